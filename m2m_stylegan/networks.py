"""StyleGAN2 networks: mapping, synthesis, discriminator, under the official names of classes, arguments, attributes and tensors.

Karras et al., arXiv 1912.04958 (StyleGAN2) and 2006.06676 (StyleGAN2-ADA). All arithmetic runs in the dtype of the parameters
(float32, or float64 after `.double()`); blocks marked `use_fp16` run in half precision unless `force_fp32` is given.
`SynthesisNetwork.run` and `Discriminator.run` execute any consecutive part of the blocks, which is all that slicing needs.

The text of this file is embedded in the pickles that we write, behind the text of `ops/reference.py`, and then executed by the official
tools: it needs nothing but torch and numpy and keeps to the syntax and APIs of Python 3.7 and torch 1.7.
"""

import numpy as np
import torch

try:
    from m2m_stylegan.ops import activation_gain, bias_act, conv2d_resample, downsample2d, epilogue, setup_filter, upsample2d
except ImportError:  # Inside a pickle, on a machine without this package: ops/reference.py stands above this line.
    pass

SQRT_HALF = float(np.sqrt(0.5))


def normalize_2nd_moment(x):
    """x / rms(x) over the features of each row; x: [N, C]."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def to_compute(x, dtype, channels_last):
    """Cast features [N, C, H, W] and choose their layout.

    On a CPU channels-last is always taken: fp32 transposed and depthwise convolutions run 3 to 6 times faster in it (torch 2.13).
    """
    fmt = torch.channels_last if channels_last or x.device.type == 'cpu' else torch.contiguous_format
    return x.to(dtype=dtype, memory_format=fmt)


def scaled_conv2d(x, weight, styles, up=1, padding=0, resample_filter=None, demodulate=True, flip_weight=True):
    """The two factors of a modulated convolution (1912.04958, eq. 1-3): (y [N, O, H', W'], demod [N, O] or None), whose product it is.

    x: [N, I, H, W], fp16/32/64. weight: [O, I, kh, kw] and styles: [N, I] in the parameter dtype, as is demod.

    The activations are scaled instead of the weights, with demodulation coefficients rsqrt(styles^2 . sum_k w^2): the same
    numbers up to rounding as per-sample weights [N, O, I, kh, kw], whose forming costs 15-20 times more at 512 channels.
    """
    if x.dtype == torch.float16 and demodulate:  # Keeps the products in half range; cancels in the demodulation.
        fan_in = weight.shape[1] * weight.shape[2] * weight.shape[3]
        weight = weight * (1 / np.sqrt(fan_in) / weight.abs().amax(dim=(1, 2, 3), keepdim=True))
        styles = styles / styles.abs().amax(dim=1, keepdim=True)
    demod = None
    if demodulate:
        demod = (styles.square() @ weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()
    x = epilogue(x, scale=styles, act='linear')
    return conv2d_resample(x, weight.to(x.dtype), f=resample_filter, up=up, padding=padding, flip_weight=flip_weight), demod


def modulated_1x1(x, weight, styles):
    """Modulated 1x1 convolution without demodulation, for few output channels: x [N, I, H, W], weight [O, I, 1, 1], styles [N, I] => [N, O, H, W].

    With so few outputs the weights of each sample cost nothing to form, and x is read once, as a matrix, instead of being scaled first.
    """
    n, _, h, w = x.shape
    weights = (weight[:, :, 0, 0] * styles[:, None, :]).to(x.dtype)  # [N, O, I]
    if x.stride(1) == 1:  # channels-last: so are the result and all gradients
        return torch.bmm(x.permute(0, 2, 3, 1).reshape(n, h * w, -1), weights.transpose(1, 2)).reshape(n, h, w, -1).permute(0, 3, 1, 2)
    return torch.bmm(weights, x.reshape(n, -1, h * w)).reshape(n, -1, h, w)


class FullyConnectedLayer(torch.nn.Module):
    """act(x W^T + b) with the equalised learning rate of 1710.10196: [N, in_features] => [N, out_features]."""

    def __init__(self, in_features, out_features, bias=True, activation='linear', lr_multiplier=1, bias_init=0):
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = float(lr_multiplier / np.sqrt(in_features))
        self.bias_gain = lr_multiplier

    def forward(self, x):
        weight = self.weight.to(x.dtype) * self.weight_gain
        bias = self.bias
        if bias is not None:
            bias = bias.to(x.dtype) if self.bias_gain == 1 else bias.to(x.dtype) * self.bias_gain
        if self.activation == 'linear' and bias is not None:
            return torch.addmm(bias, x, weight.t())
        return bias_act(x @ weight.t(), bias, act=self.activation)


class Conv2dLayer(torch.nn.Module):
    """Convolution with optional 2x resampling, bias and activation: [N, in, H, W] => [N, out, H * up / down, W * up / down]."""

    def __init__(self, in_channels, out_channels, kernel_size, bias=True, activation='linear', up=1, down=1,
                 resample_filter=(1, 3, 3, 1), conv_clamp=None, channels_last=False, trainable=True):
        super().__init__()
        self.activation = activation
        self.up = up
        self.down = down
        self.conv_clamp = conv_clamp
        self.register_buffer('resample_filter', setup_filter(list(resample_filter)))
        self.padding = kernel_size // 2
        self.weight_gain = float(1 / np.sqrt(in_channels * (kernel_size ** 2)))
        self.act_gain = activation_gain(activation)
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        if channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        bias_value = torch.zeros([out_channels]) if bias else None
        if trainable:
            self.weight = torch.nn.Parameter(weight)
            self.bias = torch.nn.Parameter(bias_value) if bias else None
        else:  # FreezeD (2002.10964): same names, but invisible to optimisers.
            self.register_buffer('weight', weight)
            if bias:
                self.register_buffer('bias', bias_value)
            else:
                self.bias = None

    def forward(self, x, gain=1):
        weight = (self.weight * self.weight_gain).to(x.dtype)
        x = conv2d_resample(x, weight, f=self.resample_filter, up=self.up, down=self.down, padding=self.padding,
                            flip_weight=(self.up == 1))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


class MappingNetwork(torch.nn.Module):
    """z, c => ws: normalise, embed the label, a chain of fully connected layers, broadcast, truncate."""

    def __init__(self, z_dim, c_dim, w_dim, num_ws, num_layers=8, embed_features=None, layer_features=None, activation='lrelu',
                 lr_multiplier=0.01, w_avg_beta=0.995):
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta
        embed_features = 0 if c_dim == 0 else w_dim if embed_features is None else embed_features
        layer_features = w_dim if layer_features is None else layer_features
        features = [z_dim + embed_features] + [layer_features] * (num_layers - 1) + [w_dim]
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        for i in range(num_layers):
            layer = FullyConnectedLayer(features[i], features[i + 1], activation=activation, lr_multiplier=lr_multiplier)
            setattr(self, 'fc%d' % i, layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer('w_avg', torch.zeros([w_dim]))

    def forward(self, z, c=None, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False, update_emas=None):
        """z: [N, z_dim] float (ignored if z_dim is 0), c: [N, c_dim] float (ignored if c_dim is 0).

        Returns ws [N, num_ws, w_dim], or [N, w_dim] if num_ws is None. In training mode the running mean `w_avg` is updated unless
        skip_w_avg_update is set; update_emas=True/False, the switch of the StyleGAN3 code base, decides alone when given.
        """
        x = None
        dtype = next(self.parameters(), z).dtype
        if self.z_dim > 0:
            if z.ndim != 2 or z.shape[1] != self.z_dim:
                raise ValueError('z must have shape [N, %d], got %s' % (self.z_dim, list(z.shape)))
            x = normalize_2nd_moment(z.to(dtype))
        if self.c_dim > 0:
            if c is None or c.ndim != 2 or c.shape[1] != self.c_dim:
                raise ValueError('this network is conditional: c must have shape [N, %d], got %s' % (
                    self.c_dim, None if c is None else list(c.shape)))
            y = normalize_2nd_moment(self.embed(c.to(dtype)))
            x = y if x is None else torch.cat([x, y], dim=1)
        for i in range(self.num_layers):
            x = getattr(self, 'fc%d' % i)(x)
        update = self.training and not skip_w_avg_update if update_emas is None else update_emas
        if update and self.num_ws is not None and self.w_avg_beta is not None:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is not None:
            x = x.unsqueeze(1).repeat([1, self.num_ws, 1])  # [N, num_ws, w_dim]
        if truncation_psi != 1:
            cutoff = x.shape[1] if truncation_cutoff is None else truncation_cutoff
            x = torch.cat([self.w_avg.lerp(x[:, :cutoff], truncation_psi), x[:, cutoff:]], dim=1)
        return x


class SynthesisLayer(torch.nn.Module):
    """Modulated convolution, noise, bias, activation: [N, in, H, W], w [N, w_dim] => [N, out, resolution, resolution]."""

    def __init__(self, in_channels, out_channels, w_dim, resolution, kernel_size=3, up=1, use_noise=True, activation='lrelu',
                 resample_filter=(1, 3, 3, 1), conv_clamp=None, channels_last=False):
        super().__init__()
        self.resolution = resolution
        self.up = up
        self.use_noise = use_noise
        self.activation = activation
        self.conv_clamp = conv_clamp
        self.register_buffer('resample_filter', setup_filter(list(resample_filter)))
        self.padding = kernel_size // 2
        self.act_gain = activation_gain(activation)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = torch.randn([out_channels, in_channels, kernel_size, kernel_size])
        self.weight = torch.nn.Parameter(weight.contiguous(memory_format=torch.channels_last) if channels_last else weight)
        if use_noise:
            self.register_buffer('noise_const', torch.randn([resolution, resolution]))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x, w, noise_mode='random', gain=1):
        if noise_mode not in ('random', 'const', 'none'):
            raise ValueError("noise_mode must be 'random', 'const' or 'none', got %r" % (noise_mode,))
        noise = None
        if self.use_noise and noise_mode == 'random':
            noise = torch.randn([x.shape[0], 1, self.resolution, self.resolution], device=x.device, dtype=self.weight.dtype)
        if self.use_noise and noise_mode == 'const':
            noise = self.noise_const[None, None]
        x, demod = scaled_conv2d(x, self.weight, self.affine(w), up=self.up, padding=self.padding, resample_filter=self.resample_filter,
                                 flip_weight=(self.up == 1))
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return epilogue(x, scale=demod, noise=noise, strength=None if noise is None else self.noise_strength, b=self.bias, act=self.activation,
                        gain=self.act_gain * gain, clamp=clamp)


class ToRGBLayer(torch.nn.Module):
    """Modulated 1x1 convolution without demodulation: [N, in, H, W], w [N, w_dim] => [N, img_channels, H, W]."""

    def __init__(self, in_channels, out_channels, w_dim, kernel_size=1, conv_clamp=None, channels_last=False):
        super().__init__()
        if kernel_size != 1:
            raise ValueError('ToRGBLayer is a 1x1 convolution, got kernel_size %r' % (kernel_size,))
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = torch.randn([out_channels, in_channels, 1, 1])
        self.weight = torch.nn.Parameter(weight.contiguous(memory_format=torch.channels_last) if channels_last else weight)
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = float(1 / np.sqrt(in_channels))

    def forward(self, x, w):
        styles = self.affine(w) * self.weight_gain
        return bias_act(modulated_1x1(x, self.weight, styles), self.bias.to(x.dtype), clamp=self.conv_clamp)


class SynthesisBlock(torch.nn.Module):
    """All layers of one resolution: (x, img) at resolution / 2 => (x, img) at resolution."""

    def __init__(self, in_channels, out_channels, w_dim, resolution, img_channels, is_last, architecture='skip',
                 resample_filter=(1, 3, 3, 1), conv_clamp=None, use_fp16=False, fp16_channels_last=False,
                 fused_modconv_default=None, **layer_kwargs):
        # fused_modconv_default is accepted because StyleGAN3 pickles carry it; one way of evaluation serves both of its values.
        super().__init__()
        if architecture not in ('orig', 'skip', 'resnet'):
            raise ValueError("architecture must be 'orig', 'skip' or 'resnet', got %r" % (architecture,))
        self.in_channels = in_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.is_last = is_last
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = 1 if is_last or architecture == 'skip' else 0
        self.register_buffer('resample_filter', setup_filter(list(resample_filter)))
        common = dict(conv_clamp=conv_clamp, channels_last=self.channels_last)
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels, resolution, resolution]))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim=w_dim, resolution=resolution, up=2,
                                        resample_filter=resample_filter, **common, **layer_kwargs)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim=w_dim, resolution=resolution, **common, **layer_kwargs)
        if self.num_torgb:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim=w_dim, **common)
        if in_channels != 0 and architecture == 'resnet':
            self.skip = Conv2dLayer(in_channels, out_channels, kernel_size=1, bias=False, up=2,
                                    resample_filter=resample_filter, channels_last=self.channels_last)

    def forward(self, x, img, ws, force_fp32=False, fused_modconv=None, noise_mode='random', update_emas=False):
        """x: [N, in_channels, r / 2, r / 2] or None at 4x4; img: [N, img_channels, r / 2, r / 2] or None; ws: [N, num_conv + num_torgb, w_dim].

        Returns x [N, out_channels, r, r] (half in fp16 blocks) and img [N, img_channels, r, r] (parameter dtype) or None.
        fused_modconv and update_emas are accepted for callers written for the official classes and change nothing.
        """
        if ws.shape[1:] != (self.num_conv + self.num_torgb, self.w_dim):
            raise ValueError('block b%d takes ws of shape [N, %d, %d], got %s' % (
                self.resolution, self.num_conv + self.num_torgb, self.w_dim, list(ws.shape)))
        param_dtype = self.conv1.weight.dtype
        dtype = torch.float16 if self.use_fp16 and not force_fp32 else param_dtype
        channels_last = self.channels_last and not force_fp32
        w = iter(ws.unbind(dim=1))
        if self.in_channels == 0:
            x = to_compute(self.const.unsqueeze(0).repeat([ws.shape[0], 1, 1, 1]), dtype, channels_last)
            x = self.conv1(x, next(w), noise_mode=noise_mode)
        elif self.architecture == 'resnet':
            x = to_compute(x, dtype, channels_last)
            y = self.skip(x, gain=SQRT_HALF)
            x = self.conv0(x, next(w), noise_mode=noise_mode)
            x = y + self.conv1(x, next(w), noise_mode=noise_mode, gain=SQRT_HALF)
        else:
            x = to_compute(x, dtype, channels_last)
            x = self.conv0(x, next(w), noise_mode=noise_mode)
            x = self.conv1(x, next(w), noise_mode=noise_mode)
        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.num_torgb:
            y = self.torgb(x, next(w)).to(dtype=param_dtype, memory_format=torch.contiguous_format)
            img = y if img is None else img + y
        return x, img


class SynthesisNetwork(torch.nn.Module):
    """ws [N, num_ws, w_dim] => image [N, img_channels, R, R], nominal range [-1, 1], unbounded."""

    def __init__(self, w_dim, img_resolution, img_channels, channel_base=32768, channel_max=512, num_fp16_res=0, **block_kwargs):
        super().__init__()
        if img_resolution < 4 or img_resolution & (img_resolution - 1):
            raise ValueError('img_resolution must be a power of two of at least 4, got %s' % (img_resolution,))
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_resolution_log2 = img_resolution.bit_length() - 1
        self.img_channels = img_channels
        self.block_resolutions = [2 ** i for i in range(2, self.img_resolution_log2 + 1)]
        channels = {res: min(channel_base // res, channel_max) for res in self.block_resolutions}
        fp16_resolution = max(2 ** (self.img_resolution_log2 + 1 - num_fp16_res), 8)
        self.num_ws = 0
        for res in self.block_resolutions:
            is_last = res == img_resolution
            block = SynthesisBlock(channels[res // 2] if res > 4 else 0, channels[res], w_dim=w_dim, resolution=res,
                                   img_channels=img_channels, is_last=is_last, use_fp16=(res >= fp16_resolution), **block_kwargs)
            self.num_ws += block.num_conv + (block.num_torgb if is_last else 0)
            setattr(self, 'b%d' % res, block)

    def first_w(self, res):
        """Index in ws of the first vector that block b{res} reads."""
        return max(2 * (res.bit_length() - 1) - 5, 0)

    def run(self, ws, x, img, resolutions, **block_kwargs):
        """Run the blocks `resolutions` (ascending, consecutive) on ws [N, num_ws, w_dim] and the (x, img) of the block before; returns (x, img)."""
        for res in resolutions:
            block = getattr(self, 'b%d' % res)
            first = self.first_w(res)
            x, img = block(x, img, ws[:, first: first + block.num_conv + block.num_torgb], **block_kwargs)
        return x, img

    def forward(self, ws, **block_kwargs):
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError('ws must have shape [N, %d, %d], got %s' % (self.num_ws, self.w_dim, list(ws.shape)))
        return self.run(ws.to(self.b4.const.dtype), None, None, self.block_resolutions, **block_kwargs)[1]


class Generator(torch.nn.Module):
    """z [N, z_dim], c [N, c_dim] => image [N, img_channels, R, R], nominal range [-1, 1], unbounded."""

    def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs=None, synthesis_kwargs=None, **more_synthesis_kwargs):
        # The StyleGAN3 code base passes the synthesis options flat, StyleGAN2-ADA as synthesis_kwargs.
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.synthesis = SynthesisNetwork(w_dim=w_dim, img_resolution=img_resolution, img_channels=img_channels,
                                          **dict(synthesis_kwargs or {}, **more_synthesis_kwargs))
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, num_ws=self.num_ws, **(mapping_kwargs or {}))

    def forward(self, z, c=None, truncation_psi=1, truncation_cutoff=None, update_emas=None, **synthesis_kwargs):
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff, update_emas=update_emas)
        return self.synthesis(ws, **synthesis_kwargs)


class DiscriminatorBlock(torch.nn.Module):
    """One resolution of the discriminator: (x, img) at resolution => (x, img) at resolution / 2."""

    def __init__(self, in_channels, tmp_channels, out_channels, resolution, img_channels, first_layer_idx, architecture='resnet',
                 activation='lrelu', resample_filter=(1, 3, 3, 1), conv_clamp=None, use_fp16=False, fp16_channels_last=False,
                 freeze_layers=0):
        super().__init__()
        if architecture not in ('orig', 'skip', 'resnet'):
            raise ValueError("architecture must be 'orig', 'skip' or 'resnet', got %r" % (architecture,))
        self.in_channels = in_channels
        self.resolution = resolution
        self.img_channels = img_channels
        self.first_layer_idx = first_layer_idx
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer('resample_filter', setup_filter(list(resample_filter)))
        self.num_layers = 0

        def layer(*args, **kwargs):
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(*args, trainable=trainable, channels_last=self.channels_last, **kwargs)

        act = dict(activation=activation, conv_clamp=conv_clamp)
        if in_channels == 0 or architecture == 'skip':
            self.fromrgb = layer(img_channels, tmp_channels, kernel_size=1, **act)
        self.conv0 = layer(tmp_channels, tmp_channels, kernel_size=3, **act)
        self.conv1 = layer(tmp_channels, out_channels, kernel_size=3, down=2, resample_filter=resample_filter, **act)
        if architecture == 'resnet':
            self.skip = layer(tmp_channels, out_channels, kernel_size=1, bias=False, down=2, resample_filter=resample_filter)

    def forward(self, x, img, force_fp32=False):
        """x: [N, in_channels, r, r] or None in the first block; img: [N, img_channels, r, r] or None.

        Returns x [N, out_channels, r / 2, r / 2] and, for architecture skip, img [N, img_channels, r / 2, r / 2], else None.
        """
        dtype = torch.float16 if self.use_fp16 and not force_fp32 else self.conv0.weight.dtype
        channels_last = self.channels_last and not force_fp32
        if x is not None:
            x = to_compute(x, dtype, channels_last)
        if self.in_channels == 0 or self.architecture == 'skip':
            img = to_compute(img, dtype, channels_last)
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = downsample2d(img, self.resample_filter) if self.architecture == 'skip' else None
        if self.architecture == 'resnet':
            y = self.skip(x, gain=SQRT_HALF)
            x = self.conv1(self.conv0(x), gain=SQRT_HALF) + y
        else:
            x = self.conv1(self.conv0(x))
        return x, img


class MinibatchStdLayer(torch.nn.Module):
    """Appends the standard deviation over groups of samples as channels (1710.10196): [N, C, H, W] => [N, C + num_channels, H, W]."""

    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x):
        n, c, h, w = x.shape
        size = n if self.group_size is None else min(self.group_size, n)
        if n % size:
            raise ValueError('minibatch standard deviation: a batch of %d is not divisible by the group size %d' % (n, size))
        y = x.reshape(size, n // size, self.num_channels, c // self.num_channels, h, w)  # sample j is in group j mod (n / size)
        y = (y - y.mean(dim=0)).square().mean(dim=0)
        y = (y + 1e-8).sqrt().mean(dim=(2, 3, 4))  # [groups, num_channels]
        y = y.reshape(n // size, self.num_channels, 1, 1).repeat([size, 1, h, w])
        return torch.cat([x, y], dim=1)


class DiscriminatorEpilogue(torch.nn.Module):
    """The 4x4 end of the discriminator: features [N, C, 4, 4] => logits [N, 1]."""

    def __init__(self, in_channels, cmap_dim, resolution, img_channels, architecture='resnet', mbstd_group_size=4,
                 mbstd_num_channels=1, activation='lrelu', conv_clamp=None):
        super().__init__()
        self.in_channels = in_channels
        self.cmap_dim = cmap_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.architecture = architecture
        if architecture == 'skip':
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        self.conv = Conv2dLayer(in_channels + mbstd_num_channels, in_channels, kernel_size=3, activation=activation,
                                conv_clamp=conv_clamp)
        self.fc = FullyConnectedLayer(in_channels * (resolution ** 2), in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, 1 if cmap_dim == 0 else cmap_dim)

    def forward(self, x, img, cmap, force_fp32=False):
        dtype = self.fc.weight.dtype  # Never half: the logits decide the game.
        x = to_compute(x, dtype, False)
        if self.architecture == 'skip':
            x = x + self.fromrgb(to_compute(img, dtype, False))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))  # [N, cmap_dim or 1]
        if self.cmap_dim > 0:
            x = (x * cmap).sum(dim=1, keepdim=True) * (1 / np.sqrt(self.cmap_dim))
        return x


class Discriminator(torch.nn.Module):
    """image [N, img_channels, R, R], c [N, c_dim] => logits [N, 1]."""

    def __init__(self, c_dim, img_resolution, img_channels, architecture='resnet', channel_base=32768, channel_max=512,
                 num_fp16_res=0, conv_clamp=None, cmap_dim=None, block_kwargs=None, mapping_kwargs=None, epilogue_kwargs=None):
        super().__init__()
        if img_resolution < 4 or img_resolution & (img_resolution - 1):
            raise ValueError('img_resolution must be a power of two of at least 4, got %s' % (img_resolution,))
        self.c_dim = c_dim
        self.img_resolution = img_resolution
        self.img_resolution_log2 = img_resolution.bit_length() - 1
        self.img_channels = img_channels
        self.block_resolutions = [2 ** i for i in range(self.img_resolution_log2, 2, -1)]
        channels = {res: min(channel_base // res, channel_max) for res in self.block_resolutions + [4]}
        fp16_resolution = max(2 ** (self.img_resolution_log2 + 1 - num_fp16_res), 8)
        cmap_dim = 0 if c_dim == 0 else channels[4] if cmap_dim is None else cmap_dim
        common = dict(img_channels=img_channels, architecture=architecture, conv_clamp=conv_clamp)
        first_layer_idx = 0
        for res in self.block_resolutions:
            block = DiscriminatorBlock(channels[res] if res < img_resolution else 0, channels[res], channels[res // 2], resolution=res,
                                       first_layer_idx=first_layer_idx, use_fp16=(res >= fp16_resolution),
                                       **dict(block_kwargs or {}, **common))
            setattr(self, 'b%d' % res, block)
            first_layer_idx += block.num_layers
        if c_dim > 0:
            self.mapping = MappingNetwork(z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None, **(mapping_kwargs or {}))
        self.b4 = DiscriminatorEpilogue(channels[4], cmap_dim=cmap_dim, resolution=4, **dict(epilogue_kwargs or {}, **common))

    def run(self, x, img, resolutions, **block_kwargs):
        """Run the blocks `resolutions` (descending, consecutive, >= 8) on the (x, img) that the block before returned; returns (x, img)."""
        for res in resolutions:
            x, img = getattr(self, 'b%d' % res)(x, img, **block_kwargs)
        return x, img

    def epilogue(self, x, img, c):
        """Logits [N, 1] of the features [N, C(4), 4, 4] (and img [N, img_channels, 4, 4] for architecture skip)."""
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)

    def forward(self, img, c=None, update_emas=False, **block_kwargs):
        x, img = self.run(None, img, self.block_resolutions, **block_kwargs)
        return self.epilogue(x, img, c)
