"""Make pictures with a network: `python tools/generate.py --network=demo --seeds=0-7 --outdir=out`."""

import click

from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', required=True, help='Network pickle: path, URL, short name (ffhq256 ...) or demo')
@click.option('--seeds', metavar='LIST', help='Random seeds, such as 0,3,5-8; one picture each')
@click.option('--trunc', type=float, metavar='PSI', default=1, help='Truncation psi: 1 none, towards 0 more alike and cleaner')
@click.option('--class', 'class_idx', type=int, metavar='INT', help='Class label; conditional networks need one')
@click.option('--noise-mode', type=click.Choice(['const', 'random', 'none']), default='const', help='Noise inputs')
@click.option('--projected-w', metavar='NPZ', help='Pictures of these w instead of seeds: projected_w.npz of tools/project.py')
@click.option('--outdir', metavar='DIR', required=True, help='Where the pictures go')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
@click.option('--batch', type=click.IntRange(min=1), metavar='N', default=4, help='Pictures computed at a time')
def main(**options):
    """Write seed0000.png ... (or proj00.png ...), the pictures that the official generate.py makes of the same seeds."""
    from m2m_stylegan import generate  # here, so that --help does not wait for PyTorch

    try:
        generate.generate(**options, echo=click.echo)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
