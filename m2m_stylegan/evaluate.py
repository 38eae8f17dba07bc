"""Scores of a generator or a folder of images against a dataset, by the official protocol."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import tqdm

from m2m_stylegan import detectors, distributed, metrics, snapshots
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.feature_stats import FeatureStats, StatsCache, collect
from m2m_stylegan.files import default_cache_dir
from m2m_stylegan.image_sources import Compute, dataset_images, generated_images
from m2m_stylegan.metric_names import METRICS, NEIGHBOURS, OFFLINE_METRICS, SPLITS, Metric, choose
from m2m_stylegan.path_length import path_lengths

__all__ = ['METRICS', 'OFFLINE_METRICS', 'Evaluator', 'Result', 'evaluate', 'values']


@dataclasses.dataclass(frozen=True)
class Result:
    """One metric of one network or folder."""

    metric: Metric
    values: dict[str, float]  # by metric.keys
    num_real: int  # 0 if the metric compares with nothing


@dataclasses.dataclass(frozen=True)
class Fakes:
    """What is scored: images, and path lengths if it is a network."""

    images: Compute
    num: int | None  # None: as many as one likes
    lengths: Callable[[Metric], Compute] | None


class Evaluator:
    """Scores networks and folders against one dataset, whose own statistics are computed once and kept in a cache on disk.

    data       official folder or zip: the real images, and the labels for conditional networks.
    names      of METRICS.
    num        generated images; None: what the name says. Scores for different `num` cannot be compared.
    device     of networks and detectors.
    batch      images per pass through a detector: speed and memory only.
    cache_dir  default: files.default_cache_dir().
    seed       of latents, labels, noise and subsets.
    mirror     did training use mirrored copies? Only for metrics without `_full`.
    detector   path of the official detector file that the metrics need; default: looked up, or downloaded.
    trust      open that file although its checksum is not the official one.
    show       progress bars.

    In a `distributed.session` all processes must make one and call the same methods: they share the work, and all get the results. Whatever
    can be wrong with the arguments raises UserError here, before any work.
    """

    def __init__(
        self,
        data: str | os.PathLike,
        names: Iterable[str] = OFFLINE_METRICS,
        num: int | None = None,
        device: str | torch.device = 'cpu',
        batch: int = 64,
        cache_dir: str | os.PathLike | None = None,
        seed: int = 0,
        *,
        mirror: bool = False,
        detector: str | os.PathLike | None = None,
        trust: bool = False,
        show: bool = False,
    ):
        self.metrics = choose(names, num)
        self.data, self.device, self.batch, self.seed, self.mirror = Path(data), torch.device(device), batch, seed, mirror
        self._show = show and distributed.rank() == 0
        self._cache = StatsCache(cache_dir or default_cache_dir())
        self._reals: dict[tuple, FeatureStats | None] = {}
        self._views = {mirrored: ImageDataset(data, xflip=mirrored) for mirrored in {self._mirrored(metric) for metric in self.metrics}}
        self._check_counts(self.metrics)
        needed = sorted({metric.detector for metric in self.metrics})
        if detector is not None and len(set(needed) - {detectors.OFFLINE}) != 1:
            raise UserError(f'detector={detector}: the metrics asked for need {" and ".join(needed)}; ask for those of this file alone')
        self._detectors = {name: detectors.load(name, path=detector, trust=trust, device=device, cache_dir=cache_dir) for name in needed}

    def run(self, network: str | os.PathLike) -> dict[str, float]:
        """Values by name (fd_effnetlite0, pr50k3_full_recall, ...) of a network pickle, or of a folder or zip of images."""
        return {key: value for result in self.score(network) for key, value in result.values.items()}

    def score(self, network: str | os.PathLike) -> list[Result]:
        """Like `run`, metric by metric. A folder with fewer images than asked for is used whole, and the names say so."""
        fakes = self._open(network)
        chosen = [metric if fakes.num is None or fakes.num >= metric.num else metric.with_num(fakes.num) for metric in self.metrics]
        self._check_counts(chosen)
        found, passes = [], {}
        for metric in chosen:
            real = self._real(metric) if metric.compares else None
            key = (metric.detector, metric.num, metric.kind == 'is', metric.paths)
            if key not in passes:
                keep = any(m.kind != 'fd' for m in chosen if m.detector == metric.detector)
                passes[key] = self._collect('generated images', metric.num, self._rows_of(metric, fakes), keep)
            numbers = distributed.from_main(values, metric, real, passes[key], self.seed, self.device)
            found.append(Result(metric, dict(zip(metric.keys, numbers, strict=True)), self._num_real(metric) if metric.compares else 0))
        return found

    def floor(self, metrics: Iterable[Metric] | None = None) -> dict[str, float]:
        """Values of the comparing metrics (default: all) between two disjoint random halves of the real images: what a perfect generator gets.

        Halves are smaller than the set, and Frechet distances grow as sets shrink, so for few images this is on the high side; near-duplicates
        among the real images pull it down.
        """
        found = {}
        for metric in self.metrics if metrics is None else metrics:
            if metric.compares:
                real = self._real(metric, keep=True)
                numbers = distributed.from_main(lambda m=metric, r=real: values(m, *halves(r, m, self.seed), self.seed, self.device))
                found |= zip(metric.keys, numbers, strict=True)
        return found

    def identity(self, metric: Metric) -> str:
        """Name and checksum of the metric's detector."""
        return self._detectors[metric.detector].identity

    def _open(self, network: str | os.PathLike) -> Fakes:
        real = next(iter(self._views.values()))
        if os.path.isdir(network) or str(network).lower().endswith('.zip'):
            fake = ImageDataset(network)
            _check_same('resolution', fake.resolution, real.resolution, network, self.data)
            order = np.random.RandomState(self.seed).permutation(len(fake))  # Folders can be sorted by class, and not all may be wanted.
            return Fakes(dataset_images(torch.utils.data.Subset(fake, order)), len(fake), None)
        G = snapshots.load_G_ema(network).to(self.device)
        _check_same('resolution', G.img_resolution, real.resolution, network, self.data)
        _check_same('number of channels', G.img_channels, real.num_channels, network, self.data)
        labels = ImageDataset(self.data, use_labels=True) if G.c_dim else None
        _check_same('number of label values', G.c_dim, labels.label_dim if labels else 0, network, self.data)

        def lengths(metric: Metric) -> Compute:
            return path_lengths(G, labels, self._detectors[metric.detector].lpips, metric.paths, self.seed, self.device)
        return Fakes(generated_images(G, labels, self.seed, self.device), None, lengths)

    def _rows_of(self, metric: Metric, fakes: Fakes) -> Compute:
        """What is collected of the generated images for a metric."""
        detector = self._detectors[metric.detector]
        if metric.kind == 'ppl':
            if fakes.lengths is None:
                raise UserError(f'{metric.name} needs a network; a folder of images has no latents')
            return fakes.lengths(metric)
        extract = detector.probabilities if metric.kind == 'is' else detector.features
        return lambda start, stop: extract(fakes.images(start, stop).to(self.device))

    def _real(self, metric: Metric, keep: bool = False) -> FeatureStats | None:
        """Statistics of the real images; None in a process other than the first if it found them in the cache."""
        num, view, detector = self._num_real(metric), self._view(metric), self._detectors[metric.detector]
        # The offline metrics get their floor printed, for which the features are needed.
        keep = keep or metric.detector == detectors.OFFLINE or any(m.kind != 'fd' for m in self.metrics if m.detector == metric.detector)
        memo = (metric.detector, self._mirrored(metric), num, keep)
        if memo not in self._reals:
            key = {'dataset': view.name, 'fingerprint': view.fingerprint, 'mirrored': self._mirrored(metric), 'num': num,
                   'detector': detector.identity}
            cached = self._cache.read(key, keep=keep) if distributed.rank() == 0 else None
            if not distributed.from_main(lambda: cached is not None):
                images = dataset_images(view)
                cached = self._collect('real images', num, lambda start, stop: detector.features(images(start, stop).to(self.device)), keep)
                if distributed.rank() == 0:
                    self._cache.write(key, cached)
            self._reals[memo] = cached
        return self._reals[memo]

    def _collect(self, what: str, num: int, compute: Compute, keep: bool) -> FeatureStats:
        with tqdm.tqdm(desc=what, total=num, unit='img', disable=not self._show, leave=False) as bar:
            return collect(what, num, compute, keep=keep, batch=self.batch, progress=bar.update)

    def _mirrored(self, metric: Metric) -> bool:
        return self.mirror and metric.as_trained

    def _view(self, metric: Metric) -> ImageDataset:
        return self._views[self._mirrored(metric)]

    def _num_real(self, metric: Metric) -> int:
        return min(len(self._view(metric)), metric.max_real or len(self._view(metric)))

    def _check_counts(self, chosen: list[Metric]) -> None:
        problems = [f'{metric.name} needs at least {metric.at_least} {what}, found {num}' for metric in chosen
                    for what, num in [('generated images', metric.num), (f'real images in {self.data}', self._num_real(metric))]
                    if num < metric.at_least and (metric.compares or what == 'generated images')]
        if problems:
            raise UserError('too few images:\n' + '\n'.join(f'  * {problem}' for problem in problems))


def values(metric: Metric, real: FeatureStats | None, fake: FeatureStats, seed: int, device: str | torch.device = 'cpu') -> list[float]:
    """The numbers of a metric in the order of metric.keys, from statistics that hold the features for all kinds but 'fd'."""
    if metric.kind == 'fd':
        return [metrics.frechet_distance(real.mean, real.cov, fake.mean, fake.cov)]
    x = fake.features.to(device)
    if metric.kind == 'kd':
        return [metrics.kernel_distance(real.features.to(device), x, seed=seed)]
    if metric.kind == 'pr':
        return list(metrics.precision_recall(real.features.to(device), x, k=NEIGHBOURS))
    return list(metrics.inception_score(x, SPLITS)) if metric.kind == 'is' else [metrics.mean_path_length(x.squeeze(1))]


def halves(real: FeatureStats, metric: Metric, seed: int) -> tuple[FeatureStats, FeatureStats]:
    """Two disjoint random parts of the real features, of equal size, at most metric.num each. Raises UserError if they are too small."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(real.num))
    size = min(real.num // 2, metric.num)
    if size < metric.at_least:
        raise UserError(f'the floor of {metric.name} needs at least {2 * metric.at_least} real images, found {real.num}')
    return tuple(FeatureStats.of(real.features[part]) for part in (order[:size], order[size: 2 * size]))


def evaluate(network: str | os.PathLike, data: str | os.PathLike, names: Iterable[str] = OFFLINE_METRICS, **options) -> dict[str, float]:
    """Values by name of a network pickle or a folder of images against a dataset; `options` as of Evaluator."""
    return Evaluator(data, names, **options).run(network)


def _check_same(what: str, found: int, expected: int, network: str | os.PathLike, data: str | os.PathLike) -> None:
    if found != expected:
        raise UserError(f'{network} and {data} differ in {what}: {found} and {expected}. Scores of these would say nothing about the network; '
                        'tools/dataset.py makes a dataset that fits.')
