"""The command line of tools/transfer.py as data: what it may say, and what it comes down to for a network, a dataset and a machine."""

import dataclasses

import torch

from m2m_stylegan import code_game, distributed, phases, slicing
from m2m_stylegan.bank import CHUNK_ITEMS
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.metric_names import choose
from m2m_stylegan.training_loop import LoopOptions

CODE_BATCH = 16  # images per step of low-res training in feature space, whatever the resolution
KIMG = 1000
# Of --train=both: share of the budget for low-res training, and --ema-rampup of high-res training, which begins near its end (docs/method.md).
SPLIT, BOTH_EMA_RAMPUP = 0.4, 0.3


@dataclasses.dataclass(frozen=True)
class TransferOptions:
    """The command line of tools/transfer.py, one field per option, with the official names; None means 'choose for me'."""

    outdir: str | None  # None only if resume is a run directory
    network: str = 'demo'
    data: str | None = None
    train: str = 'both'
    slice: str | int | None = None
    split: float | None = None
    d_trains: str | None = None
    no_bypass: bool = False
    critic: str | None = None
    prepare_kimg: float | None = None
    prepare_minutes: float | None = None
    bank: int | None = None
    cache_dir: str | None = None
    cond: bool = False
    subset: int | None = None
    mirror: bool = False
    gamma: float | None = None
    kimg: float | None = None
    minutes: float | None = None
    batch: int | None = None
    batch_gpu: int | None = None
    lr: float | None = None
    aug: str = 'ada'
    p: float | None = None
    target: float | None = None
    augpipe: str | None = None
    freezed: int = 0
    pl_weight: float | None = None
    train_noise: bool | None = None
    ema_rampup: float | None = None
    tick: float | None = None
    snap: int = 50
    snap_minutes: float | None = None
    metrics: str = 'none'
    seed: int = 0
    workers: int = 3
    gpus: int = 1
    device: str = 'auto'
    nhwc: bool = False
    allow_tf32: bool = False
    nobench: bool = False
    fp32: bool = False
    resume: str | None = None
    dry_run: bool = False
    cbase: int | None = None
    cmax: int | None = None
    map_depth: int | None = None
    latent_dim: int | None = None


def check_options(options: TransferOptions) -> None:
    """Raise one UserError that lists every contradiction between options."""
    scratch = options.network == 'none'
    problems = []

    def need(condition: bool, text: str) -> None:
        if not condition:
            problems.append(text)

    need(options.aug == 'fixed' or options.p is None, '--p is only used with --aug=fixed')
    need(options.aug != 'fixed' or options.p is not None, '--aug=fixed needs --p, the probability of each augmentation in [0, 1]')
    need(options.p is None or 0 <= options.p <= 1, f'--p={options.p} must lie in [0, 1]')
    need(options.aug == 'ada' or options.target is None, '--target is only used with --aug=ada')
    need(options.target is None or 0 <= options.target <= 1, f'--target={options.target} must lie in [0, 1]')
    need(options.aug != 'noaug' or options.augpipe is None, '--augpipe has no meaning with --aug=noaug')
    need(options.train != 'full' or options.slice is None,
         '--slice cuts the networks for --train=high-res, low-res and both; --train=full trains everything')
    need(options.train in ('high-res', 'both') or options.bank is None, f'--bank is only used with --train=high-res and both, not with '
         f'--train={options.train}')
    need(options.train in ('high-res', 'both') or options.d_trains is None,
         f'--d-trains is only used with --train=high-res and both, not with --train={options.train}')
    need(options.train == 'both' or options.split is None, f'--split is only used with --train=both, not with --train={options.train}')
    need(options.split is None or 0 < options.split < 1, f'--split={options.split} must lie between 0 and 1')
    need(options.train == 'low-res' or not options.no_bypass, f'--no-bypass is only used with --train=low-res, not with --train={options.train}')
    for name in ('critic', 'prepare_kimg', 'prepare_minutes'):
        need(prepares(options) or getattr(options, name) is None,
             f'--{name.replace("_", "-")} belongs to training in feature space: --train=both, or low-res without --no-bypass')
    need(parse_slice(options.slice) is not None or options.slice is None, f'--slice={options.slice}: expected a resolution, or w')
    need(not bypassed(options) or options.aug != 'fixed', '--aug=fixed augments pixels; low-res training in feature space has none')
    for name in ('target', 'augpipe', 'pl_weight', 'train_noise'):
        need(not bypassed(options) or getattr(options, name) is None,
             f'--{name.replace("_", "-")} has no meaning in low-res training in feature space')
    need(options.gamma is None or not bypassed(options) or options.critic != 'wgan-gp', '--gamma in feature space needs --critic=logistic')
    need(options.slice != 'w' or bypassed(options) or options.train == 'full', '--slice=w is only there for --train=low-res without --no-bypass')
    need(options.train == 'full' or options.freezed == 0,
         '--freezed is FreezeD, a form of --train=full; with --train=high-res use --d-trains=high-res')
    need(not scratch or options.train == 'full', '--network=none (train from scratch) needs --train=full: there are no trained blocks to keep')
    for name in ('cbase', 'cmax', 'map_depth', 'latent_dim'):
        need(scratch or getattr(options, name) is None, f'--{name.replace("_", "-")} shapes a new network and needs --network=none')
    for name in ('kimg', 'minutes', 'batch', 'batch_gpu', 'lr', 'tick', 'snap_minutes', 'subset', 'bank', 'gpus', 'prepare_kimg', 'prepare_minutes',
                 'cbase', 'cmax', 'map_depth', 'latent_dim'):
        value = getattr(options, name)
        need(value is None or value > 0, f'--{name.replace("_", "-")}={value} must be positive')
    for name in ('gamma', 'pl_weight', 'ema_rampup'):
        value = getattr(options, name)
        need(value is None or value >= 0, f'--{name.replace("_", "-")}={value} must be a number from 0 up')
    need(options.bank is None or options.bank % CHUNK_ITEMS == 0,
         f'--bank={options.bank} must be a multiple of {CHUNK_ITEMS}')
    need(0 <= options.seed < 2 ** 32, f'--seed={options.seed} must be at least 0 and less than 2^32')
    need(options.freezed >= 0, f'--freezed={options.freezed} must not be negative')
    need(options.snap > 0, f'--snap={options.snap} must be at least 1')
    try:
        metric_list(options)
    except UserError as err:
        problems.append(f'--metrics={options.metrics}: {err}')
    if problems:
        raise UserError('These options do not go together:\n' + '\n'.join(f'  * {problem}' for problem in problems))


def metric_list(options: TransferOptions) -> list[str]:
    """Names of the metrics to evaluate at every snapshot. Raises UserError for unknown ones."""
    names = [name.strip() for name in options.metrics.split(',') if name.strip() not in ('', 'none')]
    return [metric.name for metric in choose(names)] if names else []


def choose_device(name: str) -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:N' => device; of several processes on a machine, each gets the GPU of its own number.

    Raises UserError if it is not there.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise UserError(f'--device={name}: expected auto, cpu, cuda or cuda:N') from err
    if device.type not in ('cpu', 'cuda'):
        raise UserError(f'--device={name}: expected auto, cpu, cuda or cuda:N')
    if device.type == 'cpu':
        return device
    if device.index is not None and distributed.launched():
        raise UserError(f'--device={name} with several processes: every process has its own GPU; choose GPUs with CUDA_VISIBLE_DEVICES')
    index = distributed.local_rank() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f'--device={name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices, number {index} was asked for. '
                        'Install a CUDA build of PyTorch, ask for fewer --gpus, or use --device=cpu.')
    return torch.device('cuda', index)


def parse_slice(text: str | int | None) -> int | None:
    """The slice resolution that --slice stands for; slicing.W_SLICE for w; None for nothing or nonsense."""
    return slicing.W_SLICE if text == 'w' else int(text) if str(text).isdecimal() and int(text) >= 4 else None


def slice_of(options: TransferOptions, resolution: int) -> int:
    """The slice resolution: as given, else the default for this image resolution."""
    return parse_slice(options.slice) or max(resolution // (4 if prepares(options) else 8), 4)


def bypassed(options: TransferOptions) -> bool:
    """Does all training happen in feature space?"""
    return options.train == 'low-res' and not options.no_bypass


def prepares(options: TransferOptions) -> bool:
    """Does some training happen in feature space, for which an encoder is needed?"""
    return bypassed(options) or options.train == 'both'


def stages(options: TransferOptions, resolution: int, device: torch.device) -> list[LoopOptions]:
    """What is trained one after the other: one stage, with --train=both two, of which the first ends after --split of the budget.

    What is said about pixels, D and batches belongs to the second one. There noise is not trained unless asked for: what G cannot repair, since its
    layout is frozen, it would cover with grain (docs/method.md).
    """
    if options.train != 'both':
        return [loop_options(options, resolution, device)]
    split = options.split or SPLIT
    low = dataclasses.replace(
        options, train='low-res', kimg=split * (options.kimg or KIMG), minutes=None if options.minutes is None else split * options.minutes,
        batch=None, batch_gpu=None, gamma=None, lr=None, train_noise=None)
    high = dataclasses.replace(options, train='high-res', slice=slice_of(options, resolution), train_noise=bool(options.train_noise),
                               ema_rampup=BOTH_EMA_RAMPUP if options.ema_rampup is None else options.ema_rampup)
    return [loop_options(low, resolution, device), loop_options(high, resolution, device)]


def loop_options(options: TransferOptions, resolution: int, device: torch.device) -> LoopOptions:
    """The official `auto` configuration for options.gpus GPUs, with overrides; on a CPU smaller batches and shorter ticks.

    As in the official --resume, fine-tuning of the whole network keeps the moving average's full half-life from the start. Training of a part
    begins with a short one: its runs can be shorter than that half-life, and the average would still show the source. `--ema-rampup` overrides
    both, so that short runs can be compared.
    """
    on_cpu, scratch = device.type == 'cpu', options.network == 'none'
    gpus = options.gpus
    batch = options.batch or usual_batch(gpus, resolution, on_cpu, bypassed(options))
    if batch % gpus:
        raise UserError(f'--batch={batch} must be a multiple of --gpus={gpus}.')
    batch_gpu = min(options.batch_gpu or batch, batch // gpus)
    if batch // gpus % batch_gpu:
        raise UserError(f'--batch={batch} must be a multiple of --batch-gpu={batch_gpu}' + (f' times --gpus={gpus}.' if gpus > 1 else '.'))
    lr = options.lr or (0.002 if resolution >= 1024 else 0.0025)
    gamma = 0.0002 * resolution ** 2 / batch if options.gamma is None else options.gamma
    ema_rampup = (None if options.train == 'full' and not scratch else 0.05) if options.ema_rampup is None else options.ema_rampup or None
    codes = None
    if bypassed(options):
        codes = code_game.CodeOptions(critic=options.critic or 'logistic', **({} if options.lr is None else {'pair_lr': options.lr}),
                                      **({} if options.gamma is None else {'r1_gamma': options.gamma}))
    loss = phases.LossOptions(r1_gamma=gamma, pl_weight=2.0 if options.pl_weight is None else options.pl_weight)
    return LoopOptions(
        train=options.train, d_trains=options.d_trains or 'high-res', freezed=options.freezed,
        train_noise=options.train_noise is not False,
        slice_res=None if options.train == 'full' else slice_of(options, resolution), seed=options.seed, num_gpus=gpus,
        batch_size=batch, batch_gpu=batch_gpu, total_kimg=options.kimg or KIMG,
        max_seconds=None if options.minutes is None else options.minutes * 60, kimg_per_tick=options.tick or (1 if on_cpu else 4),
        snapshot_ticks=options.snap, snapshot_seconds=None if options.snap_minutes is None else options.snap_minutes * 60,
        G_lr=lr, D_lr=lr, ema_kimg=batch * 10 / 32,
        ema_rampup=ema_rampup, loss=loss,
        codes=codes, ada_target=(0.6 if options.target is None else options.target) if options.aug == 'ada' and codes is None else None,
        ada_kimg=500 if scratch else 100,
        force_fp32=on_cpu or options.fp32)


def usual_batch(gpus: int, resolution: int, on_cpu: bool, in_feature_space: bool) -> int:
    """Images per step. As in the official `auto` where the GPUs divide that into groups of 4, which D's minibatch standard deviation wants; else
    the next smaller number that they do. In feature space CODE_BATCH, or the next larger multiple of the GPUs."""
    if in_feature_space:
        return -(-CODE_BATCH // gpus) * gpus
    official = min(gpus * min(4096 // resolution, 16 if on_cpu else 32), 64)
    return official // (4 * gpus) * 4 * gpus or max(official // gpus * gpus, gpus)


def new_network_kwargs(options: TransferOptions, dataset: ImageDataset, loop: LoopOptions) -> tuple[dict, dict]:
    """Constructor arguments of G and D for training from scratch: the official `auto` configuration, with overrides."""
    dim = options.latent_dim or 512
    size = {'channel_base': options.cbase or (32768 if dataset.resolution >= 512 else 16384), 'channel_max': options.cmax or 512,
            'num_fp16_res': 0 if options.fp32 else 4, 'conv_clamp': None if options.fp32 else 256}
    layout = {'fp16_channels_last': True} if options.nhwc else {}
    shape = {'c_dim': dataset.label_dim, 'img_resolution': dataset.resolution, 'img_channels': dataset.num_channels}
    G_kwargs = {'z_dim': dim, 'w_dim': dim, 'mapping_kwargs': {'num_layers': options.map_depth or 2}, 'synthesis_kwargs': {**size, **layout}, **shape}
    D_kwargs = {'block_kwargs': layout, 'mapping_kwargs': {},
                'epilogue_kwargs': {'mbstd_group_size': min(loop.batch_gpu, 4)}, **size, **shape}
    return G_kwargs, D_kwargs
