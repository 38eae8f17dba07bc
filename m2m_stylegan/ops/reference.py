"""Plain PyTorch implementations of the StyleGAN2 operators that are also compiled: activations with bias, FIR resampling.

Maths: Karras et al., arXiv 1812.04948 and 1912.04958. Everything is differentiable to any order and runs in the dtype and on
the device of its input. This file is also copied, as text, in front of `networks.py` and `augment.py` when they are
embedded in a pickle, so it needs nothing but torch and numpy and keeps to the syntax and APIs of Python 3.7 and torch 1.7.
"""

import numpy as np
import torch
import torch.nn.functional as F

# name: (function of (x, alpha), default alpha, default gain)
ACTIVATIONS = {
    'linear': (lambda x, alpha: x, 0.0, 1.0),
    'relu': (lambda x, alpha: F.relu(x), 0.0, float(np.sqrt(2))),
    'lrelu': (lambda x, alpha: F.leaky_relu(x, alpha), 0.2, float(np.sqrt(2))),
    'tanh': (lambda x, alpha: torch.tanh(x), 0.0, 1.0),
    'sigmoid': (lambda x, alpha: torch.sigmoid(x), 0.0, 1.0),
    'elu': (lambda x, alpha: F.elu(x), 0.0, 1.0),
    'selu': (lambda x, alpha: F.selu(x), 0.0, 1.0),
    'softplus': (lambda x, alpha: F.softplus(x), 0.0, 1.0),
    'swish': (lambda x, alpha: torch.sigmoid(x) * x, 0.0, float(np.sqrt(2))),
}


def activation_gain(act):
    """Default output gain of the activation named `act` (sqrt 2 for the rectifiers and swish, else 1) as a Python float."""
    return ACTIVATIONS[act][2]


def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None):
    """clamp(gain * act(x + b), -clamp, clamp).

    x: [...], any floating dtype. b: [x.shape[dim]], same dtype, or None. alpha: slope of lrelu, None = 0.2. gain: None = the
    activation's default. clamp: None = no clamping; the gradient is zero where it clamps. Returns x's shape and dtype.
    """
    func, default_alpha, default_gain = ACTIVATIONS[act]
    alpha = default_alpha if alpha is None or act == 'relu' else float(alpha)
    gain = default_gain if gain is None else float(gain)
    clamp = None if clamp is None else float(clamp)
    if act in ('relu', 'lrelu') and alpha >= 0 and gain > 0:
        return _Rectify.apply(x, b, dim % x.ndim, alpha, gain, clamp)
    if b is not None:
        x = x + b.reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    x = func(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x


class _Rectify(torch.autograd.Function):
    """bias_act for the rectifiers, the hot case: one new tensor in the forward pass and one in the backward pass.

    The result's sign and size tell all that the gradient needs, so nothing but the result is kept; composed of torch operations, every
    step would allocate and keep its own.
    """

    @staticmethod
    def forward(ctx, x, b, dim, alpha, gain, clamp):
        y = x.clone() if b is None else x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
        F.leaky_relu_(y, alpha)
        if gain != 1:
            y.mul_(gain)
        if clamp is not None:
            y.clamp_(-clamp, clamp)
        ctx.save_for_backward(y)
        ctx.args = (alpha, gain, clamp)
        ctx.bias_dims = None if b is None else [i for i in range(x.ndim) if i != dim]
        return y

    @staticmethod
    def backward(ctx, dy):
        dx = _RectifyGrad.apply(dy, ctx.saved_tensors[0], *ctx.args)
        db = dx.sum(dim=ctx.bias_dims) if ctx.bias_dims is not None and ctx.needs_input_grad[1] else None
        return dx, db, None, None, None, None


class _RectifyGrad(torch.autograd.Function):
    """dy => dx of _Rectify: linear in dy with factors fixed by y, so it is its own gradient; second derivatives in x are zero."""

    @staticmethod
    def forward(ctx, dy, y, alpha, gain, clamp):
        ctx.save_for_backward(y)
        ctx.args = (alpha, gain, clamp)
        dx = torch.ops.aten.leaky_relu_backward(dy, y, alpha, True)
        if gain != 1:
            dx.mul_(gain)
        # The gradient of clamp is zero where it clamps.
        return dx if clamp is None else torch.ops.aten.hardtanh_backward(dx, y, -clamp, clamp)

    @staticmethod
    def backward(ctx, ddx):
        return _RectifyGrad.apply(ddx, ctx.saved_tensors[0], *ctx.args), None, None, None, None


def epilogue(x, scale=None, noise=None, strength=None, b=None, act='lrelu', alpha=None, gain=None, clamp=None):
    """What follows a modulated convolution: clamp(gain * act(x * scale + noise * strength + b), -clamp, clamp).

    x: [N, C, H, W], any floating dtype. scale: [N, C]. noise: [N or 1, 1, H, W] or [H, W]. strength: []. b: [C]. Each of these in any
    floating dtype, or None. act, alpha, gain, clamp: as in `bias_act`. Returns x's shape and dtype.
    """
    if noise is not None:
        noise = (noise if strength is None else noise * strength).to(x.dtype)
    if scale is not None:
        scale = scale.to(x.dtype)[:, :, None, None]
        x = x * scale if noise is None else torch.addcmul(noise, x, scale)
    elif noise is not None:
        x = x + noise
    return bias_act(x, None if b is None else b.to(x.dtype), act=act, alpha=alpha, gain=gain, clamp=clamp)


def setup_filter(f, normalize=True, flip_filter=False, gain=1, separable=None):
    """Turn taps into the float32 buffer that the FIR operators take.

    f: number, list or tensor, 0-D to 2-D; None is the identity. One-dimensional taps become their outer product unless there are
    eight or more of them (cheaper as two passes) or `separable` says otherwise. Returns [taps] or [taps_y, taps_x].
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError('a FIR filter must have one or two non-empty dimensions, got shape %s' % (list(f.shape),))
    if f.ndim == 0:
        f = f.reshape(1)
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = f[:, None] * f[None, :]
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * (gain ** (f.ndim / 2))


def pair(value):
    """int or (x, y) => (x, y)."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def quad(padding):
    """int, (x, y) or (x0, x1, y0, y1) => (x0, x1, y0, y1)."""
    if isinstance(padding, int):
        return (padding,) * 4
    padding = tuple(int(p) for p in padding)
    return padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def filter_size(f):
    """(width, height) of a filter."""
    return (1, 1) if f is None else (int(f.shape[-1]), int(f.shape[0]))


def crop_or_pad(x, padding):
    """Pad with zeros by (x0, x1, y0, y1); negative values crop."""
    x0, x1, y0, y1 = padding
    if max(padding) > 0:
        x = F.pad(x, [max(x0, 0), max(x1, 0), max(y0, 0), max(y1, 0)])
    if min(padding) < 0:
        x = x[:, :, max(-y0, 0): x.shape[2] - max(-y1, 0), max(-x0, 0): x.shape[3] - max(-x1, 0)]
    return x


def _fir(x, f, up, down, padding, flip, gain):
    """One pass of upfirdn2d without autograd bookkeeping; f is [taps_y, taps_x]."""
    channels = x.shape[1]
    (ux, uy), (x0, x1, y0, y1) = up, padding
    if ux > 1 or uy > 1:
        # Zero insertion keeps the memory format: channels-last depthwise convolutions are 3 to 30 times faster on a CPU.
        fmt = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        shape = [x.shape[0], channels, x.shape[2] * uy + max(y0, 0) + max(y1, 0), x.shape[3] * ux + max(x0, 0) + max(x1, 0)]
        z = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=fmt)
        z[:, :, max(y0, 0): max(y0, 0) + x.shape[2] * uy: uy, max(x0, 0): max(x0, 0) + x.shape[3] * ux: ux] = x
        x, padding = z, tuple(min(p, 0) for p in padding)
    x0, x1, y0, y1 = padding
    symmetric = x0 == x1 >= 0 and y0 == y1 >= 0  # The convolution itself can pad then, without a copy.
    if not symmetric:
        x = crop_or_pad(x, padding)
    f = f.to(device=x.device, dtype=x.dtype) * gain
    if not flip:  # conv2d computes a correlation
        f = f.flip([0, 1])
    weight = f[None, None].repeat([channels, 1, 1, 1])
    return F.conv2d(x, weight, stride=(down[1], down[0]), padding=(y0, x0) if symmetric else 0, groups=channels)


def is_channels_last(x):
    """Are the channels of one pixel neighbours in memory?"""
    return x.stride(1) == 1 and x.shape[1] > 1


def adjoint_padding(taps, in_size, out_size, up, down, padding):
    """Padding with which upfirdn2d, with up and down exchanged and the filter flipped, is its own gradient; all arguments are (x, y)."""
    ends = []
    for i, p0 in enumerate((padding[0], padding[2])):
        ends += [taps[i] - p0 - 1, in_size[i] * up[i] - out_size[i] * down[i] + p0 - up[i] + 1]
    return tuple(ends)


class _UpFirDn(torch.autograd.Function):
    """upfirdn2d closed under differentiation: its gradient is another upfirdn2d, so double backward costs one more filter pass.

    Written as a bare depthwise convolution, autograd would also compute the gradient of the constant filter, one convolution per
    channel, in every R1 and path-length step.
    """

    @staticmethod
    def forward(ctx, x, f, up, down, padding, flip, gain):
        ctx.args = (f, up, down, padding, flip, gain)
        ctx.in_size = (x.shape[3], x.shape[2])
        return _fir(x, f, up, down, padding, flip, gain)

    @staticmethod
    def backward(ctx, dy):
        f, up, down, padding, flip, gain = ctx.args
        padding = adjoint_padding(filter_size(f), ctx.in_size, (dy.shape[3], dy.shape[2]), up, down, padding)
        return (_UpFirDn.apply(dy, f, down, up, padding, not flip, gain),) + (None,) * 6


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1):
    """Insert zeros, pad or crop, filter, decimate; each channel by itself.

    x: [N, C, H, W], floating. f: [taps] (separable) or [taps_y, taps_x] from `setup_filter`, None = identity. up, down: int or (x, y).
    padding: int, (x, y) or (x0, x1, y0, y1), negative values crop. flip_filter: correlation instead of convolution. gain: total factor.
    Returns [N, C, H', W'] with H' = (H * up + y0 + y1 - taps_y) // down + 1. Raises ValueError for a bad shape.
    """
    up, down, padding = check_upfirdn2d(x, f, up, down, padding)
    if f is None:
        f = torch.ones([1, 1], dtype=x.dtype, device=x.device)
    return fir_passes(_UpFirDn.apply, x, f, up, down, padding, flip_filter, gain)


def check_upfirdn2d(x, f, up, down, padding):
    """(up, down, padding) as pairs and a quad. Raises ValueError for shapes that cannot be filtered."""
    if x.ndim != 4:
        raise ValueError('upfirdn2d expects an [N, C, H, W] tensor, got shape %s' % (list(x.shape),))
    up, down, padding = pair(up), pair(down), quad(padding)
    (fw, fh), (x0, x1, y0, y1) = filter_size(f), padding
    if x.shape[3] * up[0] + x0 + x1 < fw or x.shape[2] * up[1] + y0 + y1 < fh:
        raise ValueError('upfirdn2d: a padded input of %d x %d is smaller than the filter of %d x %d taps (height x width)' % (
            x.shape[2] * up[1] + y0 + y1, x.shape[3] * up[0] + x0 + x1, fh, fw))
    return up, down, padding


def fir_passes(fir, x, f, up, down, padding, flip, gain):
    """fir(x, f, up, down, padding, flip, gain) once for a filter [taps_y, taps_x], along x and then along y for a separable one [taps]."""
    if f.ndim == 2:
        return fir(x, f, up, down, padding, flip, gain)
    x0, x1, y0, y1 = padding
    x = fir(x, f[None, :], (up[0], 1), (down[0], 1), (x0, x1, 0, 0), flip, gain ** 0.5)
    return fir(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, y0, y1), flip, gain ** 0.5)
