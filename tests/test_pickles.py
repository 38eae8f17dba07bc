"""Reading and writing network pickles, against Python's own pickle and torch's own reductions as oracles."""

import gzip
import io
import math
import os
import pickle
import pickletools
import struct
import sys
from collections import OrderedDict

import numpy as np
import pickle_stubs as stubs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m_stylegan import pickles
from m2m_stylegan.errors import UserError
from m2m_stylegan.pickles import EasyDict, Record, TFNetwork
from m2m_stylegan.pickles_globals import NAMES
from m2m_stylegan.pickles_tree import MAX_DEPTH, STORAGE_DTYPES

PROTOCOLS = (2, 3, 4, 5)
SOURCE = 'class Layer:\n    """Größe"""\n' * 20


def state_bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(ours, expected):
    """Equal in value and in exact type, tensors and arrays bit by bit; stand-ins of the official classes count as our types."""
    if isinstance(expected, stubs.Persistent):
        assert type(ours) is Record
        assert_same({name: getattr(ours, name) for name in expected.meta}, expected.meta)
    elif isinstance(expected, stubs.Network):
        assert type(ours) is TFNetwork
        assert_same(ours.state, expected.state)
    elif isinstance(expected, torch.Tensor):
        assert type(ours) is type(expected) and ours.requires_grad == expected.requires_grad and ours.device.type == 'cpu'
        assert state_bits(ours) == state_bits(expected)
    elif isinstance(expected, np.ndarray):
        assert type(ours) is np.ndarray and ours.dtype == expected.dtype and ours.shape == expected.shape
        assert ours.tobytes() == expected.tobytes()
    elif isinstance(expected, Record):
        assert_same(vars(ours), vars(expected))
    elif isinstance(expected, np.generic):
        assert_same(ours, expected.item())
    else:
        assert type(ours) is (EasyDict if isinstance(expected, stubs.EasyDict) else type(expected))
        if isinstance(expected, dict):
            assert list(ours) == list(expected)
            for key in expected:
                assert_same(ours[key], expected[key])
        elif isinstance(expected, list | tuple):
            assert len(ours) == len(expected)
            for one, other in zip(ours, expected, strict=True):
                assert_same(one, other)
        elif isinstance(expected, float):
            assert (math.isnan(ours) and math.isnan(expected)) or struct.pack('d', ours) == struct.pack('d', expected)
        else:
            assert ours == expected


def layer(seed: int, table=dict) -> stubs.Persistent:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    parameters = {'weight': torch.nn.Parameter(weight, requires_grad=False), 'bias': torch.nn.Parameter(torch.zeros(4)), 'noise': None}
    buffers = {'resample_filter': torch.tensor([1., 3, 3, 1]).outer(torch.tensor([1., 3, 3, 1])) / 64, 'p': torch.tensor(0.5), 'none': None}
    return stubs.persistent('Layer', SOURCE, stubs.module_state(
        parameters, buffers, table=table, _non_persistent_buffers_set=set(), _hooks=OrderedDict(), weight_gain=np.float64(1 / 3),
        act_gain=np.float32(0.5), clamp=np.int64(-7), flag=np.bool_(True), half=np.float16(1.5), padding=[1, 2, -3], shape=(1,), big=2**40,
        _init_args=(3, 4), _init_kwargs={'synthesis_kwargs': stubs.EasyDict(channel_base=16384, fp16=None)}))


def official_like(table=OrderedDict) -> dict:
    root = stubs.persistent('Generator', SOURCE, stubs.module_state(
        modules={'b4': layer(0, table), 'b8': layer(1, table), 'skip': None}, table=table, z_dim=512, block_resolutions=[4, 8],
        names={'a', 'b', 3}, sizes=np.array([[4, 4], [8, 8]]), on=True, off=False, nothing=None, raw=b'\x00\xff'))
    return {'G': root, 'training_set_kwargs': {'path': '/data/ä\udcff.zip', 'xflip': False, 'random_seed': 0}, 'augment_pipe': None}


@pytest.mark.parametrize('table', [dict, OrderedDict])
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_reads_what_python_and_torch_write(protocol, table, tmp_path):
    tree = official_like(table)
    if protocol == 5:
        # NumPy's reduction for protocol 5 uses a name that official files, of protocol 3 and 4, do not contain.
        del tree['G'].meta['state']['sizes']
    data = stubs.real_dumps(tree, protocol)
    assert_same(pickles.load(data), tree)
    (tmp_path / 'network.pkl').write_bytes(data)
    assert_same(pickles.load(tmp_path / 'network.pkl'), tree)
    assert_same(pickles.load(str(tmp_path / 'network.pkl')), tree)


@pytest.mark.parametrize('core', ['numpy.core', 'numpy._core'])
def test_reads_numpy_under_its_old_and_new_module_names(core):
    tree = [np.float64(1 / 3), np.int32(-5), np.bool_(False), np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
            np.zeros((0, 3), np.float32), np.array(True), np.arange(3, dtype=np.uint8)]
    written = 'numpy._core' if int(np.__version__[0]) >= 2 else 'numpy.core'
    data = pickle.dumps(tree, 3).replace(f'c{written}.multiarray\n'.encode(), f'c{core}.multiarray\n'.encode())
    ours = pickles.load(data)
    assert f'c{core}.multiarray\n'.encode() in data
    assert_same(ours, tree)
    ours[3][0, 0] = 7   # writable, in memory of its own


def test_reads_a_tensorflow_style_pickle():
    variables = [('mod_weight', np.ones((3, 3), np.float32)), ('lod', np.float32(0))]
    mapping = stubs.tf_network({'version': 4, 'name': 'mapping', 'variables': variables, 'components': stubs.EasyDict()})
    network = stubs.tf_network({'version': 4, 'static_kwargs': {'resolution': 8}, 'components': stubs.EasyDict(mapping=mapping), 'variables': []})
    for protocol in (2, 3, 4):
        assert_same(pickles.load(stubs.real_dumps((network, network, mapping), protocol)), (network, network, mapping))
    with pytest.raises(TypeError, match='TFNetwork'):
        pickles.dumps(TFNetwork({}))


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('dtype', list(STORAGE_DTYPES.values()), ids=str)
def test_tensors_survive_bit_by_bit(dtype, protocol):
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 2 if dtype == torch.bool else 100, (2, 4, 3, 5), generator=generator).to(dtype)
    tree = [base, base.to(memory_format=torch.channels_last), base.permute(3, 1, 0, 2), base[1:, ::2], base[0, 0, 0, 0], base[:0], base[0, 0, 0],
            torch.nn.Parameter(base, requires_grad=False)]
    if dtype.is_floating_point:
        tree += [torch.nn.Parameter(base[1]), base.clone().requires_grad_(), torch.tensor([math.nan, -0.0, math.inf], dtype=dtype)]
    ours = pickles.load(pickle.dumps(tree, protocol))
    assert_same(ours, tree)
    assert ours[1].stride() == tree[1].stride()
    assert_same(pickles.load(pickles.dumps(tree)), tree)
    assert_same(stubs.real_loads(pickles.dumps(tree)), tree)


def test_tensors_have_memory_of_their_own():
    tensor = torch.arange(4.0)
    one, other = pickles.load(pickle.dumps([tensor, tensor[1:]], 4))
    one.fill_(7)
    assert other.tolist() == [1, 2, 3] and other.untyped_storage().nbytes() == 12


def test_shared_objects_stay_shared():
    weight, options = torch.nn.Parameter(torch.ones(2)), EasyDict(a=1)
    tree = [weight, weight, options, options, (options,)]
    for data in (pickles.dumps(tree), pickles.dumps(pickles.load(pickles.dumps(tree)))):
        ours = pickles.load(data)
        assert ours[0] is ours[1] and ours[2] is ours[3] is ours[4][0]
        assert data.count(b'_load_from_bytes') == 1


def our_tree() -> dict:
    """The tree of `official_like` in our own types."""
    return pickles.load(stubs.real_dumps(official_like(), 4))


def test_python_and_torch_read_what_we_write():
    tree = our_tree()
    theirs = stubs.real_loads(pickles.dumps(tree))
    assert isinstance(theirs['G'], stubs.Persistent) and list(theirs['G'].meta) == ['type', 'version', 'module_src', 'class_name', 'state']
    assert_same(tree, theirs)
    kwargs = theirs['G'].meta['state']['_modules']['b4'].meta['state']['_init_kwargs']
    assert type(kwargs) is dict and type(kwargs['synthesis_kwargs']) is stubs.EasyDict


def test_written_files_are_portable_and_small():
    data = pickles.dumps(our_tree())
    operations = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]
    assert operations[0] == ('PROTO', 4) and operations[-1][0] == 'STOP'
    pickletools.dis(data, io.StringIO())                        # checks stack and memo as it goes
    texts = [argument for name, argument in operations if name.endswith('UNICODE')]
    assert texts.count(SOURCE) == 1                             # although every object has a text object of its own
    assert len({id(module.module_src) for module in pickles.load(data)['G'].state['_modules'].values() if module}) == 1
    names = {argument for argument in texts if argument.startswith(('torch', 'numpy', 'dnnlib', 'collections', 'builtins', '_'))}
    assert names >= {'torch_utils.persistence', 'dnnlib.util', 'torch._utils'} and 'numpy._core.multiarray' not in names
    assert not [name for name in stubs.NAMES if name in sys.modules]


def test_module_sources_are_shared_by_text():
    sources = ['x = 1\n' * int('100'), 'x = 1\n' * int('100')]
    records = [Record('Layer', source, stubs.module_state()) for source in sources]
    assert sources[0] == sources[1] and sources[0] is not sources[1]
    assert pickles.dumps(records).count(b'x = 1\n' * 100) == 1


def test_equal_trees_give_equal_bytes():
    data = pickles.dumps(our_tree())
    assert data == pickles.dumps(our_tree()) == pickles.dumps(pickles.load(data))
    one, other = {8, 0}, {0, 8}
    assert list(one) != list(other) and pickles.dumps([one, {'a'}]) == pickles.dumps([other, {'a'}])


def test_numpy_scalars_are_written_as_python_ones():
    scalars = [np.float64(0.1), np.float32(0.5), np.float16(2), np.int64(-3), np.uint8(200), np.bool_(True), np.bool_(False)]
    data = pickles.dumps(scalars)
    assert b'numpy' not in data
    assert_same(pickles.load(data), scalars)


def test_dump_is_atomic(tmp_path):
    path = tmp_path / 'network.pkl'
    pickles.dump(our_tree(), path)
    before = path.read_bytes()
    assert before == pickles.dumps(our_tree())
    with pytest.raises(TypeError):
        pickles.dump({**our_tree(), 'last': object()}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['network.pkl']


@pytest.mark.parametrize('value', [
    object(), frozenset({1}), range(3), 1j, pickle.dumps, int, bytearray(b'x'), np.array(['a']), np.array([None]), np.array([1j]), np.longdouble(1),
    np.str_('a'), torch.tensor([1j]), torch.ones(2).to_sparse(), torch.empty(2, device='meta'), torch.Size([1]), torch.float32, torch.nn.ReLU(),
    {(1, 2): 3}, {1.5: 0}, {None: 0}, {True}, {(1,)}, {2**64: 0}, TFNetwork({}), type('Sub', (dict,), {})(), type('Sub', (str,), {})('x'),
], ids=lambda value: type(value).__name__)
def test_refuses_to_write_other_types(value):
    for tree in (value, {'G': [value]}):
        with pytest.raises(TypeError):
            pickles.dumps(tree)


def test_refuses_to_write_what_could_not_be_read():
    cycle = {}
    cycle['self'] = [cycle]
    deep = nested(MAX_DEPTH + 1)
    record = Record('G', '', {'_parameters': {'weight': torch.ones(1)}, '_modules': None})
    for tree, message in [(cycle, 'contains itself'), (deep, 'deeper than'), ([2**127], 'integer of 17 bytes'), (record, 'weight.*_modules')]:
        with pytest.raises(ValueError, match=message):
            pickles.dumps(tree)


def nested(depth: int):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize('wrap', [
    lambda value: [value], lambda value: (value,), lambda value: {'a': value}, lambda value: OrderedDict(a=value), lambda value: EasyDict(a=value),
    lambda value: Record('A', '', {**stubs.module_state(), 'a': value}),
])
def test_deepest_allowed_tree_survives(wrap):
    value = None
    for _ in range(MAX_DEPTH // 2 - 1 if isinstance(wrap(None), Record) else MAX_DEPTH):     # a record adds its state, which holds tables
        value = wrap(value)
    assert_same(pickles.load(pickles.dumps(value)), value)
    with pytest.raises(ValueError, match='deeper'):
        pickles.dumps(wrap(value))


leaves = (st.none() | st.booleans() | st.integers(-2**127, 2**127 - 1) | st.floats() | st.text(st.characters()) | st.binary()
          | st.sampled_from([-2**31, 2**31, 255, 256, 65535, 65536, -1]))
keys = st.text() | st.integers(-2**63, 2**64 - 1)
trees = st.recursive(leaves, lambda inner: (
    st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.dictionaries(keys, inner).map(OrderedDict)
    | st.dictionaries(keys, inner).map(EasyDict) | st.sets(keys)), max_leaves=20)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(trees)
def test_any_tree_survives(tree):
    assert_same(pickles.load(pickles.dumps(tree)), tree)


def test_many_items_survive():
    tree = {f'key{i}': [i] for i in range(1000)}      # memo indices beyond one byte
    tree['again'] = list(tree.values())
    ours = pickles.load(pickles.dumps(tree))
    assert_same(ours, tree)
    assert ours['again'][999] is ours['key999'] and stubs.real_loads(pickles.dumps(tree)) == tree


def torch_save(value, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


GOOD = pickle.dumps({'z_dim': 512, 'path': '/data'}, 4)


@pytest.mark.parametrize(('data', 'message'), [
    (b'', 'is empty'),
    (b'# weights\nhello', r"no binary pickle: it begins with b'# weights"),
    (pickle.dumps({'a': 1}, 0), 'no binary pickle'),
    (b'\x80', 'truncated'),
    (b'\x80\x09.', 'protocol 2 to 5'),
    (torch_save({'w': torch.ones(2)}), 'is a torch.save checkpoint'),
    (torch_save({'w': torch.ones(2)}, _use_new_zipfile_serialization=False), 'is a torch.save checkpoint'),
    (b'PK\x03\x04' + b'img00000000.png' * 100, 'is a zip file'),
    (b'\xef\xbb\xbf\n <!DOCTYPE html><html>', 'web page'),
    (b'<?xml version="1.0"?><Error/>', 'web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:12\n', 'git lfs pull'),
    (gzip.compress(GOOD), 'gzip'),
    (GOOD[:-1], 'truncated'),
    (GOOD[:20], 'truncated'),
    (b'\x80\x03ccollections\nOrdered', 'a name is not terminated'),
    (GOOD + b'x', '1 bytes after its end'),
    (GOOD + GOOD, 'after its end'),
    (pickle.dumps(print), r"'builtins.print', which is not on the list .* nothing was executed"),
    (pickle.dumps(os.system, 2), 'posix.system'),
    (pickle.dumps(torch.Size([1])), "'torch.Size'"),
    (pickle.dumps(torch.device('cpu')), "'torch.device'"),
    (pickle.dumps(torch.float32), "instruction|is not on the list|'torch"),
    (b'\x80\x04\x8c\x01xQ.', 'persistent id'),
    (b'\x80\x02(K\x01ios\nsystem\n.', 'instruction INST'),
    (b'\x80\x02\xff.', 'instruction 0xff'),
    (b'\x80\x04}\x94h\x00K\x01s.', 'key .* is a dict'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_says_what_is_wrong_with_a_file(data, message, tmp_path):
    path = tmp_path / 'some.pkl'
    path.write_bytes(data)
    for source, name in ((path, 'some.pkl'), (data, 'the pickle')):
        with pytest.raises(UserError, match=message) as info:
            pickles.load(source)
        assert name in str(info.value) and '\n' not in str(info.value)


def test_says_what_is_wrong_with_a_path(tmp_path):
    with pytest.raises(UserError, match='No such file'):
        pickles.load(tmp_path / 'missing.pkl')
    with pytest.raises(UserError, match='not a regular file'):
        pickles.load(tmp_path)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='not a regular file'):
        pickles.load(tmp_path / 'pipe')


@pytest.mark.parametrize('name', [
    '_rebuild_parameter_with_state', '_rebuild_from_type_v2', '_rebuild_device_tensor_from_numpy', '_rebuild_sparse_tensor', '_rebuild_tensor',
])
def test_refuses_other_rebuild_functions_by_name(name):
    with pytest.raises(UserError, match=rf"'torch._utils.{name}'"):
        pickles.load(f'\x80\x02ctorch._utils\n{name}\n)R.'.encode('latin1'))


def test_the_list_of_names_is_the_documented_one():
    multiarray = [f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('scalar', '_reconstruct')]
    assert {'.'.join(key) for key in NAMES} == {
        'torch_utils.persistence._reconstruct_persistent_obj', 'collections.OrderedDict', 'builtins.set', '__builtin__.set', '_codecs.encode',
        'torch._utils._rebuild_parameter', 'torch._utils._rebuild_tensor_v2', 'torch.storage._load_from_bytes', 'numpy.dtype', 'numpy.ndarray',
        'dnnlib.util.EasyDict', 'dnnlib.EasyDict', 'dnnlib.tflib.network.Network', *multiarray}


def test_limits_the_number_of_objects():
    data = pickle.dumps(list(range(1000)), 4)
    assert pickles.load(data, max_objects=1100) == list(range(1000))
    with pytest.raises(UserError, match='max_objects'):
        pickles.load(data, max_objects=900)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'type': 'function'}, "expected 'class'"),
    ({'type': None}, r"\['type'\]"),
    ({'version': '6'}, r"\['version'\]"),
    ({'module_src': b'import os'}, r"\['module_src'\]"),
    ({'class_name': 3, 'state': []}, r"\['class_name', 'state'\]"),
    ({'extra': 1}, '6 in all'),
    ({'state': OrderedDict()}, r"\['state'\]"),
    ({'state': {}}, '_parameters is a NoneType.*_buffers.*_modules'),
    ({'state': stubs.module_state(parameters={'weight': torch.ones(1)})}, r"_parameters\['weight'\] is a Tensor"),
    ({'state': stubs.module_state(buffers={'p': 0.5})}, r"_buffers\['p'\] is a float"),
    ({'state': stubs.module_state(modules={'b4': {}, 3: None})}, r"_modules\['b4'\] is a dict; _modules\['3'\]"),
])
def test_refuses_records_that_are_no_modules(changes, message):
    with pytest.raises(UserError, match=message):
        pickles.load(stubs.real_dumps([stubs.persistent(**{'class_name': 'G', 'module_src': '', 'state': stubs.module_state(), **changes})], 4))


def test_warns_of_another_version():
    data = stubs.real_dumps([stubs.persistent('G', '', stubs.module_state(), version=version) for version in (7, 7, 6)], 4)
    with pytest.warns(UserWarning, match='version 7') as caught:
        tree = pickles.load(data)
    assert [record.version for record in tree] == [7, 7, 6] and len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match='version 7'):
        assert_same(pickles.load(pickles.dumps(tree)), tree)


def test_module_source_is_never_executed(tmp_path):
    canary = tmp_path / 'canary'
    source = f'open({str(canary)!r}, "w")'
    record = pickles.load(stubs.real_dumps(stubs.persistent('G', source, stubs.module_state()), 4))
    assert record.module_src == source and not canary.exists() and 'open' not in repr(record)


def test_easy_dicts_hold_nothing_but_items():
    ours = pickles.load(stubs.real_dumps(stubs.EasyDict(a=1), 4))
    assert_same(ours, EasyDict(a=1))
    with pytest.raises(AttributeError):
        ours.a = 2
