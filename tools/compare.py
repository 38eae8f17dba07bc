"""Compare methods in the same time: `python tools/compare.py --network=ffhq256 --data=my256.zip --minutes=60 --outdir=compare`."""

import click

from m2m_stylegan.errors import UserError

# Options of tools/transfer.py that are passed on, under the same names, to every method that they apply to.
PASSED_ON = {
    'cond': bool, 'subset': int, 'mirror': bool, 'workers': int, 'slice': int, 'd-trains': str, 'bank': int, 'batch': int, 'batch-gpu': int,
    'lr': float, 'gamma': float, 'pl-weight': float, 'train-noise': bool, 'ema-rampup': float, 'split': float, 'aug': str, 'p': float,
    'target': float, 'augpipe': str, 'tick': float, 'device': str, 'fp32': bool, 'allow-tf32': bool, 'nobench': bool}


def passed_on(command):
    """Add the options of PASSED_ON to a command."""
    for name, kind in reversed(PASSED_ON.items()):
        note = ', but a resolution: w is a method' if name == 'slice' else ''
        command = click.option(f'--{name}', type=kind, help=f'As in tools/transfer.py{note}, for all methods that it applies to')(command)
    return command


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', default='demo', help='Source: path, URL, official short name, or demo')
@click.option('--data', metavar='PATH', help='Official folder or zip of images  [default: the bundled demo set]')
@click.option('--outdir', metavar='DIR', required=True, help='Folder of this comparison; an interrupted one goes on where it stopped')
@click.option('--methods', metavar='LIST', default='full,freezed10,high-res,low-res,both,swap',
              help='full, freezedN, high-res, low-res, both, w, no-bypass, swap (low-res part of the source, high-res part of the runs of full)')
@click.option('--minutes', type=float, metavar='F', default=5, help='Wall clock of each run: preparation counts, evaluation does not')
@click.option('--seeds', metavar='LIST', default='0,1,2', help='Numbers and ranges, such as 0,3,5-7')
@click.option('--evals', type=int, metavar='K', default=5, help='Evenly spaced evaluation times of each run')
@click.option('--num', type=int, metavar='N', default=1000, help='Images generated for each evaluation')
@click.option('--detector', metavar='NAME', default='efficientnet-lite0', help='efficientnet-lite0 (offline; not FID) or inception')
@click.option('--extra', metavar='NAME=GLOB', multiple=True, help='Also evaluate these snapshots, e.g. official=runs/00000-x/*.pkl; repeatable')
@click.option('--swap-with', metavar='PKL', help='swap takes its high-res part from here')
@click.option('--cache-dir', metavar='DIR', help='Share preparation between runs and with earlier ones  [default: each run pays for its own]')
@click.option('-n', '--dry-run', is_flag=True, help='Check everything, print the plan and stop')
@passed_on
def main(methods, seeds, extra, **options):
    """Train several methods from the same pickle, on the same images, for the same time, and write a report that shows them side by side.

    Each method and seed runs in a process of its own, one after the other. Kill it whenever you like: the same command goes on.
    """
    from m2m_stylegan import compare  # here, so that --help does not wait for PyTorch
    from m2m_stylegan.compare_plan import CompareOptions
    from m2m_stylegan.generate import parse_numbers

    training = {name: options.pop(name) for name in [name.replace('-', '_') for name in PASSED_ON]}
    try:
        compare.run(CompareOptions(
            methods=tuple(methods.split(',')), seeds=tuple(parse_numbers(seeds, '--seeds')), extra=extra,
            training={name: value for name, value in training.items() if value is not None}, **options), click.echo)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
