"""Resampling by FIR filters and resampling convolutions, composed of upfirdn2d and torch's convolutions.

Maths: Karras et al., arXiv 1912.04958. Embedded as text in pickles, behind ops/reference.py: needs only torch and the operators
imported below, and keeps to the syntax and APIs of Python 3.7 and torch 1.7.
"""

import torch.nn.functional as F

try:
    from m2m_stylegan.ops.dispatch import upfirdn2d
    from m2m_stylegan.ops.reference import crop_or_pad, filter_size, pair, quad
except ImportError:  # Inside a pickle, on a machine without this package: ops/reference.py stands above this line.
    pass


def _with_padding(padding, extra):
    return tuple(p + e for p, e in zip(quad(padding), extra))


def filter2d(x, f, padding=0, flip_filter=False, gain=1):
    """FIR filter at unchanged size: x [N, C, H, W] => [N, C, H, W] plus twice `padding`."""
    fw, fh = filter_size(f)
    return upfirdn2d(x, f, 1, 1, _with_padding(padding, (fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2)), flip_filter, gain)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1):
    """FIR upsampling that keeps the mean: x [N, C, H, W] => [N, C, H * up, W * up]."""
    (ux, uy), (fw, fh) = pair(up), filter_size(f)
    extra = ((fw + ux - 1) // 2, (fw - ux) // 2, (fh + uy - 1) // 2, (fh - uy) // 2)
    return upfirdn2d(x, f, up, 1, _with_padding(padding, extra), flip_filter, gain * ux * uy)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1):
    """FIR downsampling: x [N, C, H, W] => [N, C, H // down, W // down]."""
    (dx, dy), (fw, fh) = pair(down), filter_size(f)
    extra = ((fw - dx + 1) // 2, (fw - dx) // 2, (fh - dy + 1) // 2, (fh - dy) // 2)
    return upfirdn2d(x, f, 1, down, _with_padding(padding, extra), flip_filter, gain)


def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    """Convolution with FIR upsampling before it or FIR downsampling after it, evaluated in the cheapest equal order.

    x: [N, C_in, H, W]. w: [C_out, C_in // groups, kh, kw], same dtype. f: FIR filter. up, down: int. padding: int or quad, with
    respect to the upsampled image, applied once at the start. flip_weight: True = correlation, as in torch, False = convolution.
    flip_filter: the same for f. Returns [N, C_out, H', W'].
    """
    (fw, fh), (kh, kw), (x0, x1, y0, y1) = filter_size(f), w.shape[2:], quad(padding)
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
        return F.conv2d(crop_or_pad(x, (x0, x1, y0, y1)), correlation, groups=groups)
    x = upfirdn2d(x, f if up > 1 else None, up, 1, (x0, x1, y0, y1), flip_filter, up ** 2)
    x = F.conv2d(x, correlation, groups=groups)
    return upfirdn2d(x, f, 1, down, 0, flip_filter) if down > 1 else x
