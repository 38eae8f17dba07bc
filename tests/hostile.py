"""A corpus of hostile and damaged pickles, the same in every run."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pickle_stubs as stubs
import torch
from pickle_assembler import ODICT, SYSTEM, Raw, array, call, data, dtype, make, name, program, push, record, storage, storage_bytes, tensor, text

from m2m_stylegan.pickles_globals import NAMES

CANARY = 'canary'


class Case(NamedTuple):
    name: str
    data: bytes
    may_load: bool = False      # damage may hit tensor data or options, random pickles may be harmless


def good_pickles() -> Iterator[tuple[int, bytes]]:
    """Small networks that Python and torch pickled, in every protocol."""
    weights = {'weight': torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)), 'bias': None}
    buffers = {'w_avg': torch.zeros(3), 'on': torch.tensor([True, False])}
    inner = stubs.persistent('Layer', 'class Layer: pass\n' * 3, stubs.module_state(weights, buffers, gain=np.float64(0.5), names={'a'}))
    outer = stubs.persistent('G', 'class Layer: pass\n' * 3, stubs.module_state(
        modules={'fc': inner}, _init_kwargs=stubs.EasyDict(z_dim=4), sizes=np.arange(3)))
    for protocol in (2, 3, 4):
        yield protocol, stubs.real_dumps({'G': outer, 'D': inner, 'training_set_kwargs': {'path': '/data'}}, protocol)


def evil_names(folder: str) -> list[tuple[str, tuple]]:
    """Things that would leave a trace if they ran, with their arguments; and gadgets that allow-lists have let through elsewhere."""
    touch = f'open({str(Path(folder, CANARY))!r}, "w").close()'
    shell = f'touch {Path(folder, CANARY)}'
    return [
        ('os.system', (shell,)), ('posix.system', (shell,)), ('nt.system', (shell,)), ('subprocess.call', (['sh', '-c', shell],)),
        ('subprocess.Popen', (['sh', '-c', shell],)), ('builtins.eval', (touch,)), ('builtins.exec', (touch,)), ('__builtin__.eval', (touch,)),
        ('builtins.open', (str(Path(folder, CANARY)), 'w')), ('io.open', (str(Path(folder, CANARY)), 'w')), ('_io.FileIO', (CANARY, 'w')),
        ('pathlib.Path.touch', (str(Path(folder, CANARY)),)), ('shutil.copy', ('/etc/hostname', str(Path(folder, CANARY)))),
        ('builtins.getattr', (name('collections.OrderedDict'), '__class__')), ('builtins.__import__', ('os',)), ('importlib.import_module', ('os',)),
        ('torch.load', (CANARY,)), ('torch.hub.load', ('a', 'b')), ('torch.serialization.load', (CANARY,)), ('torch._C.x', ()),
        ('torch._utils._rebuild_parameter_with_state', (tensor(), True, ODICT, {})), ('torch._utils._rebuild_from_type_v2', (shell,)),
        ('torch.jit.unsupported_tensor_ops.execWrapper', (touch,)), ('torch.Tensor', (3,)), ('torch.Size', ([1],)), ('torch.FloatStorage', (2**40,)),
        ('numpy.testing._private.utils.runstring', (touch, {})), ('numpy.load', (CANARY,)), ('numpy.core.multiarray.fromfile', (CANARY,)),
        ('numpy.core.numeric._frombuffer', (b'',)), ('numpy.core.multiarray.__class__', ()), ('collections.OrderedDict.fromkeys', ([1],)),
        ('collections.defaultdict', (name('os.getcwd'),)), ('functools.partial', (name('os.system'), shell)), ('operator.attrgetter', ('system',)),
        ('_codecs.lookup', ('hex',)), ('codecs.encode', ('a', 'rot13')), ('copyreg._reconstructor', (name('builtins.object'), 1)),
        ('copy_reg._reconstructor', (1,)), ('copyreg.__newobj__', (1,)), ('types.CodeType', ()), ('types.FunctionType', ()), ('pickle.loads', (b'',)),
        ('dnnlib.util.open_url', ('http://localhost/',)), ('dnnlib.util.call_func_by_name', ('os.system',)), ('training.networks.Generator', ()),
        ('m2m_stylegan.pickles.load', (CANARY,)), ('builtins.print', ('x',)), ('builtins.dict', ()), ('builtins.bytearray', (2**40,)),
        ('ctypes.CDLL', ('libc.so.6',)), ('code.interact', ()), ('webbrowser.open', ('x',)), ('socket.create_connection', (('localhost', 1),)),
    ]


def executing(folder: str) -> Iterator[Case]:
    """Every way that pickles have of calling something, with names outside the list, also deep inside an otherwise good file."""
    for dotted, args in evil_names(folder):
        module, attribute = dotted.rsplit('.', 1)
        function, packed = name(dotted), push(args)
        stack_global = text(module) + text(attribute) + b'\x93'
        ways = {
            'GLOBAL': function, 'STACK_GLOBAL': stack_global, 'REDUCE': function + packed + b'R', 'STACK_GLOBAL REDUCE': stack_global + packed + b'R',
            'NEWOBJ': function + packed + b'\x81', 'NEWOBJ_EX': function + packed + b'}\x92', 'BUILD': function + b')R' + push({'a': 1}) + b'b',
            'INST': b'(' + b''.join(map(push, args)) + b'i' + function[1:], 'OBJ': b'(' + function + b''.join(map(push, args)) + b'o',
            'in a record': record(state=Raw(function + packed + b'R')), 'as dict value': push({'G': Raw(function + packed + b'R')}),
            'via EasyDict': make('dnnlib.util.EasyDict') + push({'__class__': Raw(function)}) + b'b',
            'as hooks': tensor(hooks=Raw(function + packed + b'R')), 'as module text': record(module_src=Raw(function)),
            'as set': call('builtins.set', [Raw(function)]), 'as storage': storage(entry=('storage', function, '0', 'cpu', 4, None)),
            'called in storage': storage(entry=('storage', Raw(function + packed + b'R'), '0', 'cpu', 4, None)),
        }
        yield from (Case(f'{dotted} {way}', program(code)) for way, code in ways.items())
    for code in (b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00', b'Pid\n', text('id') + b'Q', b'\x97', data(b'a') + b'\x98',
                 b'\x96' + struct.pack('<Q', 2**40), b'N2', b'NN0', b'(N1', b"S'a'\n", b'I1\n', b'L1L\n', b'F1.0\n', b'U\x01a', b'T\x01\x00\x00\x00a',
                 b'Va\n', b'(l', b'(d', b'Np1\n', b'Ng1\n', b'\x8b' + struct.pack('<i', 2**31 - 1), b'\x8d' + struct.pack('<Q', 2**40),
                 b'\x8e' + struct.pack('<Q', 2**40), b'(\x91', b'\x80\x04N', b'\x00N', b'\xffN', b'N\x80\x04'):
        yield Case(f'instruction {code[:4]!r}', program(code))


ODD = {
    'none': None, 'true': True, 'int': 7, 'negative': -1, 'huge': 2**63, 'long': -2**120, 'float': 0.5, 'text': 'latin1', 'utf-8': 'utf-8',
    'bytes': b'12345678', 'tuple': (), 'list': [], 'lists': [[]], 'dict': {}, 'odict': ODICT, 'easy': make('dnnlib.util.EasyDict'),
    'tensor': tensor(), 'storage': storage(), 'dtype': dtype(), 'bare dtype': call('numpy.dtype', 'f8', False, True), 'array': array(),
    'pending': call('numpy.core.multiarray._reconstruct', name('numpy.ndarray'), (0,), b'b'), 'network': make('dnnlib.tflib.network.Network'),
    'name': name('numpy.ndarray'), 'record': record(), 'parameter': call('torch._utils._rebuild_parameter', tensor(), True, ODICT),
    'mark': Raw(b'('), 'nothing': Raw(b''),
}


# Odd values that some names take, and rightly.
HARMLESS = {
    'OrderedDict': ('with tuple', 'of only nothing', 'and nothing'),
    'EasyDict': ('new with tuple', 'new of nothing'),
    'set': ('of only list', 'argument 0 list', 'and nothing'),
    'encode': ('argument 0 text', 'argument 0 utf-8', 'argument 1 text', 'and nothing'),
    'scalar': ('argument 0 dtype', 'argument 0 bare dtype', 'argument 1 bytes', 'and nothing'),
    '_rebuild_parameter': ('argument 0 tensor', 'argument 1 true', 'argument 2 odict', 'and nothing'),
    '_rebuild_tensor_v2': ('argument 0 storage', 'argument 4 true', 'argument 5 odict', 'and nothing',
                           *(f'argument 6 {odd}' for odd in ('none', 'dict', 'odict', 'easy', 'nothing'))),
}


def misused() -> Iterator[Case]:
    """The names that are allowed, with arguments and states that they never have."""
    good_args = {
        '_reconstruct_persistent_obj': ({'type': 'class', 'version': 6, 'module_src': '', 'class_name': 'G', 'state': {}},), 'OrderedDict': (),
        'set': ([1],), 'encode': ('a', 'latin1'), '_rebuild_parameter': (tensor(), True, ODICT),
        '_rebuild_tensor_v2': (storage(), 0, (2,), (1,), False, ODICT, None), '_load_from_bytes': (storage_bytes(),), 'dtype': ('f8', False, True),
        'ndarray': ((2,),), 'scalar': (dtype(), bytes(8)), '_reconstruct': (name('numpy.ndarray'), (0,), b'b'), 'EasyDict': (), 'Network': (),
    }
    for module, attribute in NAMES:
        dotted, args = f'{module}.{attribute}', good_args[attribute]
        for odd, value in ODD.items():
            ways = {
                'of only': call(dotted, value), 'and': call(dotted, *args, value), 'with': name(dotted) + push(value) + b'R',
                'new with': name(dotted) + push(value) + b'\x81', 'new of': name(dotted) + push((value,)) + b'\x81',
                **{f'argument {i}': call(dotted, *args[:i], value, *args[i + 1:]) for i in range(len(args))},
            }
            for way, code in ways.items():
                yield Case(f'{dotted} {way} {odd}', program(code), f'{way} {odd}' in HARMLESS.get(attribute, ()))
    for target, made in ODD.items():
        for odd, value in ODD.items():
            yield Case(f'BUILD {target} with {odd}', program(push(made) + push(value) + b'b'), (target, odd) == ('network', 'dict'))
            yield Case(f'BUILD {target} with attributes {odd}', program(push(made) + push((None, {'__class__': value})) + b'b'))
        for code in (*(bytes([code]) for code in b'R\x81bsuae\x90\x93Q02t\x85\x86\x87'), b'q\x00h\x01', b'h\x00'):
            yield Case(f'{target} then {code!r}', program(push(made) + code), code in (b'\x85', b't'))
        for code in (b'e', b'u', b'\x90'):
            for items in (b'', b'K\x01', b'K\x01K\x02'):
                fits = (target in ('list', 'lists') and code == b'e') or (target in ('dict', 'odict', 'easy') and code == b'u' and len(items) != 2)
                yield Case(f'{target} gets {items!r} by {code!r}', program(push(made) + b'(' + items + code), fits)
        is_key = target in ('int', 'negative', 'huge', 'text', 'utf-8')
        yield Case(f'key {target}', program(b'}' + push(made) + b'Ns'), is_key)
        yield Case(f'element {target}', program(b'\x8f(' + push(made) + b'\x90'), is_key or target == 'nothing')
        yield Case(f'state {target}', program(record(state=made)))
        for table in ('_parameters', '_buffers', '_modules'):
            tables = {'_parameters': {}, '_buffers': {}, '_modules': {}, table: made}
            yield Case(f'{table} {target}', program(record(state=tables)), target in ('dict', 'odict', 'easy'))
            may_load = target in ('none', 'tensor', 'parameter', 'record')
            yield Case(f'{table} entry {target}', program(record(state={**tables, table: {'w': made}})), may_load)


def damaged_tensors() -> Iterator[Case]:
    """Every bound of a tensor, an array or their bytes, overstepped."""
    sizes = [
        ((2, 2), (2, 2)), ((5,), (1,)), ((4,), (2,)), ((2, 2), (-1, 1)), ((-2, 2), (2, 1)), ((2**40,), (0,)), ((2**62, 2), (0, 0)), ((2, 2), (1,)),
        ((2,), (2, 1)), ((0, 2**62), (1, 1)), ((2**20,) * 9 + (0,), (1,) * 10), ((1,) * 17, (1,) * 17), ((2.0, 2), (2, 1)), ((True, 2), (2, 1)),
        ((2, 2), (2, True)), ((2, 2), (2**63, 1)), ((1,), (2**70,)), ((2**100,), (1,)), (([2],), (1,)), ((2, 2), (None, 1)), (('2',), (1,)),
        ((8,), (0,)), ((0,), (2**63,)), ((3, 1), (1, 5)), ((2, 2), (0, 4)),
    ]
    yield from (Case(f'size {size} stride {stride}', program(tensor(None, 0, size, stride))) for size, stride in sizes)
    yield from (Case(f'offset {offset}', program(tensor(None, offset))) for offset in (1, 4, 5, -1, 2**31, 2**63, -2**63, 2**100))
    yield from (Case(f'numel {numel}', program(tensor(storage(numel)), b'')) for numel in (0, 3, 5, -1, -4, 2**32, 2**61, 2**62, 2**63 - 1, -2**63))
    yield from (Case(f'count {count}', program(tensor(storage(count=count)), b'')) for count in (0, 3, 5, -4, 2**61, -2**63))
    yield from (Case(f'{n} bytes', program(tensor(storage(raw=bytes(n))), b'')) for n in (0, 1, 15, 17, 32))
    hooks = Raw(ODICT + push('hook') + b'K\x01s')
    yield Case('tensor hooks', program(tensor(hooks=hooks)))
    yield Case('tensor metadata', program(tensor(None, 0, (2, 2), (2, 1), False, ODICT, {'neg': True})))
    yield Case('parameter hooks', program(call('torch._utils._rebuild_parameter', tensor(), True, hooks)))
    for kind in ('LongStorage', 'BoolStorage'):
        whole = tensor(storage(1, bytes(8 if kind == 'LongStorage' else 1), kind=f'torch.{kind}'), 0, (), ())
        yield Case(f'tensor with gradients of {kind}', program(Raw(whole[:whole.rindex(ODICT) - 1] + b'\x88' + ODICT + b'tR')))
        yield Case(f'gradients of {kind}', program(call('torch._utils._rebuild_parameter', whole, True, ODICT)))
    kinds = ['DoubleStorage', 'HalfStorage', 'LongStorage', 'ByteStorage', 'BoolStorage', 'ComplexFloatStorage', 'UntypedStorage', 'Tensor', 'load']
    yield from (Case(f'kind {kind}', program(tensor(storage(kind=f'torch.{kind}')))) for kind in kinds)
    yield Case('booleans', program(tensor(storage(4, b'\x00\x01\x02\xff', kind='torch.BoolStorage'))))
    evil = Raw(call('os.system', 'true'))
    for value in (0, 1, None, 'x', evil, [], SYSTEM, 2**120, Raw(text('a') + b'Q'), name('torch.FloatStorage'), Raw(b''), Raw(b'NN')):
        yield Case(f'magic {value!r:.30}', program(tensor(storage(magic=value))))
        yield Case(f'version {value!r:.30}', program(tensor(storage(version=value))))
        yield Case(f'keys {value!r:.30}', program(tensor(storage(keys=(value,)))))
        if value is not SYSTEM:
            yield Case(f'system {value!r:.30}', program(tensor(storage(system=value))))
        for i in range(6):
            entry = ['storage', name('torch.FloatStorage'), '0', 'cpu', 4, None]
            if value is not entry[i] and not (i == 3 and value == 'x') and not (i == 1 and isinstance(value, Raw) and b'FloatS' in value):
                yield Case(f'entry {i} {value!r:.30}', program(tensor(storage(entry=(*entry[:i], value, *entry[i + 1:])))))
    for change in ({'protocol_version': 1000}, {'little_endian': False}, {'little_endian': 1}, {'type_sizes': {}}, {'extra': 0}):
        yield Case(f'system {change}', program(tensor(storage(system={**SYSTEM, **change}))))
    whole = storage_bytes()
    for n in range(len(whole)):
        yield Case(f'storage cut to {n}', program(tensor(call('torch.storage._load_from_bytes', whole[:n]))))
    scalar = 'numpy.core.multiarray.scalar'
    codes = ['O', 'O8', 'V8', 'S8', 'U2', 'M8', 'M8[s]', 'm8', 'c8', 'g', 'f16', 'f8,f8', '', 'f', 'i3', '>f8', '<f8', 'object', 'x' * 5000, '\x1b[J']
    yield from (Case(f'dtype {code[:20]}', program(call(scalar, call('numpy.dtype', code, False, True), bytes(8)))) for code in codes)
    rest = (None, None, None, -1, -1, 0)
    states = [
        (4, '<', *rest), (3, '>', *rest), (3, '|', *rest), (3, '\x1b' * 5000, *rest), (), (3, '<'), [3, '<'], None, {},
        (3, '<', None, ('a',), {'a': 1}, 8, 1, 27), (3, '<', (name('numpy.ndarray'), (2,)), None, None, -1, -1, 63),
    ]
    yield from (Case(f'dtype state {state!r:.60}', program(array(kind=dtype(state=state)))) for state in states)
    shapes = [(3,), (1,), (-2,), (2, 2), (2**62,), (2**61, 0), (2**32, 2**32), (0, 2**62), (2.0,), (True, 2), [2], None, 2, (1,) * 40, ('2',)]
    yield from (Case(f'array {shape!r:.40}', program(array(shape))) for shape in shapes)
    boolean = dtype('b1', (3, '|', None, None, None, -1, -1, 0))
    arrays = {
        'short': array(raw=bytes(15)), 'text': array(raw='ab'), 'objects': array(raw=[1, 2]), 'order': array(fortran=2),
        'version': array(version=None), 'dtype': array(kind='f8'), 'class': array(base=('dnnlib.util.EasyDict', (0,), b'b')),
        'new shape': array(base=('numpy.ndarray', (2**40,), b'b')), 'letter': array(base=('numpy.ndarray', (0,), b'O')),
        'bools': array((16,), boolean, raw=b'\x02' * 16), 'twice': Raw(array() + push((1, (2,), dtype(), False, bytes(16))) + b'b'),
        'bool scalar': call(scalar, boolean, b'\x05'), 'scalar bytes': call(scalar, dtype(), bytes(7)),
        'scalar memory': call(scalar, dtype(), bytes(2**20)),
    }
    yield from (Case(f'array {what}', program(code)) for what, code in arrays.items())


def bombs() -> Iterator[Case]:
    """Little files that claim, copy, nest or repeat a lot."""
    for length in (2**20, 2**31 - 1, 2**32 - 1):
        for code in (b'B', b'X', b'T', b'\x8b'):
            yield Case(f'{code!r} of {length}', program(code + struct.pack('<I', length) + b'abc'))
    for length in (2**31, 2**40, 2**63 - 1, 2**64 - 1):
        for code in (b'\x8d', b'\x8e', b'\x96', b'\x95'):
            yield Case(f'{code!r} of {length}', program(code + struct.pack('<Q', length) + b'abc'))
    yield Case('frame past the end', program(b'\x95' + struct.pack('<Q', 10), b'N'))
    yield Case('memo index', program(b'Nr' + struct.pack('<I', 2**32 - 1)), True)
    yield Case('memo indices', program(b'(', *(b'Nr' + struct.pack('<I', 2**32 - 1 - 2**20 * i) for i in range(50)), b't'), True)
    yield Case('memo read', program(b'Nj' + struct.pack('<I', 2**32 - 1)))
    yield Case('long', program(b'\x8a\xff' + bytes(255)))
    odict, easy, network = call('collections.OrderedDict'), make('dnnlib.util.EasyDict'), make('dnnlib.tflib.network.Network')
    nests = {'list': (b']', b'a'), 'marked list': (b'](', b'e'), 'tuple': (b'', b'\x85'), 'mark': (b'(', b't'), 'dict': (b'}K\x00', b's'),
             'ordered dict': (odict + b'K\x00', b's'), 'easy dict': (easy + b'K\x00', b's'), 'network': (network + b'}K\x00', b'sb'),
             'open mark': (b'(', b''), 'open list': (b'](', b'')}
    for what, (down, up) in nests.items():
        for depth in (100, 30_000):
            yield Case(f'{depth} times {what}', program(down * depth + b'N' + up * depth))
            yield Case(f'{depth} times {what} in a storage', program(storage(entry=Raw(down * depth + b'N' + up * depth))))
    doubling = b''.join(b'h' + bytes([i, ord('h'), i]) + b'\x86\x94' for i in range(250))
    yield Case('2^60 paths', program(b'(', b'N\x94', doubling[:60 * 6], b't'), True)
    yield Case('2^250 paths', program(b'(', b'N\x94', doubling, b't'))
    cycles = {'list': b']\x94h\x00a', 'dict': b'}\x94K\x00h\x00s', 'through tuple': b']\x94h\x00\x85a', 'ordered dict': odict + b'\x94K\x00h\x00s',
              'long': b']\x94' + b']' * 40 + b'h\x00' + b'a' * 41,
              'record': b'}\x94(' + b''.join(text(table) + b'}' for table in ('_parameters', '_buffers', '_modules')) + b'u' + b'K\x00'
                        + record(state=Raw(b'h\x00')) + b's'}
    yield from (Case(f'cycle {what}', program(code)) for what, code in cycles.items())
    mebibyte, many = bytes(2**20), 20_000
    copies = {
        'sets': ('builtins.set', (list(range(1000)),), many),
        'tensors': ('torch._utils._rebuild_tensor_v2', (storage(2**18, mebibyte), 0, (1,), (1,), False, ODICT), many),
        'small tensors': ('torch._utils._rebuild_tensor_v2', (storage(), 0, (1,), (1,), False, ODICT), 60_000),
        'storages': ('torch.storage._load_from_bytes', (storage_bytes(2**18, mebibyte),), 3 * many),
        'texts': ('_codecs.encode', ('a' * 2**20, 'latin1'), many),
    }
    for what, (function, args, count) in copies.items():
        yield Case(f'many {what}', program(b'(', name(function), b'\x94', push(args), b'\x94R', b'h\x00h\x01R' * count, b't'))
    state = push((1, (2**17,), dtype(), False, mebibyte))
    new_array = name('numpy.core.multiarray._reconstruct') + b'\x94' + push((name('numpy.ndarray'), (0,), b'b')) + b'\x94R'
    yield Case('many arrays', program(b'(', new_array, state, b'\x94b', b'h\x00h\x01Rh\x02b' * many, b't'))
    for what, code in {'sets': b'\x8f', 'marks': b'(', 'memos': b'\x94'}.items():
        yield Case(f'very many {what}', program(b'(', b'N', code * 1_000_001, b't'))
    colliding = [b'\x8a\x10' + (i * (2**61 - 1)).to_bytes(16, 'little') for i in range(2, 50_000)]
    yield Case('colliding keys', program(b'}(', *(key + b'N' for key in colliding), b'u'))
    yield Case('colliding elements', program(b'\x8f(', *colliding, b'\x90'))
    yield Case('colliding elements of a call', program(name('builtins.set'), b'](', *colliding, b'e\x85R'))
    yield Case('wide text', program(text('a' * 2**24 + '\U0001f600')))
    yield Case('wide texts', program(b'(', text('a' * 2**22 + '\U0001f600') * 20, b't'))


def random_programs(count: int) -> Iterator[Case]:
    """Random sequences of values, instructions and allowed names; now and then one makes sense."""
    rng = random.Random(0)
    codes = [bytes([code]) for code in b'(.0120bcehjlNpqrsutR}]Q)a\x81\x85\x86\x87\x88\x89\x8f\x90\x93\x94']
    codes += [b'h\x00', b'h\x01', b'q\x00', b'q\x01']
    pieces = [*map(push, ODD.values()), *(name('.'.join(key)) for key in NAMES), *codes, *codes]
    for i in range(count):
        yield Case(f'random {i}', program(*rng.choices(pieces, k=rng.randint(1, 25)), protocol=rng.choice((2, 3, 4, 5))), True)


def broken_files() -> Iterator[Case]:
    """Good files cut short, with bytes changed, lost, doubled or exchanged."""
    rng = random.Random(1)
    for protocol, whole in good_pickles():
        yield from (Case(f'protocol {protocol} cut to {n}', whole[:n]) for n in range(0, len(whole), 13))
        yield Case(f'protocol {protocol} doubled', whole + whole)
        for i in range(200):
            changed = bytearray(whole)
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            yield Case(f'protocol {protocol} flipped {i}', bytes(changed), True)
        for _ in range(100):
            at, length = rng.randrange(len(whole)), rng.randrange(1, 9)
            yield Case(f'protocol {protocol} without {length} bytes at {at}', whole[:at] + whole[at + length:], True)
            yield Case(f'protocol {protocol} with {length} more bytes at {at}', whole[:at + length] + whole[at:], True)
            yield Case(f'protocol {protocol} with noise at {at}', whole[:at] + rng.randbytes(length) + whole[at + length:], True)


def corpus(folder: str) -> Iterator[Case]:
    yield from executing(folder)
    yield from misused()
    yield from damaged_tensors()
    yield from bombs()
    yield from random_programs(600)
    yield from broken_files()
