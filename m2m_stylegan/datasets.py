"""Training images: the official folder/zip format checked up front, the official order of images, and the snapshot grid."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data

from m2m_stylegan.dataset_checks import check_dataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.image_files import ImageFiles, ImageReadError, printable, problem_list


class ImageDataset(torch.utils.data.Dataset):
    """Square uint8 images of one size, with optional labels, under the official attribute names.

    path          folder (recursive) or .zip; images are all files with an image extension, sorted by relative path.
    resolution    expected pixels per side, or None for whatever is found.
    use_labels    read `labels` of dataset.json, per image an int (one-hot of size largest + 1) or a list of floats.
    max_size      keep this many images, drawn with `random_seed` and then sorted.
    xflip         append the mirrored images, so that `len` doubles.

    Item: (uint8 [C, H, W], float32 label [label_dim]), label_dim 0 without labels. Can be pickled and used after a fork.
    The header of every image is read here, so that a wrong set fails now: UserError lists all that is wrong. Damaged pixel
    data is found when it is decoded; `verify` decodes everything.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resolution: int | None = None,
        use_labels: bool = False,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
    ):
        self.path = os.fspath(path)
        self.name = os.path.splitext(os.path.basename(os.path.abspath(self.path)))[0]
        self._files = ImageFiles(path)
        self._names = self._files.image_names
        self._pixels: np.ndarray | None = None
        if max_size is not None and max_size < 1:
            raise UserError(f'max_size={max_size}: expected at least one image')
        # labels: int64 [n_files] class ids, float32 [n_files, label_dim], or None
        self.image_shape, self._labels = check_dataset(self._files, resolution, use_labels)  # [CHW]

        self._raw_idx = np.arange(len(self._names))
        if max_size is not None and max_size < len(self._names):
            np.random.RandomState(random_seed).shuffle(self._raw_idx)
            self._raw_idx = np.sort(self._raw_idx[:max_size])
        self._num_distinct = len(self._raw_idx)
        if xflip:
            self._raw_idx = np.tile(self._raw_idx, 2)

    def __len__(self) -> int:
        return len(self._raw_idx)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        raw = self._raw_idx[idx]
        img = self._decode(raw) if self._pixels is None else self._pixels[idx % self._num_distinct]  # [CHW]
        return (img[:, :, ::-1] if self.xflip(idx) else img).copy(), self.get_label(idx)

    def raw_idx(self, idx: int) -> int:
        """Position of item `idx` in the sorted list of files."""
        return int(self._raw_idx[idx])

    def xflip(self, idx: int) -> bool:
        """Is item `idx` a mirrored one?"""
        return idx % len(self) >= self._num_distinct

    def get_labels(self, indices: Iterable[int]) -> np.ndarray:
        """The labels of several items, at least one: float32 [N, label_dim]."""
        return np.stack([self.get_label(idx) for idx in indices])

    def get_label(self, idx: int) -> np.ndarray:
        """Label of item `idx`, float32 [label_dim]; one-hot for class labels."""
        if self._labels is None:
            return np.zeros([0], dtype=np.float32)
        label = self._labels[self._raw_idx[idx]]
        if self._labels.ndim == 2:
            return label.copy()
        onehot = np.zeros(self.label_shape, dtype=np.float32)
        onehot[label] = 1
        return onehot

    @functools.cached_property
    def label_shape(self) -> list[int]:
        """[label_dim]; classes are counted over all files, whatever max_size keeps."""
        if self._labels is None:
            return [0]
        return [int(self._labels.max()) + 1] if self._labels.ndim == 1 else [self._labels.shape[1]]

    @property
    def label_dim(self) -> int:
        return self.label_shape[0]

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def num_channels(self) -> int:
        return self.image_shape[0]

    @property
    def resolution(self) -> int:
        return self.image_shape[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes, CRC-32s and labels of the images in use, in order; mirroring is left out.

        A folder and a zip of the same files have the same fingerprint. Free for a zip; a folder is read once.
        """
        digest = hashlib.sha256()
        for idx in range(self._num_distinct):
            name = self._names[self._raw_idx[idx]]
            entry = [name, self._files.size(name), self._files.crc32(name), self.get_label(idx).tolist()]
            digest.update(json.dumps(entry).encode() + b'\n')
        return digest.hexdigest()

    def decode_all(self, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> np.ndarray:
        """The images in use (after max_size, before mirroring) as one uint8 array [n, C, H, W].

        `progress` wraps the loop, e.g. tqdm.tqdm. Raises one UserError that names every damaged file.
        """
        pixels = np.empty([self._num_distinct, *self.image_shape], dtype=np.uint8)
        self._decode_each(pixels.__setitem__, progress)
        return pixels

    def verify(self, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> None:
        """Decode all images in use and keep none. Raises one UserError that names every damaged file."""
        self._decode_each(lambda i, img: None, progress)

    def in_memory(self, max_bytes: int = 1 << 30, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> bool:
        """Decode everything once if it fits into `max_bytes`, so that items cost a copy. Returns whether it is in memory now.

        Forked workers share the array; spawned ones get a copy each. Raises UserError like `decode_all`.
        """
        if self._pixels is None and self._num_distinct * int(np.prod(self.image_shape)) <= max_bytes:
            self._pixels = self.decode_all(progress)
        return self._pixels is not None

    def close(self) -> None:
        """Close the zip handle; reading an item opens it again."""
        self._files.close()

    def _decode(self, raw: int) -> np.ndarray:
        name = self._names[raw]
        img = self._files.image(name)
        pixels = np.asarray(img)  # [HW] or [HWC]
        pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # [CHW]
        if [*pixels.shape] != self.image_shape:
            reason = f'decodes to shape {[*pixels.shape]}, its header said {self.image_shape}'
            raise ImageReadError(f'image {printable(name)} in {self.path} {reason}', reason)
        return pixels

    def _decode_each(self, keep: Callable[[int, np.ndarray], Any], progress: Callable[[Iterable[int]], Iterable[int]]) -> None:
        damaged = []
        for i in progress(range(self._num_distinct)):
            try:
                keep(i, self._decode(self._raw_idx[i]))
            except ImageReadError as err:
                damaged.append(f'{self._names[self._raw_idx[i]]} ({err.reason})')
        if damaged:
            listed = problem_list({'images cannot be read': damaged}, self._num_distinct)
            raise UserError(f'{self.path} holds damaged images; replace or remove them:\n{listed}')


class InfiniteSampler(torch.utils.data.Sampler):
    """The official endless order of items: shuffled once; every visited item is swapped with a random one visited before.

    n             number of items, at least 1.
    rank          this process yields every `num_replicas`-th index of the common order, starting with the `rank`-th.
    window_size   how far back a swap reaches, as a fraction of n.
    start_idx     positions of the common order (all ranks together) to skip: after k images, resume with start_idx=k.
    """

    def __init__(
        self,
        n: int,
        *,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_size: float = 0.5,
        start_idx: int = 0,
    ):
        if n < 1 or not 0 <= rank < num_replicas or not 0 <= window_size <= 1 or start_idx < 0:
            expected = 'n >= 1, 0 <= rank < num_replicas, 0 <= window_size <= 1, start_idx >= 0'
            raise ValueError(f'expected {expected}, got {n=}, {rank=}, {num_replicas=}, {window_size=}, {start_idx=}')
        self.n, self.rank, self.num_replicas = n, rank, num_replicas
        self.shuffle, self.seed, self.window_size, self.start_idx = shuffle, seed, window_size, start_idx

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.n)
        rnd = np.random.RandomState(self.seed)
        if self.shuffle:
            rnd.shuffle(order)
        order = order.tolist()
        window = int(np.rint(self.n * self.window_size)) if self.shuffle else 0
        idx = 0
        while True:
            # One call for many draws gives the same numbers as many calls and keeps a fast-forward cheap.
            steps_back = rnd.randint(window, size=1 << 14).tolist() if window >= 2 else [0] * (1 << 14)
            for step_back in steps_back:
                i = idx % self.n
                if idx >= self.start_idx and idx % self.num_replicas == self.rank:
                    yield order[i]
                j = (i - step_back) % self.n
                order[i], order[j] = order[j], order[i]
                idx += 1


def snapshot_grid(dataset: ImageDataset) -> tuple[tuple[int, int], list[int]]:
    """The official choice for reals.png: ((columns, rows), item indices row by row).

    Without labels: all items shuffled. With labels: one class per row, cyclic, each row showing further items of its class.
    """
    _, height, width = dataset.image_shape
    columns = int(np.clip(7680 // width, 7, 32))
    rows = int(np.clip(4320 // height, 4, 32))
    rnd = np.random.RandomState(0)
    if not dataset.has_labels:
        indices = list(range(len(dataset)))
        rnd.shuffle(indices)
        return (columns, rows), [indices[i % len(indices)] for i in range(columns * rows)]

    groups: dict[tuple[float, ...], list[int]] = {}
    for idx in range(len(dataset)):
        label = tuple(dataset.get_label(idx)[::-1].tolist())  # reversed, one-hot vectors sort by class
        groups.setdefault(label, []).append(idx)
    classes = [groups[label] for label in sorted(groups)]
    for members in classes:
        rnd.shuffle(members)
    grid = []
    for row in range(rows):
        members = classes[row % len(classes)]
        offset = row // len(classes) * columns
        grid += [members[(offset + column) % len(members)] for column in range(columns)]
    return (columns, rows), grid
