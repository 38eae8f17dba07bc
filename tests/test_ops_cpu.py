"""Compiled CPU kernels against the plain PyTorch reference in float64, for every dtype and memory layout.

Yardstick: a kernel may err at most twice as much as plain PyTorch in the same dtype, plus one rounding of the largest value.
"""

import pytest
import torch

from m2m_stylegan.ops import build, library, reference

pytestmark = pytest.mark.skipif(not build.ready('cpu'), reason=f'CPU operators: {build.prepare("cpu").reason}')

OPS = torch.ops.m2m_stylegan
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    'strided': lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'cropped': lambda x: torch.nn.functional.pad(x, [1, 2, 2, 1]).contiguous(memory_format=CHANNELS_LAST)[:, :, 2:-1, 1:-2],
    'expanded': lambda x: x[:1].expand_as(x),
}
layouts = pytest.mark.parametrize('layout', LAYOUTS)
dtypes = pytest.mark.parametrize('dtype', DTYPES, ids=str)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got, exact, plain, like=None):
    """got: of the kernel. exact: the reference in float64. plain: the reference in got's dtype. like: a tensor whose dtype and layout to expect."""
    assert got.shape == exact.shape
    if like is not None:
        assert got.dtype == like.dtype
        assert got.is_contiguous(memory_format=library.suggest_memory_format(like))
    if got.numel():
        rounding = 64 if got.dtype == torch.float64 else 1  # float64 is its own yardstick
        allowed = 2 * (plain.double() - exact).abs().max() + rounding * torch.finfo(plain.dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= allowed


# upfirdn2d: filter shape, up (x, y), down (x, y), padding (x0, x1, y0, y1). The default filter is an outer product, the others are not.
RESAMPLE = {
    'filter': ((4, 4), (1, 1), (1, 1), (2, 1, 2, 1)),
    'up': ((4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
    'down': ((4, 4), (1, 1), (2, 2), (1, 1, 1, 1)),
    'up_x': ((1, 12), (2, 1), (1, 1), (6, 5, 0, 0)),
    'up_y': ((12, 1), (1, 2), (1, 1), (0, 0, 6, 5)),
    'down_x': ((1, 12), (1, 1), (2, 1), (5, 5, 0, 0)),
    'down_y': ((12, 1), (1, 1), (1, 2), (0, 0, 5, 5)),
    'crop': ((4, 4), (1, 1), (1, 1), (-1, 3, 2, -2)),
    'crop_y': ((3, 1), (1, 1), (1, 1), (-1, -2, 1, 1)),
    'pad_x_of_a_column': ((3, 1), (1, 1), (1, 1), (2, 1, 1, 1)),
    'crop_up': ((3, 4), (2, 2), (1, 1), (-3, 2, 5, -4)),
    'pad_far': ((4, 4), (1, 1), (2, 2), (9, 0, 0, 11)),
    'identity': ((1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    'zeros_between': ((1, 2), (3, 2), (1, 1), (0, 1, 2, 0)),
    'only_zeros_between': ((2, 1), (4, 1), (1, 1), (-1, -37, 0, 0)),
    'both': ((5, 7), (2, 3), (3, 2), (4, 1, 2, 3)),
    'only_padding': ((2, 2), (1, 1), (1, 1), (20, -9, 20, -9)),
}


def upfirdn(x, f, up, down, padding, flip=False, gain=1.7):
    return OPS.upfirdn2d(x, f, *up, *down, *padding, flip, gain)


@layouts
@dtypes
@pytest.mark.parametrize('case', RESAMPLE)
def test_upfirdn2d(case, dtype, layout):
    taps, up, down, padding = RESAMPLE[case]
    for outer, channels, flip in [(True, 3, False), (True, 17, True), (False, 3, True), (False, 17, False)]:
        x = LAYOUTS[layout](randn(2, channels, 9, 10, dtype=dtype))
        f = randn(taps[0], 1, dtype=torch.float32, seed=1).round() * randn(1, taps[1], dtype=torch.float32, seed=2).round().add(0.5) if outer \
            else randn(*taps, dtype=torch.float32, seed=3)
        args = (f, up, down, padding, flip, 1.7)
        check(upfirdn(x, *args), reference._fir(x.double(), *args), reference._fir(x, *args), like=x)


@dtypes
@pytest.mark.parametrize('shape', [[1, 1, 1, 1], [3, 1, 1, 5], [1, 70, 5, 1], [1, 2, 3, 200], [1, 600, 2, 3]])
def test_upfirdn2d_odd_sizes(shape, dtype):
    f = reference.setup_filter([1, 3, 3, 1])
    for fmt in (CONTIGUOUS, CHANNELS_LAST):
        x = randn(*shape, dtype=dtype).contiguous(memory_format=fmt)
        for up, down in [(1, 1), (2, 1), (1, 2), (3, 2)]:
            args = (f, (up, up), (down, down), (3, 2, 2, 3), False, 1.0)
            check(upfirdn(x, *args), reference._fir(x.double(), *args), reference._fir(x, *args), like=x)


def test_upfirdn2d_empty():
    f = torch.ones(4, 4)
    assert upfirdn(torch.ones(0, 3, 8, 8), f, (1, 1), (2, 2), (1, 1, 1, 1)).shape == (0, 3, 4, 4)
    assert upfirdn(torch.ones(2, 0, 8, 8), f, (2, 2), (1, 1), (2, 1, 2, 1)).shape == (2, 0, 16, 16)
    assert upfirdn(torch.ones(2, 3, 0, 8), f, (1, 1), (1, 1), (0, 0, 2, 2)).equal(torch.zeros(2, 3, 1, 5))


@pytest.mark.parametrize('f', [torch.zeros(3, 2), torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.full([2, 2], float('nan')), torch.full([2, 2], 1e-30),
                               torch.tensor([[1.0, 2.0], [2.0, 4.001]]),
                               torch.tensor([[0.5, 0.25], [0.25, 0.125]], dtype=torch.float64)[:, :1]])
def test_upfirdn2d_unusual_filters(f):
    x = randn(1, 2, 5, 6, dtype=torch.float32)
    expected = reference._fir(x, f, (2, 1), (1, 1), (1, 1, 1, 1), False, 1)
    torch.testing.assert_close(upfirdn(x, f, (2, 1), (1, 1), (1, 1, 1, 1), gain=1.0), expected, equal_nan=True)


def test_upfirdn2d_keeps_nan_and_infinity_in_their_windows():
    x = torch.zeros(1, 2, 9, 9)
    x[0, 0, 4, 4], x[0, 1, 4, 4] = float('nan'), float('inf')
    for f in (reference.setup_filter([1, 3, 3, 1]), randn(4, 4, dtype=torch.float32)):
        y = upfirdn(x, f, (1, 1), (1, 1), (2, 1, 2, 1))
        assert y.isfinite().logical_not().sum() == 2 * 16
        assert y[0, 0].isnan().sum() == 16 and y[0, 1].isinf().sum() == 16


def smooth_acts():
    return [act for act in reference.ACTIVATIONS if act not in library.RECTIFIERS]


def plain_bias_act(x, b, dim, act, alpha, gain, clamp, dy, ddx=None):
    """[y, dx] or, with ddx, [y, dx, what bias_act_grad2 returns], by torch alone."""
    x = x.clone().requires_grad_()
    y = reference.bias_act(x, b, dim, act, alpha, gain, clamp)
    dx, = torch.autograd.grad(y, x, dy, create_graph=True)
    second = [] if ddx is None else torch.autograd.grad(dx, x, ddx)
    return [t.detach() for t in (y, dx, *second)]


@layouts
@dtypes
@pytest.mark.parametrize('clamp', [None, 0.75])
@pytest.mark.parametrize('act', reference.ACTIVATIONS)
def test_bias_act(act, clamp, dtype, layout):
    index, gain = library.ACT_INDEX[act], 1.25
    alpha = {'lrelu': 0.2}.get(act, 0.0)
    x, dy, ddx = (LAYOUTS[layout](randn(2, 7, 9, 10, dtype=dtype, seed=seed)) for seed in (1, 2, 3))
    b = randn(7, dtype=dtype, seed=4)
    if clamp is not None:  # Where a derivative jumps, rounding decides: no gradient there.
        y = reference.bias_act(x.double(), b.double(), 1, act, alpha, gain)
        dy = dy.where((y.abs() - clamp).abs() > 0.02, 0)
    args, tail = (1, act, alpha, gain, clamp), (1, index, alpha, gain, -1.0 if clamp is None else clamp)
    smooth = act in smooth_acts()
    exact = plain_bias_act(x.double(), b.double(), *args, dy.double(), ddx.double() if smooth else None)
    plain = plain_bias_act(x, b, *args, dy, ddx if smooth else None)
    y = OPS.bias_act(x, b, *tail)
    got = [y, OPS.bias_act_grad(dy, *((x, b, None) if smooth else (None, None, y)), *tail)]
    if smooth:
        got.append(OPS.bias_act_grad2(ddx, dy, x, b, *tail))
    for g, e, p, like in zip(got, exact, plain, (x, dy, ddx), strict=False):
        check(g, e, p)
        assert g.dtype == dtype and g.stride() == torch.empty_like(like).stride()


@pytest.mark.parametrize('shape, dim', [((5,), 0), ((4, 1500), 1), ((3, 5), 0), ((2, 3, 41, 43), 1), ((2, 3, 4), 2), ((6, 1, 4), 1), ((0, 3), 1),
                                        ((3, 0, 2), 1)])
def test_bias_act_shapes(shape, dim):
    x, b = randn(*shape, dtype=torch.float32), randn(shape[dim], dtype=torch.float32)
    for bias in (b, None):
        for view in (x, x.t().contiguous().t() if x.ndim == 2 else x):
            torch.testing.assert_close(OPS.bias_act(view, bias, dim, 2, 0.2, 1.0, -1.0), reference.bias_act(view, bias, dim, 'lrelu', gain=1))
            y = OPS.bias_act(view, bias, dim, 8, 0.0, 1.0, -1.0)
            torch.testing.assert_close(y, reference.bias_act(view, bias, dim, 'swish', gain=1))
            assert y.stride() == view.stride()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 3e-7), (torch.float64, 1e-15)])
@pytest.mark.parametrize('act', smooth_acts())
def test_activations_to_the_last_digits(act, dtype, tolerance):
    """The exponential is our own: relative errors over its whole range, near zero too; NaN and infinity as in torch."""
    magnitudes = torch.logspace(-6, 1.9, 2000, dtype=dtype)
    x = torch.cat([magnitudes, -magnitudes])
    args = (None, 0, library.ACT_INDEX[act], 0.0, 1.0, -1.0)
    exact = reference.bias_act(x.double(), None, 0, act, gain=1)
    relevant = exact.abs() > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(OPS.bias_act(x, *args).double()[relevant], exact[relevant], rtol=tolerance, atol=0)
    assert not OPS.bias_act(x, *args)[~relevant].abs().gt(torch.finfo(torch.float32).tiny).any()
    special = torch.tensor([float('nan'), float('inf'), -float('inf'), 0.0, 500.0, -500.0, 1e30], dtype=dtype)
    expected = reference.bias_act(special, None, 0, act, gain=1)
    torch.testing.assert_close(OPS.bias_act(special, *args), expected, rtol=tolerance, atol=0, equal_nan=True)


# epilogue: which of scale, noise, strength and bias are there; samples that the noise is for.
OPERANDS = [('scale', 'noise', 'strength', 'b'), ('scale',), ('b',), ('noise', 'b'), ()]


def operands(x, has, noise_samples):
    n, c, h, w = x.shape
    dtype = library.accumulator(x.dtype)
    everything = {'scale': randn(n, c, dtype=dtype, seed=5), 'noise': randn(noise_samples, 1, h, w, dtype=dtype, seed=6),
                  'strength': randn(dtype=dtype, seed=7), 'b': randn(c, dtype=dtype, seed=8)}
    return [everything[name] if name in has else None for name in ('scale', 'noise', 'strength', 'b')]


def plain_epilogue(x, small, dy, ddx, ddscale, dtype, kwargs):
    """(y, {input: gradient}, (gdy, gx, gscale)) by torch alone, all computed in `dtype`."""
    x, dy, *small = (None if t is None else t.to(dtype).clone().requires_grad_() for t in (x, dy, *small))
    y = reference.epilogue(x, *small, **kwargs)
    given = [t for t in (x, *small) if t is not None]
    grads = torch.autograd.grad(y, given, dy, create_graph=True)
    wrt = [dy, *given[:2]] if small[0] is not None else [dy, x]
    second = torch.autograd.grad(grads[:len(wrt) - 1], wrt, [ddx.to(dtype), ddscale.to(dtype)][:len(wrt) - 1], allow_unused=True)
    it = iter(grads)
    return y.detach(), [None if t is None else next(it).detach() for t in (x, *small)], second


@layouts
@dtypes
@pytest.mark.parametrize('kwargs', [{'act': 'lrelu', 'clamp': 0.75}, {'act': 'relu', 'gain': 0.5}, {'act': 'linear', 'gain': 1.0}],
                         ids=['lrelu', 'relu', 'linear'])
@pytest.mark.parametrize('has', OPERANDS, ids='+'.join)
def test_epilogue(has, kwargs, dtype, layout):
    for channels, noise_samples in [(3, 1), (17, 2)]:
        x, dy, ddx = (LAYOUTS[layout](randn(2, channels, 9, 10, dtype=dtype, seed=seed)) for seed in (1, 2, 3))
        check_epilogue(x, dy, ddx, operands(x, has, noise_samples), kwargs)


@pytest.mark.parametrize('shape', [[1, 1, 1, 1], [3, 600, 1, 1], [1, 700, 3, 5], [2, 19, 33, 35], [1, 2, 130, 131], [2, 1, 5, 1]])
@pytest.mark.parametrize('fmt', [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_epilogue_of_other_sizes(shape, fmt):
    for dtype in (torch.float32, torch.float64):
        x, dy, ddx = (randn(*shape, dtype=dtype, seed=seed).contiguous(memory_format=fmt) for seed in (1, 2, 3))
        check_epilogue(x, dy, ddx, operands(x, OPERANDS[0], 1), {'act': 'lrelu', 'clamp': 3.0})


def check_epilogue(x, dy, ddx, small, kwargs):
    """The result, all gradients, and all of those of the gradient penalties."""
    ddscale = randn(*x.shape[:2], dtype=library.accumulator(x.dtype), seed=9)
    alpha, clamp = library.RECTIFIERS[kwargs['act']](0.2), kwargs.get('clamp')
    gain = kwargs.get('gain', reference.activation_gain(kwargs['act']))
    tail = (alpha, gain, -1.0 if clamp is None else clamp)
    exact_y = reference.epilogue(x.double(), *small, **kwargs)
    # Where the derivative jumps, rounding decides: no gradient there.
    sure = exact_y.abs() > 0.02 * gain if clamp is None else (exact_y.abs() > 0.02 * gain) & (exact_y.abs() < clamp - 0.02)
    sure |= exact_y.abs() == clamp
    dy = dy.where(sure, 0)
    exact = plain_epilogue(x, small, dy, ddx, ddscale, torch.float64, kwargs)
    plain = plain_epilogue(x, small, dy, ddx, ddscale, x.dtype, kwargs)

    y = OPS.epilogue(x, *small, *tail)
    check(y, exact[0], plain[0], like=x)
    linear = alpha == 1 and clamp is None
    scale, noise, strength, _ = small
    mask = [t is not None for t in (x, *small)]
    grads = OPS.epilogue_grad(dy, x, None if linear else y, scale, noise, strength, *tail, mask)
    for got, e, p, like in zip(grads, exact[1], plain[1], (dy, None, None, None, None), strict=True):
        if e is None:
            assert got.shape == (0,)
        else:
            check(got, e, p, like)
    with_scale = scale is not None
    mask = [True, with_scale, with_scale]
    grads2 = OPS.epilogue_grad2(ddx, ddscale if with_scale else None, dy, x, None if linear else y, scale, *tail, mask)
    assert [g.numel() > 0 for g in grads2] == mask
    sure = sure.contiguous(memory_format=library.suggest_memory_format(dy))
    check(*(gdy.where(sure, 0) for gdy in (grads2[0], exact[2][0], plain[2][0])), like=dy)
    if with_scale:
        for got, e, p, like in zip(grads2[1:], exact[2][1:], plain[2][1:], (dy, None), strict=True):
            check(got, e, p, like)


def test_epilogue_empty():
    for shape in ([0, 3, 4, 5], [2, 0, 4, 5], [2, 3, 0, 5]):
        x = torch.ones(shape)
        n, c, h, w = shape
        scale, noise, strength, b = torch.ones(n, c), torch.ones(1, 1, h, w), torch.ones([]), torch.ones(c)
        assert OPS.epilogue(x, scale, noise, strength, b, 0.2, 1.0, -1.0).shape == x.shape
        grads = OPS.epilogue_grad(x, x, x, scale, noise, strength, 0.2, 1.0, -1.0, [True] * 5)
        assert [g.shape for g in grads] == [x.shape, (n, c), noise.shape, (), (c,)]
        assert not any(g.any() for g in grads)
        assert [g.shape for g in OPS.epilogue_grad2(x, scale, x, x, x, scale, 0.2, 1.0, -1.0, [True] * 3)] == [x.shape, x.shape, (n, c)]


@dtypes
def test_no_gradient_passes_where_the_clamp_holds(dtype):
    """Also if the limit is no number of that dtype, and its rounded value is smaller."""
    x = torch.full([1, 1, 4, 4], 1e4, dtype=dtype)
    for clamp in (362.03867196751236, 1.1, 1.2, 256.0):
        y = OPS.epilogue(x, None, None, None, None, 0.2, 1.0, clamp)
        assert y.double().sub(clamp).abs().max() <= clamp * torch.finfo(dtype).eps
        assert not OPS.epilogue_grad(x, None, y, None, None, None, 0.2, 1.0, clamp, [True] + [False] * 4)[0].any()
        assert not OPS.bias_act_grad(x, None, None, y, 1, 2, 0.2, 1.0, clamp).any()


def test_nan_and_infinity_come_through():
    x = torch.tensor([float('nan'), float('inf'), -float('inf'), 1.0]).reshape(1, 1, 2, 2)
    for clamp, infinity in ((-1.0, float('inf')), (3.0, 3.0)):
        expected = torch.tensor([float('nan'), infinity, -infinity, 1.0])
        for y in (OPS.epilogue(x, None, None, None, None, 0.2, 1.0, clamp), OPS.bias_act(x, None, 1, 2, 0.2, 1.0, clamp)):
            torch.testing.assert_close(y.flatten(), expected, equal_nan=True)
    dx = OPS.bias_act_grad(x, None, None, torch.ones_like(x), 1, 2, 0.2, 1.0, 3.0)
    torch.testing.assert_close(dx, x, equal_nan=True)


@pytest.mark.parametrize('fmt', [CONTIGUOUS, CHANNELS_LAST], ids=str)
def test_sums_are_the_same_for_any_number_of_threads(fmt):
    x, dy = (randn(3, 20, 47, 61, dtype=torch.float32, seed=seed).contiguous(memory_format=fmt) for seed in (1, 2))
    scale, noise, strength, b = operands(x, OPERANDS[0], 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = OPS.epilogue(x, scale, noise, strength, b, 0.2, 1.0, -1.0)
            grads = OPS.epilogue_grad(dy, x, y, scale, noise, strength, 0.2, 1.0, -1.0, [True] * 5)
            results.append([y, *grads, *OPS.epilogue_grad2(x, scale, dy, x, y, scale, 0.2, 1.0, -1.0, [True] * 3)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))
