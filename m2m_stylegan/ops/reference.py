"""Plain PyTorch implementations of the StyleGAN2 operators: activations with bias, FIR resampling, resampling convolutions.

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
    alpha = default_alpha if alpha is None else float(alpha)
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


def _pair(value):
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _quad(padding):
    if isinstance(padding, int):
        return (padding,) * 4
    padding = tuple(int(p) for p in padding)
    return padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def _taps(f):
    """(width, height) of a filter."""
    return (1, 1) if f is None else (int(f.shape[-1]), int(f.shape[0]))


def _crop_or_pad(x, padding):
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
        fmt = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        shape = [x.shape[0], channels, x.shape[2] * uy + max(y0, 0) + max(y1, 0), x.shape[3] * ux + max(x0, 0) + max(x1, 0)]
        z = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=fmt)
        z[:, :, max(y0, 0): max(y0, 0) + x.shape[2] * uy: uy, max(x0, 0): max(x0, 0) + x.shape[3] * ux: ux] = x
        x, padding = z, tuple(min(p, 0) for p in padding)
    x0, x1, y0, y1 = padding
    symmetric = x0 == x1 >= 0 and y0 == y1 >= 0  # The convolution itself can pad then, without a copy.
    if not symmetric:
        x = _crop_or_pad(x, padding)
    f = f.to(device=x.device, dtype=x.dtype) * gain
    if not flip:  # conv2d computes a correlation
        f = f.flip([0, 1])
    weight = f[None, None].repeat([channels, 1, 1, 1])
    return F.conv2d(x, weight, stride=(down[1], down[0]), padding=(y0, x0) if symmetric else 0, groups=channels)


def _is_channels_last(x):
    return x.stride(1) == 1 and x.shape[1] > 1


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
        f, up, down, (x0, _, y0, _), flip, gain = ctx.args
        (fw, fh), (iw, ih) = _taps(f), ctx.in_size
        oh, ow = dy.shape[2:]
        p = (fw - x0 - 1, iw * up[0] - ow * down[0] + x0 - up[0] + 1, fh - y0 - 1, ih * up[1] - oh * down[1] + y0 - up[1] + 1)
        return (_UpFirDn.apply(dy, f, down, up, p, not flip, gain),) + (None,) * 6


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1):
    """Insert zeros, pad or crop, filter, decimate; each channel by itself.

    x: [N, C, H, W], floating. f: [taps] (separable) or [taps_y, taps_x] from `setup_filter`, None = identity. up, down: int or (x, y).
    padding: int, (x, y) or (x0, x1, y0, y1), negative values crop. flip_filter: correlation instead of convolution. gain: total factor.
    Returns [N, C, H', W'] with H' = (H * up + y0 + y1 - taps_y) // down + 1. Raises ValueError for a bad shape.
    """
    if x.ndim != 4:
        raise ValueError('upfirdn2d expects an [N, C, H, W] tensor, got shape %s' % (list(x.shape),))
    up, down, padding = _pair(up), _pair(down), _quad(padding)
    (fw, fh), (x0, x1, y0, y1) = _taps(f), padding
    if x.shape[3] * up[0] + x0 + x1 < fw or x.shape[2] * up[1] + y0 + y1 < fh:
        raise ValueError('upfirdn2d: a padded input of %d x %d is smaller than the filter of %d x %d taps (height x width)' % (
            x.shape[2] * up[1] + y0 + y1, x.shape[3] * up[0] + x0 + x1, fh, fw))
    if f is None:
        f = torch.ones([1, 1], dtype=x.dtype, device=x.device)
    if f.ndim == 2:
        return _UpFirDn.apply(x, f, up, down, padding, flip_filter, gain)
    x = _UpFirDn.apply(x, f[None, :], (up[0], 1), (down[0], 1), (x0, x1, 0, 0), flip_filter, gain ** 0.5)
    return _UpFirDn.apply(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, y0, y1), flip_filter, gain ** 0.5)


def _with_padding(padding, extra):
    return tuple(p + e for p, e in zip(_quad(padding), extra))


def filter2d(x, f, padding=0, flip_filter=False, gain=1):
    """FIR filter at unchanged size: x [N, C, H, W] => [N, C, H, W] plus twice `padding`."""
    fw, fh = _taps(f)
    return upfirdn2d(x, f, 1, 1, _with_padding(padding, (fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2)), flip_filter, gain)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1):
    """FIR upsampling that keeps the mean: x [N, C, H, W] => [N, C, H * up, W * up]."""
    (ux, uy), (fw, fh) = _pair(up), _taps(f)
    extra = ((fw + ux - 1) // 2, (fw - ux) // 2, (fh + uy - 1) // 2, (fh - uy) // 2)
    return upfirdn2d(x, f, up, 1, _with_padding(padding, extra), flip_filter, gain * ux * uy)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1):
    """FIR downsampling: x [N, C, H, W] => [N, C, H // down, W // down]."""
    (dx, dy), (fw, fh) = _pair(down), _taps(f)
    extra = ((fw - dx + 1) // 2, (fw - dx) // 2, (fh - dy + 1) // 2, (fh - dy) // 2)
    return upfirdn2d(x, f, 1, down, _with_padding(padding, extra), flip_filter, gain)


def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    """Convolution with FIR upsampling before it or FIR downsampling after it, evaluated in the cheapest equal order.

    x: [N, C_in, H, W]. w: [C_out, C_in // groups, kh, kw], same dtype. f: FIR filter. up, down: int. padding: int or quad, with
    respect to the upsampled image, applied once at the start. flip_weight: True = correlation, as in torch, False = convolution.
    flip_filter: the same for f. Returns [N, C_out, H', W'].
    """
    (fw, fh), (kh, kw), (x0, x1, y0, y1) = _taps(f), w.shape[2:], _quad(padding)
    if up > 1:
        x0, x1, y0, y1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2, y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1, y0, y1 = x0 + (fw - down + 1) // 2, x1 + (fw - down) // 2, y0 + (fh - down + 1) // 2, y1 + (fh - down) // 2
    correlation = w if flip_weight else w.flip([2, 3])

    if up > 1 and down == 1 and kh == kw == 1:  # A 1x1 convolution commutes with the filter: run it on the small image.
        return upfirdn2d(F.conv2d(x, correlation, groups=groups), f, up, 1, (x0, x1, y0, y1), flip_filter, up ** 2)
    if down > 1 and up == 1:  # Filter, then convolve only where a sample is kept.
        if kh == kw == 1:
            return F.conv2d(upfirdn2d(x, f, 1, down, (x0, x1, y0, y1), flip_filter), correlation, groups=groups)
        return F.conv2d(upfirdn2d(x, f, 1, 1, (x0, x1, y0, y1), flip_filter), correlation, stride=down, groups=groups)
    if up > 1 and down == 1 and min(x0, x1, y0, y1) >= 0:  # A transposed convolution skips the zeros; the filter commutes with it and comes last.
        c_in, c_out = x.shape[1], w.shape[0]
        wt = (w.flip([2, 3]) if flip_weight else w).reshape(groups, c_out // groups, c_in // groups, kh, kw)
        wt = wt.transpose(1, 2).reshape(c_in, c_out // groups, kh, kw)
        x0, x1, y0, y1 = x0 - (kw - 1), x1 - (kw - up), y0 - (kh - 1), y1 - (kh - up)
        # What can be cropped by the transposed convolution itself need not be computed.
        crop = (max(min(-y0, -y1), 0), max(min(-x0, -x1), 0))
        x = F.conv_transpose2d(x, wt, stride=up, padding=crop, groups=groups)
        return upfirdn2d(x, f, 1, 1, (x0 + crop[1], x1 + crop[1], y0 + crop[0], y1 + crop[0]), flip_filter, up ** 2)
    if up == 1 and down == 1:
        if x0 == x1 and y0 == y1 and min(x0, y0) >= 0:
            return F.conv2d(x, correlation, padding=(y0, x0), groups=groups)
        return F.conv2d(_crop_or_pad(x, (x0, x1, y0, y1)), correlation, groups=groups)
    x = upfirdn2d(x, f if up > 1 else None, up, 1, (x0, x1, y0, y1), flip_filter, up ** 2)
    x = F.conv2d(x, correlation, groups=groups)
    return upfirdn2d(x, f, 1, down, 0, flip_filter) if down > 1 else x
