"""Build the report of a comparison again: `python tools/report.py runs/compare`."""

from pathlib import Path

import click

from m2m_stylegan.errors import UserError


@click.command()
@click.argument('folder', type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folder):
    """Write FOLDER/report.html from what tools/compare.py has left in FOLDER, finished or not: one file that opens without a network."""
    from m2m_stylegan import report  # here, so that --help does not wait for PyTorch

    try:
        path = report.build(folder)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err
    click.echo(f'Wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)')


if __name__ == '__main__':
    main()
