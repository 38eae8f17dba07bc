"""What a comparison is to do: options and files checked, the runs laid out, a restart with other settings refused."""

import dataclasses
import glob
import json
import os
import platform
import re
import shlex
from pathlib import Path

import numpy as np
import torch

import m2m_stylegan
from m2m_stylegan import cells, downloads, scores, slicing, snapshots, transfer
from m2m_stylegan.cells import Cell
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.transfer_options import TransferOptions, choose_device, slice_of

DETECTORS = {'efficientnet-lite0': ('fd_effnetlite0', 'kd_effnetlite0'), 'inception': ('fid50k_full', 'kid50k_full')}
METHODS = {'full': {'train': 'full'}, 'high-res': {'train': 'high-res'}, 'low-res': {'train': 'low-res'}, 'both': {'train': 'both'},
           'w': {'train': 'low-res', 'slice': 'w'}, 'no-bypass': {'train': 'low-res', 'no_bypass': True}}
EMA_RAMPUP = 0.05  # of full training, as the others have by themselves: as officially resumed, the average of a short run would still show the source
SWAP = 'swap'
KNOWN = f'{", ".join(METHODS)}, freezedN (full training with the first N layers of D frozen, e.g. freezed10), {SWAP}'
# Else transfer refuses them. Training in feature space ('low-res', 'w') has rates and batches of its own.
ONLY_FOR = {'slice': ('high-res', 'low-res', 'both', 'no-bypass'), 'bank': ('high-res', 'both'), 'd_trains': ('high-res', 'both'), 'split': ('both',)}
IN_PIXELS = ('gamma', 'pl_weight', 'train_noise', 'aug', 'p', 'target', 'augpipe', 'lr', 'batch', 'batch_gpu')


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """The command line of tools/compare.py."""

    outdir: str
    network: str = 'demo'
    data: str | None = None                  # None: the bundled demo set
    methods: tuple[str, ...] = ('full', 'freezed10', 'high-res', 'low-res', 'both', 'swap')
    minutes: float = 5.0                     # wall clock of each run, preparation included, evaluation not
    seeds: tuple[int, ...] = (0, 1, 2)
    evals: int = 5                           # evaluation times per run, evenly spaced; the last is the end
    num: int = 1000                          # images generated for each evaluation
    detector: str = 'efficientnet-lite0'
    extra: tuple[str, ...] = ()              # 'name=glob': snapshots made by others
    swap_with: str | None = None             # pickle that gives swap its high-res part, instead of the runs of `full`
    cache_dir: str | None = None             # shared preparation, not charged to who finds it made; None: each run makes its own
    training: dict = dataclasses.field(default_factory=dict)  # fields of TransferOptions for all methods that they apply to
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the options come down to once the files have been opened."""

    options: CompareOptions
    folder: Path
    network: Path
    data: Path
    device: torch.device
    cells: list[Cell]
    extras: list[tuple[str, Path]]
    swap_with: Path | None
    settings: dict  # what a restart must not change
    about: dict  # for the report


def method_options(method: str) -> dict:
    """Fields of TransferOptions that a training method stands for. Raises UserError for an unknown one."""
    if match := re.fullmatch(r'freezed([1-9][0-9]?)', method):
        return {'train': 'full', 'freezed': int(match[1])}
    if method not in METHODS:
        raise UserError(f'--methods: {method} is unknown; known are {KNOWN}')
    return METHODS[method]


def cell_options(options: CompareOptions, method: str, seed: int, folder: Path, network: Path, data: Path) -> TransferOptions:
    """The training run of a cell."""
    chosen = method_options(method)
    in_pixels = chosen['train'] != 'low-res' or 'no_bypass' in chosen
    passed_on = {name: value for name, value in options.training.items()
                 if method in ONLY_FOR.get(name, (method,)) and (in_pixels or name not in IN_PIXELS)}
    if chosen['train'] == 'full':
        passed_on.setdefault('ema_rampup', EMA_RAMPUP)
    return TransferOptions(
        outdir=str(folder), network=str(network), data=str(data), seed=seed, minutes=options.minutes, snap_minutes=options.minutes / options.evals,
        kimg=cells.UNLIMITED_KIMG, cache_dir=options.cache_dir or str(folder / cells.CACHE),
        **chosen, **passed_on)


def command_line(options: CompareOptions) -> str:
    """The command of tools/compare.py that says `options`."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == 'training':
            words += [f'--{name.replace("_", "-")}={value}' for name, value in value.items()]
        elif field.name == 'extra':
            words += [f'--extra={text}' for text in value]
        elif field.default is dataclasses.MISSING or value != field.default:
            words.append(f'--{field.name.replace("_", "-")}={",".join(map(str, value)) if isinstance(value, tuple) else value}')
    return shlex.join(['python', 'tools/compare.py', *words])


def versions() -> dict[str, str]:
    """What the results depend on besides the options."""
    return {'m2m_stylegan': m2m_stylegan.__version__, 'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__}


def machine(device: torch.device) -> dict[str, str | int]:
    """What the speed depends on."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as f:
            cpu = next((line.split(':', 1)[1].strip() for line in f if line.startswith('model name')), platform.machine())
    except OSError:
        cpu = platform.processor() or platform.machine()
    gpu = {'gpu': torch.cuda.get_device_name(device)} if device.type == 'cuda' else {}
    return {**gpu, 'cpu': cpu, 'cores': os.cpu_count() or 1, 'threads': torch.get_num_threads()}


def plan(options: CompareOptions) -> Plan:
    """Open and check everything that can fail before long work starts. Raises one UserError that lists all that is wrong."""
    problems = _option_problems(options)
    extras = []
    for text in options.extra:
        name, _, pattern = text.partition('=')
        found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not scores.NAME.fullmatch(name) or name in (scores.SOURCE, SWAP, *METHODS) or name in options.methods:
            problems.append(f'--extra={text}: expected name=pattern; a name is of letters, digits, . _ and -, and not that of a method')
        elif not found:
            problems.append(f'--extra={text}: no file matches')
        extras += [(name, Path(path).resolve()) for path in found]
    if problems:
        raise UserError('This comparison cannot be made:\n' + '\n'.join(f'  * {problem}' for problem in problems))

    folder = Path(options.outdir).resolve()
    device = choose_device(options.training.get('device', 'auto'))
    network, data = downloads.resolve(options.network, options.cache_dir).resolve(), Path(options.data or transfer.DEMO_DATA).resolve()
    dataset = ImageDataset(data, use_labels=options.training.get('cond', False))
    swap_with = None if options.swap_with is None else downloads.resolve(options.swap_with, options.cache_dir).resolve()
    source = snapshots.load(network)
    transfer.check_match(source.G_ema, dataset)
    settings = {
        'network_sha256': source.sha256, 'data_fingerprint': dataset.fingerprint, 'minutes': options.minutes, 'evals': options.evals,
        'metrics': list(DETECTORS[options.detector]), 'num': options.num,
        'cache': 'shared' if options.cache_dir else 'own', 'training': dict(options.training), 'versions': versions(), 'machine': machine(device)}
    about = {'methods': list(options.methods), 'seeds': list(options.seeds), 'network': str(network), 'data': str(data),
             'num_images': len(dataset), 'resolution': dataset.resolution,
             'slice': slice_of(TransferOptions(outdir='', train='high-res', slice=options.training.get('slice')), dataset.resolution)}
    slicing.check_slice(about['slice'], dataset.resolution)
    cell_list = []
    for seed in options.seeds:
        for method in options.methods:
            if method != SWAP:
                cell_list.append(make_cell(options, method, seed, folder, network, data, settings))
    made = Plan(options, folder, network, data, device, cell_list, extras, swap_with, settings, about)
    check_restart(made)
    _check_trainings(made)
    return made


def make_cell(options: CompareOptions, method: str, seed: int, folder: Path, network: Path, data: Path, settings: dict) -> Cell:
    """The cell of one method and seed; paths are left out of its request, the files' fingerprints are in."""
    cell_folder = folder / 'cells' / f'{method}-seed{seed}'
    training = cell_options(options, method, seed, cell_folder, network, data)
    kept = {field.name: getattr(training, field.name) for field in dataclasses.fields(training)
            if field.name not in ('outdir', 'network', 'data', 'cache_dir') and getattr(training, field.name) != field.default}
    shared = ('network_sha256', 'data_fingerprint', 'cache', 'versions', 'machine')
    return Cell(cell_folder, method, seed, training, {'options': kept, **{name: settings[name] for name in shared}})


def _option_problems(options: CompareOptions) -> list[str]:
    problems = []
    for name, values in [('methods', options.methods), ('seeds', options.seeds)]:
        if not values or len(set(values)) < len(values):
            problems.append(f'--{name}: expected at least one, and none twice, got {", ".join(map(str, values)) or "nothing"}')
    for method in options.methods:
        try:
            method == SWAP or method_options(method)
        except UserError as err:
            problems.append(str(err))
    if SWAP in options.methods and 'full' not in options.methods and options.swap_with is None:
        problems.append('--methods: swap takes its high-res part from the runs of full: add full, or name a pickle with --swap-with')
    if options.swap_with is not None and SWAP not in options.methods:
        problems.append('--swap-with is only used with --methods=...,swap')
    for name in ('minutes', 'evals', 'num'):
        if not getattr(options, name) > 0:
            problems.append(f'--{name}={getattr(options, name)} must be positive')
    if options.detector not in DETECTORS:
        problems.append(f'--detector={options.detector}: expected one of {", ".join(DETECTORS)}')
    return problems


def check_restart(made: Plan) -> None:
    """Raise UserError that lists in what the folder differs from what is asked for now."""
    found = [(made.folder / scores.RECORD, (scores.read_record(made.folder) or {}).get('settings'), made.settings)]
    for cell in made.cells:
        found.append((cell.folder / cells.RECORD, (cells.read_record(cell.folder) or {}).get('request'), cell.request))
    wanted_as_json = [(path, there, json.loads(json.dumps(wanted))) for path, there, wanted in found]
    lines = [f'  * {path.relative_to(made.folder)}: {line}' for path, there, wanted in wanted_as_json if there is not None
             for line in cells.differences(there, wanted)]
    if lines:
        raise UserError(f'{made.folder} holds a comparison with other settings; results would not be comparable. Give the settings it was started '
                        'with, or another --outdir:\n' + '\n'.join(lines[:20]))


def _check_trainings(made: Plan) -> None:
    """Raise UserError that lists every method whose training run would refuse to start."""
    problems = []
    for cell in made.cells:
        if cell.seed == made.options.seeds[0]:
            try:
                transfer.plan(cell.options)
            except UserError as err:
                problems.append(f'{cell.method}: {err}')
    if problems:
        raise UserError('\n'.join(problems))
