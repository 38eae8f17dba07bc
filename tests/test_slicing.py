"""Slicing: rejoined networks equal whole ones bit for bit, at every resolution and for every architecture."""

import pytest
import tiny
import torch

from m2m_stylegan import slicing
from m2m_stylegan.errors import UserError


@pytest.mark.parametrize('res', [4, 8, 16])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('architecture, c_dim, img_channels', [('skip', 0, 3), ('resnet', 3, 1), ('orig', 0, 3)])
def test_rejoined_is_whole(architecture, c_dim, img_channels, dtype, res):
    G = tiny.generator(16, c_dim=c_dim, img_channels=img_channels, architecture=architecture, conv_clamp=256).to(dtype)
    D = tiny.discriminator(16, c_dim=c_dim, img_channels=img_channels, architecture=architecture, conv_clamp=256).to(dtype)
    z, c = torch.randn([4, G.z_dim], dtype=dtype), torch.randn([4, c_dim], dtype=dtype)
    for noise_mode in ['const', 'none']:
        ws = G.mapping(z, c)
        x, img = slicing.g_low(G, ws, res, noise_mode=noise_mode)
        assert x.shape[2:] == (res, res)
        # Features that went through a file come back contiguous: that must not change a bit either.
        x = x.contiguous(memory_format=torch.contiguous_format).clone()
        joined = img if res == 16 else slicing.g_high(G, x, img, ws, res, noise_mode=noise_mode)
        assert torch.equal(joined, G(z, c, noise_mode=noise_mode))
    image = torch.randn([4, img_channels, 16, 16], dtype=dtype)
    x, img = slicing.d_high(D, image, res)
    if res < 16:
        assert x.shape[2:] == (res, res)
        x = x.contiguous(memory_format=torch.contiguous_format).clone()
    assert torch.equal(slicing.d_low(D, x, img, c, res), D(image, c))


def test_rejoined_half_precision_blocks():
    G = tiny.generator(16, num_fp16_res=2, conv_clamp=256)
    ws = G.mapping(torch.randn(2, G.z_dim))
    x, img = slicing.g_low(G, ws, 8, noise_mode='const')
    assert x.dtype == torch.float16 and img.dtype == torch.float32
    assert torch.equal(slicing.g_high(G, x, img, ws, 8, noise_mode='const'), G.synthesis(ws, noise_mode='const'))


@pytest.mark.parametrize('architecture', ['skip', 'resnet', 'orig'])
def test_every_tensor_is_in_exactly_one_part(architecture):
    for net in [tiny.generator(16, architecture=architecture), tiny.discriminator(16, architecture=architecture, c_dim=2)]:
        low, high, everything = (slicing.tensor_names(net, 8, part) for part in ['low-res', 'high-res', 'all'])
        assert low | high == everything and not low & high
        assert everything == set(net.state_dict())
    G = tiny.generator(16)
    assert not any(name.startswith('synthesis.b') for name in slicing.tensor_names(G, 16, 'high-res'))
    assert {name.split('.')[1] for name in slicing.tensor_names(G, 4, 'high-res')} == {'b8', 'b16'}
    assert {name.split('.')[0] for name in slicing.tensor_names(tiny.discriminator(16, c_dim=2), 8, 'low-res')} == {'b8', 'b4', 'mapping'}


def test_high_part_is_independent_of_the_low_blocks():
    """The high-res part must not touch what training replaces by the cache."""
    G = tiny.generator(16)
    ws = G.mapping(torch.randn(2, G.z_dim))
    x, img = slicing.g_low(G, ws, 8, noise_mode='const')
    expected = slicing.g_high(G, x, img, ws, 8, noise_mode='const')
    for res in (4, 8):
        getattr(G.synthesis, f'b{res}').forward = None  # calling it would fail
    assert torch.equal(slicing.g_high(G, x, img, ws, 8, noise_mode='const'), expected)


def test_bad_slice_is_refused():
    with pytest.raises(UserError, match='--slice=12: expected one of 4, 8, 16 for a network of 16 x 16 pixels'):
        slicing.check_slice(12, 16)


def test_table_counts_by_hand():
    G, D = tiny.generator(8), tiny.discriminator(8)  # 8 channels at 4x4 and at 8x8
    trained = {id(p) for name, p in G.named_parameters() if not slicing.is_low_res(name, 4)}
    rows = {row.name: row for row in slicing.block_table(G, D, trained, lambda name, res: name in ('G.mapping', 'G.b4'))}
    assert list(rows) == ['G.mapping', 'G.b4', 'G.b8', 'D.b8', 'D.b4']
    assert rows['G.mapping'].num_params == 6 * 8 + 8 + 8 * 8 + 8
    assert rows['G.mapping'].macs == 6 * 8 + 8 * 8
    affine = 8 * 8  # w_dim x channels
    # conv0 is a transposed convolution: one 3x3 kernel per input pixel; conv1 and torgb one kernel per output pixel.
    assert rows['G.b8'].macs == 8 * 8 * 9 * 16 + 8 * 8 * 9 * 64 + 8 * 3 * 64 + 3 * affine
    assert rows['D.b8'].macs == 3 * 8 * 64 + 8 * 8 * 9 * 64 + 8 * 8 * 9 * 16 + 8 * 8 * 16
    assert rows['D.b4'].macs == 9 * 8 * 9 * 16 + 8 * 16 * 8 + 8
    assert rows['G.b4'].idle and rows['G.mapping'].idle and not rows['G.b8'].idle
    assert rows['G.b8'].num_trained == rows['G.b8'].num_params and rows['G.b4'].num_trained == 0
    text = slicing.format_table(list(rows.values()))
    assert 'G.b4' in text and 'idle' in text and 'trained' in text


def test_table_leaves_the_networks_alone():
    G, D = tiny.generator(8).train(), tiny.discriminator(8)
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    slicing.block_table(G, D, set(), lambda name, res: False)
    assert G.training and all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    assert not any(module._forward_hooks for module in G.modules())
