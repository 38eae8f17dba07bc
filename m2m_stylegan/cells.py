"""One training run of a comparison, a cell: its folder, its process, and how far it came according to its files.

Nothing about a cell is kept in memory only, so that `kill -9` at any moment loses no more than the training since the last snapshot.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tqdm

from m2m_stylegan import checkpoint
from m2m_stylegan.errors import UserError
from m2m_stylegan.run_dir import write_json
from m2m_stylegan.training_loop import StopRequest
from m2m_stylegan.transfer_options import TransferOptions

RECORD, CONSOLE, CACHE = 'cell.json', 'console.txt', 'cache'
UNLIMITED_KIMG = 1e6  # The clock is to end a run, not the default number of images.
RUN_DIR = re.compile(r'\d{5}-')


@dataclasses.dataclass(frozen=True)
class Saved:
    """A line of snapshots.jsonl: a network pickle, the images D had seen by then, and the seconds charged to the run."""

    pkl: Path
    cur_nimg: int
    elapsed_s: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method with one seed. `request` is all that decides what comes out; a folder with another request is refused."""

    folder: Path
    method: str
    seed: int
    options: TransferOptions
    request: dict

    @property
    def title(self) -> str:
        return f'{self.method}, seed {self.seed}'

    @property
    def budget_s(self) -> float:
        return self.options.minutes * 60


def read_record(folder: Path) -> dict | None:
    """Content of cell.json, or None if there is none. Raises UserError for anything but {'request': {...}, 'sessions': [...], ...}."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        record['request'].keys(), record['sessions'][:0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise UserError(f'{path} is damaged or is not from tools/compare.py ({type(err).__name__}: {err}). Remove {folder} to run it again.') from err
    return record


def differences(found: object, wanted: object, prefix: str = '') -> list[str]:
    """One line for each entry in which two trees of dicts differ, named by its dotted path."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*wanted, *found])
        return [line for key in keys for line in differences(found.get(key), wanted.get(key), f'{prefix}.{key}' if prefix else key)]
    return [] if found == wanted else [f'{prefix}: {found} there, {wanted} now']


def read_snapshots(run_dir: Path) -> list[Saved]:
    """The snapshots of a run in order, as far as their pickles exist.

    Lines that a kill cut short are passed over, and so are those that a resumed run has since trained anew.
    """
    path = run_dir / 'snapshots.jsonl'
    saved: list[Saved] = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.is_file() else []:
        try:
            fields = json.loads(line)
            entry = Saved(run_dir / Path(fields['pkl']).name, int(fields['cur_nimg']), float(fields['elapsed_s']))
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        if math.isfinite(entry.elapsed_s):
            saved = [s for s in saved if s.cur_nimg < entry.cur_nimg and s.pkl != entry.pkl] + [entry]
    return [s for s in saved if s.pkl.is_file()]


def read_stats(run_dir: Path) -> list[dict[str, float]]:
    """Means of the statistics, tick by tick, from stats.jsonl, ours or the official one; broken lines are passed over."""
    path = run_dir / 'stats.jsonl'
    ticks = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, AttributeError):
            ticks.append({name: s['mean'] for name, s in json.loads(line).items() if isinstance(s, dict) and isinstance(s.get('mean'), int | float)})
    return [tick for tick in ticks if tick]


def performance(run_dir: Path) -> dict[str, float | None]:
    """What a run cost: img_per_s while training (median of the ticks after the first), peak_cpu_gb, peak_gpu_gb, preparation_s; None: unknown."""
    ticks = read_stats(run_dir)

    def values(name: str) -> list[float]:
        return [tick[name] for tick in ticks if name in tick and math.isfinite(tick[name])]

    seconds_per_kimg = [s for s in values('Timing/sec_per_kimg') if s > 0]
    return {'img_per_s': 1000 / statistics.median(seconds_per_kimg[1:] or seconds_per_kimg) if seconds_per_kimg else None,
            'peak_cpu_gb': max(values('Resources/cpu_mem_gb'), default=None), 'peak_gpu_gb': max(values('Resources/peak_gpu_mem_gb'), default=None),
            'preparation_s': next(iter(values('Timing/maintenance_sec')), None)}


def run_dirs(cell: Cell) -> list[Path]:
    """The run directories in the cell, oldest first. There is more than one only after a kill in a bad moment."""
    return sorted(path for path in cell.folder.glob('*') if RUN_DIR.match(path.name) and path.is_dir())


def finished_run(cell: Cell) -> Path | None:
    """The run directory whose last snapshot was made when the time was up, or None."""
    if (read_record(cell.folder) or {}).get('out_of_time'):
        return resumable_run(cell)
    return next((path for path in run_dirs(cell) if any(s.elapsed_s >= cell.budget_s - 0.1 for s in read_snapshots(path))), None)


def resumable_run(cell: Cell) -> Path | None:
    """The run directory from which training can go on, or None."""
    return next((path for path in run_dirs(cell) if checkpoint.files(path)), None)


def charged_s(cell: Cell) -> float:
    """Seconds of the budget that the snapshots account for."""
    return max((s.elapsed_s for path in run_dirs(cell) for s in read_snapshots(path)), default=0.0)


FLAGS = ('no-bypass',)  # options of tools/transfer.py that take no value


def arguments(options: TransferOptions) -> list[str]:
    """Command line of tools/transfer.py that says `options`."""
    said = {field.name.replace('_', '-'): getattr(options, field.name) for field in dataclasses.fields(options)
            if getattr(options, field.name) != field.default}
    return [f'--{name}' if name in FLAGS else f'--{name}={value}' for name, value in said.items()]


def next_command(cell: Cell, runner: list[str]) -> list[str]:
    """What to execute next: the resumption of an interrupted run, or the run from its start."""
    run = resumable_run(cell)
    if run is None:
        return [*runner, *arguments(cell.options)]
    limits = {name: getattr(cell.options, name) for name in ('outdir', 'minutes', 'kimg', 'device', 'workers')}
    return [*runner, *arguments(TransferOptions(**limits, resume=str(run)))]


def run(cell: Cell, runner: list[str], lock_fd: int) -> None:
    """Bring the cell to its end in a process of its own. Raises UserError if that stops early, KeyboardInterrupt if this process is told to."""
    if finished_run(cell) is not None:
        return
    command = next_command(cell, runner)
    if resumable_run(cell) is None:
        for path in run_dirs(cell):  # Killed before there was anything to resume from.
            shutil.rmtree(path)
    record = read_record(cell.folder) or {'request': cell.request, 'sessions': []}
    record['sessions'].append({'command': shlex.join(command), 'started': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')})
    write_json(cell.folder / RECORD, record)
    done_s = charged_s(cell)
    code = execute(command, cell.folder / CONSOLE, lock_fd, cell.title, done_s, cell.budget_s)
    if code == 0 and charged_s(cell) == done_s > 0:  # Resumed so near to the end that starting up took the time that was left.
        write_json(cell.folder / RECORD, {**record, 'out_of_time': True})
    if finished_run(cell) is None:
        console = cell.folder / CONSOLE
        tail = '\n'.join(f'    {line}' for line in console.read_text(encoding='utf-8', errors='replace').splitlines()[-8:])
        raise UserError(f'{cell.title}: stopped after {charged_s(cell):.0f} of {cell.budget_s:.0f} s with exit status {code}. '
                        f'All of its output is in {console}; the last of it:\n{tail}')


def execute(command: list[str], console: Path, lock_fd: int, title: str, done_s: float, budget_s: float) -> int:
    """Run a command with a progress bar over its time and its output in a file; returns its exit status.

    A signal to this process is passed on once, so that the training saves its state, and becomes KeyboardInterrupt. The command inherits the
    lock of the folder: if this process is killed, the command goes on, and the next comparison waits for it.
    """
    bar = tqdm.tqdm(total=budget_s, initial=done_s, desc=title, bar_format='{desc} {percentage:3.0f}%|{bar:24}| {elapsed}', leave=False,
                    dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60)
    with bar, open(console, 'ab') as log, StopRequest() as stop:
        # A session of its own: else Ctrl-C would reach it twice, and the second time means not to save.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock_fd], start_new_session=True)
        told = False
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            bar.update(min(0.2, bar.total - bar.n))
            if stop.received and not told:
                process.terminate()
                told = True
    if stop.received:
        raise KeyboardInterrupt
    return process.returncode


@contextlib.contextmanager
def locked(folder: Path, echo: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock of a comparison's folder; yields the descriptor that a child inherits to hold it, too."""
    import fcntl  # POSIX only: here, so that this module can still be imported elsewhere

    fd = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo(f'Another comparison, or a run left over from one that was killed, is at work in {folder}; waiting for it to end.')
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def disk_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file() and not path.is_symlink())
