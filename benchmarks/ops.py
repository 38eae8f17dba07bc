"""Compiled operators against the plain PyTorch reference, forward and backward, in one run: `python benchmarks/ops.py`."""

import functools
import statistics

import click
import torch

from m2m_stylegan.ops import build, dispatch, reference, selfcheck

# (batch, channels, resolution) of the networks' feature maps. 256 px: channel_base 16384; 1024 px: config-f.
SHAPES = {
    '64': [(8, 64, 16), (8, 64, 32), (8, 32, 64), (8, 3, 64)],
    '256': [(4, 512, 16), (4, 512, 32), (4, 256, 64), (4, 128, 128), (4, 64, 256), (4, 3, 256)],
    '1024': [(1, 256, 128), (1, 128, 256), (1, 64, 512), (1, 32, 1024), (1, 3, 1024)],
}


def cases(n: int, c: int, size: int, device: str, dtype: torch.dtype) -> dict[str, tuple[str, tuple, dict]]:
    """The uses of the operators at one feature map, in the memory layouts that the networks use."""
    fmt = torch.channels_last if device == 'cpu' and c > 3 else torch.contiguous_format

    def randn(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=device, dtype=dtype)
        return x.contiguous(memory_format=fmt) if len(shape) == 4 else x

    f = reference.setup_filter([1, 3, 3, 1]).to(device)
    x = randn(n, c, size, size)
    found = {'upfirdn2d up 2': ('upfirdn2d', (randn(n, c, size // 2, size // 2), f), {'up': 2, 'padding': (2, 1, 2, 1), 'gain': 4})}
    if c > 3:
        small = (randn(n, c).float(), randn(n, 1, size, size).float(), randn().float(), randn(c).float())
        found |= {
            'upfirdn2d filter': ('upfirdn2d', (x, f), {'padding': 2}),
            'upfirdn2d down 2': ('upfirdn2d', (x, f), {'down': 2, 'padding': 1}),
            'bias_act lrelu': ('bias_act', (x, small[3].to(dtype)), {'act': 'lrelu', 'clamp': 256.0}),
            'epilogue': ('epilogue', (x, *small), {'act': 'lrelu', 'clamp': 256.0})}
    return found


@click.command(context_settings={'show_default': True})
@click.option('--nets', default='64,256,1024', help='Resolutions of the networks whose shapes are measured')
@click.option('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
@click.option('--dtype', type=click.Choice(['float32', 'float16', 'bfloat16']), default='float32')
@click.option('--repeats', type=int, default=5)
def main(nets, device, dtype, repeats):
    """Milliseconds of forward plus backward for each use of each operator, and reference / compiled; medians per operator at the end."""
    build.prepare(device)
    dtype = getattr(torch, dtype)
    name = torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    click.echo(f'torch {torch.__version__}, {name}, {dtype}\n{"operator":<20}{"shape":<20}{"compiled ms":>12}{"reference ms":>14}{"ratio":>8}')
    ratios = {}
    for net in nets.split(','):
        for shape in SHAPES[net]:
            for label, (op, args, kwargs) in cases(*shape, device, dtype).items():
                fast, slow = (selfcheck.seconds(functools.partial(selfcheck.forward_backward, getattr(table, op), args, kwargs), repeats)
                              for table in (dispatch, reference))
                ratios.setdefault(op, []).append(slow / fast)
                text = f'{shape[0]} x {shape[1]} x {shape[2]}²'
                click.echo(f'{label:<20}{text:<20}{fast * 1e3:>12.2f}{slow * 1e3:>14.2f}{slow / fast:>8.1f}')
    for op, values in ratios.items():
        click.echo(f'{op}: median ratio {statistics.median(values):.1f}, smallest {min(values):.1f}')


if __name__ == '__main__':
    main()
