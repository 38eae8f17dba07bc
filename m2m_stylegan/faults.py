"""What can go wrong in a week of training, and what is then said and done about it."""

import contextlib
import errno
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from m2m_stylegan import checkpoint, distributed, stats
from m2m_stylegan.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PHASES = {'Loss/G/loss': 'Gmain, the adversarial loss of G', 'Loss/G/pairs': 'Gpairs, the regression of codes',
          'Loss/pl_penalty': 'Greg, the path length penalty of G',
          'Loss/D/loss': 'Dmain, the adversarial loss of D', 'Loss/r1_penalty': 'Dreg, the R1 penalty of D'}
DISK = {errno.ENOSPC: 'make room', errno.EDQUOT: 'make room', errno.EFBIG: 'make room', errno.EROFS: 'choose an --outdir that can be written',
        errno.EACCES: 'choose an --outdir that can be written', errno.EPERM: 'choose an --outdir that can be written',
        errno.EIO: 'check the disk', errno.ESTALE: 'check the network file system'}


class StopRequest:
    """Turns the first signal to stop into a flag, so that the loop can save before it leaves; a second one interrupts at once.

    Signals within a second of the first are the same one, which has come several ways: from the terminal or the cluster, and from torchrun.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._since_s = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> 'StopRequest':
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # Not the main thread: signals are somebody else's business.
                break
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self.received is None:
            self.received, self._since_s = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since_s > 1:
            raise KeyboardInterrupt


_RECEIVED = ' received'


class Limits:
    """Images, seconds and signals that end a session, and the clock of the snapshots. Every process comes to the same decisions.

    options: training_loop.LoopOptions. start_time: time.monotonic() from which the session counts, so that setting the clock changes nothing.
    """

    def __init__(self, options, stop: StopRequest, start_time: float, earlier_seconds: float):
        self.options, self.stop, self.start_time, self.earlier_seconds = options, stop, start_time, earlier_seconds
        self.snapshots_made = self._snapshots_due()

    def elapsed_seconds(self) -> float:
        """Time of the run, with that of earlier sessions."""
        return self.earlier_seconds + time.monotonic() - self.start_time

    def check(self, cur_nimg: int) -> tuple[str | None, bool]:
        """The reason to stop now, or None, and whether a snapshot is due by the clock."""
        options = self.options
        late = options.max_seconds is not None and self.elapsed_seconds() >= options.max_seconds
        late, number, due = distributed.max_each([int(late), int(self.stop.received or 0), self._snapshots_due()])
        snapshot, self.snapshots_made = due > self.snapshots_made, due
        if cur_nimg >= options.total_kimg * 1000:
            return f'{options.total_kimg:g} kimg reached', snapshot
        if late:
            return f'time budget of {stats.format_time(options.max_seconds)} used', snapshot
        return signal.Signals(number).name + _RECEIVED if number else None, snapshot

    @staticmethod
    def interrupted(reason: str) -> bool:
        """Is this reason of `check` a signal, and not a limit?"""
        return reason.endswith(_RECEIVED)

    def _snapshots_due(self) -> int:
        return int(self.elapsed_seconds() / self.options.snapshot_seconds) if self.options.snapshot_seconds else 0


def ignore_signals(worker: int) -> None:
    """For loader processes: a signal to the whole process group must not take the data away before the loop has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def symptoms(statistics: dict[str, dict[str, float]], modules: dict[str, torch.nn.Module]) -> list[str]:
    """What is not finite: losses of the last tick, by phase, and tensors of the networks. Waits for the device."""
    found = [f'{name} is not finite (phase {phase})' for name, phase in PHASES.items()
             if name in statistics and not math.isfinite(statistics[name]['mean'])]
    for key, module in modules.items():
        tensors = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        # On one device, since AugmentPipe.p is on the CPU whatever the others are on, and all at once, since asking waits.
        device = max((tensor.device for tensor in tensors.values()), key=lambda device: device.type != 'cpu')
        finite = torch.stack([tensor.isfinite().all().to(device, non_blocking=True) for tensor in tensors.values()]).tolist()
        bad = [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]
        if bad:
            found.append(f'{key}: {len(bad)} of {len(tensors)} tensors are not finite, the first is {key}.{bad[0]}')
    return found


def diagnosis(found: list[str], before: dict[str, dict[str, float]], state, options) -> str:
    """The message with which diverged training stops. before: statistics of the tick before."""
    def mean(name: str) -> str:
        return f'{before[name]["mean"]:.3g}' if name in before else 'unknown'

    again = ', again after going back to the last good state' if state.backoffs else ' before there was a good state to go back to'
    p = 0.0 if state.augment_pipe is None else float(state.augment_pipe.p)
    lines = [f'Training diverged at {state.cur_nimg / 1000:.2f} kimg{again}:', *(f'  * {line}' for line in found)]
    lines.append(f'In the tick before: scores real {mean("Loss/scores/real")}, fake {mean("Loss/scores/fake")}; loss of G {mean("Loss/G/loss")}, '
                 f'of D {mean("Loss/D/loss")}; augmentation p {p:.3g}. Learning rates: G {options.G_lr:g}, D {options.D_lr:g}; '
                 f'--gamma={options.loss.r1_gamma:g}, --pl-weight={options.loss.pl_weight:g}, batch {options.batch_size}.')
    lines.append('Try, in a new run from the last good snapshot (--resume=.../network-snapshot-*.pkl): several times the --gamma if the scores '
                 'were far apart, half the --lr, --fp32=1 if blocks run in half precision, --pl-weight=0 if only Greg is named.')
    return '\n'.join(lines)


@contextlib.contextmanager
def rescue(run_dir: Path, live: checkpoint.Live, keep: int, echo: Callable[[str], None]) -> Iterator[None]:
    """If an exception leaves the block between two steps, save the checkpoint, unless it is one that training has ruined.

    Not with several processes: the others may be elsewhere.
    """
    try:
        yield
    except Exception:
        if not live.in_step and distributed.world_size() == 1 and not symptoms({}, live.modules):
            with contextlib.suppress(OSError):
                checkpoint.save(run_dir, live, keep)
                echo(f'The state at {live.state.cur_nimg / 1000:.2f} kimg has been saved.')
        raise


@contextlib.contextmanager
def explained(run_dir: Path, options, group_size: int) -> Iterator[None]:
    """Turn what is the machine's fault, not the code's, into a UserError that says how to go on. group_size: images that D compares."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise UserError(_out_of_memory(err, options, group_size) + _way_back(run_dir)) from err
    except OSError as err:
        if err.errno not in DISK:
            raise
        raise UserError(f'cannot write {err.filename or run_dir}: {err.strerror}; {DISK[err.errno]}. Files written earlier are whole.'
                        f'{_way_back(run_dir)}') from err
    except RuntimeError as err:
        if 'DataLoader worker' not in str(err):
            raise
        raise UserError(f'A loader process ended ({str(err).splitlines()[0]}). Usually the memory or /dev/shm was full: try fewer --workers, or '
                        f'--workers=0 to load in the main process.{_way_back(run_dir)}') from err


def _out_of_memory(err: RuntimeError, options, group_size: int) -> str:
    fits = [n for n in range(1, options.batch_gpu // 2 + 1) if options.batch_rank % n == 0 and n % min(group_size or n, n) == 0]
    advice = f'Try --batch-gpu={max(fits)}' if fits else 'There is no smaller --batch-gpu: train fewer blocks (--train=high-res) or smaller images'
    return f'Out of memory with {options.batch_gpu} images per pass (--batch-gpu). {advice}. PyTorch says: {str(err).splitlines()[0]}'


def _way_back(run_dir: Path) -> str:
    return f'\nGo on with --resume={run_dir}' if checkpoint.files(run_dir) else ''
