"""Features of many images: streamed, put together over processes, summed in float64, and kept on disk for real images."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from m2m_stylegan import distributed
from m2m_stylegan.feature_files import digest_of
from m2m_stylegan.files import atomic_write
from m2m_stylegan.image_sources import Compute
from m2m_stylegan.metrics import check_features

_EXCHANGE_BYTES = 1 << 26  # of features in one message between processes


@dataclasses.dataclass(frozen=True)
class FeatureStats:
    """Features of a set of images: always their sums, and the features themselves if they were asked for. All on the CPU."""

    num: int
    total: torch.Tensor  # [F] float64, sum of x
    outer: torch.Tensor  # [F, F] float64, sum of x x^T
    features: torch.Tensor | None  # [num, F] float32

    @classmethod
    def of(cls, features: torch.Tensor) -> 'FeatureStats':
        """Of features [num, F]."""
        x = features.double()
        return cls(len(x), x.sum(dim=0), x.T @ x, features)

    @property
    def mean(self) -> torch.Tensor:
        """[F] float64."""
        return self.total / self.num

    @property
    def cov(self) -> torch.Tensor:
        """[F, F] float64, divided by num and not by num - 1."""
        return self.outer / self.num - self.mean.outer(self.mean)


def collect(
    what: str,
    num: int,
    compute: Compute,
    *,
    keep: bool,
    batch: int = 64,
    progress: Callable[[int], object] = lambda n: None,
) -> FeatureStats:
    """Statistics of the feature rows [num, F] that `compute` gives, the same for every batch size and number of processes up to rounding.

    keep: also the features, in order. Several processes (see `distributed`) share the work; all must call this, and all get the result.
    progress(n): n more items are done, in all processes together. Raises UserError if a feature is NaN or infinite; `what` names the images
    in it.
    """
    total = outer = features = None
    stride = batch * distributed.world_size()
    with full_precision():
        for begin in range(0, num, stride):
            start, stop = (min(begin + batch * (distributed.rank() + i), num) for i in (0, 1))
            if start < stop:
                x = compute(start, stop).to(torch.float32).cpu()
                check_features(what, x, at_least=1, first=start)
                if total is None:
                    total, outer, features = _zeros(num, x.shape[1], keep)
                total += x.double().sum(dim=0)
                outer.addmm_(x.double().T, x.double())
                if keep:
                    features[start:stop] = x
            progress(min(stride, num - begin))
    width = distributed.max_each([0 if total is None else len(total)])[0]
    if total is None:  # There were fewer batches than processes.
        total, outer, features = _zeros(num, width, keep)
    # Rows of features that a process has not computed are zeros there, so that a sum also puts these together.
    for part in [total, outer, *(features.split(max(_EXCHANGE_BYTES // (4 * width), 1)) if keep else [])]:
        distributed.sum_(part)
    return FeatureStats(num, total, outer, features)


def _zeros(num: int, width: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    total = torch.zeros([width], dtype=torch.float64)
    return total, torch.zeros([width, width], dtype=torch.float64), torch.zeros([num, width]) if keep else None


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TensorFloat-32 on a GPU, which PyTorch allows for convolutions by default: scores are compared across machines."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclasses.dataclass(frozen=True)
class StatsCache:
    """Statistics of real images on disk, one file for every key: a dict, plain enough for JSON, of all that they depend on.

    The keys `dataset` and `detector` also name the file.
    """

    cache_dir: str | os.PathLike

    def path(self, key: dict) -> Path:
        """Where the statistics are kept."""
        name = re.sub(r'[^A-Za-z0-9._-]', '_', f'{key["dataset"]}-{key["detector"].split(" ")[0]}')[:100]
        return Path(self.cache_dir) / 'metrics' / f'{name}-{hashlib.sha256(_canonical(key).encode()).hexdigest()[:16]}.safetensors'

    def read(self, key: dict, *, keep: bool) -> FeatureStats | None:
        """The statistics, or None if there are none, the features are asked for and missing, or the file is damaged."""
        try:
            with safetensors.safe_open(self.path(key), 'pt') as f:
                metadata = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, safetensors.SafetensorError):
            return None
        if (metadata.get('key'), metadata.get('sha256')) != (_canonical(key), digest_of(tensors)) or (keep and 'features' not in tensors):
            return None
        return FeatureStats(int(tensors['num']), tensors['total'], tensors['outer'], tensors.get('features'))

    def write(self, key: dict, stats: FeatureStats) -> None:
        """Keep them, atomically. A full or read-only disk is only a warning: the statistics are at hand now."""
        tensors = {'num': torch.tensor(stats.num), 'total': stats.total, 'outer': stats.outer, 'features': stats.features}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        metadata = {'key': _canonical(key), 'sha256': digest_of(tensors)}
        try:
            with atomic_write(self.path(key)) as tmp:
                safetensors.torch.save_file(tensors, tmp, metadata)
        except (OSError, safetensors.SafetensorError) as err:
            warnings.warn(f'cannot keep the statistics of the real images in {self.path(key)}: {err}. Make room there, or set M2M_CACHE_DIR.',
                          stacklevel=2)


def _canonical(key: dict) -> str:
    return json.dumps(key, sort_keys=True)
