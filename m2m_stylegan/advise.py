"""Which training to choose for a network, a set of images and a machine: measured, slice by slice, in a few minutes.

Low-res training cannot be expected to get nearer to the images than what their codes decode to, its floor; so floors and the price of a step
decide. Floors come from encoders trained for a short time: a longer preparation gives lower ones.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from m2m_stylegan import preparation, prepare_codes, slicing, step_costs, transfer
from m2m_stylegan.bank import Bank
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.image_sources import generated_images
from m2m_stylegan.step_costs import Cost
from m2m_stylegan.training_loop import random_labels
from m2m_stylegan.transfer_options import TransferOptions, parse_slice, stages

# What must hold for low-res training to be recommended; measured values stand in docs/method.md. It won with a floor of 0.8 times the distance of the
# untouched source and steps 13 times cheaper, was level at 1.3 times, and lost with steps only 5 times cheaper, however low the floor.
CHEAPER = 8  # A step of low-res training must be so many times cheaper than a full one,
CLEARLY = 0.9  # and its floor at most this share of the distance of the untouched source network.
NEAR = 3  # A source within so many times the distance of two halves of the images makes much the same images already.


@dataclasses.dataclass(frozen=True)
class Row:
    """What one slice offers."""

    slice: str
    psnr: float  # dB, of the decoded codes against the images
    feature_error: float  # squared distance of D's features, relative to their size
    fd: float | None  # floor: Frechet distance of the decoded codes to the images; None without the detector
    preparation_s: float  # wall clock; next to nothing if it was found in the cache
    code_bytes: int  # of all codes of the set
    low: Cost  # a step of low-res training, high-res blocks bypassed
    high: Cost | None  # a step of high-res training; None at slice w, which it does not have
    bank_item_bytes: int | None  # of one cached latent of high-res training


@dataclasses.dataclass(frozen=True)
class Advice:
    """All that was measured, and what follows from it."""

    network: str
    data: str
    num_images: int
    num: int  # images behind each Frechet distance to the images
    prepare_kimg: float  # of each encoder
    seed: int
    machine: str
    memory: str  # what the memory of a Cost is
    full: Cost
    source_fd: float | None  # of the untouched source network
    real_fd: float | None  # between two halves of the images
    rows: tuple[Row, ...]
    train: str  # recommended: 'both', 'low-res' (at slice w), 'high-res' or 'full'
    slice: str | None  # recommended; None: the default, or none
    reason: str


def advise(
    network: str = 'demo',
    data: str | None = None,
    *,
    slices: Iterable[str] | None = None,
    prepare_kimg: float = 2.0,
    num: int = 500,
    device: str = 'auto',
    cache_dir: str | None = None,
    seed: int = 0,
    cond: bool = False,
    echo: Callable[[str], None] = print,
) -> Advice:
    """Train a short encoder for every slice (default: all), and measure floors and steps. Raises UserError for what the user can mend.

    network, data, cond, seed: as in tools/transfer.py, which finds the encoders and codes again if it is given the same prepare_kimg.
    num: images behind each Frechet distance; values for different num cannot be compared.
    """
    job = open_job(slices, num, network=network, data=data, prepare_kimg=prepare_kimg, device=device, cache_dir=cache_dir, seed=seed, cond=cond)
    judge = prepare_codes.open_judge(job, num, echo)
    dataset, G = job.dataset, job.snapshot.G_ema.to(job.device).eval()
    source_fd = judge and judge.distance('Features of source images', generated_images(G, dataset if G.c_dim else None, seed, job.device))
    full = _cost(_variant(job, 'full'), 'full step')
    rows = tuple(_row(job, res, judge, echo) for res in slice_list(slices, dataset.resolution))
    real_fd = judge and judge.floor
    train, at, reason = recommend(rows, full, source_fd, real_fd)
    return Advice(
        str(job.network_path), str(dataset.path), len(dataset), num, prepare_kimg, seed, machine(job.device),
        step_costs.MEMORY_KINDS[job.device.type], full, source_fd, real_fd, rows, train, at, reason)


def open_job(slices: Iterable[str] | None, num: int, **options) -> transfer.Job:
    """Open and check everything that can fail; the options are those of `advise`. Raises UserError."""
    slices = None if slices is None else list(slices)
    wrong = [] if num >= 4 else [f'--num={num}: expected at least 4 images']
    if slices is not None:
        wrong += [f'--slices: {name} is no slice; expected w, or a resolution' for name in slices if parse_slice(name) is None]
        wrong += [] if slices else ['--slices is empty']
    if wrong:
        raise UserError('\n'.join(wrong))
    job = prepare_codes.open_job(TransferOptions(outdir='', train='low-res', slice='w', **options))
    slice_list(slices, job.dataset.resolution)
    return job


def slice_list(names: Iterable[str] | None, resolution: int) -> list[int]:
    """Slice resolutions by name, each once, in rising order; None: all. Raises UserError for one that networks of this resolution lack."""
    if names is None:
        return [slicing.W_SLICE, *slicing.slice_resolutions(resolution)[:-1]]
    found = sorted({parse_slice(name) for name in names})
    for res in found:
        slicing.check_slice(res, resolution, lowest=slicing.W_SLICE)
    return found


def machine(device: torch.device) -> str:
    """The machine that was measured, in a few words."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    return f'{name}, torch {torch.__version__}'


def _variant(job: transfer.Job, train: str, res: int | None = None) -> transfer.Job:
    """The job with another --train and --slice, all else at its defaults."""
    options = dataclasses.replace(job.options, train=train, slice=res and slicing.slice_name(res),
                                  prepare_kimg=job.options.prepare_kimg if train == 'low-res' else None)
    found = dataclasses.replace(job, options=options, stages=stages(options, job.dataset.resolution, job.device))
    transfer.check_group(transfer.group_size(job.snapshot), found.loop.batch_gpu)
    return found


def _row(job: transfer.Job, res: int, judge: prepare_codes.Judge | None, echo: Callable[[str], None]) -> Row:
    name, low = slicing.slice_name(res), _variant(job, 'low-res', res)
    prepared = prepare_codes.codes_of(low, None, echo)
    fd = judge and judge.decoded(prepared)
    low_cost, high_cost, item_bytes = _cost(low, f'low-res step, slice {name}', prepared=prepared), None, None
    if res != slicing.W_SLICE:
        high = _variant(job, 'high-res', res)
        bank, item_bytes = step_costs.small_bank(job.snapshot.G_ema, res, high.loop, lambda chunk, num: random_labels(
            job.dataset, np.random.RandomState(chunk), num, job.device))
        high_cost = _cost(high, f'high-res step, slice {name}', bank=bank)
    return Row(name, prepared.psnr, prepared.feature_error, fd, prepared.seconds, prepared.codes.nbytes, low_cost, high_cost, item_bytes)


def _cost(job: transfer.Job, what: str, bank: Bank | None = None, prepared: preparation.Prepared | None = None) -> Cost:
    state = transfer.build_state(job)
    with torch.random.fork_rng(devices=[job.device] if job.device.type == 'cuda' else []):
        torch.manual_seed(job.options.seed)
        tasks, phase_list = step_costs.step_tasks(state, job.dataset, job.loop, job.device, bank=bank, prepared=prepared)
        with transfer.progress_bar(total=len(tasks), desc=f'Measuring: {what}') as bar:
            return step_costs.measure(tasks, job.loop.batch_size, step_costs.state_nbytes(state, phase_list), job.device, bar.update)


def recommend(rows: Iterable[Row], full: Cost, source_fd: float | None, real_fd: float | None) -> tuple[str, str | None, str]:
    """(train, slice, reason): both, at the slice with the lowest floor among those whose floor and price are good enough, else high-res or full.

    At slice w the whole synthesis network is frozen, and low-res training alone is meant.
    """
    rows = list(rows)

    def mode(row: Row) -> str:
        return 'low-res' if row.slice == 'w' else 'both'

    def times(row: Row) -> float:
        return full.seconds / row.low.seconds

    cheap = [row for row in rows if times(row) >= CHEAPER]
    if source_fd is None:
        if not cheap:
            return 'full', None, f'No low-res step is {CHEAPER} times cheaper than a full one, and full training adapts everything.'
        best = max(cheap, key=lambda row: row.psnr)
        return mode(best), best.slice, (
            f'Its decoded codes are nearest to the images ({best.psnr:.1f} dB) of the slices with a step at least {CHEAPER} times cheaper than a '
            f'full one ({times(best):.0f} times). Whether they are nearer than the untouched source was not measured: see above.')
    clear = [row for row in rows if row.fd <= CLEARLY * source_fd]
    worth = [row for row in clear if row in cheap]
    if worth:
        best = min(worth, key=lambda row: row.fd)
        return mode(best), best.slice, (
            f'Its floor of {best.fd:.1f} is clearly below the {source_fd:.1f} of the untouched source, and the lowest of the slices with a step at '
            f'least {CHEAPER} times cheaper than a full one; here it is {times(best):.0f} times cheaper.')
    if clear:
        best = max(clear, key=times)
        return 'full', None, (f'The slices with a floor clearly below the {source_fd:.1f} of the untouched source save too little: at best, at slice '
                              f'{best.slice}, a step is {times(best):.1f} times cheaper than a full one, which adapts everything.')
    lowest = min(rows, key=lambda row: row.fd)
    why = (f'The lowest floor, {lowest.fd:.1f} at slice {lowest.slice}, is not clearly below the {source_fd:.1f} of the untouched source: after this '
           'short preparation the frozen high-res blocks cannot show these images and must be trained.')
    if source_fd <= NEAR * real_fd:
        return 'high-res', None, f'{why} The source is near to the images already (two halves of them have {real_fd:.1f}), so layout can stay.'
    return 'full', None, f'{why} The source is also far from the images (two halves of them have {real_fd:.1f}), so layout must change, too.'


def format_advice(advice: Advice) -> str:
    """The table, what it means, and the recommendation, as text."""
    def cost(found: Cost | None) -> str:
        if found is None:
            return f'{"-":>10}{"-":>8}{"-":>8}{"-":>9}'
        return (f'{found.macs / advice.full.macs:>10.2%}{found.seconds * 1000:>8.2f}{advice.full.seconds / found.seconds:>8.1f}'
                f'{found.memory_bytes / 2 ** 20:>9.1f}')

    def number(value: float | None) -> str:
        return '-' if value is None else f'{value:.1f}'

    head = f'{"MACs":>10}{"ms/img":>8}{"faster":>8}{"MiB":>9}'
    lines = [
        f'{advice.network}\n{advice.data}: {advice.num_images} images\n{advice.machine}; encoders of {advice.prepare_kimg:g} kimg',
        '', f'{"":<8}{"floor":>15}  |{"low-res step":>23}{"":>12}{"codes":>9}  |{"high-res step":>23}{"":>12}{"item":>9}',
        f'{"slice":<8}{"dB":>7}{"fd":>8}  |{head}{"MiB":>9}  |{head}{"KiB":>9}']
    for row in advice.rows:
        item = None if row.bank_item_bytes is None else row.bank_item_bytes / 1024
        lines.append(f'{row.slice:<8}{row.psnr:>7.1f}{number(row.fd):>8}  |{cost(row.low)}{row.code_bytes / 2 ** 20:>9.1f}  |{cost(row.high)}'
                     f'{number(item):>9}')
    lines += ['', f'{"full step":<25}|{cost(advice.full)}', f'{"source, untouched":<17}{number(advice.source_fd):>6}',
              f'{"halves of images":<17}{number(advice.real_fd):>6}', '',
              f'fd: fd_effnetlite0 of {advice.num} decoded codes, or images of the source, to all target images; and that of two halves of these.',
              'MACs: of a step per image, compared with a full step. faster: than a full step. codes: of the whole set; item: of one cached latent.',
              f'Memory: {advice.memory}.', '',
              f'Recommended: --train={advice.train}' + ('' if advice.slice is None else f' --slice={advice.slice}'), advice.reason]
    return '\n'.join(lines)


def to_json(advice: Advice) -> str:
    """The advice as JSON; from_json reads it again."""
    return json.dumps(dataclasses.asdict(advice), indent=2, allow_nan=False) + '\n'


def from_json(text: str) -> Advice:
    """The advice that to_json wrote. Raises UserError for anything else."""
    try:
        content = json.loads(text)
        rows = tuple(Row(**{**row, 'low': Cost(**row['low']), 'high': row['high'] and Cost(**row['high'])}) for row in content['rows'])
        return Advice(**{**content, 'rows': rows, 'full': Cost(**content['full'])})
    except (ValueError, TypeError, KeyError) as err:
        raise UserError(f'this is not what tools/advise.py --json writes ({type(err).__name__}: {err})') from err


def run(slices: list[str] | None, json_path: str | None, dry_run: bool, echo: Callable[[str], None], options: dict) -> Advice | None:
    """What the command does; `options` as of advise. Returns None for a dry run. Raises UserError."""
    if dry_run:
        job = open_job(slices, **options)
        names = ', '.join(map(slicing.slice_name, slice_list(slices, job.dataset.resolution)))
        echo(f'{job.network_path}\n{job.dataset.path}: {len(job.dataset)} images\n{machine(job.device)}\nSlices: {names}\n'
             f'Encoders: {options["prepare_kimg"]:g} kimg each, in {transfer.cache_dir(job) / "encoders"}\nDry run; nothing was written.')
        return None
    if json_path is not None:
        folder = Path(json_path).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        if Path(json_path).is_dir() or not os.access(folder, os.W_OK):  # now, not after an hour of measurements
            raise UserError(f'--json={json_path} cannot be written')
    found = advise(slices=slices, echo=echo, **options)
    echo(format_advice(found))
    if json_path is not None:
        with atomic_write(json_path) as tmp:
            tmp.write_text(to_json(found), encoding='utf-8')
    return found
