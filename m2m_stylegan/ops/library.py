"""Schemas, shapes and derivatives of the compiled operators in torch's namespace `m2m_stylegan`.

The kernels in csrc/ register themselves for CPU and CUDA when `ops.build` has loaded them. Every operator that is called inside a backward pass
has a derivative of its own (R1 and path length regularisation differentiate twice), or refuses loudly; torch would otherwise return
wrong second derivatives with a warning.
"""

import torch
from torch._prims_common import suggest_memory_format

from m2m_stylegan.ops import reference

ACT_INDEX = {act: i for i, act in enumerate(reference.ACTIVATIONS)}
# The epilogue knows leaky rectifiers only: name => slope of the negative half, given alpha.
RECTIFIERS = {'linear': lambda alpha: 1.0, 'relu': lambda alpha: 0.0, 'lrelu': lambda alpha: alpha}

SCHEMAS = {
    'upfirdn2d': '(Tensor x, Tensor f, int upx, int upy, int downx, int downy, int padx0, int padx1, int pady0, int pady1, bool flip, float gain)'
                 ' -> Tensor',
    'bias_act': '(Tensor x, Tensor? b, int dim, int act, float alpha, float gain, float clamp) -> Tensor',
    'bias_act_grad': '(Tensor dy, Tensor? x, Tensor? b, Tensor? y, int dim, int act, float alpha, float gain, float clamp) -> Tensor',
    'bias_act_grad2': '(Tensor ddx, Tensor dy, Tensor x, Tensor? b, int dim, int act, float alpha, float gain, float clamp) -> Tensor',
    'epilogue': '(Tensor x, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? b, float alpha, float gain, float clamp) -> Tensor',
    'epilogue_grad': '(Tensor dy, Tensor? x, Tensor? y, Tensor? scale, Tensor? noise, Tensor? strength, float alpha, float gain, float clamp, '
                     'bool[5] mask) -> (Tensor dx, Tensor dscale, Tensor dnoise, Tensor dstrength, Tensor db)',
    'epilogue_grad2': '(Tensor ddx, Tensor? ddscale, Tensor dy, Tensor? x, Tensor? y, Tensor? scale, float alpha, float gain, float clamp, '
                      'bool[3] mask) -> (Tensor gdy, Tensor gx, Tensor gscale)',
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f'm2m_stylegan::{_name}', _schema)
_OPS = torch.ops.m2m_stylegan


def accumulator(dtype):
    """The dtype in which sums over elements of `dtype` are made, and in which the epilogue takes its small operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(name):
    return torch.library.register_fake(f'm2m_stylegan::{name}')


def _no_third_derivative(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f'm2m_stylegan::{name} has no derivative: third derivatives of compiled operators are not available. '
                                  'Set M2M_OPS=ref to use plain PyTorch operators, which have derivatives of every order.')
    torch.library.register_autograd(f'm2m_stylegan::{name}', backward, setup_context=lambda ctx, inputs, output: None)


# upfirdn2d: linear, and its gradient is another upfirdn2d.

@_fake('upfirdn2d')
def _(x, f, upx, upy, downx, downy, padx0, padx1, pady0, pady1, flip, gain):
    height = (x.shape[2] * upy + pady0 + pady1 - f.shape[0]) // downy + 1
    width = (x.shape[3] * upx + padx0 + padx1 - f.shape[1]) // downx + 1
    return x.new_empty([x.shape[0], x.shape[1], height, width]).to(memory_format=suggest_memory_format(x))


def _upfirdn2d_setup(ctx, inputs, output):
    x, f, *args = inputs
    ctx.save_for_backward(f)
    ctx.args, ctx.in_size = args, (x.shape[3], x.shape[2])


def _upfirdn2d_backward(ctx, dy):
    f, = ctx.saved_tensors
    (upx, upy, downx, downy, *padding), (flip, gain) = ctx.args[:8], ctx.args[8:]
    padding = reference.adjoint_padding((f.shape[1], f.shape[0]), ctx.in_size, (dy.shape[3], dy.shape[2]), (upx, upy), (downx, downy), padding)
    return (_OPS.upfirdn2d(dy, f, downx, downy, upx, upy, *padding, not flip, gain),) + (None,) * 11


torch.library.register_autograd('m2m_stylegan::upfirdn2d', _upfirdn2d_backward, setup_context=_upfirdn2d_setup)


# bias_act: the rectifiers keep y, whose sign and size tell all; the smooth activations keep x and b.

_fake('bias_act')(lambda x, *args: torch.empty_like(x))
_fake('bias_act_grad')(lambda dy, *args: torch.empty_like(dy))
_fake('bias_act_grad2')(lambda ddx, *args: torch.empty_like(ddx))


def _all_but(ndim, dim):
    return [i for i in range(ndim) if i != dim]


def _bias_act_setup(ctx, inputs, output):
    x, b, *ctx.args = inputs
    rectifier = ctx.args[1] < len(RECTIFIERS)
    ctx.save_for_backward(*((None, None, output) if rectifier else (x, b, None)))
    ctx.has_bias = b is not None


def _bias_act_backward(ctx, dy):
    dx = _OPS.bias_act_grad(dy, *ctx.saved_tensors, *ctx.args)
    db = dx.sum(_all_but(dx.ndim, ctx.args[0])) if ctx.has_bias and ctx.needs_input_grad[1] else None
    return (dx, db) + (None,) * 5


def _bias_act_grad_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.args = inputs[4:]


def _bias_act_grad_backward(ctx, ddx):
    dy, x, b, y = ctx.saved_tensors
    gdy = _OPS.bias_act_grad(ddx, x, b, y, *ctx.args) if ctx.needs_input_grad[0] else None
    gx = gb = None
    if x is not None and any(ctx.needs_input_grad[1:3]):
        gx = _OPS.bias_act_grad2(ddx, dy, x, b, *ctx.args)
        gb = None if b is None else gx.sum(_all_but(gx.ndim, ctx.args[0]))
    return (gdy, gx, gb) + (None,) * 6


torch.library.register_autograd('m2m_stylegan::bias_act', _bias_act_backward, setup_context=_bias_act_setup)
torch.library.register_autograd('m2m_stylegan::bias_act_grad', _bias_act_grad_backward, setup_context=_bias_act_grad_setup)
_no_third_derivative('bias_act_grad2')


# epilogue: y = clamp(gain * lrelu(x * scale + noise * strength + b)). With r = dy/d(argument), a function of y alone, and g = dy * r:
# dx = g * scale, dscale = sum_hw g * x, dnoise = strength * sum_c g, dstrength = sum g * noise, db = sum_nhw g.

_fake('epilogue')(lambda x, *args: torch.empty_like(x, memory_format=suggest_memory_format(x)))


def _wanted(mask, *makers):
    return tuple(maker() if want else None for want, maker in zip(mask, makers, strict=True))


@_fake('epilogue_grad')
def _(dy, x, y, scale, noise, strength, alpha, gain, clamp, mask):
    n, c = dy.shape[:2]
    small = dy.new_empty([0], dtype=accumulator(dy.dtype))
    dx = torch.empty_like(dy, memory_format=suggest_memory_format(dy)) if mask[0] else dy.new_empty([0])
    dscale = small.new_empty([n, c]) if mask[1] else small
    dnoise = torch.empty_like(noise) if mask[2] else small
    return dx, dscale, dnoise.clone(), small.new_empty([]) if mask[3] else small.clone(), small.new_empty([c]) if mask[4] else small.clone()


@_fake('epilogue_grad2')
def _(ddx, ddscale, dy, x, y, scale, alpha, gain, clamp, mask):
    gdy, gx = (torch.empty_like(dy, memory_format=suggest_memory_format(dy)) if want else dy.new_empty([0]) for want in mask[:2])
    return gdy, gx, dy.new_empty(list(dy.shape[:2]) if mask[2] else [0], dtype=accumulator(dy.dtype))


def _is_linear(alpha, gain, clamp):
    return alpha == 1 and clamp < 0


def _epilogue_setup(ctx, inputs, output):
    x, scale, noise, strength, b, *ctx.args = inputs
    y = None if _is_linear(*ctx.args) else output
    ctx.save_for_backward(None if scale is None else x, y, scale, noise, strength)
    ctx.has = (True, scale is not None, noise is not None, strength is not None, b is not None)


def _epilogue_backward(ctx, dy):
    mask = [has and need for has, need in zip(ctx.has, ctx.needs_input_grad, strict=False)]
    grads = _OPS.epilogue_grad(dy, *ctx.saved_tensors, *ctx.args, mask)
    return (*_wanted(mask, *(lambda g=g: g for g in grads)), None, None, None)


def _epilogue_grad_setup(ctx, inputs, output):
    dy, x, y, scale, noise, strength, *args, mask = inputs
    ctx.save_for_backward(dy, x, y, scale, noise, strength)
    ctx.args, ctx.mask = args, mask
    ctx.set_materialize_grads(False)


def _slope(y, like, alpha, gain, clamp):
    """r = d(epilogue)/d(argument) as a tensor, from its result y."""
    if y is None:
        return torch.full_like(like, gain)
    r = torch.where(y > 0, y.new_full([], gain), y.new_full([], gain * alpha))  # Python numbers would be rounded to float32
    return r if clamp < 0 else torch.where(y.abs() < y.new_full([], clamp), r, 0.0)  # the limit rounded as y is


def _epilogue_grad_backward(ctx, ddx, ddscale, ddnoise, ddstrength, ddb):
    dy, x, y, scale, noise, strength = ctx.saved_tensors
    need = ctx.needs_input_grad  # dy, x, y, scale, noise, strength
    gdy = gx = gscale = gnoise = gstrength = None
    if ddx is not None or ddscale is not None:
        # The gradient penalties reach only these two, in every block: one pass of a kernel.
        ddx = torch.zeros_like(dy) if ddx is None else ddx
        mask = [need[0], need[1] and ddscale is not None, need[3] and scale is not None]
        gdy, gx, gscale = _wanted(mask, *(lambda g=g: g for g in _OPS.epilogue_grad2(ddx, ddscale, dy, x, y, scale, *ctx.args, mask)))
    if ddnoise is not None or ddstrength is not None or ddb is not None:
        acc = accumulator(dy.dtype)
        r = _slope(y, dy, *ctx.args).to(acc)
        factor = 0.0  # by which r * dy enters <ddnoise, dnoise> + <ddstrength, dstrength> + <ddb, db>
        if ddnoise is not None:
            factor = factor + (ddnoise if strength is None else ddnoise * strength)
        if ddstrength is not None:
            factor = factor + ddstrength * noise
        if ddb is not None:
            factor = factor + ddb[:, None, None]
        extra = (r * factor).to(dy.dtype)
        gdy = extra if gdy is None else gdy + extra
        g = dy.to(acc) * r
        if ddnoise is not None and strength is not None and need[5]:
            gstrength = (g * ddnoise).sum()
        if ddstrength is not None and need[4]:
            gnoise = (g * ddstrength).sum_to_size(noise.shape)
    return gdy, gx, None, gscale, gnoise, gstrength, None, None, None, None


torch.library.register_autograd('m2m_stylegan::epilogue', _epilogue_backward, setup_context=_epilogue_setup)
torch.library.register_autograd('m2m_stylegan::epilogue_grad', _epilogue_grad_backward, setup_context=_epilogue_grad_setup)
_no_third_derivative('epilogue_grad2')
