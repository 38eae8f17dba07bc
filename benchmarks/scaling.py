"""Several processes against one: `python benchmarks/scaling.py --train=full` trains twice and prints the ratio of their speeds."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]


def seconds_per_kimg(processes: int, options: list[str], folder: Path) -> float:
    """Mean over the ticks after the first, which warms up."""
    outdir = folder / str(processes)
    own = [f'--outdir={outdir}', f'--cache-dir={folder / "cache"}', f'--gpus={processes}']
    command = [sys.executable, str(ROOT / 'tools' / 'transfer.py'), *own, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stats, = outdir.glob('*/stats.jsonl')
    ticks = [json.loads(line)['Timing/sec_per_kimg']['mean'] for line in stats.read_text(encoding='utf-8').splitlines()]
    if len(ticks) < 3:
        raise click.ClickException(f'{len(ticks)} ticks are too few: give more --kimg, or a smaller --tick')
    return sum(ticks[1:]) / (len(ticks) - 1)


@click.command(context_settings={'show_default': True, 'ignore_unknown_options': True})
@click.option('--processes', type=int, default=2)
@click.option('--train', default='full')
@click.option('--kimg', type=float, default=0.64)
@click.option('--tick', type=float, default=0.16)
@click.argument('options', nargs=-1)
def main(processes, train, kimg, tick, options):
    """Train with one process and with several, the same batch in all; other OPTIONS go to tools/transfer.py.

    On a CPU set OMP_NUM_THREADS=1, or one process has all cores, too.
    """
    options = [f'--train={train}', f'--kimg={kimg}', f'--tick={tick}', *options]
    with tempfile.TemporaryDirectory() as folder:
        one, several = (seconds_per_kimg(number, options, Path(folder)) for number in (1, processes))
    click.echo(f'{" ".join(options)}\n1 process: {one:.2f} s per kimg; {processes}: {several:.2f}; ratio {one / several:.2f}')


if __name__ == '__main__':
    main()
