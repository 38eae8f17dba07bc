"""TensorFlow pickles against what the official converter made of them (tests/golden/tf_mapping.npz)."""

import re

import numpy as np
import pytest
import tf_pickles
import torch

from m2m_stylegan import legacy_tf, network_records, pickles, snapshots
from m2m_stylegan.errors import UserError

VECTORS = tf_pickles.VECTORS
G_KWARGS = VECTORS.json('g_resnet/static_kwargs')
D_KWARGS = VECTORS.json('d_skip/static_kwargs')


def load(G=None, D=None, Gs=None):
    """Through a real pickle; by default the unconditional networks."""
    root = (G or tf_pickles.network('g_resnet'), D or tf_pickles.network('d_skip'), Gs or tf_pickles.network('g_resnet'))
    return snapshots.load(tf_pickles.dumps(root))


def problems_of(**nets):
    with pytest.raises(UserError, match=r'^This TensorFlow pickle cannot be converted:') as info:
        load(**nets)
    return re.findall(r'^  \* (.*)$', str(info.value), re.MULTILINE)


def rename(network, old, new):
    network.state['variables'] = [(new if name == old else name, array) for name, array in network.state['variables']]
    return network


@pytest.mark.parametrize('g, d', [('g_skip_cond', 'd_resnet_cond'), ('g_resnet', 'd_skip'), ('g_resnet', 'd_orig')])
def test_recorded_conversions(g, d):
    snapshot = load(tf_pickles.network(g), tf_pickles.network(d), tf_pickles.network(g, version=4))
    assert (snapshot.flavour, snapshot.records, snapshot.augment_pipe, snapshot.training_set_kwargs) == ('tf', {}, None, None)
    for net, name in [(snapshot.G, g), (snapshot.D, d), (snapshot.G_ema, g)]:
        expected = VECTORS.under(f'{name}/pt/', torch.float32)
        found = net.state_dict()
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        assert not net.training and not any(tensor.requires_grad for tensor in net.parameters())
        ours, theirs = network_records.constructor_kwargs(net), VECTORS.json(f'{name}/init_kwargs')
        for key, value in theirs.items():
            if key != 'mapping_kwargs':  # Ours give sizes where theirs give None, and nothing if there is no mapping.
                assert ours[key] == value if not isinstance(value, dict) else ours[key].items() >= value.items()
        assert ours['mapping_kwargs'].items() <= {**theirs['mapping_kwargs'], 'layer_features': ours['mapping_kwargs'].get('layer_features')}.items()
    c = torch.eye(3)[[0, 1, 2, 0], :snapshot.G.c_dim]
    image = snapshot.G_ema(torch.randn(4, snapshot.G.z_dim), c, noise_mode='const')
    assert image.shape == (4, snapshot.G.img_channels, 16, 16) and image.isfinite().all()
    assert snapshot.D(torch.randn(4, snapshot.D.img_channels, 16, 16), c).isfinite().all()


def test_no_random_numbers_are_drawn():
    state = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), state)


def test_averaged_generator_alone():
    G = snapshots.load_G_ema(tf_pickles.dumps(tuple(tf_pickles.network(name) for name in ('g_resnet', 'd_skip', 'g_resnet'))))
    assert torch.equal(G.synthesis.b4.const, VECTORS.tensor('g_resnet/pt/synthesis.b4.const', torch.float32))


def test_as_official_pickle(tmp_path):
    first = load()
    snapshots.save(tmp_path / 'a.pkl', G=first.G, D=first.D, G_ema=first.G_ema, like=first)
    again = snapshots.load(tmp_path / 'a.pkl')
    assert again.flavour == 'm2m'
    for name in ('G', 'D', 'G_ema'):
        found, expected = getattr(again, name).state_dict(), getattr(first, name).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_constructor_arguments():
    options = {'num_fp16_res': 1, 'conv_clamp': 256, 'resample_kernel': [1, 2, 1], 'nonlinearity': 'relu', 'truncation_psi': 0.5}
    G = load(G=tf_pickles.network('g_resnet', {**G_KWARGS, **options, 'mapping_lrmul': 0.1, 'mapping_nonlinearity': 'swish', 'w_avg_beta': None,
                                               'structure': 'auto', 'style_mixing_prob': None})).G
    assert [block.use_fp16 for block in G.synthesis.children()] == [False, False, True]
    assert G.synthesis.b8.conv0.conv_clamp == 256 and G.synthesis.b8.conv0.activation == 'relu'
    taps = torch.tensor([1., 2., 1.])
    assert torch.equal(G.synthesis.b8.conv0.resample_filter, taps[:, None] * taps / 16)
    assert (G.mapping.fc0.bias_gain, G.mapping.fc0.activation, G.mapping.w_avg_beta) == (0.1, 'swish', 1)
    D = load(D=tf_pickles.network('d_skip', {**D_KWARGS, **options, 'mbstd_group_size': None, 'freeze_layers': 2})).D
    assert D.b4.mbstd.group_size is None and D.b4.conv.activation == D.b16.conv0.activation == 'relu'
    assert 'b16.conv0.weight' in dict(D.named_buffers()) and 'b16.conv1.weight' in dict(D.named_parameters())


def test_label_embedding_defaults_to_the_size_of_z():
    G = tf_pickles.network('g_skip_cond', {key: value for key, value in VECTORS.json('g_skip_cond/static_kwargs').items() if key != 'label_fmaps'})
    mapping = G.state['components']['mapping'].state
    mapping['variables'] = [(name, {'LabelEmbed/weight': np.ones([3, 6], np.float32), 'LabelEmbed/bias': np.ones([6], np.float32),
                                    'Dense0/weight': np.ones([12, 8], np.float32)}.get(name, array)) for name, array in mapping['variables']]
    assert load(G, tf_pickles.network('d_resnet_cond'), G).G.mapping.embed.weight.shape == (6, 3)


def test_discriminator_with_a_label_embedding_and_no_mapping():
    kwargs = {key: value for key, value in VECTORS.json('d_resnet_cond/static_kwargs').items() if not key.startswith('mapping')}
    D = tf_pickles.network('d_resnet_cond', kwargs)
    D.state['variables'] = [(name, array) for name, array in D.state['variables'] if not name.startswith('Mapping')]
    G = tf_pickles.network('g_skip_cond')
    net = load(G, D, G).D
    assert net.mapping.num_layers == 0 and net.mapping.embed.weight.shape == (5, 3)


@pytest.mark.parametrize('name, old, new, kwargs', [('d_orig', '16x16/FromRGB', 'FromRGB_lod0', {'architecture': 'resnet'}),
                                                    ('g_resnet', '16x16/ToRGB', 'ToRGB_lod0', {'architecture': 'skip'})])
def test_layers_per_level_of_detail(name, old, new, kwargs):
    net = tf_pickles.network(name, {**VECTORS.json(f'{name}/static_kwargs'), **kwargs})
    part = net.state['components']['synthesis'] if name == 'g_resnet' else net
    part.state['variables'] = [(key.replace(old, new), array) for key, array in part.state['variables'] if 'Skip' not in key]
    part.state['variables'] += [(new.replace('lod0', 'lod1') + '/weight', np.ones(3, np.float32)), ('lod', np.zeros([], np.float32))]
    if name == 'd_orig':
        G = tf_pickles.network('g_resnet')
        G.state['static_kwargs']['num_channels'] = 3
        rgb = {'16x16/ToRGB/weight': np.ones([1, 1, 4, 3], np.float32), '16x16/ToRGB/bias': np.ones([3], np.float32)}
        synthesis = G.state['components']['synthesis'].state
        synthesis['variables'] = [(key, rgb.get(key, array)) for key, array in synthesis['variables']]
        D = load(G, net, G).D
        assert D.b16.architecture == 'orig'
        assert torch.equal(D.b16.fromrgb.weight, VECTORS.tensor('d_orig/pt/b16.fromrgb.weight', torch.float32))
    else:
        G = load(net, Gs=net).G
        assert G.synthesis.b16.architecture == 'orig'
        assert torch.equal(G.synthesis.b16.torgb.weight, VECTORS.tensor('g_resnet/pt/synthesis.b16.torgb.weight', torch.float32))


def test_unsupported_arguments_are_all_listed():
    G = tf_pickles.network('g_resnet', {**G_KWARGS, 'fused_modconv': True, 'blur_filter': [1, 2, 1], 'use_styles': True, 'resolution': 17,
                                        'nonlinearity': 'sine'})
    assert problems_of(G=G, D=tf_pickles.network('d_skip', {**D_KWARGS, 'mbstd_group_size': 0, 'epilogue': 1})) == [
        'G: argument blur_filter=[1, 2, 1] is not supported (configurations A to D and comparison methods are not)',
        'G: argument use_styles=True is not supported (configurations A to D and comparison methods are not)',
        'G: argument resolution has the impossible value 17',
        "G: argument nonlinearity has the impossible value 'sine'",
        'D: argument epilogue=1 is not supported (configurations A to D and comparison methods are not)',
        'D: argument mbstd_group_size has the impossible value 0',
    ]


def test_old_versions():
    text = 'it has format version 3, expected 4 or newer: StyleGAN (1) and Progressive GAN are not supported'
    old = tf_pickles.network('g_resnet', version=3)
    assert problems_of(G=old, Gs=old) == [f'G: {text}', f'Gs: {text}']


def test_variables_that_do_not_fit_are_all_listed():
    D = rename(rename(tf_pickles.network('d_skip'), '4x4/Conv/weight', 'x'), 'Output/bias', 'y')
    D.state['variables'] += [('Output/bias', np.ones([2], np.float32)), ('4x4/Conv/weight', np.ones([3, 3, 9, 8], np.int32))]
    D.state['variables'] = [(name, array) for name, array in D.state['variables'] if name != '8x8/Conv0/bias']
    Gs = tf_pickles.network('g_resnet', {**G_KWARGS, 'fmap_max': 4})
    problems = problems_of(D=D, Gs=Gs)
    assert problems[:3] == [
        'D: variable 8x8/Conv0/bias is missing',
        'D: variable 4x4/Conv/weight is of type int32, expected float32',
        'D: variable Output/bias has the shape [2]; b4.out.bias needs [1], from it comes [2]',
    ]
    assert problems[3:5] == [
        'Gs: variable synthesis/4x4/Const/const has the shape [1, 8, 4, 4]; synthesis.b4.const needs [4, 4, 4], from it comes [8, 4, 4]',
        'Gs: variable synthesis/4x4/Conv/weight has the shape [3, 3, 8, 8]; synthesis.b4.conv1.weight needs [4, 4, 3, 3], '
        'from it comes [8, 8, 3, 3]',
    ]


def test_output_without_dimensions():
    D = tf_pickles.network('d_skip')
    D.state['variables'] = [(name, np.float32(1).reshape([]) if name == 'Output/weight' else array) for name, array in D.state['variables']]
    assert problems_of(D=D) == ['D: variable Output/weight has the shape []; b4.out.weight needs [1, 8], from it comes []']


def test_variables_without_a_place_are_reported():
    D = tf_pickles.network('d_skip')
    D.state['variables'].append(('8x8/Strange/weight', np.ones(3, np.float32)))
    with pytest.warns(UserWarning, match=r'^TensorFlow Discriminator: unused variables 8x8/Strange/weight$'):
        load(D=D)


WIDE = tf_pickles.Network({'variables': [], 'components': {str(i): tf_pickles.Network({'variables': []}) for i in range(20)}})


@pytest.mark.parametrize('change, problem', [
    ({'components': {'x': WIDE}}, 'D: component x/ is not a network'),
    ({'variables': None}, 'D: component (top) is not a network'),
    ({'components': {'x': 1}}, 'D: component x/ is not a network'),
    ({'components': {'x': tf_pickles.Network({'variables': [('a', 'b')]})}},
     'D: component x/ has variables that are not pairs of a name and an array'),
    ({'static_kwargs': [1]}, 'D: its static_kwargs are [1], expected a dict'),
    ({'version': None}, 'D: it has format version None, expected 4 or newer: StyleGAN (1) and Progressive GAN are not supported'),
])
def test_damaged_networks(change, problem):
    D = tf_pickles.network('d_skip')
    D.state.update(change)
    assert problems_of(D=D) == [problem]


def test_components_within_themselves():
    net = tf_pickles.network('d_skip').state
    root = pickles.TFNetwork({**net, 'components': {'x': pickles.TFNetwork({'variables': [], 'components': {}})}})
    root.state['components']['x'].state['components']['y'] = root.state['components']['x']
    with pytest.raises(UserError, match=r'D: component x/y/y/ is not a network'):
        legacy_tf.convert((root, root, root))


def test_wrong_number_of_networks():
    with pytest.raises(UserError, match='holds 2 objects, expected the networks G, D and Gs'):
        snapshots.load(tf_pickles.dumps((tf_pickles.network('g_resnet'), tf_pickles.network('d_skip'))))


def test_sizes_that_are_lies_allocate_nothing():
    problems = problems_of(G=tf_pickles.network('g_resnet', {**G_KWARGS, 'fmap_base': 2**20, 'fmap_max': 2**20, 'dlatent_size': 2**20}))
    assert any('needs [1048576]' in problem for problem in problems)
