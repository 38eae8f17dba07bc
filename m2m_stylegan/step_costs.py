"""What one step of training costs on this machine, measured by running it: seconds, multiply-accumulates, memory."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from m2m_stylegan import bank as feature_bank
from m2m_stylegan import phases
from m2m_stylegan.features import ResidentFeatures, TensorSpec
from m2m_stylegan.training_loop import LoopOptions, State, batches, code_batches, open_game, trained_names

REPEATS, ENOUGH_SECONDS = 3, 4.0  # timed runs of each part of a step: at most, and when to stop after fewer

Task = tuple[int, Callable[[], object]]
"""A part of a step, and how many steps lie between two of its runs."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of training, per image of a batch; memory per process."""

    seconds: float  # the fastest of a few runs
    macs: float  # multiply-accumulates of convolutions and matrix products, forward and backward, regularisers included
    memory_bytes: int  # MEMORY_KINDS says of what


MEMORY_KINDS = {'cuda': 'peak of the memory that PyTorch has allocated on the GPU',
                'cpu': 'weights, gradients, optimiser moments and what the backward pass needs at its peak; not PyTorch itself, images and caches'}


def step_tasks(state: State, dataset, loop: LoopOptions, device: torch.device, *, bank: feature_bank.Bank | None = None,
               prepared=None) -> tuple[list[Task], list[phases.Phase]]:
    """The parts of a training step as training_loop runs them, but for its statistics: data, phases, moving average, refreshing the bank.

    `state` is trained by running them. bank: for high-res; prepared: preparation.Prepared, for low-res in feature space.
    """
    for net in (state.G, state.D):
        net.train().requires_grad_(False)
    names = trained_names(state, loop)
    source, _, phase_list = open_game(state, loop, names, bank, prepared, _mute, device)
    data = batches(dataset, loop, 0, device, 0) if prepared is None else code_batches(prepared, dataset, loop, 0, device)
    real = next(data)

    def run(phase: phases.Phase) -> None:
        phases.run_phase(phase, source.draw(real['c']), real, loop.batch_gpu)

    tasks = [(1, lambda: next(data)), *((phase.interval, functools.partial(run, phase)) for phase in phase_list),
             (1, lambda: phases.update_ema(state.G_ema, state.G, 0.999, names['G']))]
    return tasks + ([] if bank is None else [(loop.refresh_interval, bank.refresh)]), phase_list


def _mute(name: str, value: torch.Tensor) -> None:
    pass


def small_bank(G_ema, res: int, loop: LoopOptions, labels: Callable[[int, int], torch.Tensor]) -> tuple[feature_bank.Bank, int]:
    """A bank of one chunk, enough to time high-res training, and the bytes of one item."""
    def make(chunk: int, dtype: torch.dtype) -> phases.Batch:
        return feature_bank.make_chunk(G_ema, res, labels, loop.seed, chunk, loop.loss.style_mixing_prob, dtype, force_fp32=loop.force_fp32)

    dtype = feature_bank.storage_dtype(make(0, torch.float32))
    chunk = make(0, dtype)
    specs = {name: TensorSpec(tuple(value.shape[1:]), value.dtype) for name, value in chunk.items()}
    features = ResidentFeatures(specs, feature_bank.CHUNK_ITEMS, chunk['ws'].device, chunk)
    return feature_bank.Bank(features, lambda number: make(number, dtype)), features.nbytes // len(features)


def measure(tasks: list[Task], num_images: int, state_bytes: int, device: torch.device, progress: Callable[[int], object] = lambda n: None) -> Cost:
    """Run every task once to count, then a few times to time it; the intervals are its weights.

    num_images: of one step. state_bytes: what is added to the memory that is counted on a CPU. progress(1) is called after each task.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    seconds = macs = 0.0
    saved_bytes = 0
    for interval, task in tasks:
        with _MacCounter() as counter, _saved_for_backward() as saved:
            task()
        macs += counter.macs / interval
        saved_bytes = max(saved_bytes, saved.peak)
        seconds += _best_seconds(task, device) / interval
        progress(1)
    memory = torch.cuda.max_memory_allocated(device) if device.type == 'cuda' else saved_bytes + state_bytes
    return Cost(seconds / num_images, macs / num_images, memory)


def state_nbytes(state: State, phase_list: list[phases.Phase]) -> int:
    """Bytes of the three networks, and of gradients and both moments of what the phases train."""
    weights = [*state.G.parameters(), *state.D.parameters(), *state.G_ema.parameters()]
    trained = {id(p): p for phase in phase_list for p in phase.params}
    return _nbytes(weights) + 3 * _nbytes(trained.values())


def _nbytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _best_seconds(task: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return time.perf_counter()

    best, begin = float('inf'), now()
    for _ in range(REPEATS):
        start = now()
        task()
        best = min(best, now() - start)
        if now() - begin > ENOUGH_SECONDS:
            break
    return best


class _MacCounter(TorchDispatchMode):
    """Counts multiply-accumulates by PyTorch's own formulas. Its FlopCounterMode cannot be used: it refuses autograd.grad to a leaf, i.e. R1."""

    macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.macs += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) // 2
        return out


class _Saved:
    """Bytes of the distinct storages that autograd holds for backward passes, now and at most."""

    def __init__(self):
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def hold(self, x: torch.Tensor) -> '_Held':
        return _Held(self, x)


class _Held:
    """A saved tensor; autograd drops it when it is done with it."""

    def __init__(self, saved: _Saved, tensor: torch.Tensor):
        self.saved, self.tensor = saved, tensor
        storage = tensor.untyped_storage()
        self.key, self.nbytes = storage.data_ptr(), storage.nbytes()
        saved.holders[self.key] = saved.holders.get(self.key, 0) + 1
        if saved.holders[self.key] == 1:
            saved.now += self.nbytes
            saved.peak = max(saved.peak, saved.now)

    def __del__(self):
        self.saved.holders[self.key] -= 1
        if not self.saved.holders[self.key]:
            self.saved.now -= self.nbytes


@contextlib.contextmanager
def _saved_for_backward() -> Iterator[_Saved]:
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.hold, lambda held: held.tensor):
        yield saved
