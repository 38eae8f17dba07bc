"""Put the call of this plugin into the scripts of a checkout, or take it out again: `python tools/apply_patches.py --host=stylegan3`."""

from pathlib import Path

import click

from m2m_stylegan import host_patch_files
from m2m_stylegan.errors import UserError

PATCHES = Path(__file__).resolve().parents[1] / 'patches'


@click.command()
@click.option('--host', metavar='DIR', required=True, help='The checkout of stylegan2-ada-pytorch or stylegan3')
@click.option('--check', 'action', flag_value='check', help='Only say whether the patch fits, or is there already')
@click.option('--revert', 'action', flag_value='revert', help='Take the patch out again')
@click.option('--patches', metavar='DIR', default=PATCHES, help='Patch files and their `series`  [default: those of this repository]')
def main(host, action, patches):
    """Patch the scripts of an official checkout so that they run under this plugin by themselves.

    Each gets one line, a call of m2m_stylegan.host, which must be importable (pip install). Files that are not exactly the known ones are left
    alone, all of them; Windows line ends are kept.
    """
    try:
        name, states = host_patch_files.choose(patches, host)
        if action != 'check':
            change = host_patch_files.revert if action == 'revert' else host_patch_files.apply
            change(host, states)
            states = host_patch_files.choose(patches, host)[1]
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err
    click.echo('\n'.join([f'{name}:', *(f'  {insertion.path}: {state}' for insertion, state in states.items())]))


if __name__ == '__main__':
    main()
