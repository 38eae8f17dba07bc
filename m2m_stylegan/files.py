"""Writing files so that a reader never sees half of one."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and moved over `path`, on an exception it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because PIL and others choose the format by it; the leading dot keeps globs such as *.pkl away from it.
    fd, name = tempfile.mkstemp(prefix=f'.{path.stem}-', suffix=f'.tmp{path.suffix}', dir=path.parent)
    os.close(fd)
    tmp = Path(name)
    try:
        yield tmp
        with open(tmp, 'rb') as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o666 & ~_umask())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def default_cache_dir() -> Path:
    """$M2M_CACHE_DIR, or ~/.cache/m2m_stylegan."""
    return Path(os.environ.get('M2M_CACHE_DIR') or Path.home() / '.cache' / 'm2m_stylegan')


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else _sha256_py310(f)


def _sha256_py310(f) -> str:
    digest = hashlib.sha256()
    while chunk := f.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    # There is no way to read the umask without setting it; mkstemp makes files 0600, which would hide results from colleagues.
    mask = os.umask(0)
    os.umask(mask)
    return mask
