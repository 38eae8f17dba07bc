"""The official names of metrics and what they stand for; and our names for those of the offline detector."""

import dataclasses
import re
from collections.abc import Iterable

from m2m_stylegan import detectors
from m2m_stylegan.errors import UserError
from m2m_stylegan.path_length import PathLength

NEIGHBOURS, SPLITS = 3, 10  # of precision and recall; of the Inception score


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a name stands for. Where no count is in the name (ppl2_wend, fd_effnetlite0), `num` is a default."""

    name: str
    kind: str  # 'fd' Frechet distance, 'kd' kernel distance, 'pr' precision and recall, 'is' Inception score, 'ppl' path length
    detector: str = detectors.INCEPTION
    num: int = 50000  # generated images
    max_real: int | None = None  # None: all
    as_trained: bool = False  # Are mirrored copies of the real images used if training used them?
    paths: PathLength | None = None

    @property
    def keys(self) -> list[str]:
        """Names of the numbers that it gives."""
        parts = {'pr': ['_precision', '_recall'], 'is': ['_mean', '_std']}
        return [self.name + part for part in parts.get(self.kind, [''])]

    @property
    def compares(self) -> bool:
        """Does it need real images?"""
        return self.kind in ('fd', 'kd', 'pr')

    @property
    def at_least(self) -> int:
        """The smallest number of images on each side for which it is defined."""
        return {'fd': 2, 'kd': 2, 'pr': NEIGHBOURS + 1, 'is': SPLITS, 'ppl': 1}[self.kind]

    def with_num(self, num: int) -> 'Metric':
        """The same for another number of generated images, under a name that says so: fid50k_full => fid2k_full, pr50k3 => pr1.5k3."""
        name = re.sub(r'\d+k', f'{num / 1000:.10g}k', self.name, count=1)
        return dataclasses.replace(self, name=name, num=num, max_real=num if self.max_real == self.num else self.max_real)


def _all() -> list[Metric]:
    comparing = [('fid{}k', 'fd', None), ('kid{}k', 'kd', 1_000_000), ('pr{}k3', 'pr', 200_000)]
    return [
        *(Metric(f'{name.format(n)}_full', kind, num=1000 * n, max_real=max_real) for n in (50, 5) for name, kind, max_real in comparing),
        Metric('is50k', 'is'),
        *(Metric(name.format(50), kind, max_real=50000, as_trained=True) for name, kind, _ in comparing),
        Metric('ppl2_wend', 'ppl', detectors.VGG16, paths=PathLength('w', 'end')),
        *(Metric(f'ppl_{space}{sampling}', 'ppl', detectors.VGG16, paths=PathLength(space, sampling, crop=True))
          for sampling in ('full', 'end') for space in 'zw'),
        *(Metric(f'{kind}_effnetlite0', kind, detectors.OFFLINE, num=5000) for kind in ('fd', 'kd', 'pr')),
    ]


METRICS = {metric.name: metric for metric in _all()}
OFFLINE_METRICS = ['fd_effnetlite0', 'kd_effnetlite0']


def choose(names: Iterable[str], num: int | None = None) -> list[Metric]:
    """The metrics of these names, each once, for `num` generated images. Raises UserError that lists all unknown names."""
    names = list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f'unknown metrics {", ".join(unknown)}; there are: {", ".join(METRICS)}')
    if not names:
        raise UserError(f'no metric given; there are: {", ".join(METRICS)}')
    if num is not None and num < 1:
        raise UserError(f'num={num}: expected at least one generated image')
    return [METRICS[name] if num is None else METRICS[name].with_num(num) for name in names]
