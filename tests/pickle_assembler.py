"""Writes pickles instruction by instruction, true or false ones: what no pickler would write."""

import pickle
import struct


class Raw(bytes):
    """Instructions that push one object."""


def text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack('<I', len(raw)) + raw


def data(value: bytes) -> bytes:
    return pickle.BINBYTES + struct.pack('<I', len(value)) + value


def push(value) -> bytes:
    """Instructions that push `value`: Raw as it is, containers item by item, everything else as Python writes it."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, bytes):
        return data(value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, tuple):
        return b'(' + b''.join(map(push, value)) + b't'
    if isinstance(value, list):
        return b'](' + b''.join(map(push, value)) + b'e'
    if isinstance(value, dict):
        return b'}(' + b''.join(push(part) for item in value.items() for part in item) + b'u'
    return pickle.dumps(value, 2)[2:-1]


def name(dotted: str) -> Raw:
    module, attribute = dotted.rsplit('.', 1)
    return Raw(f'c{module}\n{attribute}\n'.encode())


def call(dotted: str, *args) -> Raw:
    return Raw(name(dotted) + push(args) + b'R')


def program(*parts: bytes, protocol: int = 4) -> bytes:
    return b'\x80' + bytes([protocol]) + b''.join(parts) + b'.'


def make(dotted: str) -> Raw:
    return Raw(name(dotted) + b')\x81')


ODICT = call('collections.OrderedDict')
SYSTEM = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}}


def storage_bytes(numel=4, raw=bytes(range(16)), *, kind='torch.FloatStorage', magic=0x1950a86a20f9469cfc6c, version=1001, system=SYSTEM,
                  entry=None, keys=('0',), count=None) -> bytes:
    entry = ('storage', name(kind), '0', 'cpu', numel, None) if entry is None else entry
    pickled = [program(push(value), protocol=2) for value in (magic, version, system)]
    count = numel if count is None else count
    return b''.join(pickled) + program(push(entry) + b'Q', protocol=2) + program(push(list(keys)), protocol=2) + struct.pack('<q', count) + raw


def storage(*args, **kwargs) -> Raw:
    return call('torch.storage._load_from_bytes', storage_bytes(*args, **kwargs))


def tensor(store=None, offset=0, size=(2, 2), stride=(2, 1), requires_grad=False, hooks=ODICT, *more) -> Raw:
    return call('torch._utils._rebuild_tensor_v2', storage() if store is None else store, offset, size, stride, requires_grad, hooks, *more)


def dtype(code='f8', state=(3, '<', None, None, None, -1, -1, 0)) -> Raw:
    return Raw(call('numpy.dtype', code, False, True) + push(state) + b'b')


def array(shape=(2,), kind=None, fortran=False, raw=bytes(16), version=1, base=('numpy.ndarray', (0,), b'b')) -> Raw:
    made = call('numpy.core.multiarray._reconstruct', name(base[0]), *base[1:])
    return Raw(made + push((version, shape, dtype() if kind is None else kind, fortran, raw)) + b'b')


def record(**changes) -> Raw:
    tables = {'_parameters': {}, '_buffers': {}, '_modules': {}}
    meta = {'type': 'class', 'version': 6, 'module_src': '', 'class_name': 'G', 'state': tables, **changes}
    return call('torch_utils.persistence._reconstruct_persistent_obj', meta)
