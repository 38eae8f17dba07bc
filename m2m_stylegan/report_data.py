"""What the results of a comparison say: medians over seeds, time to quality, and the summary in words. Computed from the folder alone."""

import dataclasses
import re
import statistics
from pathlib import Path

from m2m_stylegan import cells, scores
from m2m_stylegan.errors import UserError
from m2m_stylegan.scores import SOURCE, Score
from m2m_stylegan.stats import format_time

TITLES = {'fd_effnetlite0': ('FD', 'Fréchet distance of EfficientNet-Lite0 features (not FID)'),
          'kd_effnetlite0': ('KD', 'kernel distance of EfficientNet-Lite0 features (not KID)')}
HIGHER_IS_BETTER = re.compile(r'is\d|pr[\d_]')


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at one evaluation time: median, least and largest value over its seeds, and the medians of when that was."""

    slot: int | None
    elapsed_s: float | None
    kimg: float | None
    median: float
    low: float
    high: float
    num: int  # seeds

    def __str__(self) -> str:
        return number(self.median) + (f' ({number(self.low)} to {number(self.high)})' if self.num > 1 else '')


@dataclasses.dataclass(frozen=True)
class Run:
    """What cell.json says of a run. outcome: None if it has not been finished."""

    method: str
    seed: int
    sessions: list[dict]
    outcome: dict | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that a folder holds."""

    settings: dict
    about: dict
    scores: list[Score]
    runs: list[Run]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for score in self.scores for name in score.metrics))

    @property
    def methods(self) -> list[str]:
        """In the order asked for; then what else has been evaluated."""
        found = [score.method for score in self.scores if score.method != SOURCE]
        return [m for m in dict.fromkeys([*self.about['methods'], *found]) if m in {*found, *(run.method for run in self.runs)}]

    @property
    def seeds(self) -> list[int]:
        """All that have results."""
        return sorted({score.seed for score in self.scores if score.seed is not None})

    @property
    def missing(self) -> list[str]:
        """Runs that have been started, or were asked for the last time, and are not finished."""
        finished = {(run.method, run.seed) for run in self.runs if run.outcome is not None}
        wanted = [(method, seed) for method in self.about['methods'] if method != 'swap' for seed in self.about['seeds']]
        wanted += [(run.method, run.seed) for run in self.runs]
        return [f'{method}, seed {seed}' for method, seed in dict.fromkeys(wanted) if (method, seed) not in finished]


def read(folder: Path) -> Comparison:
    """Read a comparison, finished or not. Raises UserError that names the file with which something is wrong."""
    record = scores.read_record(folder)
    if record is None:
        raise UserError(f'{folder} is not a folder of tools/compare.py: it has no {scores.RECORD}.')
    _check(folder / scores.RECORD, record['settings'] | record['about'], {
        'minutes': (int, float), 'evals': int, 'num': int, 'versions': dict, 'machine': dict, 'cache': str, 'methods': list, 'seeds': list,
        'network': str, 'network_sha256': str, 'data': str, 'data_fingerprint': str, 'num_images': int, 'resolution': int, 'commands': list,
        'floor': dict})
    runs = []
    for path in sorted(folder.glob(f'cells/*/{cells.RECORD}')):
        cell = cells.read_record(path.parent)
        method, _, seed = path.parent.name.rpartition('-seed')
        if not scores.NAME.fullmatch(method) or not seed.isdecimal():
            raise UserError(f'{path.parent} is not the folder of a run; expected a name such as full-seed0')
        outcome = cell.get('outcome')
        if outcome is not None:
            _check(path, outcome, {'disk_bytes': int, 'blocks': list})
        runs.append(Run(method, int(seed), cell['sessions'], outcome))
    return Comparison(record['settings'], record['about'], scores.read(folder), runs)


def _check(path: Path, found: dict, types: dict) -> None:
    wrong = [f'{name} is {found.get(name)!r}' for name, kind in types.items() if not isinstance(found.get(name), kind)]
    if wrong:
        raise UserError(f'{path} is damaged or is from another version of tools/compare.py: {", ".join(wrong)[:400]}')


def lower_is_better(metric: str) -> bool:
    """True for distances, False for inception score, precision and recall."""
    return HIGHER_IS_BETTER.match(metric) is None


def number(value: float) -> str:
    """Three or four significant digits, without exponents for the numbers that occur here."""
    return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.4g}' if abs(value) >= 100 else f'{value:.3g}'


def curves(comparison: Comparison, metric: str) -> dict[str, list[Point]]:
    """{method: its points in order}: one per evaluation time, or one per snapshot if made elsewhere. Methods without a value are absent."""
    groups: dict[str, dict[object, list[Score]]] = {}
    for score in comparison.scores:
        if score.metrics.get(metric) is not None:
            groups.setdefault(score.method, {}).setdefault(score.pkl if score.slot is None else score.slot, []).append(score)
    found = {method: [_point(group, metric) for group in groups[method].values()] for method in [SOURCE, *comparison.methods] if method in groups}
    return {method: sorted(points, key=lambda p: (p.elapsed_s or 0, p.kimg or 0)) for method, points in found.items()}


def _point(group: list[Score], metric: str) -> Point:
    values = [score.metrics[metric] for score in group]
    return Point(group[0].slot, median(s.elapsed_s for s in group), median(None if s.cur_nimg is None else s.cur_nimg / 1000 for s in group),
                 statistics.median(values), min(values), max(values), len(values))


def median(values) -> float | None:
    """Median of those that are not None, or None."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def reaches(point: Point, target: float, metric: str) -> bool:
    """Is this median at least as good as the target?"""
    return point.median <= target if lower_is_better(metric) else point.median >= target


def best(points: list[Point], metric: str) -> Point:
    """The point with the best median; of equals the first."""
    return min(points, key=lambda p: p.median if lower_is_better(metric) else -p.median)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """When a method's median first was as good as full training's best one. elapsed_s: None if it never was, or if its times are unknown."""

    method: str
    best: Point
    elapsed_s: float | None
    ratio: float | None  # full training's time / this time


def time_to_quality(found: dict[str, list[Point]], metric: str) -> tuple[Point | None, list[Arrival]]:
    """Full training's best median, and when each method got there; (None, []) without full training, or if it never got better than the source."""
    if 'full' not in found:
        return None, []
    target = best(found['full'], metric)
    if any(reaches(point, target.median, metric) for point in found.get(SOURCE, [])):
        return None, []
    arrivals = []
    for method, points in found.items():
        if method != SOURCE:
            time = next((p.elapsed_s for p in points if reaches(p, target.median, metric) and p.elapsed_s is not None), None)
            arrivals.append(Arrival(method, best(points, metric), time, target.elapsed_s / time if time else None))
    return target, arrivals


def summary(comparison: Comparison) -> list[str]:
    """The result in sentences, from the numbers; what the numbers do not support is said, too."""
    settings, about = comparison.settings, comparison.about
    budget, device = format_time(settings['minutes'] * 60), settings['machine'].get('gpu') or f'{settings["machine"].get("cpu")}, no GPU'
    sentences = [f'{Path(about["network"]).name} ({about["resolution"]} px) was adapted to {plural(about["num_images"], "image")} in {budget} of '
                 f'wall clock per run, with {plural(len(comparison.seeds), "seed")}, on one machine ({device}).']
    for metric in comparison.metrics:
        sentences += _ranking(comparison, metric)
    if comparison.metrics:
        sentences += _times(comparison, comparison.metrics[0])
    return sentences + _caveats(comparison)


def _ranking(comparison: Comparison, metric: str) -> list[str]:
    """The order at the end, in full for the first metric; and whether chance could have made the lead of the best."""
    found, (short, _) = curves(comparison, metric), title(metric)
    last = {method: points[-1] for method, points in found.items() if method != SOURCE}
    if not last:
        return []
    order = sorted(last, key=lambda m: last[m].median if lower_is_better(metric) else -last[m].median)
    direction = 'lower' if lower_is_better(metric) else 'higher'
    if metric == comparison.metrics[0]:
        text = f'{short} at the end, best first ({direction} is better): {", ".join(f"{method} {last[method]}" for method in order)}.'
        floor = comparison.about['floor'].get(metric)
        if isinstance(floor, int | float):
            text += f' Two halves of the real images are {number(floor)} apart.'
    else:
        text = f'By {short} the order is: {", ".join(f"{method} {number(last[method].median)}" for method in order)}.'
    if SOURCE in found:
        start = found[SOURCE][0].median
        worse = [method for method in order if not reaches(last[method], start, metric)]
        text += f' The source had {number(start)}' + (f'; {", ".join(worse)} ended worse than that.' if worse else '.')
    return [text + (_lead(order, last) if len(order) > 1 else '')]


def _lead(order: list[str], last: dict[str, Point]) -> str:
    (one, first), (two, second) = ((method, last[method]) for method in order[:2])
    if min(first.num, second.num) < 2:
        return f' With one seed, the lead of {one} over {two} may be chance.'
    if first.high >= second.low and second.high >= first.low:
        return f' The seeds of {one} and {two} overlap: neither is shown to be better.'
    return f' Every seed of {one} is better than every seed of {two}.'


def _times(comparison: Comparison, metric: str) -> list[str]:
    found, (short, _) = curves(comparison, metric), title(metric)
    target, arrivals = time_to_quality(found, metric)
    if 'full' not in found:
        return ['There is no result of full training here, hence no time to its quality.']
    if target is None:
        return [f'Full training did not get better than the source in this time (best median {short} {number(best(found["full"], metric).median)}): '
                'the time to its quality has no meaning.']
    parts = []
    for arrival in arrivals:
        if arrival.method != 'full':
            reached = 'not reached' if arrival.ratio is None else f'{format_time(arrival.elapsed_s)}, {_ratio(arrival.ratio)}'
            parts.append(f'{arrival.method} {reached}')
    step = format_time(comparison.settings['minutes'] * 60 / comparison.settings['evals'])
    return [f'Full training was at its best after {format_time(target.elapsed_s)} (median {short} {number(target.median)}'
            f'{_way(comparison, found, metric, target)}). Time to that quality: {"; ".join(parts) or "no other method has results"}. '
            f'Times are known to within the {step} between evaluations.']


def _way(comparison: Comparison, found: dict[str, list[Point]], metric: str, target: Point) -> str:
    """How far full training came from the source towards the floor: ratios of times to nearly nowhere are noise."""
    floor = comparison.about['floor'].get(metric)
    if SOURCE not in found or not isinstance(floor, int | float) or found[SOURCE][0].median == floor:
        return ''
    share = (found[SOURCE][0].median - target.median) / (found[SOURCE][0].median - floor)
    return f', {share:.0%} of the way from the source to the real images' + (', so little that the times below say nothing' if share < 0.1 else '')


def _ratio(ratio: float) -> str:
    return f'{number(ratio)} times sooner' if ratio > 1.005 else 'at the same time' if ratio > 0.995 else f'{number(1 / ratio)} times later'


def _caveats(comparison: Comparison) -> list[str]:
    sentences = []
    if comparison.missing:
        sentences.append(f'Not finished, so not in the figures: {"; ".join(comparison.missing)}.')
    errors = [f'{score.method}{"" if score.seed is None else f", seed {score.seed}"} ({Path(score.pkl).name})'
              for score in comparison.scores if score.error]
    if errors:
        sentences.append(f'Could not be evaluated: {"; ".join(errors[:10])}{" and more" if len(errors) > 10 else ""}.')
    resumed = [f'{run.method}, seed {run.seed}' for run in comparison.runs if len(run.sessions) > 1]
    if resumed:
        sentences.append(f'Interrupted and resumed: {"; ".join(resumed)}; starting up again was charged to them.')
    if comparison.settings['cache'] == 'shared':
        sentences.append('The feature cache was shared (--cache-dir): preparation is charged only to the run that made it.')
    return sentences


def title(metric: str) -> tuple[str, str]:
    """Short and long name of a metric."""
    return TITLES.get(metric, (metric, metric))


def plural(num: int, noun: str) -> str:
    """'1 seed', '2 seeds'."""
    return f'{num} {noun}{"" if num == 1 else "s"}'
