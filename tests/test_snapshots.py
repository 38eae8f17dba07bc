"""Network pickles to networks and back. Files of the official code itself: test_interop.py."""

import ast
import copy
import pickletools
import re
import subprocess
import sys
import textwrap
import warnings
from collections import OrderedDict

import golden
import pytest
import torch

from m2m_stylegan import network_records, networks, pickles, snapshots
from m2m_stylegan.augment import AugmentPipe
from m2m_stylegan.errors import UserError
from m2m_stylegan.ops import build
from m2m_stylegan.pickles import EasyDict

G_NAMES = ['g_4x4', 'g_orig_rgb_16', 'g_resnet_clamp_gray_16', 'g_resnet_cond_16', 'g_skip_cond_gray_clamp_16', 'g_skip_nonoise_relu_odd_16',
           'g_skip_rgb_32']
D_NAMES = ['d_orig_cond_cmap_16', 'd_orig_gray_16', 'd_resnet_clamp_mbstd_all_16', 'd_resnet_cond_16', 'd_resnet_nombstd_freeze5_16',
           'd_resnet_rgb_32', 'd_skip_cond_mbstd2ch_16', 'd_skip_rgb_16']


def recorded(name, prefix='state/', meta='meta'):
    """A network with the recorded weights of the official one."""
    vectors = golden.load(name)
    net = getattr(networks, vectors.json(meta)['kind'])(**vectors.json(meta)['kwargs']).eval().requires_grad_(False)
    net.load_state_dict(vectors.under(prefix, torch.float32))
    return net


def tiny(num_fp16_res=0, channels_last=False, freeze_layers=0, c_dim=0, **options):
    """G and D of 16 x 16 pixels that belong together."""
    size = {'channel_base': 64, 'channel_max': 8, 'num_fp16_res': num_fp16_res, 'conv_clamp': 256 if num_fp16_res else None, **options}
    common = {'c_dim': c_dim, 'img_resolution': 16, 'img_channels': 3}
    layout = {'fp16_channels_last': channels_last}
    G = networks.Generator(z_dim=6, w_dim=8, mapping_kwargs={'num_layers': 2}, synthesis_kwargs={**size, **layout}, **common)
    D = networks.Discriminator(**size, block_kwargs={'freeze_layers': freeze_layers, **layout}, **common)
    for net in (G, D):
        for tensor in [*net.parameters(), *(b for name, b in net.named_buffers() if 'resample' not in name)]:
            tensor.data.add_(torch.randn(tensor.shape) * 0.1)
        net.eval().requires_grad_(False)
    return G, D


def run(net, seed=1, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    c = torch.eye(max(net.c_dim, 1))[[0] * 4][:, :net.c_dim]
    if isinstance(net, networks.Generator):
        return net(torch.randn(4, net.z_dim, generator=generator), c, truncation_psi=0.7, noise_mode='const', **kwargs)
    return net(torch.randn(4, net.img_channels, net.img_resolution, net.img_resolution, generator=generator), c, **kwargs)


def assert_same(net, expected):
    assert type(net) is type(expected) and not net.training
    for table in ('named_parameters', 'named_buffers'):
        found, wanted = dict(getattr(net, table)()), dict(getattr(expected, table)())
        assert list(found) == list(wanted)
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert not any(tensor.requires_grad for tensor in found.values())
    assert torch.equal(run(net), run(expected))


def dump_tree(tree):
    return pickles.load(pickles.dumps(tree))


def official_tree(flavour='sg3', source='# somebody else\'s source\n', **options):
    """A tree as the official code writes it, apart from the source text."""
    G, D = tiny(**options)
    tree = {name: network_records.embed(net, source) for name, net in [('G', G), ('D', D), ('G_ema', G)]}
    tree['augment_pipe'] = network_records.embed(AugmentPipe(xflip=1), '# their pipe\n')
    tree['training_set_kwargs'] = EasyDict(path='x.zip')
    for record in [record for net in ('G', 'D', 'G_ema') for record in records(tree[net])]:
        if flavour == 'sg3' and record.class_name == 'SynthesisBlock':
            record.state['fused_modconv_default'] = 'inference_only'
        if flavour == 'sg3' and record.class_name == 'FullyConnectedLayer':
            record.state |= {'in_features': record.state['_parameters']['weight'].shape[1], 'out_features': 8}
        record.state['_forward_hooks_with_kwargs'] = OrderedDict()
        record.state['_init_args'] = (1, 2)
    return tree, G, D


def records(record):
    yield record
    for child in record.state['_modules'].values():
        yield from records(child)


def module_of(record, path):
    for key in path.split('.') if path else []:
        record = record.state['_modules'][key]
    return record


def load_tree(tree):
    return snapshots.load(pickles.dumps(tree))


def problems_of(tree):
    with pytest.raises(UserError) as info:
        load_tree(tree)
    return re.findall(r'^  \* (.*)$', str(info.value), re.MULTILINE)


@pytest.mark.parametrize('name', G_NAMES + D_NAMES)
def test_recorded_networks_survive(name):
    net = recorded(name)
    again = network_records.build(dump_tree(network_records.embed(net, '')))
    assert_same(again, net)
    vectors = golden.load(name)
    if name.startswith('g_'):
        image = again(vectors.tensor('z', torch.float32), vectors.tensor('c', torch.float32), noise_mode='const')
        assert golden.relative_error(image, vectors.tensor('gen/img_const')) < 2e-5
    else:
        logits = again(vectors.tensor('img', torch.float32), vectors.tensor('c', torch.float32))
        assert golden.relative_error(logits, vectors.tensor('logits')) < 2e-5
    kwargs = network_records.constructor_kwargs(net)
    rebuilt = type(net)(**kwargs).eval().requires_grad_(False)
    rebuilt.load_state_dict(net.state_dict())
    assert_same(rebuilt, net)
    assert network_records.constructor_kwargs(rebuilt) == kwargs


@pytest.mark.parametrize('options', [{}, {'c_dim': 3}, {'num_fp16_res': 1}, {'num_fp16_res': 4, 'channels_last': True}, {'freeze_layers': 5},
                                     {'architecture': 'resnet'}, {'architecture': 'orig'}], ids=str)
def test_round_trip(tmp_path, options):
    G, D = tiny(**options)
    G_ema = copy.deepcopy(G)
    G_ema.synthesis.b4.const += 1
    path = tmp_path / 'a.pkl'
    snapshots.save(path, G=G, D=D, G_ema=G_ema, training_set_kwargs={'path': 'x.zip', 'max_size': None})
    first = snapshots.load(path)
    assert first.flavour == 'm2m' and first.augment_pipe is None
    assert first.training_set_kwargs == {'path': 'x.zip', 'max_size': None}
    for net, expected in [(first.G, G), (first.D, D), (first.G_ema, G_ema)]:
        assert_same(net, expected)
        assert network_records.constructor_kwargs(net) == network_records.constructor_kwargs(expected)
    snapshots.save(tmp_path / 'b.pkl', G=first.G, D=first.D, G_ema=first.G_ema, training_set_kwargs=first.training_set_kwargs, like=first)
    assert (tmp_path / 'b.pkl').read_bytes() == path.read_bytes()
    assert snapshots.load(path.read_bytes()).sha256 == first.sha256
    assert {child.name for child in tmp_path.iterdir()} == {'a.pkl', 'b.pkl'}


def test_constructor_arguments_are_those_that_made_the_network():
    size = {'channel_base': 96, 'channel_max': 10, 'num_fp16_res': 1, 'conv_clamp': 3}
    common = {'c_dim': 2, 'img_resolution': 16, 'img_channels': 1}
    G_kwargs = {
        **common, 'z_dim': 5, 'w_dim': 7,
        'mapping_kwargs': {'num_layers': 3, 'embed_features': 4, 'layer_features': 6, 'activation': 'relu', 'lr_multiplier': 0.1, 'w_avg_beta': None},
        'synthesis_kwargs': {**size, 'architecture': 'resnet', 'resample_filter': [[1.0]], 'fp16_channels_last': True, 'use_noise': False,
                             'activation': 'swish', 'kernel_size': 5}}
    D_kwargs = {
        **common, **size, 'architecture': 'skip', 'cmap_dim': 9,
        'block_kwargs': {'activation': 'swish', 'resample_filter': [1, 3, 3, 1], 'fp16_channels_last': True, 'freeze_layers': 4},
        'mapping_kwargs': {'num_layers': 1, 'embed_features': 3, 'layer_features': 9, 'activation': 'relu', 'lr_multiplier': 1},
        'epilogue_kwargs': {'mbstd_group_size': 2, 'mbstd_num_channels': 5, 'activation': 'relu'}}
    assert network_records.constructor_kwargs(networks.Generator(**G_kwargs)) == G_kwargs
    assert network_records.constructor_kwargs(networks.Discriminator(**D_kwargs)) == D_kwargs


def test_half_precision_values(tmp_path):
    G, D = (recorded('fp16_rules_32', f'{name}/', f'{name}_meta') for name in 'GD')
    snapshots.save(tmp_path / 'a.pkl', G=G, D=D, G_ema=G)
    snapshot = snapshots.load(tmp_path / 'a.pkl')
    assert [block.use_fp16 for block in snapshot.G.synthesis.children()] == [block.use_fp16 for block in G.synthesis.children()]
    assert any(block.use_fp16 for block in G.synthesis.children())
    assert torch.equal(run(snapshot.G), run(G))
    assert torch.equal(run(snapshot.D), run(D))


def test_options_that_differ_between_layers_survive():
    G, D = tiny(num_fp16_res=1)
    G.synthesis.b8.use_fp16 = True
    G.synthesis.b16.use_fp16 = False
    G.synthesis.b16.conv0.conv_clamp = 0.5
    G.synthesis.b8.torgb.weight_gain *= 3
    G.synthesis.b8.conv1.activation = 'swish'
    G.mapping.fc1.bias_gain = 0.5
    G.mapping.w_avg_beta = 0.5
    D.b4.mbstd.group_size = None
    D.b8.conv0.conv_clamp = None
    for net in (G, D):
        again = network_records.build(dump_tree(network_records.embed(net, '')))
        assert_same(again, net)
        for path, module in net.named_modules():
            own = {key: value for key, value in vars(module).items() if not key.startswith('_')}
            assert {key: getattr(again.get_submodule(path), key) for key in own} == own


@pytest.mark.parametrize('flavour', ['ada', 'sg3'])
def test_source_of_the_input_is_kept(tmp_path, flavour):
    tree, G, D = official_tree(flavour, freeze_layers=3)
    snapshot = load_tree(tree)
    assert snapshot.flavour == flavour
    assert_same(snapshot.G_ema, G)
    assert_same(snapshot.D, D)
    generator, discriminator = copy.deepcopy(snapshot.G), copy.deepcopy(snapshot.D)
    for tensor in [*generator.parameters(), *discriminator.parameters()]:
        tensor += 1
    generator.synthesis.b16.conv0.conv_clamp = 3
    pipe = AugmentPipe(xflip=0.5)
    pipe.p.fill_(0.25)
    path = tmp_path / 'a.pkl'
    snapshots.save(path, G=generator, D=discriminator, G_ema=snapshot.G_ema, augment_pipe=pipe, like=snapshot)
    written = pickles.load(path)
    assert list(written) == ['training_set_kwargs', 'G', 'D', 'G_ema', 'augment_pipe']
    assert list(written['D'].state['_modules']['b16'].state['_modules']['fromrgb'].state['_buffers']) == ['resample_filter', 'weight', 'bias']
    for name in ('G', 'D', 'G_ema'):
        for before, after in zip(records(tree[name]), records(written[name]), strict=True):
            assert (after.module_src, after.class_name) == (before.module_src, before.class_name)
            changed = {key for key in before.state if not key.startswith('_') and before.state[key] != after.state[key]}
            assert changed == ({'conv_clamp'} if name == 'G' and before is module_of(tree['G'], 'synthesis.b16.conv0') else set())
            assert after.state['_init_kwargs'] == before.state['_init_kwargs'] and after.state['_init_args'] == (1, 2)
            assert list(after.state) == list(before.state)
    again = snapshots.load(path)
    assert_same(again.G, generator)
    assert_same(again.D, discriminator)
    assert_same(again.G_ema, G)
    assert written['augment_pipe'].module_src == '# their pipe\n'
    assert written['augment_pipe'].state['xflip'] == 0.5
    assert written['augment_pipe'].state['_buffers']['p'] == 0.25
    assert snapshot.augment_pipe.state['xflip'] == 1  # The input's record is not changed.
    snapshots.save(path, G=generator, D=discriminator, G_ema=snapshot.G_ema, augment_pipe=snapshot.augment_pipe, like=snapshot)
    assert pickles.load(path)['augment_pipe'].state['xflip'] == 1


def test_other_structures_cannot_take_the_source_of_the_input(tmp_path):
    snapshot = load_tree(official_tree()[0])
    wide, conditional = tiny(channel_base=128)[0], tiny(c_dim=2)[1]
    with pytest.raises(UserError) as info:
        snapshots.save(tmp_path / 'a.pkl', G=wide, D=conditional, G_ema=snapshot.G_ema, like=snapshot)
    text = str(info.value)
    assert 'G: tensor synthesis.b16.conv1.weight has the shape [4, 4, 3, 3], expected [8, 8, 3, 3]' in text
    assert 'D: module mapping.fc7 is missing' in text and 'D: tensor mapping.embed.weight [8, 2] is missing' in text
    assert 'D: c_dim is 2, in the record 0' in text
    assert 'G_ema' not in text
    assert list(tmp_path.iterdir()) == []


def test_written_file_is_plain(tmp_path):
    G, D = tiny(num_fp16_res=2, channels_last=True)
    G.train().requires_grad_(True)
    snapshots.save(tmp_path / 'a.pkl', G=G.double(), D=D, G_ema=G, augment_pipe=AugmentPipe(xflip=1))
    assert G.training and G.synthesis.b4.const.requires_grad  # The given networks are left alone.
    data = (tmp_path / 'a.pkl').read_bytes()
    assert data.count(b'class SynthesisLayer(') == data.count(b'class AugmentPipe(') == 1
    strings, names = [], set()
    for opcode, arg, _ in pickletools.genops(data):
        if opcode.name == 'STACK_GLOBAL':
            names.add('.'.join(strings[-2:]))
        if isinstance(arg, str):
            strings.append(arg)
    assert {name for name in names if name.startswith(('numpy', 'm2m'))} == set()
    tree = pickles.load(data)
    for name in ('G', 'D', 'G_ema'):
        for record in records(tree[name]):
            assert record.state['training'] is False and record.version == 6
            assert {'_backward_hooks', '_forward_hooks', '_init_args', '_init_kwargs'} <= set(record.state)
            assert type(record.state['_parameters']) is OrderedDict
            for tensor in record.state['_parameters'].values():
                assert tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.requires_grad
    kwargs = tree['G_ema'].state['_init_kwargs']
    assert type(kwargs['synthesis_kwargs']) is EasyDict and kwargs['synthesis_kwargs']['num_fp16_res'] == 2
    assert module_of(tree['G'], 'mapping').state['_init_kwargs']['num_ws'] == 6
    assert tree['augment_pipe'].state['_init_kwargs']['xflip'] == 1.0


def test_networks_in_training_continue_apart_from_the_records():
    tree, G, _ = official_tree()
    tree['G'] = tree['G_ema']
    snapshot = load_tree(tree)
    snapshot.G.synthesis.b4.const += 1
    assert torch.equal(snapshot.G_ema.synthesis.b4.const, G.synthesis.b4.const)
    assert torch.equal(module_of(snapshot.records['G'], 'synthesis.b4').state['_parameters']['const'], G.synthesis.b4.const)


def test_tensors_of_other_precision_become_float32():
    tree, G, _ = official_tree()
    affine = module_of(tree['G_ema'], 'synthesis.b8.conv0.affine').state['_parameters']
    affine['weight'] = torch.nn.Parameter(affine['weight'].half(), requires_grad=False)
    again = load_tree(tree).G_ema
    assert again.synthesis.b8.conv0.affine.weight.dtype == torch.float32
    assert torch.equal(again.synthesis.b8.conv0.affine.weight, G.synthesis.b8.conv0.affine.weight.half().float())


def test_all_problems_with_tensors_are_listed():
    tree, _, _ = official_tree()
    del module_of(tree['G'], 'synthesis.b8.conv0').state['_parameters']['noise_strength']
    del module_of(tree['G'], 'synthesis.b16.conv1.affine').state['_parameters']['weight']
    module_of(tree['D'], 'b4.out').state['_parameters']['bias'] = torch.nn.Parameter(torch.zeros(2))
    module_of(tree['D'], 'b8').state['_buffers']['extra'] = torch.zeros(3)
    module_of(tree['D'], 'b8.skip').state['_parameters']['bias'] = torch.nn.Parameter(torch.zeros(8))
    module_of(tree['D'], 'b16.conv0').state['_parameters']['bias'] = None
    module_of(tree['G_ema'], 'mapping').state['_buffers']['w_avg'] = torch.zeros(8, dtype=torch.int64)
    module_of(tree['G_ema'], 'synthesis').state['_modules']['b16'].state['_modules']['torgb2'] = module_of(tree['G'], 'synthesis.b16.torgb.affine')
    assert problems_of(tree) == [
        'G: tensor synthesis.b8.conv0.noise_strength [] is missing',
        'G: tensor synthesis.b16.conv1.affine.weight [4, 8] is missing',
        'D: tensor b16.conv0.bias [4] is missing',
        'D: tensor b8.extra [3] is unexpected',
        'D: tensor b8.skip.bias [8] is unexpected',
        'D: tensor b4.out.bias has the shape [2], expected [1]',
        'G_ema: module synthesis.b16.torgb2 is unexpected',
        'G_ema: tensor synthesis.b16.torgb2.weight [4, 8] is unexpected',
        'G_ema: tensor synthesis.b16.torgb2.bias [4] is unexpected',
        'G_ema: tensor mapping.w_avg is torch.int64, expected a floating-point type',
    ]


def set_state(path, key, value):
    return lambda record: module_of(record, path).state.__setitem__(key, value)


def set_tensor(path, key, *shape):
    return lambda record: module_of(record, path).state['_parameters'].__setitem__(key, torch.nn.Parameter(torch.ones(shape), requires_grad=False))


def remove(path, table, key):
    return lambda record: module_of(record, path).state[table].__delitem__(key)


@pytest.mark.parametrize('change, problem', [
    (remove('synthesis.b4.conv1', '_parameters', 'weight'), 'tensor synthesis.b4.conv1.weight is missing'),
    (remove('', '_modules', 'mapping'), 'module mapping is missing'),
    (remove('synthesis', '_modules', 'b8'), 'it consists of blocks of the resolutions [4, 16], expected 4, 8, 16 and so on'),
    (set_tensor('synthesis.b8.conv1', 'weight', 5, 5, 3, 3),
     'its numbers of channels per resolution follow no channel_base and channel_max: {4: 8, 8: 5, 16: 4}'),
    (set_tensor('synthesis.b16.torgb', 'weight', 0, 4, 1, 1), 'tensor synthesis.b16.torgb.weight has the impossible shape [0, 4, 1, 1]'),
    (set_tensor('synthesis.b16.torgb', 'weight', 3), 'tensor synthesis.b16.torgb.weight has the shape [3], expected [3, 4, 1, 1]'),
    (set_tensor('mapping.fc0', 'weight', 8), 'tensor mapping.fc0.weight has the impossible shape [8]'),
    (set_state('', 'z_dim', 7), 'z_dim is 7, expected 6'),
    (set_state('mapping', 'num_layers', 10**9), 'mapping.num_layers is 1000000000, expected 2'),
    (set_state('synthesis', 'block_resolutions', [4, 8]), 'synthesis.block_resolutions is [4, 8], expected [4, 8, 16]'),
    (set_state('synthesis.b16.conv0', 'up', 1), 'synthesis.b16.conv0.up is 1, expected 2'),
    (set_state('synthesis.b16', 'is_last', 1), 'synthesis.b16.is_last is 1, expected True'),
    (set_state('synthesis.b16', 'architecture', 'resnet'), "synthesis.b16.architecture is 'resnet', expected 'skip'"),
    (set_state('synthesis.b4', 'architecture', 'dense'), "synthesis.b4.architecture has the impossible value 'dense'"),
    (set_state('synthesis.b8', 'use_fp16', 1), 'synthesis.b8.use_fp16 has the impossible value 1'),
    (set_state('synthesis.b8.conv1', 'activation', 'evil'), "synthesis.b8.conv1.activation has the impossible value 'evil'"),
    (set_state('synthesis.b8.conv1', 'activation', ['lrelu']), 'synthesis.b8.conv1.activation has the impossible value a list'),
    (set_state('synthesis.b8.conv1', 'conv_clamp', -1), 'synthesis.b8.conv1.conv_clamp has the impossible value -1'),
    (set_state('mapping.fc1', 'weight_gain', float('nan')), 'mapping.fc1.weight_gain has the impossible value nan'),
    (set_state('mapping.fc1', 'weight_gain', torch.ones(2)), 'mapping.fc1.weight_gain has the impossible value a Tensor'),
    (set_state('mapping.fc0', 'bias_gain', 10**30), f'mapping.fc0.bias_gain has the impossible value {10**30}'),
    (set_state('synthesis', 'img_resolution', 2**40), 'synthesis.img_resolution is 1099511627776, expected 16'),
    (lambda record: setattr(module_of(record, 'synthesis.b8.conv0'), 'class_name', 'Conv2dLayer'),
     'module synthesis.b8.conv0 is a Conv2dLayer, expected a SynthesisLayer'),
    (lambda record: setattr(module_of(record, 'synthesis.b8.conv0'), 'class_name', 'evil\n' * 99),
     'it consists of unknown classes: ' + ('evil\\n' * 99)[:240]),
    (lambda record: module_of(record, 'mapping').state['_buffers'].__setitem__('fc0.weight', torch.ones(1)),
     'tensor mapping.fc0.weight occurs twice'),
    (lambda record: module_of(record, '').state['_modules'].__setitem__('again', module_of(record, 'mapping')), 'module again occurs twice'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_refused_generators(change, problem):
    tree, _, _ = official_tree()
    tree['G_ema'] = dump_tree(tree['G_ema'])
    change(tree['G_ema'])
    assert f'G_ema: {problem}' in problems_of(tree)


@pytest.mark.parametrize('change, problem', [
    (remove('b4.fc', '_parameters', 'weight'), 'tensor b4.fc.weight is missing'),
    (remove('b4', '_modules', 'mbstd'), 'module b4.mbstd is missing'),
    (set_tensor('b4.conv', 'weight', 8, 7, 3, 3), 'b4.conv takes 7 channels, expected at least the 8 of b4.fc'),
    (set_state('b4.mbstd', 'num_channels', 2), 'b4.mbstd.num_channels is 2, expected 1'),
    (set_state('b4.mbstd', 'group_size', 0), 'b4.mbstd.group_size has the impossible value 0'),
    (set_state('b8', 'first_layer_idx', 0), 'b8.first_layer_idx is 0, expected 4'),
    (set_state('', 'c_dim', 3), 'c_dim is 3, expected 0'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_refused_discriminators(change, problem):
    tree, _, _ = official_tree()
    change(tree['D'])
    assert f'D: {problem}' in problems_of(tree)


def test_shared_modules_cost_no_time():
    tree, _, _ = official_tree()
    record = network_records.embed(networks.FullyConnectedLayer(1, 1), '')
    for _ in range(16):  # 2^16 paths
        outer = network_records.embed(torch.nn.Module(), '')
        outer.state['_modules'] = {'a': record, 'b': record}
        record = outer
    tree['G'].state['_modules']['x'] = record
    assert any('occurs twice' in problem for problem in problems_of(tree))


def test_nested_attributes_cost_no_time():
    tree, _, _ = official_tree()
    value = [1]
    for _ in range(60):
        value = [value, value]
    tree['G'].state['z_dim'] = tree['G'].state['strange'] = value
    assert problems_of(tree) == ['G: z_dim is a list, expected 6']


def test_frozen_layers_in_the_middle_stay_frozen():
    tree, _, D = official_tree()
    state = module_of(tree['D'], 'b8.conv0').state
    state['_buffers'] |= {key: state['_parameters'].pop(key).data for key in ('weight', 'bias')}
    again = load_tree(tree).D
    assert 'b8.conv0.weight' in dict(again.named_buffers()) and 'b16.conv0.weight' in dict(again.named_parameters())
    assert torch.equal(run(again), run(D))


def test_unknown_and_absent_attributes_are_reported():
    tree, G, _ = official_tree()
    tree['G_ema'].state['temperature'] = 2.0
    del module_of(tree['G_ema'], 'synthesis.b16').state['channels_last']
    problems = 'temperature = 2.0 is unknown and ignored; synthesis.b16.channels_last is absent, False is used'
    with pytest.warns(UserWarning, match=f'^Generator: attributes differ from those of the official classes: {problems}$'):
        assert_same(load_tree(tree).G_ema, G)


def test_weights_that_are_not_finite_are_reported():
    tree, _, _ = official_tree()
    module_of(tree['D'], 'b4.fc').state['_parameters']['bias'][1] = float('nan')
    module_of(tree['D'], 'b4.out').state['_parameters']['weight'][0, 0] = float('inf')
    with pytest.warns(UserWarning, match=r'^Discriminator: NaN or infinite values in b4.fc.bias, b4.out.weight$'):
        load_tree(tree)


def alias_free(record):
    record.state['_modules']['synthesis'].state['_modules']['input'] = network_records.embed(networks.FullyConnectedLayer(2, 2), '')
    return record


def unknown_classes(record):
    for name, module in zip(('ProjectedDiscriminator', 'FastganSynthesis'), record.state['_modules'].values(), strict=False):
        module.class_name = name
    return record


@pytest.mark.parametrize('root, problems', [
    (lambda tree: [1], 'the pickle holds a list; expected a dict with the networks G, D and G_ema'),
    (lambda tree: tree['G_ema'], 'the pickle holds a single network of class Generator; expected a dict'),
    (lambda tree: (1, 2, 3), 'the pickle holds a tuple'),
    (lambda tree: {}, ['G is missing (there are: no entries)', 'D is missing (there are: no entries)', 'G_ema is missing (there are: no entries)']),
    (lambda tree: {'G_ema': tree['G_ema'], 'x': 1}, ['G is missing (there are: G_ema, x)', 'D is missing (there are: G_ema, x)']),
    (lambda tree: {**tree, 'D': tree['G'], 'G': None},
     ['G is nothing, expected a network', 'D is a single network of class Generator, expected a Discriminator']),
    (lambda tree: {**tree, 'augment_pipe': 3, 'training_set_kwargs': [1]}, ['augment_pipe is a int', 'training_set_kwargs is a list']),
    (lambda tree: {**tree, 'G': alias_free(tree['G']), 'G_ema': alias_free(tree['G_ema'])},
     ['G and G_ema: alias-free StyleGAN3 generator (config stylegan3-t or stylegan3-r), which is not supported. Take a StyleGAN2 network, from '
      'stylegan2-ada-pytorch or trained by stylegan3 with --cfg=stylegan2. (The D beside it is an ordinary StyleGAN2 discriminator, but of no '
      'use without such a G.)']),
    (lambda tree: {**tree, 'D': unknown_classes(tree['D'])}, ['D: it consists of unknown classes: FastganSynthesis, ProjectedDiscriminator']),
    (lambda tree: {**tree, 'D': network_records.embed(tiny(c_dim=2)[1], '')}, ['c_dim differs: G 0, D 2, G_ema 0']),
])
def test_refused_files(root, problems):
    tree = root(official_tree()[0])
    if isinstance(problems, str):
        with pytest.raises(UserError, match=re.escape(problems)):
            load_tree(tree)
    else:
        assert problems_of(tree) == problems


def test_messages_name_the_file(tmp_path):
    pickles.dump({'a': 1}, tmp_path / 'a.pkl')
    with pytest.raises(UserError, match=r'a\.pkl is not a usable network pickle'):
        snapshots.load(tmp_path / 'a.pkl')


def test_averaged_generator_alone():
    tree, G, _ = official_tree()
    for root in (tree, {'G_ema': tree['G_ema']}, tree['G_ema']):
        assert_same(snapshots.load_G_ema(pickles.dumps(root)), G)
    with pytest.raises(UserError, match='G_ema is a single network of class Discriminator, expected a Generator'):
        snapshots.load_G_ema(pickles.dumps(tree['D']))


@pytest.mark.parametrize('module', ['networks', 'augment'])
def test_embedded_source_is_old_python(module):
    source = snapshots.embedded_source(module)
    ast.parse(source, feature_version=(3, 7))
    imported = {name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert imported <= {'numpy', 'torch', 'torch.nn.functional', 'contextlib', 'torch_utils.persistence',
                        'm2m_stylegan.ops', 'm2m_stylegan.ops.dispatch', 'm2m_stylegan.ops.reference'}


# The loader of the official code bases as spec'd: executes the embedded text in an empty module and allocates without a constructor.
LOADER = textwrap.dedent('''
    import pickle, sys, types
    import torch

    class EasyDict(dict):
        pass

    sys.modules['m2m_stylegan'] = None  # cannot be imported even where it is installed
    MODULES, PERSISTENT = {}, []

    def persistent_class(cls):
        PERSISTENT.append(cls.__name__)
        return type(cls.__name__, (cls,), {'__module__': cls.__module__})

    def _reconstruct_persistent_obj(meta):
        source = meta['module_src']
        if source not in MODULES:
            MODULES[source] = sys.modules[f'embedded{len(MODULES)}'] = types.ModuleType(f'embedded{len(MODULES)}')
            exec(source, vars(MODULES[source]))
        cls = vars(MODULES[source])[meta['class_name']]
        obj = cls.__new__(cls)
        obj.__setstate__(meta['state'])
        return obj

    for name, values in [('torch_utils', {}), ('dnnlib', {}), ('dnnlib.util', {'EasyDict': EasyDict}), ('torch_utils.persistence', {
            'persistent_class': persistent_class, '_reconstruct_persistent_obj': _reconstruct_persistent_obj})]:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    with open(sys.argv[1], 'rb') as file:
        data = pickle.load(file)
    assert not any(name.startswith('m2m_stylegan.') for name in sys.modules)
    assert len(MODULES) == 2 and sorted(set(PERSISTENT)) == sorted(PERSISTENT)
    assert {'Generator', 'SynthesisLayer', 'Discriminator', 'AugmentPipe'} <= set(PERSISTENT)
    inputs = torch.load(sys.argv[2])
    G, D, pipe = data['G_ema'], data['D'], data['augment_pipe']
    kwargs = dict(G._init_kwargs)
    kwargs['synthesis_kwargs']['num_fp16_res'] = 4
    rebuilt = type(G)(**kwargs).eval()
    rebuilt.load_state_dict(G.state_dict())
    type(D)(**D._init_kwargs).load_state_dict(D.state_dict())
    images = G(inputs['z'], inputs['c'], truncation_psi=0.7, noise_mode='const')
    torch.manual_seed(0)
    torch.save({'images': images, 'rebuilt': rebuilt(inputs['z'], inputs['c'], truncation_psi=0.7, noise_mode='const', force_fp32=True).detach(),
                'fp16': rebuilt.synthesis.b16.use_fp16, 'logits': D(inputs['images'], inputs['c']), 'augmented': pipe(inputs['large'])}, sys.argv[3])
''')


def test_embedded_source_runs_without_this_package(tmp_path, monkeypatch):
    monkeypatch.setattr(build, '_READY', {'cpu': False})  # a pickle carries the plain operators only: bit for bit the same with these
    G, D = tiny(c_dim=2)
    pipe = AugmentPipe(xflip=1, rotate=1, brightness=1, imgfilter=0.5, cutout=1)
    snapshots.save(tmp_path / 'a.pkl', G=G, D=D, G_ema=G, augment_pipe=pipe)
    inputs = {'z': torch.randn(4, 6), 'c': torch.eye(2)[[0, 1, 1, 0]], 'images': torch.randn(4, 3, 16, 16), 'large': torch.randn(4, 3, 24, 24)}
    torch.save(inputs, tmp_path / 'in.pt')
    (tmp_path / 'loader.py').write_text(LOADER)
    subprocess.run([sys.executable, '-I', tmp_path / 'loader.py', tmp_path / 'a.pkl', tmp_path / 'in.pt', tmp_path / 'out.pt'], check=True, cwd='/')
    found = torch.load(tmp_path / 'out.pt')
    images = G(inputs['z'], inputs['c'], truncation_psi=0.7, noise_mode='const')
    assert torch.equal(found['images'], images) and found['fp16']
    assert golden.relative_error(found['rebuilt'], images) < 1e-5
    assert torch.equal(found['logits'], D(inputs['images'], inputs['c']))
    torch.manual_seed(0)
    assert torch.equal(found['augmented'], pipe(inputs['large']))


def test_no_warnings_and_no_random_numbers():
    data = pickles.dumps(official_tree()[0])
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        snapshots.load(data)
    assert torch.equal(torch.get_rng_state(), state)
