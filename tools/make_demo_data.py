"""Remake the demo's image sets; for maintainers, see m2m_stylegan/assets/CREDITS.md for the packages it needs."""

from pathlib import Path

import click

from m2m_stylegan.demo_data import write_fluent_busts, write_noto_busts, write_personas


@click.group()
def main():
    """Remake the image sets of the demonstration."""


@main.command()
@click.option('--dest', metavar='ZIP', required=True, help='Image set to write')
@click.option('--num-images', metavar='INT', type=click.IntRange(min=1), default=10000, show_default=True)
@click.option('--resolution', metavar='INT', type=click.IntRange(min=4), default=64, show_default=True, help='Width and height')
@click.option('--first-seed', metavar='INT', type=click.IntRange(min=0), default=0, help='For a hold-out')
def source(**options):
    """Draw DiceBear Personas portraits (art: Draftbit, CC BY 4.0)."""
    click.echo(f'next unused seed: {write_personas(**options)}')


@main.command()
@click.option('--dest', metavar='ZIP', required=True, help='Image set to write')
@click.option('--resolution', metavar='INT', type=click.IntRange(min=4), default=64, show_default=True, help='Width and height')
@click.option('--noto-dir', type=click.Path(exists=True, path_type=Path), required=True, help='Unpacked @iconify-json/noto')
@click.option('--emoji-dir', type=click.Path(exists=True, path_type=Path), required=True, help='Unpacked emoji-datasource')
def target(**options):
    """Draw Noto emoji portraits (art: Google, Apache-2.0)."""
    click.echo(f'{write_noto_busts(**options)} images')


@main.command()
@click.option('--dest', metavar='ZIP', required=True, help='Image set to write')
@click.option('--resolution', metavar='INT', type=click.IntRange(min=4), default=64, show_default=True, help='Width and height')
@click.option('--fluent-dir', type=click.Path(exists=True, path_type=Path), required=True, help='Unpacked @lobehub/fluent-emoji-3d')
@click.option('--emoji-dir', type=click.Path(exists=True, path_type=Path), required=True, help='Unpacked emoji-datasource')
def second_target(**options):
    """Draw Fluent 3D emoji portraits (art: Microsoft, MIT); not bundled."""
    click.echo(f'{write_fluent_busts(**options)} images')


if __name__ == '__main__':
    main()
