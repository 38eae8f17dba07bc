"""Writes a tree as a pickle of protocol 4, instruction by instruction.

Python's own pickler imports every name that it writes down; this one writes `torch_utils.persistence` and `dnnlib.util`
without having them. The calls are those that the official tools, torch 1.7 to 2.x and NumPy 1.x write.
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from m2m_stylegan.pickles_tree import (
    ARRAY_CODES,
    MAX_INT_BYTES,
    STORAGE_DTYPES,
    TORCH_MAGIC,
    TORCH_PROTOCOL,
    TORCH_SYSTEM,
    EasyDict,
    Record,
    check_tree,
    is_key,
)

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_TORCH_HEADER = b''.join(pickle.dumps(value, 2) for value in (TORCH_MAGIC, TORCH_PROTOCOL, TORCH_SYSTEM))


@dataclass(eq=False)
class Name:
    """A module and a name in it, for the reader of the pickle to look up."""

    module: str
    name: str


@dataclass(eq=False)
class Call:
    """A call for the reader of the pickle to make, with the state to set on its result if there is one."""

    function: Name
    args: tuple
    state: tuple | None = None


@dataclass(eq=False)
class StorageBytes:
    """The elements of a tensor, to be written as the bytes of a torch storage."""

    tensor: torch.Tensor


_ORDERED_DICT = Name('collections', 'OrderedDict')
_EASY_DICT = Name('dnnlib.util', 'EasyDict')
_PERSISTENT = Name('torch_utils.persistence', '_reconstruct_persistent_obj')
_PARAMETER = Name('torch._utils', '_rebuild_parameter')
_TENSOR = Name('torch._utils', '_rebuild_tensor_v2')
_STORAGE = Name('torch.storage', '_load_from_bytes')
_NEW_ARRAY = Name('numpy.core.multiarray', '_reconstruct')      # under this name for old NumPy; new NumPy still has it
_ARRAY = Name('numpy', 'ndarray')
_DTYPE = Name('numpy', 'dtype')


class Writer:
    """`run(tree)` passes the pickle of `tree` to `write`, piece by piece; raises as `pickles.dumps` does."""

    def __init__(self, write: Callable[[bytes], object]):
        self.write = write
        self.memo: dict[object, tuple[int, object]] = {}    # text or id -> index, object (kept, so that its id stays taken)

    def run(self, tree: object) -> None:
        check_tree(tree)
        self.write(pickle.PROTO + b'\x04')
        self.save(tree)
        self.write(pickle.STOP)

    def save(self, value: object) -> None:
        """Write `value`, or a reference to it if it was written before; equal texts count as the same object."""
        if isinstance(value, np.generic):
            value = value.item()
        key = value if type(value) is str else id(value)
        if key in self.memo:
            index = self.memo[key][0]
            self.write(pickle.BINGET + bytes([index]) if index < 256 else pickle.LONG_BINGET + struct.pack('<I', index))
            return
        if type(value) not in _SAVERS:
            raise TypeError(f'a {type(value).__name__} cannot be written into a network pickle')
        _SAVERS[type(value)](self, value)
        if type(value) not in _UNSHARED:
            self.memo[key] = len(self.memo), value
            self.write(pickle.MEMOIZE)

    def save_group(self, values: Iterable, instruction: bytes) -> None:
        self.write(pickle.MARK)
        for value in values:
            self.save(value)
        self.write(instruction)

    def save_items(self, mapping: dict) -> None:
        if not all(map(is_key, mapping)):
            raise TypeError('dict keys in a network pickle must be str, or int of 64 bits')
        self.save_group((part for item in mapping.items() for part in item), pickle.SETITEMS)

    def save_dict(self, value: dict) -> None:
        self.write(pickle.EMPTY_DICT)
        self.save_items(value)

    def save_ordered_dict(self, value: OrderedDict) -> None:
        self.save_call(Call(_ORDERED_DICT, ()))
        self.save_items(value)

    def save_easy_dict(self, value: EasyDict) -> None:
        self.save(_EASY_DICT)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save_items(value)

    def save_list(self, value: list) -> None:
        self.write(pickle.EMPTY_LIST)
        self.save_group(value, pickle.APPENDS)

    def save_tuple(self, value: tuple) -> None:
        self.save_group(value, pickle.TUPLE)

    def save_set(self, value: set) -> None:
        if not all(map(is_key, value)):
            raise TypeError('set elements in a network pickle must be str, or int of 64 bits')
        self.write(pickle.EMPTY_SET)
        self.save_group(sorted(value, key=lambda element: (type(element).__name__, element)), pickle.ADDITEMS)

    def save_int(self, value: int) -> None:
        if 0 <= value < 2**8:
            self.write(pickle.BININT1 + struct.pack('<B', value))
        elif 0 <= value < 2**16:
            self.write(pickle.BININT2 + struct.pack('<H', value))
        elif -2**31 <= value < 2**31:
            self.write(pickle.BININT + struct.pack('<i', value))
        else:
            raw = pickle.encode_long(value)
            if len(raw) > MAX_INT_BYTES:
                raise ValueError(f'an integer of {len(raw)} bytes is too large for a network pickle, at most {MAX_INT_BYTES}')
            self.write(pickle.LONG1 + bytes([len(raw)]) + raw)

    def save_text(self, value: str) -> None:
        self.save_sized(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, value.encode('utf-8', 'surrogatepass'))

    def save_bytes(self, value: bytes) -> None:
        self.save_sized(pickle.SHORT_BINBYTES, pickle.BINBYTES, value)

    def save_sized(self, short: bytes, long: bytes, *parts: bytes | memoryview) -> None:
        size = sum(map(len, parts))
        if size >= 2**32:
            raise ValueError(f'{size} bytes are too large for one object of a network pickle, at most {2**32 - 1}')
        self.write(short + bytes([size]) if size < 256 else long + struct.pack('<I', size))
        for part in parts:
            self.write(part)

    def save_name(self, value: Name) -> None:
        self.save(value.module)
        self.save(value.name)
        self.write(pickle.STACK_GLOBAL)

    def save_call(self, value: Call) -> None:
        self.save(value.function)
        self.save_tuple(value.args)
        self.write(pickle.REDUCE)
        if value.state is not None:
            self.save_tuple(value.state)
            self.write(pickle.BUILD)

    def save_record(self, value: Record) -> None:
        fields = ('type', 'version', 'module_src', 'class_name', 'state')     # in the order of the official writer
        self.save_call(Call(_PERSISTENT, ({field: getattr(value, field) for field in fields},)))

    def save_parameter(self, value: torch.nn.Parameter) -> None:
        self.save_call(Call(_PARAMETER, (value.detach(), value.requires_grad, OrderedDict())))

    def save_tensor(self, value: torch.Tensor) -> None:
        if value.layout != torch.strided or value.dtype not in _STORAGE_NAMES or value.device.type == 'meta':
            raise TypeError(f'a {value.dtype} tensor of layout {value.layout} on {value.device} cannot be written into a network pickle')
        elements = value.detach().cpu().contiguous()
        storage = Call(_STORAGE, (StorageBytes(elements),))
        self.save_call(Call(_TENSOR, (storage, 0, tuple(value.shape), elements.stride(), value.requires_grad, OrderedDict())))

    def save_storage_bytes(self, value: StorageBytes) -> None:
        """The legacy torch stream of one storage (torch/serialization.py); its key is constant, so that equal tensors give equal bytes."""
        count, name = value.tensor.numel(), _STORAGE_NAMES[value.tensor.dtype]
        strings = [pickle.BINUNICODE + struct.pack('<I', len(text)) + text for text in (b'storage', b'0', b'cpu')]
        persistent_id = b''.join((
            pickle.PROTO, b'\x02', pickle.MARK, strings[0], pickle.GLOBAL, b'torch\n', name.encode(), b'\n', *strings[1:],
            pickle.dumps(count, 2)[2:-1], pickle.NONE, pickle.TUPLE, pickle.BINPERSID, pickle.STOP,
        ))
        elements = memoryview(value.tensor.reshape(-1).view(torch.uint8).numpy())
        self.save_sized(pickle.SHORT_BINBYTES, pickle.BINBYTES,
                        _TORCH_HEADER, persistent_id, pickle.dumps(['0'], 2), struct.pack('<q', count), elements)

    def save_array(self, value: np.ndarray) -> None:
        code = value.dtype.str[1:]
        if code not in ARRAY_CODES:
            raise TypeError(f'a NumPy array of {value.dtype} cannot be written into a network pickle')
        native = value.astype('|b1' if code == 'b1' else f'<{code}', copy=False)
        dtype = Call(_DTYPE, (code, False, True), (3, native.dtype.str[0], None, None, None, -1, -1, 0))
        self.save_call(Call(_NEW_ARRAY, (_ARRAY, (0,), b'b'), (1, value.shape, dtype, False, native.tobytes())))


_UNSHARED = (type(None), bool, int, float, StorageBytes)
_SAVERS: dict[type, Callable] = {
    type(None): lambda writer, value: writer.write(pickle.NONE),
    bool: lambda writer, value: writer.write(pickle.NEWTRUE if value else pickle.NEWFALSE),
    int: Writer.save_int,
    float: lambda writer, value: writer.write(pickle.BINFLOAT + struct.pack('>d', value)),
    str: Writer.save_text,
    bytes: Writer.save_bytes,
    tuple: Writer.save_tuple,
    list: Writer.save_list,
    set: Writer.save_set,
    dict: Writer.save_dict,
    OrderedDict: Writer.save_ordered_dict,
    EasyDict: Writer.save_easy_dict,
    Record: Writer.save_record,
    torch.nn.Parameter: Writer.save_parameter,
    torch.Tensor: Writer.save_tensor,
    np.ndarray: Writer.save_array,
    Name: Writer.save_name,
    Call: Writer.save_call,
    StorageBytes: Writer.save_storage_bytes,
}
