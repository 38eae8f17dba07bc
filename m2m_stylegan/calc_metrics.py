"""The command `tools/calc_metrics.py`: options, processes, output lines."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from m2m_stylegan import detectors, distributed, downloads, pickles
from m2m_stylegan.errors import UserError
from m2m_stylegan.evaluate import Evaluator, Result
from m2m_stylegan.metric_names import OFFLINE_METRICS, choose
from m2m_stylegan.stats import format_time
from m2m_stylegan.transfer_options import choose_device

OFFLINE_SUFFIX = '_effnetlite0'


@dataclasses.dataclass(frozen=True)
class MetricOptions:
    """The options of the command, under their official names where these exist."""

    network: str  # pickle, short name, URL, or a folder or zip of images
    metrics: str | None = None
    data: str | None = None
    mirror: bool | None = None
    gpus: int = 1
    verbose: bool = True
    detector: str | None = None
    trust_detector: bool = False
    num: int | None = None
    device: str = 'auto'
    batch: int = 64
    cache_dir: str | None = None
    seed: int = 0


def run(options: MetricOptions, echo: Callable[[str], None], remark: Callable[[str], None]) -> None:
    """Evaluate; one official JSON line per metric goes to `echo`, and into metric-*.jsonl if the pickle lies in a run directory.

    remark: gets what is said besides. gpus > 1 runs the command again as so many processes.
    """
    start_time = time.time()
    if options.gpus < 1 or options.batch < 1:
        raise UserError(f'--gpus={options.gpus}, --batch={options.batch}: expected at least 1')
    names, detector = chosen(options)
    network = Path(options.network) if is_image_set(options.network) else downloads.resolve(options.network, options.cache_dir)
    data, mirror = dataset_of(network, options)
    lengths = [metric.name for metric in choose(names) if metric.kind == 'ppl']
    if lengths and is_image_set(options.network):
        raise UserError(f'{", ".join(lengths)}: path lengths need a network; {network} has images, but no latents')
    if options.gpus > 1 and not distributed.launched():
        distributed.launch(options.gpus, [sys.executable, *sys.argv])
        return
    with distributed.session():
        evaluator = Evaluator(data, names, options.num, device_of(options.device), options.batch, options.cache_dir, options.seed, mirror=mirror,
                              detector=detector, trust=options.trust_detector, show=options.verbose)
        results = evaluator.score(network)
        floor = evaluator.floor(metric for metric in evaluator.metrics if metric.detector == detectors.OFFLINE)
        if distributed.rank() == 0:
            for result in results:
                write(result, floor, time.time() - start_time, evaluator, network, echo)
                if options.verbose:
                    remark(describe(result, floor))


def device_of(name: str) -> torch.device:
    """The device of this process: with 'auto', each has its own GPU."""
    return torch.device('cuda', distributed.local_rank()) if name == 'auto' and torch.cuda.is_available() else choose_device(name)


def chosen(options: MetricOptions) -> tuple[list[str], str | None]:
    """Names of the metrics, and the path of the detector file if one is given."""
    offline = options.detector == detectors.OFFLINE
    if options.metrics is None:
        names = OFFLINE_METRICS if offline else ['fid50k_full']
    else:
        names = [metric.name for metric in choose(name.strip() for name in options.metrics.split(',') if name.strip())]
    if offline and (wrong := [name for name in names if not name.endswith(OFFLINE_SUFFIX)]):
        raise UserError(f'--detector={detectors.OFFLINE} cannot give {", ".join(wrong)}, which are defined by other networks. '
                        f'Its metrics are fd{OFFLINE_SUFFIX}, kd{OFFLINE_SUFFIX}, pr{OFFLINE_SUFFIX}.')
    return names, None if offline else options.detector


def is_image_set(network: str) -> bool:
    """Is it a folder or zip of images, and no network?"""
    short_name = network in ('demo', *downloads.OFFICIAL_PICKLES)
    return not short_name and '://' not in network and (os.path.isdir(network) or network.lower().endswith('.zip'))


def dataset_of(network: Path, options: MetricOptions) -> tuple[str, bool]:
    """Path of the real images, and whether training used mirrored copies; what is not given is taken from the pickle."""
    stored = {}
    if not is_image_set(str(network)) and (options.data is None or options.mirror is None):
        tree = pickles.load(network)
        stored = (tree.get('training_set_kwargs') if isinstance(tree, dict) else None) or {}
    data = options.data or stored.get('path')
    if data is None or (options.data is None and not os.path.exists(data)):
        where = f'{network} names {data}, which is not here' if data else f'{network} does not say which images it was trained on'
        raise UserError(f'{where}: pass the real images with --data')
    return data, bool(stored.get('xflip')) if options.mirror is None else options.mirror


def write(result: Result, floor: dict[str, float], seconds: float, evaluator: Evaluator, network: Path, echo: Callable[[str], None]) -> None:
    """Print the official line of a result and append it to metric-{name}.jsonl beside training_options.json. Our own additions are in `m2m`."""
    name, run_dir = result.metric.name, network.parent
    in_run_dir = (run_dir / 'training_options.json').is_file()
    ours = {'num_generated': result.metric.num, 'num_real': result.num_real, 'detector': evaluator.identity(result.metric), 'seed': evaluator.seed}
    if result.metric.keys[0] in floor:
        ours['floor'] = {key: floor[key] for key in result.metric.keys}
    line = json.dumps({
        'results': result.values, 'metric': name, 'total_time': seconds, 'total_time_str': format_time(seconds),
        'num_gpus': distributed.world_size(), 'snapshot_pkl': os.path.relpath(network, run_dir) if in_run_dir else str(network),
        'timestamp': time.time(), 'm2m': ours})
    echo(line)
    if in_run_dir:
        with open(run_dir / f'metric-{name}.jsonl', 'a', encoding='utf-8') as f:
            f.write(line + '\n')


def describe(result: Result, floor: dict[str, float]) -> str:
    """A line for people: values, from how many images, and what two halves of the real images would get."""
    values = ', '.join(f'{key} {value:.5g}' for key, value in result.values.items())
    text = f'{values} ({result.metric.num} generated' + (f', {result.num_real} real images' if result.num_real else '')
    floors = ', '.join(f'{floor[key]:.5g}' for key in result.metric.keys if key in floor)
    return text + (f'; between two halves of the real ones: {floors})' if floors else ')')
