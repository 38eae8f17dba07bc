"""The names that a network pickle may use, and what stands in for each: functions that build data and call nothing else.

Every argument is untrusted: counts, types and ranges are checked before anything is allocated.
"""

import io
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from m2m_stylegan.errors import UserError
from m2m_stylegan.pickles_reader import Budget, Buildable, Global, Machine, Stream
from m2m_stylegan.pickles_tree import (
    ARRAY_CODES,
    MAPPINGS,
    STORAGE_DTYPES,
    TORCH_MAGIC,
    TORCH_PROTOCOL,
    TORCH_SYSTEM,
    EasyDict,
    Record,
    TFNetwork,
    is_key,
)

MAX_DIMS = 16
TENSOR_STEPS = 20       # a tensor object costs about as much time and memory as this many plain instructions
MAX_ELEMENTS = 2**48    # with empty axes counted as 1, so that products and byte counts stay far from 64 bits


@dataclass(eq=False)
class Storage:
    """The raw elements of one tensor storage, still inside the pickle's bytes."""

    dtype: torch.dtype
    raw: memoryview


class PendingArray(Buildable):
    """A NumPy array between its creation and the instruction that brings its contents."""

    def build(self, state: object, budget: Budget) -> np.ndarray:
        _version, shape, dtype, fortran_order, raw = _expect('numpy.ndarray.__setstate__', state, int, tuple, DType, bool, bytes)
        count = _element_count('an array', shape)
        if len(raw) != count * dtype.numpy.itemsize:
            raise UserError(f'an array of shape {shape} has {len(raw)} bytes, expected {count * dtype.numpy.itemsize}')
        budget.copy(len(raw))
        flat = _array_elements(dtype.numpy, raw)
        return flat.reshape(shape, order='F' if fortran_order else 'C').copy(order='K')


class DType(Buildable):
    """A NumPy element type, numeric or boolean; its BUILD state can only confirm the native little-endian layout."""

    def __init__(self, code: str):
        self.numpy = np.dtype(code)

    def build(self, state: object, budget: Budget) -> 'DType':
        expected = (3, '|' if self.numpy.itemsize == 1 else '<', None, None, None, -1, -1, 0)
        if _expect('numpy.dtype.__setstate__', state, *map(type, expected)) != expected:
            raise UserError(f'an array of {self.numpy} is not in the plain little-endian layout, state {expected}')
        return self


class PendingNetwork(Buildable):
    """A TensorFlow network between its creation and the instruction that brings its state."""

    def build(self, state: object, budget: Budget) -> TFNetwork:
        return TFNetwork(state)     # check_tree looks whether it is a dict


def _expect(name: str, args: object, *types: type | tuple[type, ...]) -> tuple:
    """Return `args` if it is a tuple of exactly these types (no sub-classes: a bool is no int here)."""
    if type(args) is tuple and len(args) == len(types):
        pairs = zip(args, types, strict=True)
        if all(type(arg) in (kind if type(kind) is tuple else (kind,)) for arg, kind in pairs):
            return args
    found = [type(arg).__name__ for arg in args[:10]] if type(args) is tuple else type(args).__name__
    raise UserError(f'{name} is given arguments of the wrong number or types: {found}')


def _element_count(what: str, shape: tuple) -> int:
    """Product of `shape`, after checking that it is one."""
    if len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape) or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise UserError(f'{what} has the impossible shape {_short(shape)}')
    return math.prod(shape)


def _short(values: tuple) -> str:
    return str([value if type(value) is int else type(value).__name__ for value in values[:MAX_DIMS]])[:200]


def _persistent_object(args: tuple, budget: Budget) -> Record:
    name = 'torch_utils.persistence._reconstruct_persistent_obj'
    meta, = _expect(name, args, MAPPINGS)
    fields = {'type': str, 'version': int, 'module_src': str, 'class_name': str, 'state': dict}
    wrong = [key for key, kind in fields.items() if type(meta.get(key)) is not kind]
    if wrong or len(meta) != len(fields):
        raise UserError(f'a persistent object has wrong or missing fields: {wrong}, {len(meta)} in all, expected {list(fields)}')
    if meta['type'] != 'class':
        raise UserError(f"a persistent object is of type {meta['type'][:100]!a}, expected 'class'")
    return Record(**meta)


def _ordered_dict(args: tuple, budget: Budget) -> OrderedDict:
    _expect('collections.OrderedDict', args)
    return OrderedDict()


def _set(args: tuple, budget: Budget) -> set:
    items, = _expect('set', args, list)
    budget.step(len(items))
    if not all(map(is_key, items)):
        raise UserError('a set has elements other than str and int')
    return set(items)


def _encode(args: tuple, budget: Budget) -> bytes:
    text, encoding = _expect('_codecs.encode', args, str, str)
    if encoding != 'latin1':
        raise UserError(f'_codecs.encode is asked for {encoding[:100]!a}, expected latin1')
    budget.copy(len(text))
    try:
        return text.encode('latin1')
    except UnicodeEncodeError as err:
        raise UserError('it is damaged: a byte string has characters beyond Latin-1') from err


def _dtype(args: tuple, budget: Budget) -> DType:
    code, _align, _copy = _expect('numpy.dtype', args, str, (bool, int), (bool, int))
    if code not in ARRAY_CODES:
        raise UserError(f'an array has elements of type {code[:100]!a}, expected one of {", ".join(ARRAY_CODES)}')
    return DType(code)


def _scalar(args: tuple, budget: Budget) -> bool | int | float:
    dtype, raw = _expect('numpy scalar', args, DType, bytes)
    if len(raw) != dtype.numpy.itemsize:
        raise UserError(f'a NumPy scalar of type {dtype.numpy} has {len(raw)} bytes, expected {dtype.numpy.itemsize}')
    return _array_elements(dtype.numpy, raw)[0].item()


def _array_elements(dtype: np.dtype, raw: bytes) -> np.ndarray:
    if dtype.kind == 'b':
        _check_booleans(raw)
    return np.frombuffer(raw, dtype)


def _check_booleans(raw: bytes | memoryview) -> None:
    # A boolean byte other than 0 and 1 gives undefined results in C++ code that trusts it.
    if np.any(np.frombuffer(raw, np.uint8) > 1):
        raise UserError('it is damaged: boolean data contains values other than 0 and 1')


def _new_array(args: tuple, budget: Budget) -> PendingArray:
    cls, shape, code = _expect('numpy _reconstruct', args, Global, tuple, bytes)
    if cls is not _NDARRAY or _short(shape) != '[0]' or code != b'b':
        raise UserError('it makes a NumPy array in a way that network pickles do not')
    return PendingArray()


def _storage(args: tuple, budget: Budget) -> Storage:
    data, = _expect('torch.storage._load_from_bytes', args, bytes)
    try:
        return _parse_storage(data, budget)
    except UserError as err:
        raise UserError(f'in the bytes of a tensor: {err}') from err


def _parse_storage(data: bytes, budget: Budget) -> Storage:
    """Parse the legacy torch stream of one storage (torch/serialization.py): five pickles, the element count, the elements."""
    stream = Stream(io.BytesIO(data), len(data))

    def read(names: Mapping | None = None, persistent: Callable | None = None) -> object:
        return Machine(stream, budget, names or {}, persistent).run()

    for expected in (TORCH_MAGIC, TORCH_PROTOCOL, TORCH_SYSTEM):
        if not _same(read(), expected):
            raise UserError('they do not begin like the torch format (protocol 1001, little-endian)')
    entry, = _expect('a storage', read(_STORAGE_NAMES, lambda persistent_id: (persistent_id,)), tuple)
    tag, cls, key, _location, count, _view = _expect('a storage', entry, str, Global, str, str, int, type(None))
    if tag != 'storage' or not _same(read(), [key]):
        raise UserError('they hold something other than one storage')
    dtype = STORAGE_DTYPES[cls.name]
    stored_count = stream.number('<q')
    if stored_count != count or stream.left != count * dtype.itemsize:
        raise UserError(f'{_short((count,))} elements are announced, then [{stored_count}]; of {dtype.itemsize} bytes each, '
                        f'but {stream.left} bytes follow')
    return Storage(dtype, memoryview(data)[len(data) - stream.left:])


def _same(value: object, expected: object) -> bool:
    """Equality of plain values with equal types at every level; `value` is untrusted, `expected` bounds the work."""
    if type(value) is not type(expected):
        return False
    if type(value) is dict:
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in expected)
    if type(value) is list:
        return len(value) == len(expected) and all(map(_same, value, expected))
    return value == expected


def _tensor(args: tuple, budget: Budget) -> torch.Tensor:
    """Any metadata (a 7th argument: conjugate and negative bits) would change the meaning of the elements; network files have none."""
    budget.step(TENSOR_STEPS)
    types = (Storage, int, tuple, tuple, bool, OrderedDict, (type(None), *MAPPINGS))
    has_metadata = len(args) == len(types)
    storage, offset, size, stride, requires_grad, *extras = _expect('torch._utils._rebuild_tensor_v2', args, *types[:6 + has_metadata])
    numel = len(storage.raw) // storage.dtype.itemsize
    count = _element_count('a tensor', size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False) if type(step) is int)
    problems = [
        (any(extras), 'has hooks or metadata'),
        (not 0 <= offset <= numel, f'starts at element {_short((offset,))} of {numel}'),
        (len(stride) != len(size) or not all(type(step) is int and 0 <= step <= (max(numel, 1) if count else MAX_ELEMENTS) for step in stride),
         f'has the shape {size} and the impossible strides {_short(stride)}'),
        (count > numel, f'has the shape {size}, more than the {numel} elements that are stored'),
        (count and last >= numel, f'reaches element {_short((last,))} of {numel}'),
        (requires_grad and not storage.dtype.is_floating_point, f'asks for gradients with elements of type {storage.dtype}'),
    ]
    if found := [text for wrong, text in problems if wrong]:
        raise UserError(f'a tensor is damaged: it {", and it ".join(found)}')
    if count == 0:
        return torch.empty(size, dtype=storage.dtype, requires_grad=requires_grad)
    budget.copy(len(storage.raw))
    if storage.dtype == torch.bool:
        _check_booleans(storage.raw)
    # frombuffer needs writable memory, the clone drops elements outside the view; both copies are charged as one.
    elements = torch.frombuffer(bytearray(storage.raw), dtype=storage.dtype)
    return elements.as_strided(size, stride, offset).clone().requires_grad_(requires_grad)


def _parameter(args: tuple, budget: Budget) -> torch.nn.Parameter:
    tensor, requires_grad, hooks = _expect('torch._utils._rebuild_parameter', args, torch.Tensor, bool, OrderedDict)
    if hooks or (requires_grad and not tensor.is_floating_point()):
        raise UserError('a parameter has hooks, or asks for gradients without being floating-point')
    return torch.nn.Parameter(tensor.detach(), requires_grad)


_NDARRAY = Global('numpy.ndarray')
_STORAGE_NAMES = {('torch', name): Global(name) for name in STORAGE_DTYPES}


def _table(*entries: Global) -> dict[tuple[str, str], Global]:
    return {tuple(entry.name.rsplit('.', 1)): entry for entry in entries}


NAMES = _table(
    Global('torch_utils.persistence._reconstruct_persistent_obj', _persistent_object),
    Global('collections.OrderedDict', _ordered_dict),
    Global('builtins.set', _set),
    Global('__builtin__.set', _set),                # protocol 2 uses Python 2's module names
    Global('_codecs.encode', _encode),              # protocol 2 has no byte strings
    Global('torch._utils._rebuild_parameter', _parameter),
    Global('torch._utils._rebuild_tensor_v2', _tensor),
    Global('torch.storage._load_from_bytes', _storage),
    Global('numpy.dtype', _dtype),
    _NDARRAY,
    *(Global(f'numpy.{core}.multiarray.{name}', function) for core in ('core', '_core')
      for name, function in (('scalar', _scalar), ('_reconstruct', _new_array))),
    Global('dnnlib.util.EasyDict', new=EasyDict),
    Global('dnnlib.EasyDict', new=EasyDict),
    Global('dnnlib.tflib.network.Network', new=PendingNetwork),
)
