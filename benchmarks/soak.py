"""Kill a training run with SIGKILL at random moments, resume it, and compare what comes out with the uninterrupted run, bit for bit."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]


def command(outdir: Path, options: list[str]) -> list[str]:
    """The demo run in `outdir` with a feature cache of its own; resumed if there is something to resume from."""
    runs = list(outdir.glob('*/m2m-checkpoint*.safetensors'))
    resume = ['--resume=latest'] if runs else []
    return [sys.executable, str(ROOT / 'tools' / 'transfer.py'), f'--outdir={outdir}', f'--cache-dir={outdir / ".cache"}', *options, *resume]


def stage(outdir: Path) -> str:
    """How far a run has come, by its files: where a kill hit it."""
    if not list(outdir.glob('[0-9]*')):
        return 'starting'
    if not list(outdir.glob('*/m2m-checkpoint*.safetensors')):
        return 'preparing'
    return 'writing' if list(outdir.glob('*/.*.tmp*')) else 'training'


def execute(outdir: Path, options: list[str], kill_after_s: float | None) -> bool:
    """Run until the end, or until SIGKILL to the whole process group. Returns whether it came to its end."""
    outdir.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}  # whether the package is installed or not
    with open(outdir / 'console.txt', 'ab') as log:
        process = subprocess.Popen(command(outdir, options), stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        code = process.wait(kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    if code:
        raise click.ClickException(f'{outdir}: exit status {code}; see {outdir / "console.txt"}')
    return True


def outcome(outdir: Path) -> dict[str, str]:
    """Digests of all that must be the same: pickles, pictures, every tensor of the last checkpoint, statistics; times and memory left out."""
    from safetensors.torch import load_file

    run_dir, = (path.parent for path in outdir.glob('*/before-after.png'))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in [*run_dir.glob('*.pkl'), *run_dir.glob('*.png')]}
    for name, tensor in load_file(run_dir / 'm2m-checkpoint.safetensors').items():
        if not any(word in name for word in ('elapsed_seconds', 'Timing/', 'Resources/')):
            digests[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    for line in (run_dir / 'stats.jsonl').read_text().splitlines():
        tick = {name: value for name, value in json.loads(line).items() if name.startswith(('Loss/', 'Progress/'))}
        digests[f'tick {tick["Progress/tick"]["mean"]:g}'] = json.dumps(tick, sort_keys=True)
    return digests


@click.command(context_settings={'show_default': True})
@click.option('--workdir', metavar='DIR', required=True, help='Runs are made in here; must not exist')
@click.option('--kills', type=int, default=50, help='How many times to kill')
@click.option('--kimg', type=float, default=0.96, help='Length of the run in thousand images')
@click.option('--seed', type=int, default=0, help='Of the moments')
@click.argument('options', nargs=-1)
def main(workdir, kills, kimg, seed, options):
    """Kill the demo run KILLS times. OPTIONS after -- go to tools/transfer.py, e.g. -- --train=full --gpus=2."""
    root, rnd = Path(workdir), random.Random(seed)
    bank = [] if any(option.startswith(('--train', '--bank')) for option in options) else ['--bank=256']
    options = [f'--kimg={kimg}', '--tick=0.16', '--snap=2', '--device=cpu', *bank, *options]
    start = time.monotonic()
    execute(root / 'whole', options, None)
    seconds, wanted = time.monotonic() - start, outcome(root / 'whole')
    click.echo(f'Uninterrupted: {seconds:.1f} s, {len(wanted)} things to compare')
    hits, num_runs = Counter(), 0
    while sum(hits.values()) < kills:
        outdir = root / f'killed{num_runs}'
        finished = False
        while not finished:
            last = sum(hits.values()) >= kills
            finished = execute(outdir, options, None if last else rnd.uniform(0, seconds))
            if not finished:
                hits[stage(outdir)] += 1
                click.echo(f'kill {sum(hits.values())}: {stage(outdir)}')
        found, num_runs = outcome(outdir), num_runs + 1
        different = [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        if different:
            raise click.ClickException(f'{outdir}: {len(different)} things differ from the uninterrupted run: {", ".join(sorted(different)[:10])}')
        shutil.rmtree(outdir)
    where = ', '.join(f'{name} {count}' for name, count in hits.items())
    click.echo(f'{sum(hits.values())} kills ({where}) of {num_runs} runs of {kimg:g} kimg; every run came out bit-identical to the uninterrupted '
               'one.')


if __name__ == '__main__':
    main()
