"""The encoder of images into what G's high-res part takes: shapes, exact inverses, and the metric of its codes."""

import copy

import pytest
import tiny
import torch

from m2m_stylegan import autoencoder, slicing
from m2m_stylegan.autoencoder import decode, encoder_resolution, inputs_of, new_encoder, sensitivity_scale, source_loss, source_samples

W = slicing.W_SLICE


def networks(c_dim=0, img_channels=3, **synthesis_kwargs):
    return (tiny.generator(c_dim=c_dim, img_channels=img_channels, **synthesis_kwargs),
            tiny.discriminator(c_dim=c_dim, img_channels=img_channels, num_fp16_res=synthesis_kwargs.get('num_fp16_res', 0)))


def labels_of(G):
    return lambda num: torch.eye(G.c_dim).repeat(num, 1)[:num] if G.c_dim else torch.zeros(num, 0)


@pytest.mark.parametrize('res', [W, 4, 8])
@pytest.mark.parametrize('kwargs', [{}, {'architecture': 'orig'}, {'architecture': 'resnet', 'c_dim': 2}, {'img_channels': 1}, {'num_fp16_res': 2}],
                         ids=lambda kwargs: '-'.join(map(str, kwargs.values())) or 'skip')
def test_shapes(res, kwargs):
    G, D = networks(**kwargs)
    labels, channels = labels_of(G), kwargs.get('img_channels', 3)
    has_img = 'architecture' not in kwargs
    encoder = new_encoder(G, D, res, labels)
    code, images = source_samples(G, 5, labels(5), res)
    h, y = inputs_of(D, images, res)
    small = max(res, 4)
    assert images.shape == (5, channels, 16, 16) and y.shape == (5, channels, small, small) and h.shape == (5, 8, small, small)
    found = encoder.code(h, y)
    expected = [None, None] if res == W else [(5, 8, res, res), (5, channels, res, res) if has_img else None]
    for tensors in (code, found):
        assert [None if t is None else t.shape for t in tensors[:2]] == expected and tensors[2].shape == (5, G.w_dim)
        assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in (*tensors, h, y, images) if t is not None)
    assert torch.equal(encoder.to_w(encoder(h, y)[2]), found[2])
    assert decode(G, found, res).shape == images.shape
    assert source_loss(encoder, code, h, y).shape == autoencoder.target_loss(encoder, G, D, h, y, images, res).shape == ()
    assert not any(t.requires_grad for t in (h, y, images, code[2]))
    torch.testing.assert_close(y[1, 0, 0, 1], images[1, 0, :16 // small, 16 // small: 32 // small].mean())


@pytest.mark.parametrize('res', [W, 4, 8])
@pytest.mark.parametrize('architecture', ['skip', 'orig', 'resnet'])
@pytest.mark.parametrize('c_dim', [0, 2])
def test_true_codes_decode_to_the_image_of_g(res, architecture, c_dim):
    """Bit for bit."""
    G, _ = networks(c_dim=c_dim, architecture=architecture)
    z, c = torch.randn(4, G.z_dim), labels_of(G)(4)
    ws = G.mapping(z, c)
    code = (*slicing.g_low(G, ws, res, noise_mode='const'), ws[:, 0])
    assert torch.equal(decode(G, code, res), G(z, c, noise_mode='const'))
    # The samples that the encoder learns from have random noise.
    torch.manual_seed(1)
    code, images = source_samples(G, 4, c, res)
    torch.manual_seed(1)
    ws = G.mapping(torch.randn(4, G.z_dim), c)
    assert torch.equal(images, G.synthesis(ws)) and torch.equal(code[2], ws[:, 0])
    torch.manual_seed(1)
    torch.randn(4, G.z_dim)
    slicing.g_low(G, ws, res)
    assert torch.equal(decode(G, code, res, noise_mode='random'), images)
    assert not torch.equal(decode(G, code, res), images)


@pytest.mark.parametrize('res', [W, 8])
@pytest.mark.parametrize('architecture', ['skip', 'orig'])
def test_source_loss_is_zero_for_the_true_code(res, architecture):
    G, D = networks(architecture=architecture)
    encoder = new_encoder(G, D, res, labels_of(G))
    code, images = source_samples(G, 6, torch.zeros(6, 0), res)
    inputs = inputs_of(D, images, res)
    encoder.code = lambda h, y: code
    assert float(source_loss(encoder, code, *inputs)) == 0
    # An error of two standard deviations everywhere costs 4 in w, and 4 in (x, img).
    w = code[2] + 2 * encoder.to_w.std
    encoder.code = lambda h, y: (*code[:2], w)
    assert float(source_loss(encoder, code, *inputs)) == pytest.approx(4, rel=1e-4)
    if res != W:
        std = encoder.x_std[None, :, None, None]
        wrong = (code[0] + 2 * std[:, :8], None if code[1] is None else code[1] - 2 * std[:, 8:], code[2])
        encoder.code = lambda h, y: wrong
        assert float(source_loss(encoder, code, *inputs)) == pytest.approx(4, rel=1e-4)


def test_target_loss_is_zero_where_g_makes_the_image():
    """But for the pull of w towards the source."""
    G, D = networks()
    for block in (G.synthesis.b4, G.synthesis.b8, G.synthesis.b16):
        for layer in [block.conv1, *([block.conv0] if block.in_channels else [])]:
            layer.noise_strength.zero_()
    encoder = new_encoder(G, D, 8, labels_of(G))
    code, images = source_samples(G, 4, torch.zeros(4, 0), 8)
    encoder.code = lambda h, y: code
    encoder.to_w.mean.zero_()
    encoder.to_w.std.fill_(1e9)
    h, y = inputs_of(D, images, 8)
    assert float(autoencoder.target_loss(encoder, G, D, h, y, images, 8)) == pytest.approx(0, abs=1e-12)
    assert float(autoencoder.target_loss(encoder, G, D, h, y, images + 0.5, 8)) == pytest.approx(4 * 0.5, rel=1e-5)
    other = inputs_of(D, images.flip(0), 8)[0]
    expected = ((h - other).square() / other.square().mean(dim=(0, 2, 3), keepdim=True)).mean()
    assert float(autoencoder.target_loss(encoder, G, D, other, y, images, 8)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize('res', [W, 8])
@torch.no_grad()
def test_an_untrained_encoder_is_right_on_average(res):
    """Its outputs are in units of mean and standard deviation over the source: predicting zeros costs as much as there is variance."""
    G, D = networks()
    encoder = new_encoder(G, D, res, labels_of(G))
    for layer in [encoder.to_w.layers[-1], *([] if res == W else [encoder.to_x])]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    code, images = source_samples(G, 256, torch.zeros(256, 0), res)
    h, y = inputs_of(D, images, res)
    found = encoder.code(h, y)
    for a, b in zip(found, code, strict=True):
        if a is not None:
            dims = [0, 2, 3][: b.ndim - 1]
            spread = b.std(dim=dims).clamp_min(1e-3)
            assert float(((a.mean(dim=dims) - b.mean(dim=dims)) / spread).abs().max()) < 0.6  # its statistics are those of 64 images
            assert float(a.var(dim=0).max()) < 1e-8
    assert float(source_loss(encoder, code, h, y)) == pytest.approx(1 if res == W else 2, rel=0.2)


def test_encoder_learns_the_codes_of_the_source():
    """Sixty steps lower the loss; only the encoder is trained."""
    G, D = networks()
    encoder = new_encoder(G, D, 8, labels_of(G))
    optimizer, found = torch.optim.Adam(encoder.parameters(), 3e-3), []
    for _ in range(60):
        code, images = source_samples(G, 16, torch.zeros(16, 0), 8)
        loss = source_loss(encoder, code, *inputs_of(D, images, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert 0 < sum(found[-10:]) < 0.8 * sum(found[:10])
    assert all(param.grad is not None for param in encoder.parameters())
    assert all(param.grad is None for net in (G, D) for param in net.parameters())


def test_target_loss_reaches_every_weight_of_the_encoder():
    G, D = networks()
    encoder = new_encoder(G, D, 8, labels_of(G))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    autoencoder.target_loss(encoder, G, D, *inputs_of(D, images, 8), images, 8).backward()
    without = {name for name, param in encoder.named_parameters() if param.grad is None or not param.grad.abs().max() > 0}
    assert all('.conv0.' in name for name in without)  # behind the zeros that the residual branches begin with
    assert all(param.grad is None for net in (G, D) for param in net.parameters())


def test_nothing_but_the_high_res_part_of_d_is_run(monkeypatch):
    _, D = networks()
    D.b4.forward = D.b8.forward = None
    assert inputs_of(D, torch.randn(2, 3, 16, 16), 8)[0].shape == (2, 8, 8, 8)
    assert [encoder_resolution(res) for res in (W, 4, 8, 16)] == [4, 4, 8, 16]


# The metric of codes


def codes_of(G, num, res=8):
    code, _ = source_samples(G, num, torch.zeros(num, 0), res)
    return {name: value for name, value in zip(('x', 'img', 'w'), code, strict=True) if value is not None}


def variance_of(codes):
    return torch.cat([codes[name].var(dim=(0, 2, 3)) for name in ('x', 'img') if name in codes])


def many_batches(monkeypatch):
    monkeypatch.setattr(autoencoder, 'SENSITIVITY_BATCHES', 16)
    monkeypatch.setattr(autoencoder, 'SENSITIVITY_ITEMS', 32)


def test_sensitivity_against_the_exact_jacobian(monkeypatch):
    """Of G's own high-res part, at one code."""
    many_batches(monkeypatch)
    G, _ = networks()
    codes = codes_of(G, 1)
    jacobians = torch.autograd.functional.jacobian(lambda x, img: decode(G, (x, img, codes['w']), 8).flatten(), (codes['x'], codes['img']),
                                                   vectorize=True)
    squared = torch.cat([j[:, 0].square().sum(dim=0).mean(dim=(1, 2)) for j in jacobians])  # over pixels, then positions
    expected = squared.sqrt()
    expected = expected / (squared * variance_of(codes)).mean().sqrt()
    scale = sensitivity_scale(G, codes, 8)
    assert scale.shape == (11,) and float(expected.max() / expected.min()) > 1.5
    torch.testing.assert_close(scale, expected, rtol=0.05, atol=0)


def test_sensitivity_of_a_linear_decoder(monkeypatch):
    """Column norms of its matrix; a dead channel has none. Scaled codes have variance 1."""
    many_batches(monkeypatch)
    matrix = torch.randn(3, 6)
    matrix[:, 2] = 0
    monkeypatch.setattr(autoencoder, 'decode', lambda G, code, res: torch.einsum('oc,nchw->nohw', matrix, torch.cat(code[:2], dim=1)) + 7)
    codes = {'x': torch.randn(50, 4, 8, 8) * 3, 'img': torch.randn(50, 2, 8, 8), 'w': torch.zeros(50, 8)}
    scale = sensitivity_scale(None, codes, 8)
    norms = matrix.norm(dim=0)
    torch.testing.assert_close(scale / scale.norm(), norms / norms.norm(), rtol=0.03, atol=0)
    assert scale[2] == 0
    torch.testing.assert_close((scale.square() * variance_of(codes)).mean(), torch.tensor(1.0))


@pytest.mark.parametrize('architecture', ['skip', 'orig'])
def test_a_channel_that_the_high_res_part_ignores_has_weight_0(architecture):
    G, _ = networks(architecture=architecture)
    G.synthesis.b16.conv0.weight[:, 5] = 0
    scale = sensitivity_scale(G, codes_of(G, 8), 8)
    assert scale.shape == (11 if architecture == 'skip' else 8,)
    assert scale[5] == 0 and (scale > 0).sum() == len(scale) - 1


@pytest.mark.parametrize('factor', [0.25, 8.0])
def test_units_of_a_channel_do_not_matter(monkeypatch, factor):
    """A channel times k, with a decoder that divides it again, has 1/k of the weight: scaled codes, and what they cost, stay."""
    G, _ = networks()
    codes = codes_of(G, 16)
    units = torch.ones(8)
    units[3] = factor
    torch.manual_seed(1)
    before = sensitivity_scale(G, codes, 8)
    original = decode
    monkeypatch.setattr(autoencoder, 'decode', lambda G, code, res: original(G, (code[0] / units[None, :, None, None], *code[1:]), res))
    torch.manual_seed(1)
    after = sensitivity_scale(G, {**codes, 'x': codes['x'] * units[None, :, None, None]}, 8)
    torch.testing.assert_close(after[:8] * units, before[:8])
    torch.testing.assert_close(after[8:], before[8:])


def test_contrast_of_the_image_does_not_matter(monkeypatch):
    G, _ = networks()
    codes = codes_of(G, 16)
    torch.manual_seed(1)
    before = sensitivity_scale(G, codes, 8)
    original = decode
    monkeypatch.setattr(autoencoder, 'decode', lambda *args: 10 * original(*args))
    torch.manual_seed(1)
    torch.testing.assert_close(sensitivity_scale(G, codes, 8), before)


def test_sensitivity_leaves_the_networks_alone():
    G, _ = networks()
    before, codes = copy.deepcopy(G.state_dict()), codes_of(G, 4)
    scale = sensitivity_scale(G, codes, 8)
    assert not scale.requires_grad and not codes['x'].requires_grad and torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    assert all(param.grad is None for param in G.parameters())
