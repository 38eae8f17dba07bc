"""Several methods on the same pickle, images, seeds and wall-clock budget, evaluated by the same metrics at the same times."""

import copy
import importlib.util
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from m2m_stylegan import cells, evaluate, report, scores, slicing, snapshots
from m2m_stylegan.cells import Cell, Saved
from m2m_stylegan.compare_plan import SWAP, CompareOptions, Plan, check_restart, command_line, plan
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import sha256_of
from m2m_stylegan.run_dir import write_json
from m2m_stylegan.scores import SOURCE, Score
from m2m_stylegan.stats import format_time

RUNNER = [sys.executable, '-m', 'm2m_stylegan_tools.transfer']  # what a cell's process executes
EVAL_BATCH = 32
COST = ('img_per_s', 'peak_cpu_gb', 'peak_gpu_gb', 'preparation_s', 'disk_bytes')
Echo = Callable[[str], object]


class Judge:
    """Evaluates snapshots, each of them once however often the comparison is restarted."""

    def __init__(self, made: Plan, echo: Echo):
        self.made, self.echo = made, echo
        self.evaluator = evaluate.Evaluator(
            made.data, names=made.settings['metrics'], num=made.options.num, device=made.device, batch=EVAL_BATCH, cache_dir=made.options.cache_dir,
            show=sys.stderr.isatty())
        self.done = {score.key for score in scores.read(made.folder)}

    def floor(self) -> dict[str, float | None]:
        """The metrics between two halves of the real images."""
        return _finite(self.evaluator.floor())

    def score(self, pkl: Path, method: str, seed: int | None, slot: int | None, **facts) -> None:
        """Evaluate one pickle, keep a picture of its samples, and write the result; what is wrong with the pickle is part of the result."""
        inside = pkl.is_relative_to(self.made.folder)
        score = Score(method, seed, slot, str(pkl.relative_to(self.made.folder) if inside else pkl), {}, **facts)
        if score.key in self.done:
            return
        try:
            scores.save_samples(pkl, self.made.folder / scores.PICTURES / score.picture, self.made.device)
            score.metrics.update(_finite(self.evaluator.run(pkl)))
        except UserError as err:
            score = Score(**{**vars(score), 'error': str(err)})
        scores.add(self.made.folder, score)
        self.done.add(score.key)
        time = '' if score.elapsed_s is None else f', {format_time(score.elapsed_s)}'
        values = '  '.join(f'{name} {math.nan if value is None else value:.4g}' for name, value in score.metrics.items())
        self.echo(f'{method}{"" if seed is None else f", seed {seed}"}{time}: {score.error or values}')


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def run(options: CompareOptions, echo: Echo = print, runner: list[str] = RUNNER) -> Path | None:
    """Run what is not yet finished, evaluate what is not yet evaluated; returns the report's path (None for a dry run).

    Raises UserError for anything that the user can mend, and for failed runs once all others are done. runner: the command of tools/transfer.py.
    """
    report.check_packages()
    made = plan(options)
    if options.dry_run:
        echo(describe(made, runner))
        return None
    if runner is RUNNER and importlib.util.find_spec('m2m_stylegan_tools') is None:
        raise UserError('The package is not installed, so its tools cannot run as processes of their own: pip install -e .')
    made.folder.mkdir(parents=True, exist_ok=True)
    with cells.locked(made.folder, echo) as lock_fd:
        check_restart(made)
        failures = _run_all(made, Judge(made, echo), runner, lock_fd, echo)
        path = report.build(made.folder)
    echo(f'Report: {path}')
    if failures:
        raise UserError(f'{len(failures)} of {len(made.cells)} runs failed; the same command tries them again:\n' + '\n'.join(failures))
    return path


def _run_all(made: Plan, judge: Judge, runner: list[str], lock_fd: int, echo: Echo) -> list[str]:
    """Source, runs, controls and foreign snapshots in turn; returns what failed."""
    earlier = (scores.read_record(made.folder) or {}).get('about', {})
    about = {**made.about, 'commands': list(dict.fromkeys([*earlier.get('commands', []), command_line(made.options)])),
             'floor': earlier.get('floor') or judge.floor()}
    write_json(made.folder / scores.RECORD, {'settings': made.settings, 'about': about})
    reals = made.folder / scores.PICTURES / 'reals.png'
    if not reals.is_file():
        scores.save_reals(ImageDataset(made.data), reals)
    judge.score(made.network, SOURCE, None, 0, cur_nimg=0, elapsed_s=0.0)
    failures = []
    for cell in made.cells:
        try:
            cells.run(cell, runner, lock_fd)
            finish(cell, made, judge)
            if cell.method == 'full' and SWAP in made.options.methods and made.swap_with is None:
                swap_with_run(cell, made, judge)
        except UserError as err:
            failures.append(str(err))
            echo(str(err))
        report.build(made.folder)
    if made.swap_with is not None:
        pkl = made.folder / 'cells' / SWAP / f'{sha256_of(made.swap_with)[:12]}-slice{made.about["slice"]}.pkl'
        swap(made, made.swap_with, pkl)
        judge.score(pkl, SWAP, None, None)
    for name, path in made.extras:
        judge.score(path, name, None, None, **foreign_facts(path))
    return failures


def finish(cell: Cell, made: Plan, judge: Judge) -> None:
    """Everything about a finished run that the report needs; evaluates its snapshots and removes its feature cache, which can be large."""
    run_dir = cells.finished_run(cell)
    saved = cells.read_snapshots(run_dir)
    record = cells.read_record(cell.folder)
    if 'outcome' not in record:
        record['outcome'] = {
            'disk_bytes': cells.disk_bytes(cell.folder), **cells.performance(run_dir),
            'blocks': scores.changed_blocks(snapshots.load(made.network), snapshots.load(saved[-1].pkl))}
        write_json(cell.folder / cells.RECORD, record)
    shutil.rmtree(cell.folder / cells.CACHE, ignore_errors=True)
    cost = {name: record['outcome'][name] for name in COST}
    for slot, entry in scores.at_times(saved, cell.budget_s, made.options.evals).items():
        judge.score(entry.pkl, cell.method, cell.seed, slot, cur_nimg=entry.cur_nimg, elapsed_s=entry.elapsed_s, **cost)


def swap_with_run(cell: Cell, made: Plan, judge: Judge) -> None:
    """The layer swapping control for each evaluated snapshot of a run of `full`: what that run's time buys without any training of its own."""
    saved = cells.read_snapshots(cells.finished_run(cell))
    cost = {name: cells.read_record(cell.folder)['outcome'][name] for name in COST}
    for slot, entry in scores.at_times(saved, cell.budget_s, made.options.evals).items():
        pkl = made.folder / 'cells' / f'{SWAP}-seed{cell.seed}' / entry.pkl.name
        swap(made, entry.pkl, pkl)
        judge.score(pkl, SWAP, cell.seed, slot, cur_nimg=entry.cur_nimg, elapsed_s=entry.elapsed_s, **cost)


def swap(made: Plan, high_res: Path, dest: Path) -> None:
    """Write the pickle whose generator has the source's low-res part and the high-res part of `high_res` (layer swapping, arXiv 2010.05334)."""
    if not dest.is_file():
        source, other = snapshots.load(made.network), snapshots.load(high_res)
        G = swap_layers(source.G_ema, other.G_ema, made.about['slice'])
        snapshots.save(dest, G=G, D=other.D, G_ema=G, augment_pipe=other.augment_pipe, training_set_kwargs=other.training_set_kwargs, like=other)


@torch.no_grad()
def swap_layers(low: torch.nn.Module, high: torch.nn.Module, res: int) -> torch.nn.Module:
    """A generator with the low-res part (mapping and blocks up to res) of one and the high-res part of another. UserError if they do not fit."""
    G = copy.deepcopy(low)
    ours, theirs = G.state_dict(), high.state_dict()
    names = slicing.tensor_names(G, res, 'high-res')
    misfits = sorted(name for name in names | slicing.tensor_names(high, res, 'high-res')
                     if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape)
    if misfits:
        raise UserError(f'--swap-with: the two generators differ in the shape of {len(misfits)} tensors, such as {misfits[0]}')
    for name in names:
        ours[name].copy_(theirs[name])
    return G


def foreign_facts(path: Path) -> dict[str, float | None]:
    """What can be known about a snapshot made elsewhere: images seen from its name, time and cost from the files beside it, official or ours."""
    facts = cells.performance(path.parent)
    match = re.fullmatch(r'network-snapshot-(\d{6})\.pkl', path.name)
    known: list[Saved] = [s for s in cells.read_snapshots(path.parent) if s.pkl == path]
    if known:
        return {**facts, 'cur_nimg': known[0].cur_nimg, 'elapsed_s': known[0].elapsed_s}
    if match:
        facts['cur_nimg'] = int(match[1]) * 1000
        facts['elapsed_s'] = next((tick.get('Timing/total_sec') for tick in cells.read_stats(path.parent)
                                   if int(tick.get('Progress/kimg', -1)) == int(match[1])), None)
    return facts


def describe(made: Plan, runner: list[str]) -> str:
    """The plan for people: settings, each run with its state and command, and the time it will take."""
    lines, left = [json.dumps({**made.about, **made.settings}, indent=2)], 0.0
    for cell in made.cells:
        done = cells.finished_run(cell) is not None
        left += 0 if done else max(cell.budget_s - cells.charged_s(cell), 0)
        state = 'finished' if done else f'to resume at {format_time(cells.charged_s(cell))}' if cells.resumable_run(cell) else 'to run'
        lines.append(f'{cell.title}: {state}' + ('' if done else f'\n  {shlex.join(cells.next_command(cell, runner))}'))
    return '\n'.join([*lines, f'{format_time(left)} of training, and the evaluation of up to {len(made.cells) * made.options.evals} snapshots.',
                      'Dry run; nothing was written.'])
