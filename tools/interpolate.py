"""A film through the latent space: `python tools/interpolate.py --network=demo --seeds=0-5 --dest=loop.gif`."""

import click

from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', required=True, help='Network pickle: path, URL, short name (ffhq256 ...) or demo')
@click.option('--seeds', metavar='LIST', required=True, help='Random seeds that the loop runs through, such as 0,3,5-8')
@click.option('--dest', metavar='FILE', required=True, help='New .gif, or .mp4 (needs ffmpeg)')
@click.option('--path', type=click.Choice(['cubic-w', 'linear-w', 'slerp-z']), default='cubic-w',
              help='Spline in w (smoothest), straight lines in w, or great circles in z (always typical pictures)')
@click.option('--frames', type=click.IntRange(min=1), metavar='N', default=60, help='Frames from one seed to the next')
@click.option('--fps', type=float, metavar='N', default=25, help='Frames per second; a .gif rounds to whole 1/100 s')
@click.option('--grid', metavar='CxR', default='1x1', help='Several loops side by side; the seeds are dealt out in order')
@click.option('--size', type=click.IntRange(4, 8192), metavar='PX', help="Width and height of one picture  [default: the network's]")
@click.option('--trunc', type=float, metavar='PSI', default=1, help='Truncation psi: 1 none, towards 0 more alike and cleaner')
@click.option('--class', 'class_idx', type=int, metavar='INT', help='Class label; conditional networks need one')
@click.option('--noise-mode', type=click.Choice(['const', 'random', 'none']), default='const', help='Noise inputs; random ones flicker')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
@click.option('--batch', type=click.IntRange(min=1), metavar='N', default=4, help='Pictures computed at a time')
def main(**options):
    """Write a film that moves smoothly through the pictures of the seeds and ends where it began."""
    from m2m_stylegan import interpolate  # here, so that --help does not wait for PyTorch

    try:
        interpolate.interpolate(**options, echo=click.echo)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
