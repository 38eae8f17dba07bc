"""The main job: an official pickle and a folder of images in, an adapted official pickle out."""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tqdm

from m2m_stylegan import bank as feature_bank
from m2m_stylegan import (
    calc_metrics,
    checkpoint,
    distributed,
    downloads,
    faults,
    features,
    locks,
    networks,
    phases,
    preparation,
    resume,
    run_dir,
    slicing,
    snapshots,
    stats,
)
from m2m_stylegan.augment import AugmentPipe, augpipe_kwargs
from m2m_stylegan.datasets import ImageDataset, snapshot_grid
from m2m_stylegan.errors import UserError
from m2m_stylegan.evaluate import Evaluator
from m2m_stylegan.images import from_uint8, save_image_grid, save_panels
from m2m_stylegan.training_loop import Grid, LoopOptions, State, random_labels, sample_grid, trained_names, training_loop
from m2m_stylegan.transfer_options import TransferOptions, check_options, choose_device, metric_list, new_network_kwargs, stages

DEMO_DATA = Path(__file__).parent / 'assets' / 'demo-target-64.zip'
BANK_BYTES, BANK_ITEMS = 1 << 30, 4096  # Default size of the feature bank: what fits the first, at most the second.
PANEL_PIXELS = 256  # Larger images are averaged down to this in before-after.png, which shows 48 of them.
PIXEL_OPTIONS = {'d_trains', 'G_lr', 'D_lr', 'loss', 'freezed'}  # of LoopOptions: of no use in feature space
CPU_GRID = (8, 8)  # The official grid of up to 32 x 32 pictures would take longer to make than a tick on a CPU.


@dataclasses.dataclass
class Job:
    """What the command line comes down to once the files have been opened."""

    options: TransferOptions
    device: torch.device
    dataset: ImageDataset
    dataset_kwargs: dict
    snapshot: snapshots.Snapshot | None  # None: from scratch
    network_path: Path | None
    stages: list[LoopOptions]
    G_kwargs: dict | None  # only from scratch
    D_kwargs: dict | None
    augment_kwargs: dict | None  # constructor arguments of the augmentation pipe

    @property
    def loop(self) -> LoopOptions:
        """The options of the only stage, or of the last one."""
        return self.stages[-1]


def plan(options: TransferOptions) -> Job:
    """Open and check everything that can fail before long work starts. Raises UserError."""
    check_options(options)
    if options.network == 'none' and options.resume is not None and not Path(options.resume).is_dir():
        raise UserError(f'--network=none starts from random weights and --resume={options.resume} from those of a pickle; leave one of the two out.')
    device = choose_device(options.device)
    snapshot = network_path = None
    if options.network != 'none':
        weights = options.network if options.resume is None or Path(options.resume).is_dir() else options.resume
        network_path = downloads.resolve(weights, options.cache_dir)
        snapshot = snapshots.load(network_path)
    dataset = ImageDataset(
        options.data or DEMO_DATA, use_labels=options.cond, max_size=options.subset, xflip=options.mirror, random_seed=options.seed)
    if snapshot is not None:
        check_match(snapshot.G_ema, dataset)
    check_resolution(options, dataset)
    loops = stages(options, dataset.resolution, device)
    loop = loops[-1]
    if loop.slice_res is not None:
        slicing.check_slice(loop.slice_res, dataset.resolution, lowest=slicing.W_SLICE if loop.codes else 4)
    num_images = len(dataset) // (2 if options.mirror else 1)
    if options.subset is not None and options.subset > num_images:
        raise UserError(f'--subset={options.subset}: {dataset.path} has only {num_images} images.')
    if loop.codes is None:
        check_group(group_size(snapshot), loop.batch_gpu)
    dataset_kwargs = {
        'class_name': 'training.dataset.ImageFolderDataset', 'path': str(Path(dataset.path).resolve()), 'use_labels': options.cond,
        'max_size': num_images, 'xflip': options.mirror, 'resolution': dataset.resolution}
    if options.subset:
        dataset_kwargs['random_seed'] = options.seed
    G_kwargs, D_kwargs = new_network_kwargs(options, dataset, loop) if snapshot is None else (None, None)
    return Job(options, device, dataset, dataset_kwargs, snapshot, network_path, loops, G_kwargs, D_kwargs,
               None if options.aug == 'noaug' else augpipe_kwargs(options.augpipe or 'bgc'))


def check_match(G, dataset: ImageDataset) -> None:
    """Raise one UserError that lists in what the dataset does not fit the network."""
    problems = []
    if dataset.resolution != G.img_resolution:
        problems.append(f'the network makes {G.img_resolution} x {G.img_resolution} images, '
                        f'the dataset has {dataset.resolution} x {dataset.resolution}: run '
                        f'python tools/dataset.py --source={dataset.path} --dest=OUT.zip --resolution={G.img_resolution}')
    if dataset.num_channels != G.img_channels:
        problems.append(f'the network makes images of {G.img_channels} channels, the dataset has {dataset.num_channels}')
    if G.c_dim and not dataset.has_labels:
        problems.append(f'the network is conditional ({G.c_dim} label values): pass --cond=1 and a dataset with labels')
    elif dataset.label_dim != G.c_dim:
        problems.append(f'the network takes {G.c_dim} label values, the dataset has {dataset.label_dim}')
    if problems:
        raise UserError(f'{dataset.path} does not fit the network:\n' + '\n'.join(f'  * {problem}' for problem in problems))


def check_resolution(options: TransferOptions, dataset: ImageDataset) -> None:
    """Raise one UserError that lists what these options ask of images that they are too small for."""
    side, pipe, problems = dataset.resolution, options.augpipe or 'bgc', []
    if side < 8:
        problems.append('networks begin at 8 x 8: run python tools/dataset.py --resolution=8, or more')
    if options.aug != 'noaug' and side < 32 and augpipe_kwargs(pipe).get('imgfilter'):
        problems.append(f'the filters of --augpipe={pipe} need 32 x 32: choose bgc')
    if options.cbase is not None and options.cbase < side:
        problems.append(f'--cbase={options.cbase} leaves blocks without channels: choose at least {side}')
    if problems:
        raise UserError(f'{dataset.path} has images of {side} x {side} pixels:\n' + '\n'.join(f'  * {problem}' for problem in problems))


def group_size(snapshot: snapshots.Snapshot | None) -> int | None:
    """Number of images that the minibatch standard deviation of its D compares; None: all. Without a snapshot, that of a new D."""
    if snapshot is None:
        return 4
    return snapshot.D.b4.mbstd.group_size if snapshot.D.b4.mbstd is not None else 1


def check_group(group: int | None, batch_gpu: int) -> None:
    """Raise UserError if D's minibatch standard deviation cannot divide a batch of batch_gpu images into its groups of `group`; None: all."""
    if group and batch_gpu % min(group, batch_gpu):
        raise UserError(f'{batch_gpu} images per forward pass (--batch, --batch-gpu) cannot be divided into the groups of {group} images that this '
                        f'discriminator compares; choose at most {group}, or a multiple of {group}.')


def run_description(job: Job) -> str:
    """Name of the run directory behind its number."""
    options = job.options
    return run_dir.describe(
        job.dataset.name, cfg='auto', num_gpus=options.gpus, cond=options.cond, subset=options.subset, mirror=options.mirror, gamma=options.gamma,
        kimg=options.kimg, batch=options.batch, aug=None if options.aug == 'ada' else options.aug, p=options.p, target=options.target,
        augpipe=options.augpipe, resume='noresume' if job.snapshot is None else options.network, freezed=options.freezed or None,
        train=options.train, slice_at=slicing.slice_name(job.loop.slice_res or 0))


def training_options(job: Job, directory: Path) -> dict:
    """Content of training_options.json: the official keys in the official order, ours under `m2m`."""
    options, loop = job.options, job.loop
    opt = {'class_name': 'torch.optim.Adam', 'lr': loop.G_lr, 'betas': [0.0, 0.99], 'eps': 1e-8}
    content = {
        'num_gpus': options.gpus, 'image_snapshot_ticks': loop.snapshot_ticks, 'network_snapshot_ticks': loop.snapshot_ticks,
        'metrics': metric_list(options),
        'random_seed': options.seed, 'training_set_kwargs': job.dataset_kwargs,
        'data_loader_kwargs': {'pin_memory': True, 'num_workers': options.workers, 'prefetch_factor': 2},
        'G_kwargs': {'class_name': 'training.networks.Generator', **(job.G_kwargs or {})},
        'D_kwargs': {'class_name': 'training.networks.Discriminator', **(job.D_kwargs or {})},
        'G_opt_kwargs': opt, 'D_opt_kwargs': {**opt, 'lr': loop.D_lr},
        'loss_kwargs': {'class_name': 'training.loss.StyleGAN2Loss', 'r1_gamma': loop.loss.r1_gamma, 'pl_weight': loop.loss.pl_weight},
        'total_kimg': loop.total_kimg, 'batch_size': loop.batch_size, 'batch_gpu': loop.batch_gpu, 'ema_kimg': loop.ema_kimg,
        'ema_rampup': loop.ema_rampup}
    optional = {'ada_target': loop.ada_target, 'augment_p': options.p, 'augment_kwargs': job.augment_kwargs,
                'resume_pkl': None if job.network_path is None else str(job.network_path), 'ada_kimg': loop.ada_kimg}
    content |= {key: value for key, value in optional.items() if value is not None}
    content |= {'cudnn_benchmark': not options.nobench, 'allow_tf32': options.allow_tf32, 'run_dir': str(directory)}
    # What --resume reads: the files that were really used, wherever the command is run from next time, and the batch, from which more is worked out.
    stored = {**dataclasses.asdict(options), 'batch': loop.batch_size, 'outdir': str(Path(options.outdir).resolve()),
              'data': None if options.data is None else str(Path(options.data).resolve()),
              'network': 'none' if job.network_path is None else str(job.network_path.resolve())}
    stages = [{key: value for key, value in dataclasses.asdict(stage).items() if value is not None and (key not in PIXEL_OPTIONS or not stage.codes)}
              for stage in job.stages]  # The official keys above are those of the last stage, and know nothing of training in feature space.
    content['m2m'] = {'options': stored, 'stages': stages, 'slice': loop.slice_res, 'device': str(job.device), 'torch': torch.__version__,
                      'job': os.environ.get('TORCHELASTIC_RUN_ID'), **resume.made_from(job)}
    return content


def build_state(job: Job) -> State:
    """The networks on their device, taken from the snapshot or made new, and the augmentation pipe."""
    if job.snapshot is None:
        torch.manual_seed(job.options.seed)
        G, D = networks.Generator(**job.G_kwargs), networks.Discriminator(**job.D_kwargs)
        G_ema = copy.deepcopy(G)
    else:
        G, D, G_ema = (copy.deepcopy(net) for net in (job.snapshot.G, job.snapshot.D, job.snapshot.G_ema))
    thaw(D)
    pipe = None
    if job.augment_kwargs is not None and (job.loop.ada_target is not None or job.options.p):
        pipe = AugmentPipe(**job.augment_kwargs).requires_grad_(False).to(job.device)
        pipe.p.fill_(job.options.p or 0.0)
    return State(*(net.to(job.device) for net in (G, D, G_ema)), pipe)


def thaw(D: torch.nn.Module) -> None:
    """Turn weights that FreezeD had registered as buffers into parameters again: what is frozen is decided by this run's options."""
    for module in D.modules():
        for name in ('weight', 'bias'):
            if name in module._buffers:
                setattr(module, name, torch.nn.Parameter(module._buffers.pop(name), requires_grad=False))


def corner_of(size: tuple[int, int], indices: list[int]) -> tuple[tuple[int, int], list[int]]:
    """The upper left corner of a grid (columns, rows) of items, at most CPU_GRID."""
    columns, rows = min(size[0], CPU_GRID[0]), min(size[1], CPU_GRID[1])
    return (columns, rows), [indices[row * size[0] + column] for row in range(rows) for column in range(columns)]


def make_grid(job: Job, G, directory: Path) -> Grid:
    """Latents of the sample pictures, official choice of z and labels; writes reals.png of the same labels into `directory`."""
    size, indices = snapshot_grid(job.dataset)
    if job.device.type == 'cpu':
        size, indices = corner_of(size, indices)
    if distributed.rank() == 0:
        save_image_grid(np.stack([job.dataset[i][0] for i in indices]), directory / 'reals.png', (0, 255), size)
    generator = torch.Generator().manual_seed(job.options.seed)
    z = torch.randn([len(indices), G.z_dim], generator=generator).to(job.device)
    c = torch.from_numpy(job.dataset.get_labels(indices)).to(job.device)
    return Grid(size, z, c)


def cache_dir(job: Job) -> Path:
    """Where this job keeps what it can use again."""
    return Path(job.options.cache_dir) if job.options.cache_dir else downloads.default_cache_dir()


def open_bank(job: Job, G_ema, directory: Path | None, echo: Callable[[str], None]) -> feature_bank.Bank:
    """The cached low-res features for this G_ema, slice and labels: made with a progress bar, or found from an earlier run.

    directory: for features of a low-res part of this run's own, which nobody else can use; None: in the cache directory, for those of the pickle.
    """
    loop, options = job.loop, job.options
    kwargs = {'force_fp32': loop.force_fp32}

    def labels(chunk: int, num: int) -> torch.Tensor:
        return random_labels(job.dataset, np.random.RandomState([options.seed, chunk]), num, job.device)

    def make(chunk: int, dtype: torch.dtype) -> phases.Batch:
        # From G_ema, whose low-res part is the one that users of the result will run.
        return feature_bank.make_chunk(G_ema, loop.slice_res, labels, options.seed, chunk, loop.loss.style_mixing_prob, dtype, **kwargs)

    probe = make(0, torch.float32)
    dtype = feature_bank.storage_dtype(probe)
    item_bytes = sum(value[0].numel() * (dtype.itemsize if name in ('x', 'img') else 4) for name, value in probe.items())
    chunk_items = feature_bank.CHUNK_ITEMS
    num_items = options.bank or min(max(features.items_for_budget(item_bytes, BANK_BYTES), chunk_items), BANK_ITEMS) // chunk_items * chunk_items
    source = job.snapshot.sha256
    if directory is not None:
        source = preparation.digest_of_module(G_ema, slicing.tensor_names(G_ema, loop.slice_res, 'low-res'))
    fingerprint = {
        'kind': 'high-res bank 1', 'network_sha256': source, 'slice': loop.slice_res, 'seed': options.seed,
        'style_mixing_prob': loop.loss.style_mixing_prob, 'labels_sha256': preparation.labels_digest(job.dataset), 'items': num_items,
        'dtype': str(dtype), 'force_fp32': loop.force_fp32, 'device': job.device.type}
    name = f'slice{loop.slice_res}-{preparation.digest(fingerprint)}'  # a low-res part that was trained on has other features, beside the old ones
    directory = cache_dir(job) / 'features' / f'{job.network_path.stem}-{name}' if directory is None else directory / name
    echo(f'Feature cache: {num_items} latents of {item_bytes / 1024:.0f} KiB in {directory}')
    with progress_bar(total=num_items, unit='latent', desc='Caching low-res features') as progress:
        cache = features.write(
            directory, fingerprint, num_items, lambda start, stop: make(start // chunk_items, dtype), batch_size=chunk_items,
            shard_items=max((64 << 20) // item_bytes // chunk_items, 1) * chunk_items, rank=distributed.rank(), num_replicas=distributed.world_size(),
            progress=progress.update)
    return feature_bank.Bank(cache.resident(job.device), lambda chunk: make(chunk, dtype))


def open_codes(job: Job, directory: Path, echo: Callable[[str], None]) -> preparation.Prepared:
    """The encoder and the codes of the target images for low-res training in feature space: made, or found from an earlier run."""
    options = job.options
    kimg = preparation.SOURCE_KIMG + preparation.TARGET_KIMG if options.prepare_kimg is None else options.prepare_kimg
    share = preparation.SOURCE_KIMG / (preparation.SOURCE_KIMG + preparation.TARGET_KIMG)
    return preparation.prepare(
        job.snapshot, job.dataset, job.loop.slice_res, cache_dir=cache_dir(job),
        device=job.device, name=job.network_path.stem, source_kimg=kimg * share, target_kimg=kimg * (1 - share),
        max_seconds=None if options.prepare_minutes is None else options.prepare_minutes * 60, seed=options.seed,
        picture=directory / 'encoded.png' if distributed.rank() == 0 else None, echo=echo)


def open_scores(job: Job, directory: Path, echo: Callable[[str], None]) -> Callable[[Path], dict[str, float]] | None:
    """What evaluates a snapshot by --metrics and appends to metric-*.jsonl, or None. The detector and the images are checked at once.

    A last snapshot that a killed run has left without its lines gets them now.
    """
    options = job.options
    names = metric_list(options)
    if not names:
        return None
    evaluator = Evaluator(job.dataset.path, names, device=job.device, cache_dir=options.cache_dir, mirror=options.mirror)

    def score(path: Path) -> dict[str, float]:
        start = time.time()
        results = evaluator.score(path)
        if distributed.rank() == 0:
            for result in results:
                calc_metrics.write(result, {}, time.time() - start, evaluator, path, echo)
        return {key: value for result in results for key, value in result.values.items()}

    forgotten = distributed.from_main(snapshot_without_scores, directory, names)
    if forgotten is not None:
        score(forgotten)
    return score


def snapshot_without_scores(directory: Path, names: list[str]) -> Path | None:
    """The newest snapshot of a run, if it lacks a line in one of the files of these metrics."""
    def lines(name: str) -> list[dict]:
        path = directory / name
        text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('}\n')]  # A kill can cut the last one short.

    snapshots_made = lines('snapshots.jsonl')
    if not snapshots_made:
        return None
    newest = snapshots_made[-1]['pkl']
    scored = all(newest in [line['snapshot_pkl'] for line in lines(f'metric-{name}.jsonl')] for name in names)
    return None if scored else directory / newest


def run(options: TransferOptions, echo: Callable[[str], None] = print, command: list[str] | None = None) -> Path | None:
    """Do the whole job; returns the run directory (None for a dry run). Raises UserError for anything that the user can mend.

    command: what to execute in each of several processes (options.gpus), if this one has not been started as one of them; it leads here again.
    """
    options = resume.with_outdir(options)
    check_options(options)
    if options.gpus > 1 and not distributed.launched() and not options.dry_run:
        if command is None:
            raise UserError(f'--gpus={options.gpus}: start it by tools/transfer.py or torchrun')
        distributed.launch(options.gpus, command)
        return None
    start_time = time.monotonic()
    with distributed.session():
        main = distributed.rank() == 0
        return run_process(match_processes(options), start_time, echo if main else lambda text: None)


def match_processes(options: TransferOptions) -> TransferOptions:
    """The options for as many processes as torchrun has started."""
    if options.gpus not in (1, distributed.world_size()) and not options.dry_run:
        raise UserError(f'--gpus={options.gpus}, but {distributed.world_size()} processes were started: leave --gpus out with torchrun')
    return dataclasses.replace(options, gpus=max(distributed.world_size(), options.gpus))


def run_process(options: TransferOptions, start_time: float, echo: Callable[[str], None]) -> Path | None:
    """What each process does. Process 0 makes the files, and `echo` of the others is mute."""
    resume_dir = distributed.from_main(resume.find_run, options)
    if resume_dir is not None:
        given, options = options, resume.resumed_options(options, resume_dir)
        resume.say_ignored(given, options, echo)
    job = plan(options)
    if resume_dir is not None:
        resume.check_same_files(job, resume_dir)
    if options.dry_run:
        echo(json.dumps(training_options(job, resume_dir or Path(options.outdir) / f'?????-{run_description(job)}'), indent=2))
        echo('Dry run; nothing was written.')
        return None
    directory = resume_dir or distributed.from_main(run_dir.next_run_dir, options.outdir, run_description(job))
    with faults.explained(directory, job.loop, group_size(job.snapshot)), contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            stack.enter_context(locks.exclusive(directory / '.lock', busy=f'{directory} is being trained by another process.'))
            clear_remains(directory)
            content = training_options(job, directory)
            run_dir.write_json(directory / 'training_options.json', content)
            stack.enter_context(run_dir.log_to(directory / 'log.txt'))
            echo('Training options:\n' + json.dumps(content, indent=2))
        train_job(job, directory, resume_dir is not None, start_time, echo)
    return directory


def clear_remains(directory: Path) -> None:
    """Remove the temporary files of `atomic_write` that a killed process has left; the lock of the directory is held."""
    for path in directory.glob('.*.tmp.*'):
        path.unlink()


def train_job(job: Job, directory: Path, resumed: bool, start_time: float, echo: Callable[[str], None]) -> None:
    """Networks, cache, training, pictures, in `directory`."""
    main = distributed.rank() == 0
    if job.device.type == 'cuda':
        torch.cuda.set_device(job.device)
        torch.backends.cudnn.benchmark = not job.options.nobench
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.options.allow_tf32
    if job.options.resume is not None and not resumed:
        echo(f'--resume={job.options.resume}: weights alone, as in the official --resume. Not in a network pickle, and so started afresh: optimiser '
             'moments, augmentation strength, path length mean, counters, order of images, random numbers.')
    job.dataset.in_memory(progress=functools.partial(progress_bar, desc='Reading images', unit='img'))
    state = build_state(job)
    grid = make_grid(job, state.G_ema, directory)
    kwargs = {'force_fp32': job.loop.force_fp32}
    before = sample_grid(state.G_ema.eval(), grid, job.loop.batch_gpu, **kwargs) if main else None
    if main and not resumed:
        save_image_grid(before, directory / 'fakes_init.png', (-1, 1), grid.size)

    def save_network(path: Path, state: State) -> None:
        snapshots.save(path, G=state.G, D=state.D, G_ema=state.G_ema, augment_pipe=state.augment_pipe, training_set_kwargs=job.dataset_kwargs,
                       like=job.snapshot)

    score = open_scores(job, directory, echo)
    own_features = directory / 'features' if len(job.stages) > 1 else None
    for stage in range(first_stage(job, directory, state, echo) if resumed else 0, len(job.stages)):
        loop = job.stages[stage]
        if stage and not resumed:
            begin_stage(state, stage, loop)
        bank = open_bank(job, state.G_ema, own_features, echo) if loop.train == 'high-res' else None
        prepared = open_codes(job, directory, echo) if loop.codes else None
        late = loop.max_seconds is not None and time.monotonic() - start_time >= loop.max_seconds
        if loop.codes and late and not resumed:
            echo(f'WARNING: the preparation has taken {stats.format_time(time.monotonic() - start_time)}, all of the time of low-res training: give '
                 'more --minutes, or run the same command again, which finds the preparation made.')
        if len(job.stages) > 1:
            echo(f'Stage {stage + 1} of {len(job.stages)}: {loop.train} training, until {loop.total_kimg:g} kimg'
                 + ('' if loop.max_seconds is None else f' or {loop.max_seconds / 60:.1f} minutes'))
        echo(describe_blocks(loop, state))
        reason = training_loop(
            run_dir=directory, state=state, dataset=job.dataset, options=loop, grid=grid, save_network=save_network, bank=bank, prepared=prepared,
            score=score, device=job.device, workers=job.options.workers, start_time=start_time, resume=resumed, echo=echo)
        if faults.Limits.interrupted(reason):
            break
        start_time, resumed = time.monotonic(), False
    else:
        if main and own_features is not None:
            shutil.rmtree(own_features, ignore_errors=True)
    if main:
        save_before_after(job, directory, before, sample_grid(state.G_ema, grid, job.loop.batch_gpu, **kwargs))
        newest = json.loads((directory / 'snapshots.jsonl').read_text(encoding='utf-8').splitlines()[-1])['pkl']
        echo(f'Result:  {directory / newest}\nPicture: {directory / "before-after.png"}')


def first_stage(job: Job, directory: Path, state: State, echo: Callable[[str], None]) -> int:
    """The stage in which the run in `directory` stopped; G_ema of a later one than the first is restored, since its features are needed."""
    if len(job.stages) == 1:
        return 0
    content = checkpoint.newest(directory, echo)
    stage = int(content['counters']['stage'])
    if stage:
        state.G_ema.load_state_dict(content['modules']['G_ema'])
    return stage


@torch.no_grad()
def begin_stage(state: State, stage: int, loop: LoopOptions) -> None:
    """From here on the low-res part of G_ema, whose features are cached, is that of G, too, and the moving average starts anew."""
    state.stage, state.stage_start_nimg = stage, state.cur_nimg
    distributed.copy_from_main_([*state.G_ema.parameters(), *state.G_ema.buffers()])  # Each process has averaged a w_avg of its own.
    tensors, averages = state.G.state_dict(), state.G_ema.state_dict()
    for name in slicing.tensor_names(state.G, loop.slice_res, 'low-res'):
        tensors[name].copy_(averages[name])


def progress_bar(*args, **kwargs) -> tqdm.tqdm:
    """A bar that is gone when done; only process 0 shows it."""
    return tqdm.tqdm(*args, leave=False, dynamic_ncols=True, disable=distributed.rank() != 0, **kwargs)


def describe_blocks(loop: LoopOptions, state: State) -> str:
    """The table of blocks: what is frozen, trained, cached."""
    names = trained_names(state, loop)
    trained = {id(p) for key, net in [('G', state.G), ('D', state.D)] for name, p in net.named_parameters() if name in names[key]}
    res = loop.slice_res

    def idle(name: str, block_res: int | None) -> bool:
        if loop.codes is not None:
            return name.startswith('D.') or (block_res is not None and block_res > res)
        return loop.train == 'high-res' and name.startswith('G.') and (block_res is None or block_res <= res)

    return slicing.format_table(slicing.block_table(state.G, state.D, trained, idle))


def save_before_after(job: Job, directory: Path, before: torch.Tensor, after: torch.Tensor) -> None:
    """before-after.png: the same latents before and after training, beside images of the target set. Images [N, C, R, R] in [-1, 1]."""
    num = min(16, before.shape[0], len(job.dataset))
    chosen = np.random.RandomState(job.options.seed).permutation(len(job.dataset))[:num]
    reals = from_uint8(torch.from_numpy(np.stack([job.dataset[i][0] for i in chosen])))
    panels = [('before', before[:num]), ('after', after[:num]), ('target images', reals)]
    factor = max(job.dataset.resolution // PANEL_PIXELS, 1)
    panels = [(caption, torch.nn.functional.avg_pool2d(images, factor)) for caption, images in panels]
    save_panels(directory / 'before-after.png', panels, columns=4)
