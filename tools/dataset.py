"""Prepare a folder or zip of pictures: `python tools/dataset.py --source=photos --dest=photos-256.zip --resolution=256`."""

import functools

import click
import tqdm

from m2m_stylegan.errors import UserError
from m2m_stylegan.prepare_images import CROPS, FILTERS, PrepareOptions, prepare


@click.command()
@click.option('--source', metavar='PATH', required=True, help='Folder (searched recursively) or zip of pictures of any kind')
@click.option('--dest', metavar='PATH', required=True, help='New .zip, or new or empty folder')
@click.option('--resolution', metavar='INT', type=int, help='Width and height of the result, a power of two  [default: those of the '
              'pictures, if they are all alike]')
@click.option('--crop', type=click.Choice(CROPS), help='How pictures become square: center: the largest square in the middle; pad: a border of '
              '--background; stretch; none: they must be square; center-wide: as the official tool makes it, on black  [default: center; without a '
              'size none; with --width and --height alone stretch]')
@click.option('--background', metavar='COLOR', default='#ffffff', show_default=True, help='Behind transparency, border of pad')
@click.option('--resize-filter', type=click.Choice(tuple(FILTERS)), default='lanczos', show_default=True, help='For resizing')
@click.option('--max-images', metavar='INT', type=int, help='Stop after this many  [default: all]')
@click.option('--labels-from-folders', is_flag=True, help='Class = top-level folder, instead of dataset.json of the source')
@click.option('--transform', type=click.Choice(['center-crop', 'center-crop-wide']), help='Official spelling of --crop')
@click.option('--width', metavar='INT', type=int, help='Official spelling; without --transform pictures are stretched')
@click.option('--height', metavar='INT', type=int, help='Official spelling, see --width')
def main(source, dest, **options):
    """Convert pictures to the official dataset format: equal squares, 8-bit RGB or grey, in an uncompressed zip or a folder.

    Transparency, palettes, 16 bits, CMYK and EXIF rotation are handled; pictures that cannot be read are skipped and listed.
    """
    try:
        report = prepare(source, dest, PrepareOptions.from_command_line(**options), functools.partial(tqdm.tqdm, unit='img'))
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err
    click.echo(report.text())


if __name__ == '__main__':
    main()
