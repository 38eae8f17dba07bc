"""The ADA augmentation pipe (Karras et al., arXiv 2006.06676, appendix B), differentiable twice with respect to the images.

Embedded as text in pickles, behind ops/reference.py: needs only torch, numpy and the operators imported below, and keeps to the
syntax and APIs of Python 3.7 and torch 1.7.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

with contextlib.suppress(ImportError):  # In a pickle, on a machine without this package: ops/reference.py stands above this line.
    from m2m_stylegan.ops import downsample2d, setup_filter, upfirdn2d, upsample2d

# Low-pass filters of the orthogonal Daubechies wavelets sym6 (geometry) and sym2 (filter bank).
SYM6 = [
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466, 0.787641141030194,
    0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036,
    -0.007800708325034148,
]
SYM2 = [-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025]

# Relative power of natural images in the four bands of the filter bank; a random gain must not change the total.
BAND_POWER = [10 / 13, 1 / 13, 1 / 13, 1 / 13]

# Up to this many rows or columns, resampling is a product with a dense matrix: on one CPU core 5 ms instead of 150 ms for a
# depthwise convolution (16 RGB images of 64 x 64 with margins of 40). The product's cost grows with the cube of the size.
MAX_DENSE_SIZE = 256

BLIT = ('xflip', 'rotate90', 'xint')
GEOM = ('scale', 'rotate', 'aniso', 'xfrac')
COLOR = ('brightness', 'contrast', 'lumaflip', 'hue', 'saturation')

AUGPIPE_SPECS = {  # name of --augpipe => transforms with multiplier 1
    'blit': BLIT,
    'geom': GEOM,
    'color': COLOR,
    'filter': ('imgfilter',),
    'noise': ('noise',),
    'cutout': ('cutout',),
    'bg': BLIT + GEOM,
    'bgc': BLIT + GEOM + COLOR,
    'bgcf': BLIT + GEOM + COLOR + ('imgfilter',),
    'bgcfn': BLIT + GEOM + COLOR + ('imgfilter', 'noise'),
    'bgcfnc': BLIT + GEOM + COLOR + ('imgfilter', 'noise', 'cutout'),
}


def augpipe_kwargs(name):
    """Constructor arguments (a new dict) of the pipe that `name` stands for, e.g. 'bgc'. Raises ValueError if unknown."""
    if name not in AUGPIPE_SPECS:
        raise ValueError(f'unknown augmentation pipe {name!r}, expected one of: {", ".join(AUGPIPE_SPECS)}')
    return dict.fromkeys(AUGPIPE_SPECS[name], 1)


class AugmentPipe(torch.nn.Module):
    """Random differentiable augmentations, each applied to a sample with probability `multiplier * p`, independently.

    Multipliers (0 = off): xflip, rotate90, xint (whole-pixel translation), scale, rotate, aniso (anisotropic scaling), xfrac
    (fractional translation), brightness, contrast, lumaflip, hue, saturation, imgfilter, noise, cutout.
    Strengths: xint_max, xfrac_std in image sizes; scale_std, aniso_std, contrast_std, saturation_std, imgfilter_std in octaves;
    rotate_max, hue_max in half turns; brightness_std, noise_std in image values; cutout_size in image sizes; imgfilter_bands
    multiplies the probability of each of the four frequency bands, low to high.
    Buffers: p [] in [0, inf), the strength that the ADA controller sets, always on the CPU; Hz_geom [12] and Hz_fbank [4, 43], FIR filters.
    """

    def __init__(
        self, *,
        xflip=0, rotate90=0, xint=0, xint_max=0.125,
        scale=0, rotate=0, aniso=0, xfrac=0, scale_std=0.2, rotate_max=1, aniso_std=0.2, xfrac_std=0.125,
        brightness=0, contrast=0, lumaflip=0, hue=0, saturation=0,
        brightness_std=0.2, contrast_std=0.5, hue_max=1, saturation_std=1,
        imgfilter=0, imgfilter_bands=(1, 1, 1, 1), imgfilter_std=1,
        noise=0, cutout=0, noise_std=0.1, cutout_size=0.5
    ):
        super().__init__()
        self.xflip = float(xflip)
        self.rotate90 = float(rotate90)
        self.xint = float(xint)
        self.xint_max = float(xint_max)
        self.scale = float(scale)
        self.rotate = float(rotate)
        self.aniso = float(aniso)
        self.xfrac = float(xfrac)
        self.scale_std = float(scale_std)
        self.rotate_max = float(rotate_max)
        self.aniso_std = float(aniso_std)
        self.xfrac_std = float(xfrac_std)
        self.brightness = float(brightness)
        self.contrast = float(contrast)
        self.lumaflip = float(lumaflip)
        self.hue = float(hue)
        self.saturation = float(saturation)
        self.brightness_std = float(brightness_std)
        self.contrast_std = float(contrast_std)
        self.hue_max = float(hue_max)
        self.saturation_std = float(saturation_std)
        self.imgfilter = float(imgfilter)
        self.imgfilter_bands = list(imgfilter_bands)
        self.imgfilter_std = float(imgfilter_std)
        self.noise = float(noise)
        self.cutout = float(cutout)
        self.noise_std = float(noise_std)
        self.cutout_size = float(cutout_size)
        if len(self.imgfilter_bands) != len(BAND_POWER):
            raise ValueError(f'imgfilter_bands must have {len(BAND_POWER)} entries, got {self.imgfilter_bands}')
        self.register_buffer('p', torch.ones([]))
        self.register_buffer('Hz_geom', setup_filter(SYM6))
        self.register_buffer('Hz_fbank', torch.tensor(filter_bank(SYM2), dtype=torch.float32))

    def _apply(self, fn, *args, **kwargs):  # Old versions of PyTorch have no more than fn.
        p = self.p
        super()._apply(fn, *args, **kwargs)
        self.p = p  # stays on the CPU, where it is needed: asking a GPU for it would wait for all that it still has to do
        return self

    def forward(self, images, debug_percentile=None):
        """Augment a batch: [N, C, H, W] float32 or float64, nominal range [-1, 1] => the same shape, dtype and device.

        debug_percentile: None, or q in (0, 1): every gate is open and every draw is replaced by its q-quantile (normal draws by
        erfinv(2q - 1), a scaled one), for reproducible tests.
        Returns `images` itself if p = 0, and resamples only samples with an open geometric gate. The official code resamples all,
        which changes the others by rounding alone (4e-6 in float32, 2e-7 in float64 with float32 taps; measured at 32 x 32):
        an orthogonal wavelet filter reconstructs perfectly.
        The draws and the small matrices are made on the CPU, also for images on a GPU: that saves some two hundred tiny kernels,
        and nothing, the padding among it, has to wait for the device: p stays on the CPU, too.
        Raises ValueError for a wrong shape or dtype.
        """
        self._check(images)
        debug = debug_percentile is not None
        p = 1.0 if debug else float(self.p)
        if p == 0:
            return images
        draw = _Draws(images.shape[0], images.dtype, debug_percentile)
        images = self._apply_geometry(images, p, draw)
        images = self._apply_color(images, p, draw)
        images = self._apply_filter(images, p, draw)
        return self._apply_corruptions(images, p, draw)

    def _check(self, images):
        if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
            raise ValueError(f'expected float32 or float64 images [N, C, H, W], got {images.dtype} {list(images.shape)}')
        min_size = self.Hz_fbank.shape[1] // 2 + 1
        problems = []
        if images.shape[1] not in (1, 3) and any(getattr(self, name) for name in COLOR):
            problems.append('colour transforms need 1 or 3 channels')
        if self.imgfilter and min(images.shape[2:]) < min_size:
            problems.append(f'imgfilter needs at least {min_size} x {min_size} pixels')
        if problems:
            raise ValueError(f'{"; ".join(problems)}; got images of shape {list(images.shape)}')

    def _geometry(self, p, draw, height, width):
        """Matrices [N, 3, 3] that map output to input pixels; origin = image centre, unit = pixel, x right, y down."""
        Q = torch.eye(3, dtype=draw.dtype).repeat(draw.num, 1, 1)
        if self.xflip:
            i = torch.floor(2 * draw.uniform(self.xflip * p))
            Q = Q @ scale2d(1 - 2 * i, torch.ones_like(i))
        if self.rotate90:
            Q = Q @ rotate2d(np.pi / 2 * torch.floor(4 * draw.uniform(self.rotate90 * p)))
        if self.xint:
            t = self.xint_max * draw.symmetric(self.xint * p, 2)
            Q = Q @ translate2d(-torch.round(t[:, 0] * width), -torch.round(t[:, 1] * height))
        if self.scale:
            s = 2 ** (-self.scale_std * draw.normal(self.scale * p))
            Q = Q @ scale2d(s, s)
        # Rotation before and after the anisotropic scaling, with probabilities whose union is rotate * p.
        p_rotate = 1 - max(1 - self.rotate * p, 0) ** 0.5
        if self.rotate:
            Q = Q @ rotate2d(np.pi * self.rotate_max * draw.symmetric(p_rotate))
        if self.aniso:
            s = 2 ** (self.aniso_std * draw.normal(self.aniso * p))
            Q = Q @ scale2d(1 / s, s)
        if self.rotate and draw.percentile is None:
            Q = Q @ rotate2d(np.pi * self.rotate_max * draw.symmetric(p_rotate))
        if self.xfrac:
            t = self.xfrac_std * draw.normal(self.xfrac * p, 2)
            Q = Q @ translate2d(-t[:, 0] * width, -t[:, 1] * height)
        return Q

    def _apply_geometry(self, images, p, draw):
        if not any(getattr(self, name) for name in BLIT + GEOM):
            return images
        height, width = images.shape[2:]
        Q = self._geometry(p, draw, height, width)
        # With a debug percentile also identities are resampled, as in the official code, so that its values are met in float64.
        is_open = Q.ne(torch.eye(3, dtype=Q.dtype)).flatten(1).any(1) | (draw.percentile is not None)

        def transform(x, q):
            return warp(x, q, margins_of(Q, height, width, self.Hz_geom.numel() // 4), self.Hz_geom)
        return _where_open(is_open, images, transform, Q)

    def _apply_color(self, images, p, draw):
        num, channels, height, width = images.shape
        eye = torch.eye(3, dtype=draw.dtype)
        luma = torch.full([3, 3], 1 / 3, dtype=draw.dtype)  # projection onto the gray axis
        M, offset = eye.repeat(num, 1, 1), torch.zeros([num], dtype=draw.dtype)  # output = M (rgb + offset)
        if self.brightness:
            offset = self.brightness_std * draw.normal(self.brightness * p)
        if self.contrast:
            M = M * _each(2 ** (self.contrast_std * draw.normal(self.contrast * p)))
        if self.lumaflip:
            M = (eye - 2 * _each(torch.floor(2 * draw.uniform(self.lumaflip * p))) * luma) @ M
        if self.hue and channels == 3:
            a = _each(np.pi * self.hue_max * draw.symmetric(self.hue * p))
            cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=draw.dtype) / 3 ** 0.5
            M = (torch.cos(a) * eye + torch.sin(a) * cross + (1 - torch.cos(a)) * luma) @ M  # Rodrigues, around (1, 1, 1)
        if self.saturation and channels == 3:
            M = (luma + _each(2 ** (self.saturation_std * draw.normal(self.saturation * p))) * (eye - luma)) @ M
        if bool(M.eq(eye).all()) and not bool(offset.ne(0).any()):
            return images
        M, offset = _to(images, M), _to(images, _each(offset))
        if channels == 1:
            gain = M.sum([1, 2]) / 3
            return (images + offset[..., None]) * gain[:, None, None, None]
        out = torch.baddbmm(offset * M.sum(2, keepdim=True), M, images.reshape(num, 3, height * width))  # [N, 3, HW]
        return out.reshape(num, 3, height, width)

    def _apply_filter(self, images, p, draw):
        if not self.imgfilter:
            return images
        octaves = self.imgfilter_std * torch.stack([draw.normal(self.imgfilter * p * b) for b in self.imgfilter_bands], 1)  # [N, 4]
        t = 1 + torch.diag_embed(2 ** octaves - 1)  # [N, 4, 4]; row i amplifies band i alone
        power = (torch.tensor(BAND_POWER, dtype=draw.dtype) * t ** 2).sum(2, keepdim=True)
        gains = (t / power ** 0.5).prod(1)  # [N, 4]
        return _where_open(octaves.ne(0).any(1), images, lambda x, g: amplify_bands(x, g, self.Hz_fbank), gains)

    def _apply_corruptions(self, images, p, draw):
        if self.noise:
            sigma = self.noise_std * draw.half_normal(self.noise * p)
            noise = torch.randn(images.shape, dtype=images.dtype, device=images.device)
            images = images + _to(images, _each(sigma)[..., None]) * noise
        if self.cutout:
            size = _each(self.cutout_size * draw.gate(self.cutout * p))
            centre = draw.ungated_uniform(2)
            height, width = images.shape[2:]
            x = (torch.arange(width, dtype=draw.dtype) + 0.5) / width
            y = (torch.arange(height, dtype=draw.dtype) + 0.5) / height
            keep_x = (x - centre[:, 0, None]).abs()[:, None, :] >= size / 2  # [N, 1, W]
            keep_y = (y - centre[:, 1, None]).abs()[:, :, None] >= size / 2  # [N, H, 1]
            images = images * _to(images, (keep_x | keep_y)[:, None])
        return images


class _Draws:
    """Draws of one call for `num` samples, on the CPU. A value is drawn before its gate; a closed gate makes it 0."""

    def __init__(self, num, dtype, percentile):
        self.num, self.dtype, self.percentile = num, dtype, percentile

    def _constant(self, value, shape):
        return torch.full(shape, float(value), dtype=self.dtype)

    def _quantile(self, q):
        return torch.erfinv(torch.tensor(q, dtype=torch.float64))

    def _shape(self, dims):
        return [self.num] if dims == 1 else [self.num, dims]

    def gate(self, probability):
        """[N] of 0 and 1."""
        if self.percentile is not None:
            return self._constant(probability > 0, [self.num])
        return torch.rand([self.num], dtype=self.dtype, device='cpu').lt(probability).to(self.dtype)

    def _gated(self, value, probability):
        gate = self.gate(probability)
        return value * (gate if value.ndim == 1 else gate[:, None])

    def ungated_uniform(self, dims=1):
        """[N] or [N, dims] in [0, 1)."""
        if self.percentile is not None:
            return self._constant(self.percentile, self._shape(dims))
        return torch.rand(self._shape(dims), dtype=self.dtype, device='cpu')

    def uniform(self, probability):
        """[N] in [0, 1), 0 behind a closed gate."""
        return self._gated(self.ungated_uniform(), probability)

    def symmetric(self, probability, dims=1):
        """[N] or [N, dims] in [-1, 1)."""
        return self._gated(2 * self.ungated_uniform(dims) - 1, probability)

    def normal(self, probability, dims=1):
        """[N] or [N, dims], standard normal."""
        if self.percentile is not None:
            return self._gated(self._constant(self._quantile(2 * self.percentile - 1), self._shape(dims)), probability)
        return self._gated(torch.randn(self._shape(dims), dtype=self.dtype, device='cpu'), probability)

    def half_normal(self, probability):
        """[N], absolute value of a standard normal."""
        if self.percentile is not None:
            return self._gated(self._constant(self._quantile(self.percentile), [self.num]), probability)
        return self.normal(probability).abs()


def _each(values):
    return values[:, None, None]


def _to(images, values):
    # Not blocking: from pageable memory torch would otherwise wait for all of the device's queue.
    return values.to(device=images.device, dtype=images.dtype, non_blocking=True)


def _where_open(is_open, images, transform, params):
    """transform(images, params) for the samples with is_open (bool [N] on the CPU), the others as they are."""
    index = is_open.nonzero(as_tuple=True)[0]
    if len(index) == 0:
        return images
    if len(index) == len(images):
        return transform(images, params)
    samples = index.to(images.device, non_blocking=True)
    return images.index_copy(0, samples, transform(images.index_select(0, samples), params[index]))


def scale2d(sx, sy):
    """Homogeneous matrices [N, 3, 3] from factors [N]."""
    return torch.diag_embed(torch.stack([sx, sy, torch.ones_like(sx)], -1))


def rotate2d(angle):
    """Homogeneous matrices [N, 3, 3] from angles [N] in radians."""
    c, s, zero, one = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], -1).reshape(-1, 3, 3)


def translate2d(tx, ty):
    """Homogeneous matrices [N, 3, 3] from pixels [N]."""
    zero, one = torch.zeros_like(tx), torch.ones_like(tx)
    return torch.stack([one, zero, tx, zero, one, ty, zero, zero, one], -1).reshape(-1, 3, 3)


def margins_of(Q, height, width, hz):
    """Reflection padding [x0, x1, y0, y1] in pixels that the matrices Q [N, 3, 3] need, the largest over the batch.

    hz: filter length // 4. Enough for the image rectangle itself, but not for what a shrinking transform shows beyond it.
    """
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor([[-cx, cx, -cx, cx], [-cy, -cy, cy, cy], [1, 1, 1, 1]], dtype=Q.dtype)
    x, y, _ = (Q @ corners).transpose(0, 1).reshape(3, -1)
    needed = [(-x.min() - cx, width), (x.max() - cx, width), (-y.min() - cy, height), (y.max() - cy, height)]
    return [int(np.ceil(min(max(float(m) + 2 * hz, 0), size - 1))) for m, size in needed]


def warp(images, Q, margins, taps):
    """Transform by Q [N, 3, 3] (CPU; output => input pixels) between twofold upsampling and downsampling with the filter `taps`."""
    num, channels, height, width = images.shape
    hz = taps.numel() // 4
    x0, x1, y0, y1 = margins
    w_in, h_in = 2 * (width + x0 + x1), 2 * (height + y0 + y1)
    w_out, h_out = 2 * (width + 2 * hz), 2 * (height + 2 * hz)
    # The original pixel at x lies at 2x - 1/2 after upsampling; padding moves the centre; affine_grid's unit is half the image.
    to_input = Q.new_tensor([[4 / w_in, 0, (2 * (x0 - x1) - 1) / w_in], [0, 4 / h_in, (2 * (y0 - y1) - 1) / h_in], [0, 0, 1]])
    from_output = Q.new_tensor([[w_out / 4, 0, 1 / 4], [0, h_out / 4, 1 / 4], [0, 0, 1]])
    theta = _to(images, (to_input @ Q @ from_output)[:, :2])
    grid = F.affine_grid(theta, [num, channels, h_out, w_out], align_corners=False)
    return _downsample(_GridSample.apply(_upsample(images, margins, taps), grid), height, width, taps)


def _eye(size, like):
    return torch.eye(size, dtype=like.dtype, device=like.device)[None, None]


def _upsample(images, margins, taps):
    """Reflection padding, then upsample2d by 2: [N, C, H, W] => [N, C, 2 (H + y0 + y1), 2 (W + x0 + x1)]."""
    height, width = images.shape[2:]
    if max(height, width) > MAX_DENSE_SIZE:
        return upsample2d(F.pad(images, margins, mode='reflect'), taps)

    def matrix(size, before, after):
        rows = F.pad(_eye(size, images), [0, 0, before, after], mode='reflect')
        pads = ((taps.numel() + 1) // 2, (taps.numel() - 2) // 2)
        return upfirdn2d(rows, taps[:, None], up=(1, 2), padding=(0, 0) + pads, gain=2)[0, 0]
    return matrix(height, *margins[2:]) @ (images @ matrix(width, *margins[:2]).t())


def _downsample(x, height, width, taps):
    """downsample2d by 2 and removal of the margins: [N, C, 2 (H + 6), 2 (W + 6)] => [N, C, H, W]."""
    crop = taps.numel() // 4 * 2
    if max(height, width) > MAX_DENSE_SIZE:
        return downsample2d(x, taps, padding=-crop, flip_filter=True)

    def matrix(size):
        pads = ((taps.numel() - 1) // 2 - crop, (taps.numel() - 2) // 2 - crop)
        rows = _eye(2 * size + 2 * crop, x)
        return upfirdn2d(rows, taps[:, None], down=(1, 2), padding=(0, 0) + pads, flip_filter=True)[0, 0]
    return (matrix(height) @ x) @ matrix(width).t()


class _GridSample(torch.autograd.Function):
    """Bilinear grid_sample, zeros outside, constant grid. torch has its second derivative only from 2.12 on; R1 needs it."""

    @staticmethod
    def forward(ctx, x, grid):
        ctx.save_for_backward(grid)
        ctx.in_shape = x.shape
        return F.grid_sample(x, grid, mode='bilinear', padding_mode='zeros', align_corners=False)

    @staticmethod
    def backward(ctx, dy):
        return _GridSampleAdjoint.apply(dy, ctx.saved_tensors[0], ctx.in_shape), None


class _GridSampleAdjoint(torch.autograd.Function):
    """Transpose of _GridSample: [N, C, h, w] on the grid => [N, C, H, W] = `in_shape`."""

    @staticmethod
    def forward(ctx, dy, grid, in_shape):
        ctx.save_for_backward(grid)
        # Sampling is linear, so it does not matter where it is linearised. The forward pass costs a fifth of this and spares us
        # the aten operator of the backward pass, whose signature differs between versions of torch.
        with torch.enable_grad():
            x = dy.new_zeros([1]).expand(in_shape).requires_grad_()
            y = F.grid_sample(x, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        return torch.autograd.grad(y, x, dy)[0]

    @staticmethod
    def backward(ctx, ddx):
        return _GridSample.apply(ddx, ctx.saved_tensors[0]), None, None


def amplify_bands(images, gains, filters):
    """Multiply frequency bands of images [N, C, H, W] by gains [N, 4] (CPU), along x and along y; filters: [4, taps]."""
    taps = _to(images, gains) @ filters.to(images.dtype)
    half = taps.shape[1] // 2

    def matrix(size):  # [N, size, size]: reflection padding and correlation, one matrix per sample
        return F.conv2d(F.pad(_eye(size, images), [0, 0, half, half], mode='reflect'), taps[:, None, :, None])[0]
    height, width = images.shape[2:]
    return matrix(height)[:, None] @ images @ matrix(width).transpose(1, 2)[:, None]


def filter_bank(lowpass):
    """Zero-phase filters [4, 43] (float64) of four frequency bands, low to high, from an orthogonal wavelet; their sum is 1."""
    h = np.asarray(lowpass, dtype=np.float64)
    g = h * (-1) ** np.arange(len(h))
    low, high = np.convolve(h, h[::-1]) / 2, np.convolve(g, g[::-1]) / 2
    bank = np.eye(len(BAND_POWER), 1)
    for i in range(1, len(bank)):
        spread = np.zeros([len(bank), 2 * bank.shape[1] - 1])
        spread[:, ::2] = bank
        bank = np.stack([np.convolve(row, low) for row in spread])
        start = (bank.shape[1] - len(high)) // 2
        bank[i, start: start + len(high)] += high
    return bank
