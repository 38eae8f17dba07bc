"""Mix the layers of seeds: `python tools/style_mixing.py --network=demo --rows=0-2 --cols=3-6 --styles=0-3 --outdir=out`."""

import click

from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', required=True, help='Network pickle: path, URL, short name (ffhq256 ...) or demo')
@click.option('--rows', metavar='LIST', required=True, help='Random seeds of the rows, such as 0,3,5-8')
@click.option('--cols', metavar='LIST', required=True, help='Random seeds of the columns')
@click.option('--styles', metavar='LIST', help='Layers taken from the column seed, 0 the coarsest  [default: 0-6, fewer in small networks]')
@click.option('--trunc', type=float, metavar='PSI', default=1, help='Truncation psi: 1 none, towards 0 more alike and cleaner')
@click.option('--class', 'class_idx', type=int, metavar='INT', help='Class label; conditional networks need one')
@click.option('--noise-mode', type=click.Choice(['const', 'random', 'none']), default='const', help='Noise inputs')
@click.option('--outdir', metavar='DIR', required=True, help='Where the pictures go')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
@click.option('--batch', type=click.IntRange(min=1), metavar='N', default=4, help='Pictures computed at a time')
def main(**options):
    """Write {row}-{col}.png for every pair of seeds, {seed}-{seed}.png unmixed, and grid.png, as the official style_mixing.py."""
    from m2m_stylegan import generate  # here, so that --help does not wait for PyTorch

    try:
        generate.style_mixing(**options, echo=click.echo)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
