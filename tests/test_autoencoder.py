"""The encoder of images into what G's high-res part takes: shapes, exact inverses, and the metric of its codes."""

import copy
import types

import pytest
import tiny
import torch

from m2m_stylegan import autoencoder, slicing
from m2m_stylegan.autoencoder import decode, encoder_resolution, inputs_of, new_encoder, sensitivity, source_loss, source_samples

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
    found = encoder(h, y)
    expected = [None, None] if res == W else [(5, 8, res, res), (5, channels, res, res) if has_img else None]
    for tensors in (code, found):
        assert [None if t is None else t.shape for t in tensors[:2]] == expected and tensors[2].shape == (5, G.w_dim)
        assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in (*tensors, h, y, images) if t is not None)
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
    encoder.forward = lambda h, y: code
    assert float(source_loss(encoder, code, *inputs)) == 0
    # An error of two standard deviations everywhere costs 4 in w, and 4 in (x, img).
    w = code[2] + 2 * encoder.to_w.std
    encoder.forward = lambda h, y: (*code[:2], w)
    assert float(source_loss(encoder, code, *inputs)) == pytest.approx(4, rel=1e-4)
    if res != W:
        std = encoder.x_std[None, :, None, None]
        wrong = (code[0] + 2 * std[:, :8], None if code[1] is None else code[1] - 2 * std[:, 8:], code[2])
        encoder.forward = lambda h, y: wrong
        assert float(source_loss(encoder, code, *inputs)) == pytest.approx(4, rel=1e-4)


def test_target_loss_is_zero_where_g_makes_the_image():
    """But for the pull of w towards the source."""
    G, D = networks()
    for block in (G.synthesis.b4, G.synthesis.b8, G.synthesis.b16):
        for layer in [block.conv1, *([block.conv0] if block.in_channels else [])]:
            layer.noise_strength.zero_()
    encoder = new_encoder(G, D, 8, labels_of(G))
    code, images = source_samples(G, 4, torch.zeros(4, 0), 8)
    encoder.forward = lambda h, y: code
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
    found = encoder(h, y)
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


def joined(codes):
    return torch.cat([codes[name] for name in ('x', 'img') if name in codes], dim=1)


def variance_of(values):
    return (values - values.mean(dim=(0, 2, 3), keepdim=True)).square().mean()


def many_batches(monkeypatch):
    monkeypatch.setattr(autoencoder, 'SENSITIVITY_ITEMS', 2048)


def assert_proportional(matrix, expected, tolerance):
    """Relative to their size; trace 1."""
    matrix, expected = matrix / matrix.trace(), expected / expected.trace()
    assert float((matrix - expected).norm() / expected.norm()) < tolerance


def test_matrices_are_applied_at_every_position():
    matrix, values = torch.randn(5, 5), torch.randn(3, 5, 4, 2)
    torch.testing.assert_close(autoencoder.apply(matrix, values), torch.einsum('kl,nlhw->nkhw', matrix, values))


@pytest.mark.parametrize('architecture', ['skip', 'orig'])
def test_sensitivity_against_the_exact_jacobian(monkeypatch, architecture):
    """Of G's own high-res part, at three codes: S^2 is the mean, over images and positions, of the blocks of J^T J between the channels."""
    many_batches(monkeypatch)
    G, _ = networks(architecture=architecture)
    codes = codes_of(G, 3)
    names, expected = [name for name in ('x', 'img') if name in codes], 0
    for i in range(3):
        jacobian = torch.cat(torch.autograd.functional.jacobian(
            lambda x, img=None, i=i: decode(G, (x, img, codes['w'][i: i + 1]), 8).flatten(), tuple(codes[name][i: i + 1] for name in names),
            vectorize=True), dim=2)[:, 0]
        expected = expected + torch.einsum('pkhw,plhw->kl', jacobian, jacobian)  # over pixels and positions
    metric = sensitivity(G, codes, 8)
    assert metric.shape == expected.shape == ((11, 11) if architecture == 'skip' else (8, 8))
    assert_proportional(metric.T @ metric, expected, 0.04)
    assert float((expected - expected.diag().diag()).norm() / expected.norm()) > 0.2  # between channels, too
    torch.testing.assert_close(metric, metric.T)
    assert float(torch.linalg.eigvalsh(metric).min()) > -1e-5
    torch.testing.assert_close(variance_of(autoencoder.apply(metric, joined(codes))), torch.tensor(1.0))


def test_sensitivity_of_a_linear_decoder(monkeypatch):
    """The root of A^T A, with zeros for a dead channel and for what A maps to zero. Codes get variance 1, whatever their mean."""
    many_batches(monkeypatch)
    matrix = torch.randn(3, 6)
    matrix[:, 2] = 0
    monkeypatch.setattr(autoencoder, 'decode', lambda G, code, res: torch.einsum('oc,nchw->nohw', matrix, torch.cat(code[:2], dim=1)) + 7)
    codes = {'x': torch.randn(50, 4, 8, 8) * 3 + 5, 'img': torch.randn(50, 2, 8, 8), 'w': torch.zeros(50, 8)}
    metric = sensitivity(types.SimpleNamespace(img_resolution=16), codes, 8)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    assert_proportional(metric, vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T, 0.02)
    assert float(metric[2].abs().max()) < 1e-5 and float(metric[:, 2].abs().max()) < 1e-5
    assert float((metric @ vectors[:, :3]).norm() / metric.norm()) < 1e-2
    torch.testing.assert_close(variance_of(autoencoder.apply(metric, joined(codes))), torch.tensor(1.0))


@pytest.mark.parametrize('architecture', ['skip', 'orig'])
def test_a_channel_that_the_high_res_part_ignores_has_weight_0(architecture):
    G, _ = networks(architecture=architecture)
    G.synthesis.b16.conv0.weight[:, 5] = 0
    metric = sensitivity(G, codes_of(G, 8), 8)
    assert len(metric) == (11 if architecture == 'skip' else 8)
    for dim in (0, 1):
        size = metric.abs().amax(dim=dim)
        assert float(size[5]) < 1e-5 and (size > 0.01).sum() == len(size) - 1


MIXINGS = {
    'units': lambda: torch.diag(torch.tensor([1.0, 1, 1, 8, 1, 0.25, *[1] * 5])),
    'rotation': lambda: torch.linalg.qr(torch.randn(11, 11))[0],
    'any': lambda: torch.eye(11) + 0.2 * torch.randn(11, 11),
}


@pytest.mark.parametrize('name', MIXINGS)
def test_mixing_the_channels_does_not_matter(monkeypatch, name):
    """With a decoder that undoes it, differences of the mixed codes measure what those of the codes do."""
    G, _ = networks()
    codes, mixing = codes_of(G, 16), MIXINGS[name]()
    inverse, original = torch.linalg.inv(mixing), decode
    torch.manual_seed(1)
    before = sensitivity(G, codes, 8)

    def decode_mixed(G, code, res):
        x, img = autoencoder.apply(inverse, torch.cat(code[:2], dim=1)).split([8, 3], dim=1)
        return original(G, (x, img, code[2]), res)

    monkeypatch.setattr(autoencoder, 'decode', decode_mixed)
    x, img = autoencoder.apply(mixing, joined(codes)).split([8, 3], dim=1)
    torch.manual_seed(1)
    after = sensitivity(G, {'x': x, 'img': img, 'w': codes['w']}, 8)
    difference = torch.randn(50, 11, 2, 2)
    lengths = [autoencoder.apply(a, b).norm(dim=1) for a, b in [(before, difference), (after, autoencoder.apply(mixing, difference))]]
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after, after.T)
    if name == 'rotation':
        torch.testing.assert_close(after, mixing @ before @ mixing.T, rtol=1e-3, atol=1e-3)


def test_contrast_of_the_image_does_not_matter(monkeypatch):
    G, _ = networks()
    codes = codes_of(G, 16)
    torch.manual_seed(1)
    before = sensitivity(G, codes, 8)
    original = decode
    monkeypatch.setattr(autoencoder, 'decode', lambda *args: 10 * original(*args))
    torch.manual_seed(1)
    torch.testing.assert_close(sensitivity(G, codes, 8), before, rtol=1e-4, atol=1e-4)


def test_sensitivity_leaves_the_networks_alone():
    G, _ = networks()
    before, codes = copy.deepcopy(G.state_dict()), codes_of(G, 4)
    metric = sensitivity(G, codes, 8)
    assert not metric.requires_grad and not codes['x'].requires_grad and torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    assert all(param.grad is None for param in G.parameters())
