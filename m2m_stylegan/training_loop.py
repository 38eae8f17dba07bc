"""The training loop: one for every `--train` mode; they differ in what is trained and where fakes come from."""

import contextlib
import dataclasses
import functools
import itertools
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from m2m_stylegan import ada, checkpoint, code_game, distributed, faults, losses, phases, slicing, stats
from m2m_stylegan.bank import Bank
from m2m_stylegan.datasets import ImageDataset, InfiniteSampler
from m2m_stylegan.errors import UserError
from m2m_stylegan.faults import StopRequest
from m2m_stylegan.images import from_uint8, save_image_grid
from m2m_stylegan.progress import Progress

# Cached codes stay in memory if they leave so much of a GPU's free, or take less than that of a computer's; else they are read from disk.
CODE_RESERVE_BYTES, CODE_BYTES = 4 << 30, 1 << 30


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Everything about a run that is neither a file nor a network. Units are in the names; images count as shown to D."""

    train: str = 'full'                      # 'full', 'high-res' or 'low-res'
    d_trains: str = 'high-res'               # which part of D is trained in high-res training: 'all' or 'high-res'
    train_noise: bool = True                 # G's noise strengths, where G is trained on pixels; else they stay what they are
    slice_res: int | None = None             # r; None for 'full'
    freezed: int = 0                         # FreezeD: this many layers of D, from the pixels on, stay as they are
    seed: int = 0
    num_gpus: int = 1                        # processes, each of which trains on its share of every batch
    batch_size: int = 16                     # images per step, of all processes together
    batch_gpu: int = 16                      # images per forward pass; gradients are summed up to batch_size / num_gpus
    total_kimg: float = 1000
    max_seconds: float | None = None         # wall clock since `start_time`
    kimg_per_tick: float = 4
    snapshot_ticks: int = 50
    keep_checkpoints: int = 2                # the newest, and those before it in case it is damaged
    snapshot_seconds: float | None = None    # also a snapshot whenever another so many seconds of the run's time are over
    G_lr: float = 0.0025
    D_lr: float = 0.0025
    ema_kimg: float = 5
    ema_rampup: float | None = 0.05
    codes: code_game.CodeOptions | None = None  # low-res training in feature space, the high-res blocks bypassed
    loss: phases.LossOptions = dataclasses.field(default_factory=phases.LossOptions)
    ada_target: float | None = None          # None: p stays what it is
    ada_interval: int = 4                    # batches between adjustments of p
    ada_kimg: float = 500
    refresh_interval: int = 4                # batches between replacements of one chunk of the bank
    force_fp32: bool = False                 # run blocks marked fp16 in float32; half precision is 11 times slower on a CPU

    @property
    def batch_rank(self) -> int:
        """Images per step of one process."""
        return self.batch_size // self.num_gpus


@dataclasses.dataclass
class State:
    """All that changes while training; `checkpoint` stores and restores exactly this."""

    G: torch.nn.Module
    D: torch.nn.Module
    G_ema: torch.nn.Module
    augment_pipe: torch.nn.Module | None
    stage: int = 0             # of --train=both: 1 once high-res training has begun
    stage_start_nimg: int = 0  # cur_nimg at that time
    cur_nimg: int = 0
    batch_idx: int = 0
    cur_tick: int = 0
    tick_start_nimg: int = 0
    backoffs: int = 0  # how often diverged training has gone back to a checkpoint
    elapsed_seconds: float = 0.0
    real_signs: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros([2], dtype=torch.float64))
    """Sum and number of sign(D(real)) since ADA last adjusted p."""


def batches(dataset: ImageDataset, options: LoopOptions, start_idx: int, device: torch.device, workers: int) -> Iterator[phases.Batch]:
    """This process's share of endless batches in the official order: img [N, C, R, R] float32 in [-1, 1], c [N, label_dim] float32, on `device`."""
    in_memory = dataset.in_memory()
    sampler = InfiniteSampler(len(dataset), seed=options.seed, start_idx=start_idx, rank=distributed.rank(), num_replicas=options.num_gpus)
    loader = torch.utils.data.DataLoader(
        dataset, sampler=sampler, batch_size=options.batch_rank, num_workers=0 if in_memory else workers, pin_memory=device.type == 'cuda',
        worker_init_fn=faults.ignore_signals,
        generator=torch.Generator())  # Else it takes a seed from the global RNG, in the first step only: a resumed run would differ.
    for img, c in loader:
        yield {'img': from_uint8(img.to(device, non_blocking=True)), 'c': c.to(device, non_blocking=True)}


def code_batches(prepared, dataset: ImageDataset, options: LoopOptions, start_idx: int, device: torch.device) -> Iterator[phases.Batch]:
    """This process's share of endless batches, in the order of `batches`: codes (x, img, w; float32), labels c [N, label_dim], `index` [N]."""
    small = prepared.codes.nbytes < CODE_BYTES if device.type == 'cpu' else prepared.codes.fits(device, CODE_RESERVE_BYTES)
    codes = prepared.codes.resident(device) if small else prepared.codes
    labels = torch.from_numpy(dataset.get_labels(range(len(dataset)))).to(device)
    indices = iter(InfiniteSampler(len(dataset), seed=options.seed, start_idx=start_idx, rank=distributed.rank(), num_replicas=options.num_gpus))
    while True:
        index = torch.tensor(list(itertools.islice(indices, options.batch_rank)))
        there = index.to(device, non_blocking=True)
        found = codes.gather(there if small else index)
        yield {**{name: value.to(device, non_blocking=True).float() for name, value in found.items()}, 'c': labels[there], 'index': there}


def random_labels(dataset: ImageDataset, rnd: np.random.RandomState, num: int, device: torch.device) -> torch.Tensor:
    """Labels [num, label_dim] of uniformly random items of the dataset."""
    return torch.from_numpy(dataset.get_labels(rnd.randint(len(dataset)) for _ in range(num))).to(device, non_blocking=True)


def seed_step(options: LoopOptions, state: State) -> np.random.RandomState:
    """Make the global torch RNG and the returned numpy RNG a function of seed, process and step: a resumed run draws what it would have drawn.

    After a back-off the draws are others, so that what went wrong need not happen again.
    """
    seed = options.seed * options.num_gpus + distributed.rank()  # as in the official code
    words = np.random.SeedSequence([seed, state.batch_idx, state.backoffs]).generate_state(3)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    return np.random.RandomState(words[2])


def trained_names(state: State, options: LoopOptions) -> dict[str, frozenset[str]]:
    """Official names of the tensors of G and of D that this run may change."""
    G_names = slicing.tensor_names(state.G, options.slice_res, 'all' if options.train == 'full' else options.train)
    if options.codes is not None:  # D is not there; the critic of the codes is a network of its own
        return {'G': G_names, 'D': frozenset()}
    if not options.train_noise:
        G_names = frozenset(name for name in G_names if not name.endswith('.noise_strength'))
    if options.train == 'full':
        return {'G': G_names, 'D': slicing.tensor_names(state.D, None, 'all') - slicing.freezed_names(state.D, options.freezed)}
    d_trains = options.d_trains if options.train == 'high-res' else 'low-res'
    return {'G': G_names, 'D': slicing.tensor_names(state.D, options.slice_res, d_trains)}


@dataclasses.dataclass(frozen=True)
class Grid:
    """The fixed latents of the sample pictures."""

    size: tuple[int, int]  # (columns, rows)
    z: torch.Tensor  # [N, z_dim]
    c: torch.Tensor  # [N, c_dim]


@torch.no_grad()
def sample_grid(G_ema: torch.nn.Module, grid: Grid, batch_gpu: int, **synthesis_kwargs) -> torch.Tensor:
    """Images [N, C, R, R] float32 on the CPU, with constant noise, for the latents of the grid."""
    parts = zip(grid.z.split(batch_gpu), grid.c.split(batch_gpu), strict=True)
    return torch.cat([G_ema(z, c, noise_mode='const', **synthesis_kwargs).float().cpu() for z, c in parts])


def training_loop(
    *,
    run_dir: Path,
    state: State,
    dataset: ImageDataset,
    options: LoopOptions,
    grid: Grid,
    save_network: Callable[[Path, State], None],
    bank: Bank | None = None,
    prepared=None,
    score: Callable[[Path], dict[str, float]] | None = None,
    device: torch.device,
    workers: int = 0,
    start_time: float | None = None,
    resume: bool = False,
    echo: Callable[[str], None] = print,
) -> str:
    """Train `state` in place until the image, time or signal limit; returns the reason for which it stopped.

    Writes into run_dir: fakes*.png, network-snapshot-*.pkl (through save_network(path, state)), snapshots.jsonl (their times),
    checkpoints, stats.jsonl. Networks are on `device`. bank: required for 'high-res'.
    prepared: the preparation.Prepared that training in feature space (options.codes) needs. score: evaluates a snapshot, in all processes
    together; its values go into the tfevents. start_time: time.monotonic() at which the budget
    max_seconds began. resume: continue from the checkpoint. Of several processes (see distributed.py) each calls it; the first one writes.
    Raises UserError if training diverges again after it has gone back to the last checkpoint.
    """
    start_time = time.monotonic() if start_time is None else start_time
    main = distributed.rank() == 0
    for net in (state.G, state.D):
        net.train().requires_grad_(False)
    state.G_ema.eval().requires_grad_(False)
    for net in (state.G, state.D, state.G_ema):
        distributed.copy_from_main_([*net.parameters(), *net.buffers()])
    if options.train == 'high-res':
        state.G.eval()  # The mapping is frozen, w_avg with it.

    state.real_signs = state.real_signs.to(device)
    collector = stats.Collector()

    def report(name: str, value: torch.Tensor) -> None:
        collector.report(name, value)
        if name == 'Loss/signs/real' and options.ada_target is not None:
            state.real_signs += torch.stack([value.double().sum(), value.new_full([], value.numel(), dtype=torch.float64)])

    names = trained_names(state, options)
    source, game, phase_list = open_game(state, options, names, bank, prepared, report, device)
    live = checkpoint.Live(state, game, {phase.optimizer_name: phase.optimizer for phase in phase_list}, bank, collector)

    def batches_from(start_idx: int) -> Iterator[phases.Batch]:
        if prepared is not None:
            return code_batches(prepared, dataset, options, start_idx, device)
        return batches(dataset, options, start_idx, device, workers)

    def load_checkpoint() -> Iterator[phases.Batch]:
        checkpoint.load(run_dir, live, echo)
        if main:
            checkpoint.forget_after(run_dir, state.cur_nimg)
        return batches_from(state.cur_nimg)

    def back_off(found: list[str], before: dict) -> Iterator[phases.Batch]:
        live.in_step = True  # There is nothing to rescue.
        if state.backoffs or not distributed.from_main(checkpoint.files, run_dir):
            raise UserError(faults.diagnosis(found, before, state, options))
        echo(f'WARNING: training diverged at {state.cur_nimg / 1000:.2f} kimg: {"; ".join(found)}. Going back to the last checkpoint, once, and on '
             'with other random numbers.')
        data = load_checkpoint()
        state.backoffs += 1
        live.in_step = False
        return data

    data = load_checkpoint() if resume else batches_from(state.cur_nimg)
    if state.stage and not resume:
        checkpoint.save(run_dir, live, options.keep_checkpoints)  # That of the stage before does not fit this one, should it have to go back.
    session_start, session_nimg = time.monotonic(), state.cur_nimg
    tick_start = session_start
    maintenance_seconds = tick_start - start_time
    with (contextlib.ExitStack() as stack, StopRequest() as stop,
          Progress(options.total_kimg, options.max_seconds, start_time - state.elapsed_seconds, shown=main) as progress):
        writer = stack.enter_context(contextlib.closing(stats.StatsWriter(run_dir))) if main else None
        limits = faults.Limits(options, stop, start_time, state.elapsed_seconds)
        stack.enter_context(faults.rescue(run_dir, live, options.keep_checkpoints, echo))

        reason = limits.check(state.cur_nimg)[0] if resume else None  # A new run makes at least one step, so that there is something to save.
        while reason is None:
            # Data. Copies to a GPU do not wait for what it still has to do; their sources are not written to again.
            rnd = seed_step(options, state)
            real = next(data)
            live.in_step = True

            # Gradients and optimiser steps. Latents are drawn for every phase of every batch, used or not, as in the official code.
            for phase in phase_list:
                latents = source.draw(random_labels(dataset, rnd, options.batch_rank, device))
                if state.batch_idx % phase.interval == 0:
                    phase_start = time.perf_counter()
                    phases.run_phase(phase, latents, real, options.batch_gpu)
                    if device.type != 'cuda':  # On a GPU this would time the launches only, and waiting would cost speed.
                        collector.report(f'Timing/{phase.name}', (time.perf_counter() - phase_start) * 1000)

            # Moving average, counters, feature bank.
            beta = losses.ema_beta(options.batch_size, state.cur_nimg - state.stage_start_nimg, options.ema_kimg, options.ema_rampup)
            phases.update_ema(state.G_ema, state.G, beta, names['G'])
            state.cur_nimg += options.batch_size
            state.batch_idx += 1
            if bank is not None and state.batch_idx % options.refresh_interval == 0:
                bank.refresh()

            # Augmentation strength.
            if state.batch_idx % options.ada_interval == 0:
                if options.ada_target is not None:
                    distributed.sum_(state.real_signs)
                    sign_mean = float(state.real_signs[0] / state.real_signs[1])
                    state.augment_pipe.p.fill_(ada.adjust_p(
                        float(state.augment_pipe.p), sign_mean, options.ada_target, options.batch_size, options.ada_interval, options.ada_kimg))
                state.real_signs.zero_()

            # Reasons to stop.
            live.in_step = False
            reason, snapshot = limits.check(state.cur_nimg)
            progress.update(state.cur_nimg / 1000, collector)
            if reason is None and state.cur_tick != 0 and not snapshot and state.cur_nimg < state.tick_start_nimg + options.kimg_per_tick * 1000:
                continue

            # Tick: statistics, health, status line.
            now = time.monotonic()
            state.elapsed_seconds = limits.elapsed_seconds()
            before = collector.as_dict()
            _report_tick(collector, state, now - tick_start, maintenance_seconds, device)
            collector.update()
            found = faults.symptoms(collector.as_dict(), live.modules)
            if found:
                data, reason = back_off(found, before), None
                continue
            snapshot = snapshot or reason is not None or state.cur_tick % options.snapshot_ticks == 0
            state.cur_tick += 1
            state.tick_start_nimg = state.cur_nimg
            if main:
                progress.echo(_status_line(collector), echo)
                writer.write(collector.as_dict(), cur_nimg=state.cur_nimg, elapsed_s=state.elapsed_seconds)

            # Snapshot: picture, pickle, checkpoint.
            if snapshot:
                name = f'{state.cur_nimg // 1000:06d}' + (f'_{state.cur_nimg % 1000:03d}' if options.snapshot_seconds else '')
                path = run_dir / f'network-snapshot-{name}.pkl'
                if main:
                    _save_snapshot(path, run_dir / f'fakes{name}.png', state, grid, options, save_network)
                checkpoint.save(run_dir, live, options.keep_checkpoints)
                if score is not None:
                    results = score(path)
                    if main:
                        writer.write_metrics(results, cur_nimg=state.cur_nimg, elapsed_s=state.elapsed_seconds)
            tick_start = time.monotonic()
            maintenance_seconds = tick_start - now
        state.elapsed_seconds = limits.elapsed_seconds()
    echo(f'Stopped: {reason}; {state.cur_nimg / 1000:.1f} kimg, the last {(state.cur_nimg - session_nimg) / 1000:.1f} of them in '
         f'{stats.format_time(time.monotonic() - session_start)}.')
    return reason


def open_game(state: State, options: LoopOptions, names: dict[str, frozenset[str]], bank: Bank | None, prepared, report: losses.Report,
              device: torch.device) -> tuple:
    """(source, game, phases): where fakes come from, the objectives, and what trains on them. names: of trained_names."""
    block_kwargs = {'force_fp32': options.force_fp32}
    if options.codes is not None:
        torch.manual_seed(options.seed)  # of the critic's first weights, the same in every process
        game = code_game.make_game(state.G, prepared, options.codes, report, block_kwargs)
        return game, game, code_game.make_phases(game)
    if bank is None:
        source = phases.LatentSource(state.G, options.loss.style_mixing_prob, block_kwargs)
    else:
        source = phases.BankSource(state.G, bank, options.slice_res, block_kwargs)
    game = phases.Game(source, functools.partial(state.D, **block_kwargs), state.augment_pipe or (lambda img: img), options.loss, report, device)
    trained = {key: [p for name, p in net.named_parameters() if name in names[key]] for key, net in [('G', state.G), ('D', state.D)]}
    return source, game, phases.make_phases(game, trained['G'], trained['D'], options.G_lr, options.D_lr)


def _save_snapshot(path: Path, picture: Path, state: State, grid: Grid, options: LoopOptions, save_network: Callable[[Path, State], None]) -> None:
    samples = sample_grid(state.G_ema, grid, options.batch_gpu, force_fp32=options.force_fp32)
    save_image_grid(samples, picture, (-1, 1), grid.size)
    save_network(path, state)
    entry = {'pkl': path.name, 'cur_nimg': state.cur_nimg, 'elapsed_s': state.elapsed_seconds}
    with open(path.with_name('snapshots.jsonl'), 'a', encoding='utf-8') as f:
        f.write(json.dumps(entry) + '\n')


def _report_tick(collector, state: State, seconds: float, maintenance_seconds: float, device: torch.device) -> None:
    nimg = state.cur_nimg - state.tick_start_nimg
    for name, value in {
            'Progress/tick': state.cur_tick, 'Progress/kimg': state.cur_nimg / 1000,
            'Progress/augment': float(state.augment_pipe.p) if state.augment_pipe is not None else 0.0,
            'Timing/total_sec': state.elapsed_seconds, 'Timing/sec_per_tick': seconds, 'Timing/sec_per_kimg': seconds / nimg * 1000,
            'Timing/maintenance_sec': maintenance_seconds, 'Timing/total_hours': state.elapsed_seconds / 3600,
            'Timing/total_days': state.elapsed_seconds / 86400,
            'Resources/cpu_mem_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20,  # kilobytes on Linux; the peak so far
            'Resources/peak_gpu_mem_gb': torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == 'cuda' else 0.0}.items():
        collector.report(name, value)


def _status_line(collector) -> str:
    def mean(name):
        return collector.mean(name)

    return '  '.join([
        f'tick {mean("Progress/tick"):<5.0f}', f'kimg {mean("Progress/kimg"):<8.1f}', f'time {stats.format_time(mean("Timing/total_sec")):<12s}',
        f'sec/tick {mean("Timing/sec_per_tick"):<7.1f}', f'sec/kimg {mean("Timing/sec_per_kimg"):<7.2f}',
        f'maintenance {mean("Timing/maintenance_sec"):<6.1f}', f'cpumem {mean("Resources/cpu_mem_gb"):<6.2f}',
        f'gpumem {mean("Resources/peak_gpu_mem_gb"):<6.2f}', f'augment {mean("Progress/augment"):.3f}'])
