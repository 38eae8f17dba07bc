"""Network pickles as plain trees: `load` reads one without executing anything, `dump` and `dumps` write one. Knows no networks.

Tree types: dict, list, tuple, set, str, bytes, int, float, bool, None, OrderedDict, EasyDict, Record, TFNetwork, torch.Tensor,
torch.nn.Parameter, and NumPy arrays of numbers or booleans. Dict keys and set elements are str or int.
"""

import io
import os
import warnings
from pathlib import Path

from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.pickles_globals import NAMES
from m2m_stylegan.pickles_reader import Budget, Machine, Stream
from m2m_stylegan.pickles_tree import EasyDict, Record, TFNetwork, check_tree
from m2m_stylegan.pickles_writer import Writer

__all__ = ['EasyDict', 'Record', 'TFNetwork', 'dump', 'dumps', 'load']

MAX_OBJECTS = 1_000_000     # An official file of 1024x1024 has about 60,000.
HEAD_BYTES = 1024
# Text that protocol 2 turns back into bytes, those bytes, and the tensor made of them: three copies of what the file holds.
COPIES = 3
SPARE_BYTES = 2**26


def load(source: str | os.PathLike | bytes, *, max_objects: int = MAX_OBJECTS) -> object:
    """Read a network pickle (protocol 2 to 5) from a path or from bytes into a plain tree; nothing in it is executed.

    Tensors are on the CPU with their stored dtype and values in memory of their own; NumPy scalars become Python ones.
    `max_objects` bounds the number of pickle instructions, memory is bounded by a small multiple of the file's size.
    Raises UserError, with one message, for anything that is not an intact network pickle. Format: the pickle and torch
    serialisation formats; the allowed names are in pickles_globals.py.
    """
    name = 'the pickle' if isinstance(source, bytes) else os.fspath(source)
    try:
        if isinstance(source, bytes):
            return _read(Stream(io.BytesIO(source), len(source)), max_objects)
        path = Path(source)
        if path.exists() and not path.is_file():
            raise UserError('it is not a regular file')
        with open(path, 'rb') as file:
            return _read(Stream(file, os.fstat(file.fileno()).st_size), max_objects)
    except UserError as err:
        raise UserError(f'Cannot read {name} as a network pickle: {err}.') from err
    except OSError as err:
        raise UserError(f'Cannot read {name}: {err.strerror or err}.') from err


def dumps(tree: object) -> bytes:
    """The bytes of a pickle (protocol 4) of `tree`, which the official tools open if it describes networks as they do.

    Tensors are written contiguously. Equal trees that share their objects in the same way give equal bytes.
    Raises TypeError for anything outside the tree types, ValueError for cycles and other contents that `load` would refuse.
    """
    buffer = io.BytesIO()
    Writer(buffer.write).run(tree)
    return buffer.getvalue()


def dump(tree: object, path: str | os.PathLike) -> None:
    """Write the bytes of `dumps(tree)` to `path`, atomically, one tensor at a time."""
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        Writer(file.write).run(tree)


def _read(stream: Stream, max_objects: int) -> object:
    if problem := _not_a_pickle(stream.peek(HEAD_BYTES)):
        raise UserError(problem)
    tree = Machine(stream, Budget(max_objects, COPIES * stream.size + SPARE_BYTES), NAMES).run()
    if stream.left:
        raise UserError(f'it has {stream.left} bytes after its end: it is damaged, or several files were joined')
    try:
        versions = check_tree(tree)
    except TypeError as err:
        raise UserError(str(err)) from err
    for version in versions - {6}:
        warnings.warn(f'a persistent object has the version {version}; only version 6 is known', stacklevel=3)
    return tree


def _not_a_pickle(head: bytes) -> str | None:
    """What a file that begins with `head` is, if it is no pickle of a network; in words that say what to do."""
    text = head.lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if not head:
        return 'it is empty'
    if head.startswith(b'PK\x03\x04') and b'data.pkl' in head:
        return 'it is a torch.save checkpoint; official network pickles are plain pickles'
    if head.startswith(b'PK\x03\x04'):
        return 'it is a zip file (a dataset?)'
    if head.startswith(b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'):
        return 'it is a torch.save checkpoint in the old format; official network pickles are plain pickles'
    if head.startswith(b'\x1f\x8b'):
        return 'it is compressed with gzip; unpack it first'
    if text.startswith((b'<!doctype', b'<html', b'<?xml')):
        return 'it is a web page, not the file behind the link; download it again'
    if text.startswith(b'version https://git-lfs'):
        return 'it is a Git LFS pointer; fetch the file itself with "git lfs pull"'
    if not head.startswith(b'\x80'):
        return f'it is no binary pickle: it begins with {head[:16]!a}'
    return None
