"""Remake the demo's image sets; for maintainers, see m2m_stylegan/assets/CREDITS.md for the packages it needs."""

from pathlib import Path

import click

from m2m_stylegan.demo_data import write_fluent_busts, write_noto_busts, write_personas

dest_option = click.option('--dest', metavar='ZIP', required=True, help='Image set to write')
resolution_option = click.option('--resolution', metavar='INT', type=click.IntRange(min=4), default=64, show_default=True, help='Width and height')
emoji_option = click.option('--emoji-dir', type=click.Path(exists=True, path_type=Path), required=True, help='Unpacked emoji-datasource')


@click.group()
def main():
    """Remake the image sets of the demonstration."""


@main.command()
@dest_option
@click.option('--num-images', metavar='INT', type=click.IntRange(min=1), default=10000, show_default=True)
@resolution_option
@click.option('--first-seed', metavar='INT', type=click.IntRange(min=0), default=0, help='For a hold-out')
def source(**options):
    """Draw DiceBear Personas portraits (art: Draftbit, CC BY 4.0)."""
    click.echo(f'next unused seed: {write_personas(**options)}')


@main.command()
@dest_option
@resolution_option
@click.option('--noto-dir', type=click.Path(exists=True, path_type=Path), required=True, help='Unpacked @iconify-json/noto')
@emoji_option
def target(**options):
    """Draw Noto emoji portraits (art: Google, Apache-2.0)."""
    click.echo(f'{write_noto_busts(**options)} images')


@main.command()
@dest_option
@resolution_option
@click.option('--fluent-dir', type=click.Path(exists=True, path_type=Path), required=True, help='Unpacked @lobehub/fluent-emoji-3d')
@emoji_option
def second_target(**options):
    """Draw Fluent 3D emoji portraits (art: Microsoft, MIT); not bundled."""
    click.echo(f'{write_fluent_busts(**options)} images')


if __name__ == '__main__':
    main()
