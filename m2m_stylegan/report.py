"""The report of a comparison: one HTML file that needs nothing else, made from the comparison's folder alone."""

import importlib.util
from importlib import resources
from pathlib import Path

from m2m_stylegan import report_figures
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.report_data import Comparison, best, curves, lower_is_better, median, number, plural, read, summary, time_to_quality, title
from m2m_stylegan.scores import PICTURE_GRID, PICTURES, SOURCE, Score
from m2m_stylegan.stats import format_time

FILE_NAME = 'report.html'
PICTURE_BYTES = 1_400_000  # of all pictures together, as text in the page; keeps the page under 2 MB
PICTURE_TIMES = 8  # of more evaluation times only these many are shown


def check_packages() -> None:
    """Raise UserError unless the packages that a report needs are installed."""
    missing = [name for name in ('jinja2', 'matplotlib') if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"The report needs {' and '.join(missing)}: pip install 'm2m-stylegan[report]'")


def build(folder: Path) -> Path:
    """Write {folder}/report.html from what the comparison has found so far; returns its path. Raises UserError for a folder that is not intact."""
    check_packages()
    import jinja2

    comparison = read(folder)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(resources.files('m2m_stylegan').joinpath('assets/report.html').read_text(encoding='utf-8'))
    text = template.render(
        comparison=comparison, about=comparison.about, settings=comparison.settings, budget=format_time(comparison.settings['minutes'] * 60),
        summary=summary(comparison), charts=_charts(comparison), quality=_quality(comparison), costs=_costs(comparison),
        blocks=_blocks(comparison), commands=_commands(comparison), plural=plural, grid=PICTURE_GRID, **_pictures(folder, comparison))
    with atomic_write(folder / FILE_NAME) as tmp:
        tmp.write_text(text, encoding='utf-8')
    return folder / FILE_NAME


def _charts(comparison: Comparison) -> list[dict]:
    """Per metric: its title and its two figures."""
    hours = comparison.settings['minutes'] > 180
    unit, seconds = ('hours', 3600) if hours else ('minutes', 60)
    charts = []
    for i, metric in enumerate(comparison.metrics):
        found, floor = curves(comparison, metric), comparison.about['floor'].get(metric)
        floor = floor if isinstance(floor, int | float) else None
        short, long = title(metric)
        charts.append({
            'title': f'{short}: {long}' if short != long else short, 'better': 'lower' if lower_is_better(metric) else 'higher',
            'untimed': [m for m, points in found.items() if all(p.elapsed_s is None for p in points)],
            'uncounted': [m for m, points in found.items() if all(p.kimg is None for p in points)],
            'over_time': report_figures.chart(found, lambda p: None if p.elapsed_s is None else p.elapsed_s / seconds,
                                              f'wall clock, {unit}', short, floor, f'time{i}'),
            'over_kimg': report_figures.chart(found, lambda p: p.kimg, 'thousand images seen', short, floor, f'kimg{i}')})
    return charts


def _quality(comparison: Comparison) -> list[dict]:
    """Per metric: rows of the table of best and last values and of the time to full training's best median."""
    tables = []
    for metric in comparison.metrics:
        found = curves(comparison, metric)
        target, arrivals = time_to_quality(found, metric)
        arrived, rows = {arrival.method: arrival for arrival in arrivals}, []
        for method, points in found.items():
            arrival, top = arrived.get(method), best(points, metric)
            rows.append({
                'method': method, 'seeds': '' if method == SOURCE or points[-1].slot is None else points[-1].num, 'best': str(top),
                'when': '' if top.elapsed_s is None else format_time(top.elapsed_s), 'last': str(points[-1]),
                'time': '' if arrival is None else 'not reached' if arrival.elapsed_s is None else format_time(arrival.elapsed_s),
                'ratio': '' if arrival is None or arrival.ratio is None else f'{number(arrival.ratio)} ×'})
        tables.append({'title': title(metric)[0], 'target': None if target is None else number(target.median), 'rows': rows})
    return tables


def _costs(comparison: Comparison) -> list[dict]:
    """Rows of the table of speed, memory and disk: medians over the seeds, at the end."""
    rows = []
    for method in comparison.methods:
        last = {score.seed: score for score in comparison.scores if score.method == method}.values()
        memory_gb = median(s.peak_gpu_gb for s in last) or median(s.peak_cpu_gb for s in last)
        runs = [run for run in comparison.runs if run.method == method]
        rows.append({
            'method': method, 'img_per_s': _text(median(s.img_per_s for s in last)),
            'kimg': _text(median(None if s.cur_nimg is None else s.cur_nimg / 1000 for s in last)),
            'preparation': _text(median(s.preparation_s for s in last), ' s'),
            'memory': _text(memory_gb, ' GB of GPU' if median(s.peak_gpu_gb for s in last) else ' GB'),
            'disk': _text(median(None if s.disk_bytes is None else s.disk_bytes / 2 ** 20 for s in last), ' MiB'),
            'runs': f'{sum(run.outcome is not None for run in runs)} of {len(runs)}' if runs else ''})
    return rows


def _text(value: float | None, unit: str = '') -> str:
    return '' if value is None else f'{number(value)}{unit}'


def _blocks(comparison: Comparison) -> dict:
    """The table of what training changed: one column per method, from its first finished seed."""
    columns = {}
    for run in sorted(comparison.runs, key=lambda run: run.seed):
        if run.outcome is not None:
            columns.setdefault(run.method, run.outcome['blocks'])
    methods = [method for method in comparison.methods if method in columns]
    rows: dict[str, dict[str, str]] = {}
    for method in methods:
        for block in columns[method]:
            rows.setdefault(str(block['block']), {})[method] = _state(block['changed'], block['parameters'])
    totals = {method: _share(sum(b['changed'] for b in columns[method]), sum(b['parameters'] for b in columns[method])) for method in methods}
    return {'methods': methods, 'rows': [(block, [states.get(method, '') for method in methods]) for block, states in rows.items()],
            'totals': [totals[method] for method in methods]}


def _state(changed: int, parameters: int) -> str:
    return 'frozen' if changed == 0 else 'trained' if changed == parameters else _share(changed, parameters)


def _share(part: int, whole: int) -> str:
    return f'{part / max(whole, 1):.0%}'


def _pictures(folder: Path, comparison: Comparison) -> dict:
    """Pictures of real images, the source, and at each time all methods with their first seed: {'reals', 'source', 'times'}."""
    evals, minutes = comparison.settings['evals'], comparison.settings['minutes']
    shown = sorted({round(evals * (i + 1) / min(evals, PICTURE_TIMES)) for i in range(min(evals, PICTURE_TIMES))})
    chosen: dict[tuple[str, int], Score] = {}
    for score in sorted(comparison.scores, key=lambda score: -(score.seed or 0)):  # The first seed has the last word.
        if score.method != SOURCE and score.error is None:
            chosen[score.method, _slot(score, evals, minutes * 60)] = score
    source = next((score for score in comparison.scores if score.method == SOURCE and score.error is None), None)
    names = {score.picture for (_, slot), score in chosen.items() if slot in shown} | ({source.picture} if source else set()) | {'reals.png'}
    urls = report_figures.data_urls({name: folder / PICTURES / name for name in sorted(names) if (folder / PICTURES / name).is_file()}, PICTURE_BYTES)
    times = [{'time': format_time(minutes * 60 * slot / evals), 'figures': [
        {'method': method, 'caption': _caption(chosen.get((method, slot))), 'url': urls.get(getattr(chosen.get((method, slot)), 'picture', None))}
        for method in comparison.methods]} for slot in shown]
    return {'reals': urls.get('reals.png'), 'source': urls.get(source.picture) if source else None, 'times': times}


def _slot(score: Score, evals: int, budget_s: float) -> int:
    """The evaluation time that a snapshot belongs to; for those made elsewhere the nearest, or the last if nothing is known."""
    if score.slot is not None:
        return score.slot
    return evals if score.elapsed_s is None else min(round(score.elapsed_s / budget_s * evals), evals)


def _caption(score: Score | None) -> str:
    """Time, images seen and metrics of one picture."""
    if score is None:
        return 'no snapshot at this time'
    parts = ['' if score.elapsed_s is None else format_time(score.elapsed_s)]
    parts += ['' if score.cur_nimg is None else f'{number(score.cur_nimg / 1000)} kimg']
    parts += [f'{title(name)[0]} {number(value)}' for name, value in score.metrics.items() if value is not None]
    return ', '.join(part for part in parts if part)


def _commands(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(run, its commands in order), for runs that were started."""
    runs = sorted(comparison.runs, key=lambda run: (comparison.methods.index(run.method), run.seed))
    return [(f'{run.method}, seed {run.seed}', [str(session.get('command')) for session in run.sessions]) for run in runs]
