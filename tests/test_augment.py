"""The augmentation pipe against the official code's recorded values, closed forms, symmetries and numerical derivatives."""

import ast
import inspect

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m2m_stylegan import augment
from m2m_stylegan.augment import AUGPIPE_SPECS, AugmentPipe, augpipe_kwargs
from m2m_stylegan.ops import reference, resample

DEBUG, RECORDED = golden.load('augment_debug'), golden.load('augment_recorded_draws')
ALL = dict.fromkeys(AUGPIPE_SPECS['bgcfnc'], 1)


def make_pipe(p=1.0, dtype=torch.float64, **kwargs):
    pipe = AugmentPipe(**kwargs).to(dtype)
    pipe.p.fill_(p)
    return pipe


def random_images(*shape, dtype=torch.float64, seed=0):
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def max_error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected).abs().max())


@pytest.fixture(params=[False, True], ids=['dense', 'fir'])
def either_path(request, monkeypatch):
    """Small images take the matrix products; with the limit at 0 they take the FIR operators, as large ones do."""
    if request.param:
        monkeypatch.setattr(augment, 'MAX_DENSE_SIZE', 0)


@pytest.mark.parametrize('name', ['Hz_geom', 'Hz_fbank'])
def test_filter_buffers(name):
    assert max_error(getattr(AugmentPipe(), name), DEBUG.tensor(f'buffer/{name}')) < 1e-15  # equal in float32, down to its denormals


# Worst errors seen: 5e-14 and 2e-5.
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize('case', [pytest.param(c, id=f'{c["id"]}-{c["spec"]}-{c["img"]}') for c in DEBUG.json('cases')])
def test_debug_percentile_values_and_gradients(case, dtype, tolerance, either_path):
    images = DEBUG.tensor(f'img/{case["img"]}', dtype).requires_grad_()
    y = make_pipe(dtype=dtype, **case['kwargs'])(images, debug_percentile=case['percentile'])
    assert y.dtype == dtype
    assert max_error(y, DEBUG.tensor(f'{case["id"]}/y')) < tolerance
    if f'{case["id"]}/dy' in DEBUG:
        dx, = torch.autograd.grad(y, images, DEBUG.tensor(f'{case["id"]}/dy', dtype))
        assert max_error(dx, DEBUG.tensor(f'{case["id"]}/dx')) < tolerance


# Worst errors seen: 1e-12 and 1e-4, for values up to 16 because the filter amplifies. Near edges the spec allows 1e-3 in float32.
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize('run', ['p0.5', 'p1', 'p0.3_gray'])
def test_recorded_draws(run, dtype, tolerance, monkeypatch):
    draws = sorted(key for key in RECORDED.arrays if key.startswith(f'{run}/draw'))

    def replay(kind):
        def draw(shape, dtype, device):
            key = draws.pop(0)
            assert key.endswith(f'_{kind}')
            return RECORDED.tensor(key, dtype).reshape(tuple(shape))
        return draw

    monkeypatch.setattr(torch, 'rand', replay('rand'))
    monkeypatch.setattr(torch, 'randn', replay('randn'))
    y = make_pipe(p=float(RECORDED.tensor(f'{run}/p')), dtype=dtype, **ALL)(RECORDED.tensor(f'{run}/x', dtype))
    assert draws == []
    assert max_error(y, RECORDED.tensor(f'{run}/y')) < tolerance


def test_identity_at_p_0():
    images = random_images(3, 3, 24, 24)
    assert make_pipe(p=0, **ALL)(images) is images


@pytest.mark.parametrize('size', [(16, 16), (24, 16), (7, 9)])
def test_resampling_the_identity_reconstructs_up_to_the_rounding_of_the_taps(size, either_path):
    # What skipping closed gates relies on; the median draw of xfrac is no translation at all, yet debug mode resamples.
    images = random_images(2, 3, *size)
    assert max_error(make_pipe(xfrac=1)(images, debug_percentile=0.5), images) < 1e-6
    assert max_error(make_pipe(xfrac=1, dtype=torch.float32)(images.float(), debug_percentile=0.5), images) < 2e-5


@pytest.mark.parametrize('size', [(300, 20), (20, 300)])
def test_large_images_take_the_fir_operators_with_equal_results(size, monkeypatch):
    images = random_images(1, 1, *size)
    calls = []
    for name in ('upsample2d', 'downsample2d'):
        def counted(*args, name=name, **kwargs):
            calls.append(name)
            return getattr(resample, name)(*args, **kwargs)
        monkeypatch.setattr(augment, name, counted)
    pipe = make_pipe(**augpipe_kwargs('bg'))
    by_operators = pipe(images, debug_percentile=0.7)
    assert calls == ['upsample2d', 'downsample2d']
    monkeypatch.setattr(augment, 'MAX_DENSE_SIZE', 512)
    assert max_error(by_operators, pipe(images, debug_percentile=0.7)) < 1e-11
    assert len(calls) == 2


def smooth_images(size=32):
    """A Gaussian off the centre: band-limited, and 0 at the edges."""
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing='ij')
    return torch.exp(-((x - 12) ** 2 + (y - 17) ** 2) / 18)[None, None].repeat(1, 3, 1, 1)


@pytest.mark.parametrize('kwargs, percentile, expected', [
    ({'xflip': 1}, 0.75, lambda x: x.flip(3)),
    ({'rotate90': 1}, 0.3, lambda x: x.rot90(1, [2, 3])),
    ({'rotate90': 1}, 0.6, lambda x: x.rot90(2, [2, 3])),
    ({'rotate90': 1}, 0.9, lambda x: x.rot90(3, [2, 3])),
    ({'xint': 1}, 0.75, lambda x: x.roll([2, 2], [2, 3])),  # 0.5 * 0.125 * 32 pixels, right and down
    ({'rotate': 1, 'rotate_max': 0.5}, 1 - 1e-12, lambda x: x.rot90(1, [2, 3])),
])
def test_direction_of_geometric_transforms(kwargs, percentile, expected):
    images = smooth_images()
    # sym6 is only nearly symmetric: mirrored and turned images come out displaced by a tenth of a pixel, in the official code too.
    assert max_error(make_pipe(**kwargs)(images, debug_percentile=percentile), expected(images)) < 0.03


@pytest.mark.parametrize('kwargs, percentile, times', [({'xflip': 1}, 0.75, 2), ({'rotate90': 1}, 0.3, 4)])
def test_transforms_of_finite_order(kwargs, percentile, times):
    pipe, images = make_pipe(**kwargs), smooth_images()
    y = images
    for _ in range(times):
        y = pipe(y, debug_percentile=percentile)
    assert max_error(y, images) < 2e-3


def test_positive_scale_enlarges():
    images = smooth_images()
    y = make_pipe(scale=1)(images, debug_percentile=0.9)  # 2 ** (0.2 * erfinv(0.8))
    factor = 2 ** (0.2 * float(torch.erfinv(torch.tensor(0.8, dtype=torch.float64))))
    assert float(y.sum() / images.sum()) == pytest.approx(factor ** 2, rel=1e-3)


@pytest.mark.parametrize('channels', [1, 3])
def test_color_closed_forms(channels):
    images = random_images(2, channels, 4, 4)
    mean = images.mean(1, keepdim=True)
    n = float(torch.erfinv(torch.tensor(0.5, dtype=torch.float64)))  # the draw at percentile 0.75

    def run(**kwargs):
        return make_pipe(**kwargs)(images, debug_percentile=0.75)
    assert max_error(run(brightness=1), images + 0.2 * n) < 1e-14
    assert max_error(run(contrast=1), images * 2 ** (0.5 * n)) < 1e-14
    assert max_error(run(lumaflip=1), images - 2 * mean) < 1e-14
    assert max_error(run(saturation=1), mean + 2 ** n * (images - mean)) < 1e-14
    # A third of a turn around the gray axis permutes the channels: red becomes green.
    assert max_error(run(hue=1, hue_max=4 / 3), images.roll(1, dims=1)) < 1e-14


def test_filter_bank_is_the_identity_at_equal_gains():
    images = random_images(2, 3, 22, 30)
    bank = torch.from_numpy(augment.filter_bank(augment.SYM2))
    assert max_error(bank.sum(0), F.one_hot(torch.tensor(21), 43).double()) < 1e-11
    gains = torch.full([2, 4], 1.5, dtype=torch.float64)  # along x and along y
    assert max_error(augment.amplify_bands(images, gains, bank), 1.5 ** 2 * images) < 1e-10


def test_imgfilter_is_a_per_sample_correlation_with_reflected_edges():
    images, gains = random_images(2, 3, 24, 26), torch.tensor([[1, 2, 0.5, 1], [0.3, 1, 1, 4]], dtype=torch.float64)
    bank = AugmentPipe().Hz_fbank.double()
    y = augment.amplify_bands(images, gains, bank)
    for i in range(2):
        taps = gains[i] @ bank
        padded = F.pad(images[i][:, None], [21] * 4, mode='reflect')
        assert max_error(y[i][:, None], F.conv2d(padded, torch.outer(taps, taps)[None, None])) < 1e-12


def test_cutout_zeroes_a_rectangle_and_nothing_else():
    y = make_pipe(cutout=1)(torch.ones(64, 3, 20, 30, dtype=torch.float64))
    zeros = (y == 0)
    assert bool((zeros | (y == 1)).all())
    rows, columns = zeros[:, 0].any(2), zeros[:, 0].any(1)
    assert bool((zeros == (rows[:, None, :, None] & columns[:, None, None, :])).all())
    assert int(rows.sum(1).max()) == 10 and int(columns.sum(1).max()) == 15
    assert int(rows.sum(1).min()) >= 5 and int(columns.sum(1).min()) >= 7  # the centre lies in the image


def test_noise_has_the_strength_of_its_half_normal_sigma():
    noise = make_pipe(noise=1)(torch.zeros(400, 1, 16, 16, dtype=torch.float64))
    sigma = noise.std([1, 2, 3])
    assert float(sigma.square().mean()) ** 0.5 == pytest.approx(0.1, rel=0.1)
    assert float(sigma.mean()) == pytest.approx(0.1 * (2 / np.pi) ** 0.5, rel=0.1)


@pytest.mark.parametrize('kwargs, probability', [
    ({'brightness': 1}, 0.3),
    ({'brightness': 0.5}, 0.15),
    ({'xflip': 1}, 0.15),  # half of the flips flip
    ({'rotate': 1}, 0.3),  # two rotations, together
    ({'rotate90': 1}, 0.225),
    ({'scale': 1}, 0.3),
    ({'xfrac': 1}, 0.3),  # one gate for x and y
    ({'cutout': 1}, 0.3),
    ({'imgfilter': 1, 'imgfilter_bands': [0, 1, 0, 0]}, 0.3),
    ({'imgfilter': 1}, 1 - 0.7 ** 4),
])
def test_frequency_of_open_gates_at_p_0_3(kwargs, probability):
    images = random_images(1, 1, 22, 22).repeat(1000, 1, 1, 1)
    changed = (make_pipe(p=0.3, **kwargs)(images) != images).flatten(1).any(1)
    assert float(changed.double().mean()) == pytest.approx(probability, abs=4.5 * (probability * (1 - probability) / 1000) ** 0.5)


def test_p_above_1_opens_every_gate():
    images = random_images(50, 1, 8, 8)
    assert bool((make_pipe(p=1.7, brightness=1, rotate=1)(images) != images).flatten(1).any(1).all())


def test_samples_with_closed_gates_are_untouched_and_do_not_disturb_the_others():
    images = random_images(40, 3, 16, 16)
    pipe = make_pipe(p=0.3, xfrac=1)
    torch.manual_seed(1)
    y = pipe(images)
    changed = (y != images).flatten(1).any(1)
    assert 0 < int(changed.sum()) < 40
    torch.manual_seed(1)
    # Only the margins depend on the other samples; they do not show under translations.
    other = torch.where(changed[:, None, None, None], images, images * 2)
    assert max_error(pipe(other)[changed], y[changed]) == 0


def test_margins_cover_what_a_translation_needs_and_stop_at_full_reflection():
    def margins(tx, ty):
        Q = augment.translate2d(torch.tensor([tx, 0.0]), torch.tensor([ty, 0.0]))
        return augment.margins_of(Q, height=24, width=16, hz=3)
    assert margins(0, 0) == [6, 6, 6, 6]
    assert margins(2.25, -3) == [6, 9, 9, 6]  # reading further right, further up
    assert margins(100, 100) == [6, 15, 6, 23]


def test_color_transforms_are_affine_in_the_image():
    pipe, x, y = make_pipe(**augpipe_kwargs('color')), random_images(2, 3, 8, 8, seed=1), random_images(2, 3, 8, 8, seed=2)
    middle = pipe((x + y) / 2, debug_percentile=0.3)
    assert max_error(middle, (pipe(x, debug_percentile=0.3) + pipe(y, debug_percentile=0.3)) / 2) < 1e-13


@pytest.mark.parametrize('channels', [1, 3])
def test_first_and_second_derivatives(channels, either_path):
    pipe = make_pipe(p=0.6, **augpipe_kwargs('bgcfnc'))
    images = random_images(2, channels, 22, 22).requires_grad_()

    def run(x):
        torch.manual_seed(3)
        return pipe(x)
    assert torch.autograd.gradcheck(run, images, fast_mode=True)
    # The pipe is affine; squared, it has a second derivative that passes through the gradient of the gradient.
    assert torch.autograd.gradgradcheck(lambda x: run(x).square(), images, fast_mode=True)


def test_grid_sample_derivatives_match_torch():
    x = random_images(2, 3, 6, 5, seed=1).requires_grad_()
    grid = 1.3 * random_images(2, 4, 7, 2, seed=2)  # some of it outside
    ours = augment._GridSample.apply(x, grid)
    theirs = F.grid_sample(x, grid, align_corners=False)
    dy = random_images(*ours.shape, seed=3)
    assert torch.equal(ours, theirs)
    assert max_error(torch.autograd.grad(ours, x, dy, retain_graph=True)[0], torch.autograd.grad(theirs, x, dy)[0]) == 0
    assert torch.autograd.gradcheck(lambda x: augment._GridSample.apply(x, grid), x)
    assert torch.autograd.gradgradcheck(lambda x: augment._GridSample.apply(x, grid), x)


def test_r1_like_gradient_reaches_the_weights():
    """Gradient of |d D(augment(x)) / dx|^2 with respect to D's weights, against its closed form for a linear D: 2 A A^T w."""
    pipe = make_pipe(**augpipe_kwargs('bg'))
    images = random_images(1, 1, 8, 8).requires_grad_()
    weights = random_images(64, seed=5).requires_grad_()

    def linear_part(x):
        return pipe(x, debug_percentile=0.7)
    gradient, = torch.autograd.grad(linear_part(images).flatten() @ weights, images, create_graph=True)
    actual, = torch.autograd.grad(gradient.square().sum(), weights)
    assert max_error(actual, 2 * linear_part(gradient.detach()).flatten()) < 1e-10


def test_named_pipes():
    assert list(augpipe_kwargs('bgc')) == [
        'xflip', 'rotate90', 'xint', 'scale', 'rotate', 'aniso', 'xfrac', 'brightness', 'contrast', 'lumaflip', 'hue', 'saturation']
    assert [len(augpipe_kwargs(name)) for name in ('blit', 'geom', 'color', 'filter', 'noise', 'cutout')] == [3, 4, 5, 1, 1, 1]
    assert [len(augpipe_kwargs(name)) for name in ('bg', 'bgc', 'bgcf', 'bgcfn', 'bgcfnc')] == [7, 12, 13, 14, 15]
    assert set(augpipe_kwargs('bgcfnc').values()) == {1}
    with pytest.raises(ValueError, match=r"'bgx', expected one of: blit, geom, color"):
        augpipe_kwargs('bgx')


def test_attributes_are_those_of_the_official_pickles():
    pipe = AugmentPipe(**ALL, imgfilter_bands=(1, 1, 0, 1))
    own = {key: value for key, value in vars(pipe).items() if key not in vars(torch.nn.Module())}
    bands = own.pop('imgfilter_bands')
    assert bands == [1, 1, 0, 1] and isinstance(bands, list)
    assert len(own) == 27 and all(type(value) is float for value in own.values())
    assert {name: list(buffer.shape) for name, buffer in pipe.named_buffers()} == {'p': [], 'Hz_geom': [12], 'Hz_fbank': [4, 43]}
    assert float(pipe.p) == 1


@pytest.mark.parametrize('kwargs, images, message', [
    ({}, torch.zeros(3, 8, 8), r'images \[N, C, H, W\], got torch.float32 \[3, 8, 8\]'),
    ({}, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r'expected float32 or float64 .* got torch.uint8'),
    ({'hue': 1, 'imgfilter': 1}, torch.zeros(1, 2, 32, 21), r'1 or 3 channels; imgfilter needs at least 22 x 22 .*\[1, 2, 32, 21\]'),
])
def test_wrong_images_are_refused(kwargs, images, message):
    with pytest.raises(ValueError, match=message):
        make_pipe(dtype=torch.float32, **kwargs)(images)


def test_wrong_number_of_bands_is_refused():
    with pytest.raises(ValueError, match=r'4 entries, got \[1, 1\]'):
        AugmentPipe(imgfilter_bands=[1, 1])


def test_empty_batch():
    assert make_pipe(p=0.5, **ALL)(torch.zeros(0, 3, 32, 32, dtype=torch.float64)).shape == (0, 3, 32, 32)


def test_source_stands_alone_behind_the_reference_operators(monkeypatch):
    """As embedded in a pickle: Python 3.7 syntax, no package m2m_stylegan."""
    source = inspect.getsource(reference) + inspect.getsource(resample) + inspect.getsource(augment)
    ast.parse(source, feature_version=(3, 7))
    for name in ('m2m_stylegan', 'm2m_stylegan.ops'):
        monkeypatch.setitem(__import__('sys').modules, name, None)
    namespace = {'__name__': 'embedded'}
    exec(compile(source, 'embedded', 'exec'), namespace)
    pipe = namespace['AugmentPipe'](**augpipe_kwargs('bgc')).double()
    images = random_images(2, 3, 16, 16)
    assert max_error(pipe(images, debug_percentile=0.3), make_pipe(**augpipe_kwargs('bgc'))(images, debug_percentile=0.3)) == 0
