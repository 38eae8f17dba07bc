"""Run directories with official numbers and names, and the console copy in `log.txt`."""

import contextlib
import json
import os
import random
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from m2m_stylegan.downloads import OFFICIAL_PICKLES
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write

_CURSOR_UP = '\x1b[A'  # between the lines of nested progress bars


def next_run_dir(outdir: str | os.PathLike, desc: str) -> Path:
    """Create and return `{outdir}/{id:05d}-{desc}`; id is one more than the highest number that begins a sub-directory's name, or 0.

    Safe against other processes that do the same. Raises UserError if the directory cannot be made.
    """
    outdir = Path(outdir)
    desc = re.sub(r'[/\\\0]', '_', desc)
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        while True:
            run_id = max(_run_ids(outdir), default=-1) + 1
            run_dir = outdir / f'{run_id:05d}-{desc}'
            with contextlib.suppress(FileExistsError):
                run_dir.mkdir()
                if _run_ids(outdir).count(run_id) == 1:
                    return run_dir
                run_dir.rmdir()  # somebody else made a directory of this number under another name
            time.sleep(random.uniform(0, 0.05))
    except OSError as err:
        raise UserError(f'cannot make a run directory in {outdir}: {err.strerror}; choose another --outdir') from err


def _run_ids(outdir: Path) -> list[int]:
    numbers = [re.match(r'\d+', p.name) for p in outdir.iterdir() if p.is_dir()]
    return [int(n[0]) for n in numbers if n]


def describe(
    dataset: str,
    *,
    cfg: str,
    num_gpus: int,
    cond: bool = False,
    subset: int | None = None,
    mirror: bool = False,
    gamma: float | None = None,
    kimg: int | None = None,
    batch: int | None = None,
    aug: str | None = None,
    p: float | None = None,
    target: float | None = None,
    augpipe: str | None = None,
    resume: str | None = None,
    freezed: int | None = None,
    train: str = 'full',
    slice_at: int | str | None = None,
) -> str:
    """Official description of a run; None means that the option was not given.

    `dataset` is its name, `subset` the number of images if fewer than all. A training other than `full` appends
    `-m2m-{train}-slice{slice_at}`, e.g. `-m2m-high-res-slice16`.
    """
    parts = [
        dataset,
        'cond' if cond else None,
        _tagged('subset', subset),
        'mirror' if mirror else None,
        f'auto{num_gpus}' if cfg == 'auto' else cfg,
        _tagged('gamma', gamma),
        _tagged('kimg', kimg),
        _tagged('batch', batch),
        aug,
        _tagged('p', p),
        _tagged('target', target),
        augpipe,
        _resume_part(resume),
        _tagged('freezed', freezed),
        None if train == 'full' else f'm2m-{train}-slice{slice_at}',
    ]
    return '-'.join(part for part in parts if part is not None)


def _tagged(tag: str, value: float | None) -> str | None:
    if value is None:
        return None
    return f'{tag}{value:d}' if isinstance(value, int) else f'{tag}{value:g}'


def _resume_part(resume: str | None) -> str | None:
    if resume is None or resume == 'noresume':
        return resume
    return f'resume{resume}' if resume in OFFICIAL_PICKLES or resume == 'demo' else 'resumecustom'


@contextlib.contextmanager
def log_to(path: str | os.PathLike) -> Iterator[None]:
    """Append everything printed inside to the file `path`, line by line, besides the console.

    Progress bars, i.e. what is written with a carriage return, are not copied. An exception that leaves the block is, with its traceback.
    """
    with open(path, 'a', encoding='utf-8') as log:
        out, err = Tee(sys.stdout, log), Tee(sys.stderr, log)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                try:
                    yield
                finally:
                    out.stop_copying()
                    err.stop_copying()
            except (Exception, KeyboardInterrupt):
                log.write(traceback.format_exc())  # the interpreter prints it only after this block
                raise


class Tee:
    """A text stream that writes to `console` and copies whole lines to `log`. All else is as in `console`."""

    def __init__(self, console: TextIO, log: TextIO):
        self._console = console
        self._log = log
        self._line = ''
        self._in_progress_bar = False
        self._lock = threading.Lock()  # the monitor thread of tqdm writes, too

    def write(self, text: str) -> int:
        """Like TextIO.write."""
        self._console.write(text)
        with self._lock:
            if self._log is not None:
                self._copy(text.replace('\r\n', '\n'))
        return len(text)

    def writelines(self, lines) -> None:
        """Like TextIO.writelines."""
        for line in lines:
            self.write(line)

    def stop_copying(self) -> None:
        """Copy what is left of an unfinished line; from now on write to the console only, for those who kept this stream."""
        with self._lock:
            if self._line:
                self._copy('\n')
            self._log = None

    def _copy(self, text: str) -> None:
        for piece in re.findall(r'[^\n]*\n|[^\n]+', text):
            if '\r' in piece or _CURSOR_UP in piece:
                self._line = ''
                self._in_progress_bar = not piece.endswith('\n')
            elif self._in_progress_bar and piece == '\n':
                self._in_progress_bar = False
            else:
                self._in_progress_bar = False
                self._line += piece
                if piece.endswith('\n'):
                    self._log.write(self._line)
                    self._log.flush()
                    self._line = ''

    def __getattr__(self, name):
        return getattr(self._console, name)


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as JSON with indent 2, atomically."""
    text = json.dumps(value, indent=2)
    with atomic_write(path) as tmp:
        tmp.write_text(text + '\n', encoding='utf-8')
