"""Ways to evaluate the networks' convolutions, forward and backward, against the way the networks take: `python benchmarks/convs.py`."""

import functools

import click
import torch
import torch.nn.functional as F

from m2m_stylegan import networks, ops
from m2m_stylegan.ops import selfcheck

# (batch, input channels, output channels, resolution of the output)
SHAPES = {
    '64': [(8, 64, 64, 8), (8, 64, 64, 16), (8, 64, 64, 32), (8, 32, 32, 64)],
    '256': [(4, 512, 512, 8), (4, 512, 512, 16), (4, 512, 512, 32), (4, 256, 256, 64), (4, 128, 128, 128), (4, 64, 64, 256)],
}


def scaled(x, weight, styles, up, f):
    """The networks' way: scale the activations, convolve, scale again."""
    y, demod = networks.scaled_conv2d(x, weight, styles, up=up, padding=1, resample_filter=f, flip_weight=up == 1)
    return ops.epilogue(y, demod, act='linear')


def grouped(x, weight, styles, up, f):
    """Weights [N, O, I, 3, 3] of each sample, in one grouped convolution."""
    n, i, h, w = x.shape
    weights = weight[None] * styles[:, None, :, None, None]
    weights = weights * (weights.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, n * i, h, w)
    y = ops.conv2d_resample(x, weights.reshape(-1, *weight.shape[1:]), f, up=up, padding=1, groups=n, flip_weight=up == 1)
    return y.reshape(n, -1, *y.shape[2:])


def resample_first(x, weight, styles, up, f):
    """Upsampling by the filter before the convolution instead of a transposed convolution."""
    demod = (styles.square() @ weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()
    x = ops.upsample2d(ops.epilogue(x, styles, act='linear'), f)
    return ops.epilogue(F.conv2d(x, weight.flip([2, 3]), padding=1), demod, act='linear')


def to_rgb_by_convolution(x, weight, styles):
    """Scale the activations, then a 1x1 convolution."""
    return F.conv2d(ops.epilogue(x, styles, act='linear'), weight)


def run(fn, x, weight, styles, *args):
    """Forward and backward; returns nothing."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, styles)]
    y = fn(*inputs, *args)
    torch.autograd.grad(y, inputs, torch.ones_like(y))


@click.command(context_settings={'show_default': True})
@click.option('--nets', default='64,256', help='Resolutions of the networks whose shapes are measured')
@click.option('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
@click.option('--repeats', type=int, default=5)
def main(nets, device, repeats):
    """Milliseconds of the networks' way, and time of each alternative relative to it (above 1: the networks' way is faster)."""
    ops.prepare(device)
    f = ops.setup_filter([1, 3, 3, 1]).to(device)
    fmt, other = (torch.channels_last, torch.contiguous_format) if device == 'cpu' else (torch.contiguous_format, torch.channels_last)
    click.echo(f'torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n{"layer":<10}{"shape":<24}{"ms":>8}  alternatives')
    for n, i, o, size in (shape for net in nets.split(',') for shape in SHAPES[net]):
        styles = torch.randn([n, i], device=device)
        for layer, up in [('conv1', 1), ('conv0, up', 2), ('toRGB', 1)]:
            x = torch.randn([n, i, size // up, size // up], device=device).contiguous(memory_format=fmt)
            weight = torch.randn([3, i, 1, 1] if layer == 'toRGB' else [o, i, 3, 3], device=device)
            shape = f'{n} x {i} -> {weight.shape[0]}, {size}²'
            if layer == 'toRGB':
                args, ways = (), {'': networks.modulated_1x1, 'by convolution': to_rgb_by_convolution}
            else:
                args, ways = (up, f), {'': scaled, 'grouped': grouped} | ({'resample first': resample_first} if up > 1 else {})
            times = {name: selfcheck.seconds(functools.partial(run, fn, x, weight, styles, *args), repeats) for name, fn in ways.items()}
            swapped = x.contiguous(memory_format=other)
            times['channels-last' if device == 'cuda' else 'contiguous'] = selfcheck.seconds(
                functools.partial(run, ways[''], swapped, weight, styles, *args), repeats)
            base = times.pop('')
            click.echo(f'{layer:<10}{shape:<24}{base * 1e3:>8.2f}  '
                       + ', '.join(f'{name} {seconds / base:.2f}' for name, seconds in times.items()))


if __name__ == '__main__':
    main()
