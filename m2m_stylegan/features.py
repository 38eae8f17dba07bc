"""Cached features: one directory of safetensors shards, plus `cache.json`, which says what they were made from.

The cache knows no network: `write` takes a function that computes items, readers get plain tensors. Shards appear under
their name only when whole, so an interrupted `write` goes on where it stopped; `cache.json` comes last and marks the cache
as complete.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from m2m_stylegan import feature_files as files
from m2m_stylegan import locks
from m2m_stylegan.errors import UserError
from m2m_stylegan.feature_files import Batch, Fingerprint, Layout, TensorSpec

SHARD_BYTES = 256 << 20  # a kill loses at most this much work per process; writing takes twice as much memory


def estimate_nbytes(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], num_items: int) -> int:
    """Bytes that `num_items` items take, in memory or on disk; shapes are those of one item (without the item axis)."""
    return num_items * sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())


def items_for_budget(bytes_per_item: int, budget_bytes: int) -> int:
    """How many items fit into the budget, possibly 0."""
    return max(budget_bytes // bytes_per_item, 0)


def write(
    cache_dir: str | os.PathLike,
    fingerprint: Fingerprint,
    num_items: int,
    make_batch: Callable[[int, int], Batch],
    *,
    batch_size: int,
    shard_items: int | None = None,
    rank: int = 0,
    num_replicas: int = 1,
    progress: Callable[[int], object] | None = None,
) -> 'FeatureCache':
    """Compute and store items [0, num_items); returns the complete cache, opened on the CPU.

    * `make_batch(start, stop)` returns {name: tensor [stop - start, ...]} for those items, on any device, with the same names,
      shapes and dtypes in every call. It must be a pure function: shards found whole are kept, only the others are computed.
    * `shard_items`: items per shard; default: the power of two that keeps a shard within SHARD_BYTES.
    * `rank` i of `num_replicas` begins with the shards i, i + num_replicas, ..., then helps with those that others have not
      reached, last ones first: no rank waits at a barrier, each returns a complete cache, and a lost rank costs only time.
      Several runs may fill one directory at the same time; a shard is locked while it is computed.
    * `progress(n)` is called when n more items are done.

    Raises UserError for a directory with other contents, a cache of another fingerprint or size, features that overflow their
    dtype, and a disk that is full or not writable.
    """
    cache_dir = Path(cache_dir)
    files.check_fingerprint(fingerprint)
    if num_items < 1:
        raise UserError(f'expected at least 1 item to cache, found {num_items}')
    with files.disk_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    layout = _plan(cache_dir, fingerprint, num_items, make_batch, batch_size, shard_items)
    _check_before_work(cache_dir, layout)

    mine = range(rank, layout.num_shards, num_replicas)
    others = [k for k in reversed(range(layout.num_shards)) if k not in mine]
    digests = {}
    for k in [*mine, *others]:
        with locks.exclusive(cache_dir / '.lock', byte=k):
            try:
                _, digests[k] = files.read_shard(cache_dir, layout, k, verify=True)
                if progress is not None:
                    progress(len(layout.items_of(k)))
            except files.BadShard:
                tensors = _compute_shard(layout, k, make_batch, batch_size, progress)
                digests[k] = files.write_shard(cache_dir, layout, k, tensors)
    with locks.exclusive(cache_dir / '.lock', byte=layout.num_shards):
        files.write_manifest(cache_dir, layout, [digests[k] for k in range(layout.num_shards)])
    return open(cache_dir, fingerprint, verify=False)


def open(
    cache_dir: str | os.PathLike, fingerprint: Fingerprint, *, device: str | torch.device = 'cpu', verify: bool = True
) -> 'FeatureCache':
    """Open a complete cache whose fingerprint equals `fingerprint`; its tensors come back on `device`.

    `verify` reads every shard once and compares checksums; names, shapes and dtypes are always compared.
    Raises UserError for a stale, incomplete or damaged cache, naming each difference or each bad shard.
    """
    cache_dir = Path(cache_dir)
    files.check_fingerprint(fingerprint)
    if not (cache_dir / files.MANIFEST).exists():
        raise files.missing(cache_dir)
    layout, digests = files.read_manifest(cache_dir)
    files.refuse_stale(cache_dir, {'fingerprint': layout.fingerprint}, {'fingerprint': fingerprint})
    files.refuse_foreign_files(cache_dir, layout)
    shards, problems = [], []
    for k in range(layout.num_shards):
        try:
            tensors, digest = files.read_shard(cache_dir, layout, k, verify=verify)
            if digest != digests[k]:
                raise files.BadShard(f'has the checksum {digest}, expected {digests[k]}')
            shards.append(tensors)
        except files.BadShard as err:
            problems.append(f'{files.shard_path(cache_dir, k).name} {err}')
    if problems:
        raise UserError(files.listing(f'{cache_dir} is damaged:', problems))
    return FeatureCache(layout, shards, torch.device(device))


class _Features:
    def __init__(self, specs: dict[str, TensorSpec], num_items: int, device: torch.device):
        self.specs = specs
        self.device = device
        self._num_items = num_items

    def __len__(self) -> int:
        return self._num_items

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self.specs)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, without the item axis."""
        return {name: spec.shape for name, spec in self.specs.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each tensor."""
        return {name: spec.dtype for name, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return estimate_nbytes(self.shapes, self.dtypes, len(self))


class FeatureCache(_Features):
    """A complete cache on disk, memory-mapped: only the items asked for are read. Made by `open` and `write`."""

    def __init__(self, layout: Layout, shards: list[Batch], device: torch.device):
        super().__init__(layout.specs, layout.num_items, device)
        self.fingerprint = layout.fingerprint
        self._shard_items = layout.shard_items
        self._shards = shards

    def gather(self, indices: torch.Tensor) -> Batch:
        """Items by number: int64 [n] -> {name: tensor [n, ...] on `self.device`}. IndexError outside [0, len)."""
        indices = indices.cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f'expected indices in [0, {len(self)}), found {int(indices.min())} to {int(indices.max())}')
        shard_of, row_of = indices // self._shard_items, indices % self._shard_items
        out = _empty(self.specs, len(indices), 'cpu')
        for k in shard_of.unique().tolist():
            where = (shard_of == k).nonzero().squeeze(1)
            for name, x in out.items():
                x[where] = self._shards[k][name][row_of[where]]
        return {name: x.to(self.device) for name, x in out.items()}

    def fits(self, device: str | torch.device, reserve_bytes: int = 0) -> bool:
        """Would `resident(device)` leave `reserve_bytes` free? Only CUDA devices are asked; others count as large enough."""
        device = torch.device(device)
        return device.type != 'cuda' or self.nbytes + reserve_bytes <= torch.cuda.mem_get_info(device)[0]

    def resident(self, device: str | torch.device) -> 'ResidentFeatures':
        """A copy of all items in the memory of `device`. UserError if it does not fit."""
        if not self.fits(device):
            raise UserError(
                f'the feature cache takes {self.nbytes / 2**30:.2f} GiB, which {device} has not free. '
                f'Cache fewer items, or leave the cache on disk.'
            )
        tensors = _empty(self.specs, len(self), device)
        for k, shard in enumerate(self._shards):
            for name, x in shard.items():
                tensors[name][k * self._shard_items :][: len(x)] = x
        return ResidentFeatures(self.specs, len(self), torch.device(device), tensors)


class ResidentFeatures(_Features):
    """Features in the memory of one device, as `tensors` {name: [len, ...]}. Made by `FeatureCache.resident`."""

    def __init__(self, specs: dict[str, TensorSpec], num_items: int, device: torch.device, tensors: Batch):
        super().__init__(specs, num_items, device)
        self.tensors = tensors

    def gather(self, indices: torch.Tensor) -> Batch:
        """Items by number: int64 [n] -> {name: tensor [n, ...]}. Indices on the same device cost no synchronisation."""
        indices = indices.to(self.device)
        return {name: x.index_select(0, indices) for name, x in self.tensors.items()}

    def replace(self, indices: torch.Tensor, tensors: Batch) -> None:
        """Overwrite items in memory, never on disk: `indices` int64 [n], distinct; `tensors` {name: tensor [n, ...]}."""
        found = files.specs_of(tensors, len(indices))
        if found != self.specs:
            raise ValueError(f'expected new items {self.specs}, found {found}')
        for name, x in tensors.items():
            self.tensors[name].index_copy_(0, indices.to(self.device, non_blocking=True), x.detach().to(self.device, non_blocking=True))


def _plan(cache_dir, fingerprint, num_items, make_batch, batch_size, shard_items) -> Layout:
    if (cache_dir / files.MANIFEST).exists():
        found, _ = files.read_manifest(cache_dir)
        layout = Layout(fingerprint, num_items, shard_items or found.shard_items, found.specs)
        files.refuse_stale(cache_dir, found.identity, layout.identity)
        return layout
    num_probed = min(batch_size, num_items)
    specs = files.specs_of(make_batch(0, num_probed), num_probed)
    return Layout(fingerprint, num_items, shard_items or _default_shard_items(specs), specs)


def _default_shard_items(specs: dict[str, TensorSpec]) -> int:
    # Independent of the batch size, so that a resumed run may change it; a power of two, so that usual batch sizes divide it.
    bytes_per_item = max(_nbytes(specs, 1), 1)
    return 1 << (max(items_for_budget(bytes_per_item, SHARD_BYTES), 1).bit_length() - 1)


def _check_before_work(cache_dir: Path, layout: Layout) -> None:
    num_missing = 0
    for k in range(layout.num_shards):
        try:
            files.read_shard(cache_dir, layout, k, verify=False)
        except files.BadShard:
            num_missing += len(layout.items_of(k))
    files.refuse_foreign_files(cache_dir, layout)
    files.refuse_full_disk(cache_dir, _nbytes(layout.specs, num_missing))


def _compute_shard(layout: Layout, shard: int, make_batch, batch_size: int, progress) -> Batch:
    items = layout.items_of(shard)
    tensors = _empty(layout.specs, len(items), 'cpu')
    for start in range(items.start, items.stop, batch_size):
        stop = min(start + batch_size, items.stop)
        batch = make_batch(start, stop)
        specs = files.specs_of(batch, stop - start)
        if specs != layout.specs:
            raise ValueError(f'make_batch({start}, {stop}) returned {specs}, expected {layout.specs}')
        for name, x in batch.items():
            tensors[name][start - items.start : stop - items.start] = x.detach()
        if progress is not None:
            progress(stop - start)
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise UserError(
                f'{name} has infinite or NaN values among the items {items.start} to {items.stop - 1}: '
                f'either the network produces them, or they do not fit into {x.dtype}; try float32'
            )
    return tensors


def _empty(specs: dict[str, TensorSpec], num_items: int, device) -> Batch:
    return {name: torch.empty([num_items, *spec.shape], dtype=spec.dtype, device=device) for name, spec in specs.items()}


def _nbytes(specs: dict[str, TensorSpec], num_items: int) -> int:
    return estimate_nbytes({n: s.shape for n, s in specs.items()}, {n: s.dtype for n, s in specs.items()}, num_items)
