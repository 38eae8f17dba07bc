"""Compile, test and time the custom operators; paste the output into a bug report: `python tools/check_ops.py`."""

import sys

import click


@click.command()
def main():
    """Compile, test and time the custom operators on this machine, and print everything that a bug report needs.

    Exit status 1 if an operator gives wrong results. M2M_OPS=auto|cpu|cuda|ref chooses what is compiled.
    """
    from m2m_stylegan.errors import UserError
    from m2m_stylegan.ops import selfcheck

    for name, value in selfcheck.environment().items():
        click.echo(f'{name:<26}{value}')
    try:
        lines = [line for device in ('cpu', 'cuda') for line in selfcheck.report(device)]
    except UserError as err:
        raise click.ClickException(str(err)) from err
    click.echo('\n'.join(lines))
    sys.exit(any('relative error' in line for line in lines))


if __name__ == '__main__':
    main()
