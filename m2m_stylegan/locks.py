"""One lock between processes."""

import contextlib
import os
from collections.abc import Iterator

from m2m_stylegan.errors import UserError


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, byte: int = 0, *, busy: str | None = None) -> Iterator[None]:
    """Hold the lock on one byte of the file `path` (created empty if absent), waiting until no other process holds it.

    With `busy` it does not wait, but raises UserError with that text.
    The operating system drops the lock when the holder dies, so there are no stale locks; the file itself stays.
    A POSIX record lock keeps out processes, not threads, and a process must not nest two locks of the same file.
    Raises UserError if the file cannot be made or its file system has no locks.
    """
    import fcntl  # POSIX only: here, so that this module can still be imported elsewhere

    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, fd)
            fcntl.lockf(fd, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0), 1, byte)
        except BlockingIOError as err:
            raise UserError(busy) from err
        except OSError as err:
            raise UserError(f'cannot lock {path}: {err.strerror}; choose a directory whose file system has locks') from err
        yield
