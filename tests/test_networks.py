"""Generators and discriminators against the recorded values of the official code (tests/golden)."""

import golden
import pytest
import torch

from m2m_stylegan import networks, ops

G_NAMES = ['g_4x4', 'g_orig_rgb_16', 'g_resnet_clamp_gray_16', 'g_resnet_cond_16', 'g_skip_cond_gray_clamp_16', 'g_skip_nonoise_relu_odd_16',
           'g_skip_rgb_32']
D_NAMES = ['d_orig_cond_cmap_16', 'd_orig_gray_16', 'd_resnet_clamp_mbstd_all_16', 'd_resnet_cond_16', 'd_resnet_nombstd_freeze5_16',
           'd_resnet_rgb_32', 'd_skip_cond_mbstd2ch_16', 'd_skip_rgb_16']
DTYPES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]


def build(vectors, dtype, prefix='state/', meta='meta'):
    info = vectors.json(meta)
    net = getattr(networks, info['kind'])(**info['kwargs']).eval().requires_grad_(False)
    assert [name for name, _ in net.named_parameters()] == info['parameters']
    assert sorted(name for name, _ in net.named_buffers()) == sorted(info['buffers'])
    net.load_state_dict(vectors.under(prefix, dtype), strict=True)
    return net.to(dtype)


@pytest.mark.parametrize('dtype, tolerance', DTYPES)
@pytest.mark.parametrize('name', G_NAMES)
def test_generator(name, dtype, tolerance):
    vectors = golden.load(name)
    G = build(vectors, dtype)
    assert G.num_ws == vectors.json('meta')['num_ws']
    z, c, ws = (vectors.tensor(key, dtype) for key in ['z', 'c', 'ws_in'])

    def check(actual, key):
        assert actual.dtype == dtype
        assert golden.relative_error(actual, vectors.tensor(key)) < tolerance, key

    check(G.mapping(z, c), 'map/ws')
    check(G.mapping(z, c, truncation_psi=0.7), 'map/ws_psi0.7')
    check(G.mapping(z, c, truncation_psi=0.5, truncation_cutoff=3), 'map/ws_psi0.5_cut3')
    check(G(z, c, noise_mode='const'), 'gen/img_const')
    check(G(z, c, noise_mode='none'), 'gen/img_none')
    check(G(z, c, noise_mode='const', truncation_psi=0.7), 'gen/img_const_psi0.7')
    check(G.synthesis(ws, noise_mode='const'), 'syn/const/img')
    check(G.synthesis(ws, noise_mode='none'), 'syn/none/img')
    x = img = None
    seen = 0
    for res in G.synthesis.block_resolutions:
        x, img = G.synthesis.run(ws, x, img, [res], noise_mode='const')
        check(x, f'syn/const/x_{res}')
        seen += 1
        if f'syn/const/img_{res}' in vectors:
            check(img, f'syn/const/img_{res}')
            seen += 1
        elif res < G.img_resolution:
            assert img is None
        if f'syn/none/x_{res}' in vectors:
            x_none, _ = G.synthesis.run(ws, None, None, [r for r in G.synthesis.block_resolutions if r <= res], noise_mode='none')
            check(x_none, f'syn/none/x_{res}')
            seen += 1
    assert seen == sum(key.startswith(('syn/const/x_', 'syn/const/img_', 'syn/none/x_')) for key in vectors.arrays)
    G.train()
    G.mapping(z, c, skip_w_avg_update=True)
    assert torch.equal(G.mapping.w_avg, vectors.tensor('state/mapping.w_avg', dtype))
    G.mapping(z, c)
    check(G.mapping.w_avg, 'map/w_avg_after_train_call')


def epilogue_stages(D, x, img):
    stages = {}
    if D.b4.architecture == 'skip':
        x = x + D.b4.fromrgb(img)
    if D.b4.mbstd is not None:
        x = stages['b4_mbstd'] = D.b4.mbstd(x.to(D.b4.fc.weight.dtype))
    x = stages['b4_conv'] = D.b4.conv(x)
    x = stages['b4_fc'] = D.b4.fc(x.flatten(1))
    stages['b4_out'] = D.b4.out(x)
    return stages


@pytest.mark.parametrize('dtype, tolerance', DTYPES)
@pytest.mark.parametrize('name', D_NAMES)
def test_discriminator(name, dtype, tolerance):
    vectors = golden.load(name)
    D = build(vectors, dtype)
    image, c = vectors.tensor('img', dtype), vectors.tensor('c', dtype)

    def check(actual, key):
        assert golden.relative_error(actual, vectors.tensor(key)) < tolerance, key

    check(D(image, c), 'logits')
    for key in vectors.arrays:
        if key.startswith('logits_first'):
            n = int(key.removeprefix('logits_first'))
            check(D(image[:n], c[:n]), key)
    x, img = None, image
    for res in D.block_resolutions:
        x, img = D.run(x, img, [res])
        check(x[:2], f'feat/x_{res}')
        assert (img is None) == (f'feat/img_{res}' not in vectors)
        if img is not None:
            check(img[:2], f'feat/img_{res}')
    for stage, value in epilogue_stages(D, x, img).items():
        check(value[:vectors.arrays[f'feat/{stage}'].shape[0]], f'feat/{stage}')
    if D.c_dim:
        cmap = D.mapping(None, c)
        check(cmap[:vectors.arrays['feat/cmap'].shape[0]], 'feat/cmap')


MODCONV = golden.load('op_modulated_conv2d')


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('case', MODCONV.json('cases'), ids=lambda case: case['id'])
def test_modulated_conv2d(case, dtype, tolerance):
    i = case['id']
    x, weight, styles = (MODCONV.tensor(f'{i}/{k}', dtype).requires_grad_() for k in ['x', 'weight', 'styles'])
    noise = MODCONV.tensor(f'{i}/noise', dtype) if case['noise'] else None
    f = MODCONV.tensor('filter/f1331', dtype) if case['up'] == 2 else None
    y, demod = networks.scaled_conv2d(x, weight, styles, case['up'], case['padding'], f, case['demodulate'], case['flip_weight'])
    y = ops.epilogue(y, demod, noise, act='linear')
    grads = torch.autograd.grad(y, [x, weight, styles], MODCONV.tensor(f'{i}/dy', dtype))
    for actual, key in zip([y, *grads], ['y', 'dx', 'dweight', 'dstyles'], strict=True):
        assert golden.relative_error(actual, MODCONV.tensor(f'{i}/{key}')) < tolerance, key


def test_half_precision_rules():
    vectors = golden.load('fp16_rules_32')
    G, D = (build(vectors, torch.float32, f'{k}/', f'{k}_meta') for k in 'GD')

    def check(actual, key):
        recorded = vectors.arrays[key]
        assert str(actual.dtype) == f'torch.{recorded.dtype}', key
        tolerance = 1e-2 if recorded.dtype == 'float16' or key.startswith(('syn/mixed', 'disc/mixed')) else 2e-5
        assert golden.relative_error(actual, torch.from_numpy(recorded)) < tolerance, key

    got = {}
    ws = vectors.tensor('ws_in', torch.float32)
    for mode, force_fp32 in [('mixed', False), ('force_fp32', True)]:
        x = img = None
        for res in G.synthesis.block_resolutions:
            x, img = G.synthesis.run(ws, x, img, [res], noise_mode='const', force_fp32=force_fp32)
            got[f'syn/{mode}/x_{res}'], got[f'syn/{mode}/img_{res}'] = x, img
        x, img = None, vectors.tensor('img', torch.float32)
        for res in D.block_resolutions:
            x, img = D.run(x, img, [res], force_fp32=force_fp32)
            got[f'disc/{mode}/x_{res}'] = x
        got[f'disc/{mode}/logits'] = D.epilogue(x, img, None)
        got |= {f'disc/{mode}/{stage}': value for stage, value in epilogue_stages(D, x, img).items()}
    got['syn/mixed_unfused/img_32'] = G.synthesis(ws, noise_mode='const')
    for key, value in got.items():
        check(value, key)
    assert set(got) == {key for key in vectors.arrays if key.startswith(('syn/', 'disc/'))}
    x, weight, styles = (torch.from_numpy(vectors.arrays[f'modconv/{k}']) for k in ['x', 'weight', 'styles'])
    y = ops.epilogue(*networks.scaled_conv2d(x, weight, styles, padding=1), act='linear')
    check(y, 'modconv/y_half_unfused')
    assert golden.relative_error(y, vectors.tensor('modconv/y_float32')) < 1e-2


def test_refused_arguments():
    G = networks.Generator(4, 2, 8, 8, 3, mapping_kwargs={'num_layers': 1}, synthesis_kwargs={'channel_base': 32, 'channel_max': 4})
    with pytest.raises(ValueError, match=r'z must have shape \[N, 4\], got \[2, 5\]'):
        G(torch.zeros(2, 5), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r'conditional: c must have shape \[N, 2\], got None'):
        G(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r'ws must have shape \[N, 4, 8\], got \[2, 3, 8\]'):
        G.synthesis(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="noise_mode must be 'random', 'const' or 'none', got 'fixed'"):
        G(torch.zeros(2, 4), torch.zeros(2, 2), noise_mode='fixed')
    with pytest.raises(ValueError, match='power of two of at least 4, got 12'):
        networks.Discriminator(0, 12, 3)
    with pytest.raises(ValueError, match="architecture must be 'orig', 'skip' or 'resnet', got 'dense'"):
        networks.Discriminator(0, 8, 3, architecture='dense')
    D = networks.Discriminator(0, 8, 3, channel_base=32, channel_max=4)
    with pytest.raises(ValueError, match='a batch of 6 is not divisible by the group size 4'):
        D(torch.zeros(6, 3, 8, 8))


def test_label_mapping_without_layers_is_the_normalised_embedding():
    """TensorFlow's conditional discriminators have no mapping layers."""
    mapping = networks.MappingNetwork(z_dim=0, c_dim=3, w_dim=5, num_ws=None, num_layers=0, w_avg_beta=None)
    c = torch.eye(3)
    expected = mapping.embed(c)
    torch.testing.assert_close(mapping(None, c), expected / expected.square().mean(1, keepdim=True).sqrt())
