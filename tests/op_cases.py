"""Inputs for the compiled operators, and what they must return: `reference.py` or the formulas of the schema in float64, rounded once.

Shared by the tests that emulate the CUDA kernels and those that run them.
"""

import itertools

import torch

from m2m_stylegan.ops import library, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
ACTS = list(reference.ACTIVATIONS)
SQRT2 = 2 ** 0.5

# Relative error of one rounding; sums and transcendental functions in float32 add a little.
ROUNDING = {torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8, torch.float32: 2e-6, torch.float64: 1e-13}
ARITHMETIC = {torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float32: 2e-6, torch.float64: 1e-13}


def randn(*shape, dtype=torch.float64, fmt=torch.contiguous_format, seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=fmt) if len(shape) == 4 else x


# upfirdn2d

BINOMIAL = reference.setup_filter([1, 3, 3, 1])
ODD = randn(4, 4, dtype=torch.float32, seed=9)
SYM6 = reference.setup_filter([0.015, 0.003, -0.118, -0.048, 0.491, 0.788, 0.338, -0.073, -0.021, 0.045, 0.002, -0.008], normalize=False)
NONE, TWO = (1, 1), (2, 2)
# label: (filter, up, down, (x0, x1, y0, y1), flip, gain, (height, width)); up and down are (x, y)
UPFIRDN2D = {
    'filter': (BINOMIAL, NONE, NONE, (2, 2, 2, 2), False, 1.0, (9, 7)),
    'filter, odd': (ODD, NONE, NONE, (3, -1, -2, 4), True, 1.7, (9, 7)),
    'filter, tall': (BINOMIAL, NONE, NONE, (1, 1, 1, 1), False, 4.0, (70, 5)),
    'filter, wide': (ODD, NONE, NONE, (1, 2, 3, 0), False, 1.0, (6, 150)),
    'filter, zero first tap': (ODD * torch.tensor([0.0, 1, 1, 1]), NONE, NONE, (1, 2, 1, 2), True, 1.0, (5, 6)),
    'filter, far outside': (ODD, NONE, NONE, (9, 8, 7, 21), False, 1.0, (3, 2)),
    'up': (BINOMIAL, TWO, NONE, (2, 1, 2, 1), False, 4.0, (9, 7)),
    'up, odd': (ODD, TWO, NONE, (3, 2, 1, 4), True, 1.0, (5, 8)),
    'up, crop': (ODD, TWO, NONE, (-1, 2, -3, -2), False, 1.0, (9, 7)),
    'up, tall': (ODD, TWO, NONE, (1, 1, 3, 2), False, 1.0, (40, 3)),
    'down': (BINOMIAL, NONE, TWO, (1, 1, 1, 1), False, 1.0, (8, 10)),
    'down, odd': (ODD, NONE, TWO, (2, 1, 4, -1), True, 1.0, (11, 9)),
    'down, tall': (ODD, NONE, TWO, (0, 3, -3, 2), False, 1.0, (141, 5)),
    'up x, 12 taps': (SYM6[None, :], (2, 1), NONE, (6, 5, 0, 0), False, SQRT2, (5, 30)),
    'up x, 12 taps, odd': (SYM6[None, :], (2, 1), NONE, (3, -2, 1, 2), True, 1.0, (20, 9)),
    'up y, 12 taps': (SYM6[:, None], (1, 2), NONE, (0, 0, 6, 5), False, SQRT2, (30, 5)),
    'up y, 12 taps, odd': (SYM6[:, None], (1, 2), NONE, (2, -1, 7, -3), True, 1.0, (13, 9)),
    'down x, 12 taps': (SYM6[None, :], NONE, (2, 1), (5, 5, 0, 0), False, 1.0, (6, 30)),
    'down y, 12 taps': (SYM6[:, None], NONE, (1, 2), (0, 0, 5, 4), True, 1.0, (41, 6)),
    'down y, 12 taps, odd': (SYM6[:, None], NONE, (1, 2), (1, 0, -3, 12), False, 1.0, (30, 6)),
    'identity': (torch.ones(1, 1), NONE, NONE, (1, 0, 0, -1), False, 1.0, (5, 4)),
    'uneven': (randn(3, 5, dtype=torch.float64), (3, 1), (1, 2), (4, -1, 2, 3), True, -0.6, (6, 7)),
    'up x only': (ODD, (2, 1), NONE, (1, 2, 1, 2), False, 1.0, (5, 6)),
    'up and down': (randn(2, 7, dtype=torch.float32), (3, 2), (2, 5), (-4, 9, 5, 6), False, 1.0, (9, 8)),
}


def upfirdn2d_args(label, n, c, dtype, fmt):
    f, up, down, padding, flip, gain, size = UPFIRDN2D[label]
    return randn(n, c, *size, dtype=dtype, fmt=fmt), f, *up, *down, *padding, flip, gain


def upfirdn2d(x, f, upx, upy, downx, downy, padx0, padx1, pady0, pady1, flip, gain):
    return [reference.upfirdn2d(x.double(), f.double(), (upx, upy), (downx, downy), (padx0, padx1, pady0, pady1), flip, gain)]


# bias_act and its derivatives

# label: (shape, dimension of the bias, order of the dimensions in memory)
LAYOUTS = {
    'image': ((2, 3, 5, 7), 1, (0, 1, 2, 3)),
    'image, channels last': ((2, 16, 5, 7), 1, (0, 2, 3, 1)),
    'image, odd, channels last': ((2, 3, 5, 7), 1, (0, 2, 3, 1)),
    'features': ((37, 24), 1, (0, 1)),
    'features, transposed': ((37, 24), 1, (1, 0)),
    'sequence': ((3, 50, 9), 0, (0, 1, 2)),
    'permuted': ((3, 50, 9), 2, (2, 0, 1)),
    'several blocks': ((2, 5, 33, 31), 1, (0, 1, 2, 3)),
    'one channel': ((6, 1, 3, 3), 1, (0, 1, 2, 3)),
}


def in_order(x, order):
    """x with its dimensions in memory from the slowest to the fastest in this order."""
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])


def bias_act_args(label, act, order, dtype, clamp, with_b=True):
    """Arguments of bias_act (order 0) or of its derivatives of order 1 and 2."""
    shape, dim, memory = LAYOUTS[label]
    x, dy, ddx = (in_order(randn(*shape, dtype=dtype, seed=i), memory) for i in range(3))
    b = randn(shape[dim], dtype=dtype, seed=3) if with_b else None
    rest = (dim, ACTS.index(act), 0.3 if act == 'lrelu' else 0.0, 1.7, clamp)
    if order == 1 and act in library.RECTIFIERS:
        return dy, None, None, bias_act(x, b, *rest)[0].to(dtype), *rest
    return ((x, b, *rest), (dy, x, b, None, *rest), (ddx, dy, x, b, *rest))[order]


def bias_act(x, b, dim, act, alpha, gain, clamp):
    return [reference.bias_act(x.double(), None if b is None else b.double(), dim, ACTS[act], alpha, gain, None if clamp < 0 else clamp)]


def slope(y, alpha, gain, clamp):
    """Derivative of a rectifier with gain and clamp, from its result."""
    limit = torch.tensor(clamp, dtype=y.dtype).double()
    r = torch.where(y > 0, *torch.tensor([gain, gain * alpha], dtype=torch.float64))
    return r if clamp < 0 else torch.where(y.double().abs() < limit, r, 0.0)


def smooth(x, b, dim, act, alpha, gain, clamp, *factors):
    """The derivative of bias_act with respect to x of order len(factors), times the factors."""
    with torch.enable_grad():
        x = x.double().requires_grad_()
        y, = bias_act(x, b, dim, act, alpha, gain, clamp)
        for factor in factors:
            y, = torch.autograd.grad(y, x, factor.double(), create_graph=True)
    return [y.detach()]


def bias_act_grad(dy, x, b, y, dim, act, alpha, gain, clamp):
    if y is None:
        return smooth(x, b, dim, act, alpha, gain, clamp, dy)
    return [dy.double() * slope(y, (1.0, 0.0, alpha)[act], gain, clamp)]


def bias_act_grad2(ddx, dy, x, b, dim, act, alpha, gain, clamp):
    return smooth(x, b, dim, act, alpha, gain, clamp, dy, ddx)


# epilogue and its derivatives

# (samples, channels, height, width): small, odd, several chunks of pixels, several groups of channels
SIZES = [(2, 3, 5, 7), (3, 16, 4, 4), (1, 1, 1, 1), (2, 5, 64, 72), (1, 8, 60, 60), (2, 24, 3, 50), (1, 130, 1, 3), (2, 520, 1, 2)]
# which of scale, noise, strength and b are there
OPERANDS = [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 0, 1), (0, 1, 1, 0)]
# (alpha, gain, clamp)
RECTIFIERS = [(0.2, SQRT2, -1.0), (0.2, SQRT2, 1.0), (0.0, 0.7, 0.6), (1.0, 1.0, -1.0), (1.0, 1.5, 1.0)]


def epilogue_args(size, has, rectifier, dtype, fmt, per_sample=True):
    n, c, h, w = size
    acc = library.accumulator(dtype)
    shapes = ((n, c), (n if per_sample else 1, 1, h, w), (), (c,))
    operands = (randn(*shape, dtype=acc, seed=i) if there else None for i, (shape, there) in enumerate(zip(shapes, has, strict=True), 1))
    return randn(*size, dtype=dtype, fmt=fmt), *operands, *rectifier


def epilogue_grad_args(size, has, rectifier, dtype, fmt, per_sample=True, mask=None):
    x, scale, noise, strength, b, *rest = epilogue_args(size, has, rectifier, dtype, fmt, per_sample)
    y = epilogue(x, scale, noise, strength, b, *rest)[0].to(dtype)
    if mask is None:
        mask = [True, *(t is not None for t in (scale, noise, strength)), True]
    linear = rectifier[0] == 1 and rectifier[2] < 0
    dy = randn(*size, dtype=dtype, fmt=fmt, seed=5)
    return dy, x if mask[1] else None, None if linear else y, scale, noise, strength, *rest, mask


def epilogue_grad2_args(size, with_scale, with_ddscale, rectifier, dtype, fmt):
    mask = [True, with_ddscale, False, False, True]
    dy, x, y, scale, _, _, *rest, _ = epilogue_grad_args(size, (with_scale, 0, 0, 0), rectifier, dtype, fmt, mask=mask)
    ddscale = randn(*size[:2], dtype=library.accumulator(dtype), seed=6) if with_ddscale else None
    return randn(*size, dtype=dtype, fmt=fmt, seed=7), ddscale, dy, x, y, scale, *rest, [True, with_ddscale, with_scale]


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def per_channel(t, otherwise):
    return otherwise if t is None else t[:, :, None, None]


def epilogue(x, scale, noise, strength, b, alpha, gain, clamp):
    x, scale, noise, strength, b = double(x, scale, noise, strength, b)
    return [reference.epilogue(x, scale, noise, strength, b, 'lrelu', alpha, gain, None if clamp < 0 else clamp)]


def epilogue_grad(dy, x, y, scale, noise, strength, alpha, gain, clamp, mask):
    r = gain if y is None else slope(y, alpha, gain, clamp)
    dy, x, scale, noise, strength = double(dy, x, scale, noise, strength)
    g = dy * r
    results = [lambda: g * per_channel(scale, 1.0), lambda: (g * x).sum([2, 3]),
               lambda: (g.sum(1, keepdim=True) * (1.0 if strength is None else strength)).sum_to_size(noise.shape), lambda: (g * noise).sum(),
               lambda: g.sum([0, 2, 3])]
    return [result() if want else torch.empty([0]) for result, want in zip(results, mask, strict=True)]


def epilogue_grad2(ddx, ddscale, dy, x, y, scale, alpha, gain, clamp, mask):
    r = gain if y is None else slope(y, alpha, gain, clamp)
    ddx, ddscale, dy, x, scale = double(ddx, ddscale, dy, x, scale)
    g = dy * r
    results = [lambda: r * (ddx * per_channel(scale, 1.0) + (0.0 if ddscale is None else per_channel(ddscale, 0.0) * x)),
               lambda: g * per_channel(ddscale, 0.0), lambda: (g * ddx).sum([2, 3])]
    return [result() if want else torch.empty([0]) for result, want in zip(results, mask, strict=True)]


ORACLES = {fn.__name__: fn for fn in (upfirdn2d, bias_act, bias_act_grad, bias_act_grad2, epilogue, epilogue_grad, epilogue_grad2)}


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def check(op, args, got):
    """The tensors `got` from the operator named `op` are right."""
    dtype = args[0].dtype
    for i, (result, exact) in enumerate(zip(got, ORACLES[op](*args), strict=True)):
        large = float(exact.abs().max()) if exact.numel() else 0.0
        if result.ndim < 4 and op.startswith('epilogue'):  # a sum of terms of about one, which may cancel
            large += args[0].numel() ** 0.5
        smallest = 2.0 ** -25 if result.dtype == torch.float16 else 0.0
        tolerance = {'rtol': ROUNDING[result.dtype] * 1.01, 'atol': ARITHMETIC[dtype] * large + smallest}
        torch.testing.assert_close(result.double().cpu(), exact.double(), **tolerance,
                                   msg=lambda text, i=i: f'{op}, result {i}, {dtype}: {text}')


def bias_act_cases(dtype):
    """(operator, arguments) over layouts, activations, orders and clamps."""
    for label, (i, act) in itertools.product(LAYOUTS, enumerate(ACTS)):
        for order in range(2 if act in library.RECTIFIERS else 3):
            clamp = (-1.0, 1.1)[(i + order) % 2]
            yield ('bias_act', 'bias_act_grad', 'bias_act_grad2')[order], bias_act_args(label, act, order, dtype, clamp, with_b=(i + order) % 3 > 0)


def epilogue_cases(dtype, fmt):
    """(operator, arguments) over sizes, operands and rectifiers."""
    for i, (size, has) in enumerate(itertools.product(SIZES, OPERANDS)):
        if size[1] > 100 and has != OPERANDS[0]:  # one block per channel: slow to emulate
            continue
        rectifier = RECTIFIERS[i % len(RECTIFIERS)] if i % 2 else RECTIFIERS[i // len(OPERANDS) % len(RECTIFIERS)]
        yield 'epilogue', epilogue_args(size, has, rectifier, dtype, fmt, per_sample=i % 2 == 0)
        yield 'epilogue_grad', epilogue_grad_args(size, has, rectifier, dtype, fmt, per_sample=i % 2 == 0)
        if not has[1] or size[1] > 100:
            yield 'epilogue_grad2', epilogue_grad2_args(size, bool(has[0]), i % 2 == 0, rectifier, dtype, fmt)
