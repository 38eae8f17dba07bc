"""The plain tree that a network pickle is read into and written from: its types, its limits and its final check."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from m2m_stylegan.errors import UserError

MAX_DEPTH = 64          # Official networks nest to about 20; the limit keeps recursive code downstream far from Python's own.
MAX_INT_BYTES = 16      # Larger integers occur nowhere, and arithmetic on them is a way to burn time.

# The storages that torch can put into a pickle, by the class name that stands there (torch/storage.py).
STORAGE_DTYPES = {
    'FloatStorage': torch.float32, 'DoubleStorage': torch.float64, 'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ShortStorage': torch.int16, 'CharStorage': torch.int8,
    'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
}

# What the bytes of a storage begin with: the format of torch before 1.6, which pickle.dump of a tensor still uses (torch/serialization.py).
TORCH_MAGIC = 0x1950a86a20f9469cfc6c
TORCH_PROTOCOL = 1001
TORCH_SYSTEM = {'protocol_version': TORCH_PROTOCOL, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}}

# Array element types by their numpy code: numbers and booleans; never objects, strings or records.
ARRAY_CODES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')


class EasyDict(dict):
    """Stands for `dnnlib.util.EasyDict`: an ordinary dict that remembers it has to be written under that name."""

    __slots__ = ()


@dataclass(eq=False)
class Record:
    """A persistent object of the official code (`torch_utils.persistence`), unexecuted.

    `module_src` is the source text that the object brought along, kept as text; `state` is the instance dictionary.
    """

    class_name: str
    module_src: str = field(repr=False)
    state: dict = field(repr=False)
    type: str = 'class'
    version: int = 6


@dataclass(eq=False)
class TFNetwork:
    """A `dnnlib.tflib.network.Network` of a legacy TensorFlow pickle; `state` is what it was pickled with."""

    state: dict | None = field(default=None, repr=False)


MAPPINGS = (dict, OrderedDict, EasyDict)
LEAVES = {
    type(None), bool, int, float, str, bytes, torch.Tensor, torch.nn.Parameter, np.ndarray,
    *(np.dtype(code).type for code in ARRAY_CODES),     # NumPy scalars: written as Python ones, never read
}


def is_key(value: object) -> bool:
    """Whether `value` may be a dict key or a set element: exactly str, or an integer of at most 64 bits.

    Other types have unsalted hashes, so that thousands of equal ones could be written down to make a dict take quadratic time.
    """
    return type(value) is str or (type(value) is int and -2**63 <= value < 2**64)


def check_tree(root: object) -> set[int]:
    """Raise unless `root` consists of tree types only (TypeError), contains no cycle and nests at most MAX_DEPTH deep (UserError).

    Returns the versions of all persistent objects. Every object is visited once, however often it is referred to: a few
    hundred bytes of pickle can name 2^100 paths.
    """
    heights: dict[int, int] = {}
    versions: set[int] = set()
    for node in _post_order(root):
        height = heights[id(node)] = 1 + max((heights.get(id(child), 0) for child in _children(node)), default=0)
        if height > MAX_DEPTH:
            raise UserError(f'the contents are nested deeper than {MAX_DEPTH} levels')
        if type(node) is Record:
            versions.add(node.version)
    return versions


def _post_order(root: object) -> Iterator[object]:
    """Every container once, after those that it holds; without recursion, because the depth is not known to be sane yet."""
    path = [(root, iter(_children(root)))]
    seen, on_path = {id(root)}, {id(root)}
    while path:
        node, children = path[-1]
        for child in children:
            if id(child) in on_path:
                raise UserError(f'a {type(child).__name__} contains itself')
            if id(child) not in seen and type(child) not in LEAVES:
                path.append((child, iter(_children(child))))
                seen.add(id(child))
                on_path.add(id(child))
                break
        else:
            path.pop()
            on_path.remove(id(node))
            yield node


def _children(node: object) -> Iterable[object]:
    kind = type(node)
    if kind in LEAVES or kind is set:
        return ()
    if kind in MAPPINGS:
        return node.values()
    if kind in (list, tuple):
        return node
    if kind is Record:
        _check_state(node)
        return (node.state,)
    if kind is TFNetwork:
        if type(node.state) is not dict:
            raise UserError(f'a TensorFlow network has a {type(node.state).__name__} as its state, expected a dict')
        return (node.state,)
    raise TypeError(f'a {kind.__name__} stands where data is expected')


def _check_state(record: Record) -> None:
    """A module's state has the three tables that hold tensors and sub-modules (torch.nn.Module); hooks and options are not looked at."""
    name, problems = record.class_name[:100], []
    if type(record.state) is not dict:
        raise UserError(f'the state of {name!a} is a {type(record.state).__name__}, expected a dict')
    for table, types in (('_parameters', (torch.nn.Parameter,)), ('_buffers', (torch.Tensor,)), ('_modules', (Record,))):
        entries = record.state.get(table)
        if type(entries) not in MAPPINGS:
            problems.append(f'{table} is a {type(entries).__name__}, expected a dict')
            continue
        wrong = [key for key, value in entries.items() if type(key) is not str or (value is not None and type(value) not in types)]
        problems += [f'{table}[{str(key)[:100]!a}] is a {type(entries[key]).__name__}' for key in wrong[:5]]
    if problems:
        raise UserError(f'the state of {name!a} is not that of a network module: ' + '; '.join(problems))
