"""The files of a feature cache: `features-00000.safetensors`, ... and `cache.json` (see features.py).

Each shard carries, in its safetensors metadata, the identity of the cache and the checksum of its tensors, so that it can be
judged alone.
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write

Fingerprint = dict[str, str | int | float | bool | None]
Batch = dict[str, torch.Tensor]

FORMAT_VERSION = 1
MANIFEST = 'cache.json'
DTYPES = {str(t).removeprefix('torch.'): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64)}
_METADATA_KEY = 'm2m_stylegan'
_WAY_OUT = 'Delete the directory to compute the features anew, or pass another --cache-dir.'
# What json and safetensors raise on bytes that are not ours, and what looking for our keys in foreign JSON raises.
GARBAGE = (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


class BadShard(Exception):
    """A shard is missing or damaged; the text continues a sentence that starts with its name."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape (without the item axis) and dtype of one cached tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """What a cache holds and how it is cut into shards."""

    fingerprint: Fingerprint
    num_items: int
    shard_items: int
    specs: dict[str, TensorSpec]

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_items / self.shard_items)

    def items_of(self, shard: int) -> range:
        return range(shard * self.shard_items, min((shard + 1) * self.shard_items, self.num_items))

    @property
    def identity(self) -> dict:
        sizes = {'num_items': self.num_items, 'shard_items': self.shard_items}
        return {'format_version': FORMAT_VERSION, **sizes, 'fingerprint': self.fingerprint}


def shard_path(cache_dir: Path, shard: int) -> Path:
    """File of one shard."""
    return cache_dir / f'features-{shard:05d}.safetensors'


def specs_of(batch: Batch, num_items: int) -> dict[str, TensorSpec]:
    """Specs of {name: tensor [num_items, ...]}. ValueError for unusable names, dtypes or item counts."""
    _check_names(batch)
    for name, x in batch.items():
        if x.ndim < 1 or len(x) != num_items or x.dtype not in DTYPES.values():
            raise ValueError(f'holds {name} {list(x.shape)} {x.dtype}, expected [{num_items}, ...] of {", ".join(DTYPES)}')
    return {name: TensorSpec(tuple(x.shape[1:]), x.dtype) for name, x in batch.items()}


def write_shard(cache_dir: Path, layout: Layout, shard: int, tensors: Batch) -> str:
    """Write one shard; returns its checksum. The caller holds its lock."""
    digest = digest_of(tensors)
    metadata = json.dumps({**layout.identity, 'shard': shard, 'sha256': digest})
    _store(shard_path(cache_dir, shard), safetensors.torch.save(tensors, metadata={_METADATA_KEY: metadata}))
    return digest


def read_shard(cache_dir: Path, layout: Layout, shard: int, *, verify: bool) -> tuple[Batch, str]:
    """Memory-mapped tensors and recorded checksum of one shard.

    Raises BadShard if it is missing or damaged, UserError if it belongs to another cache.
    """
    try:
        with safe_open(shard_path(cache_dir, shard), 'pt') as f:
            metadata = json.loads(f.metadata()[_METADATA_KEY])
            digest = metadata.pop('sha256')
            metadata['fingerprint'].keys()
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    except FileNotFoundError as err:
        raise BadShard('is missing') from err
    except GARBAGE as err:
        raise BadShard(f'is not readable: {err}') from err
    refuse_stale(cache_dir, metadata, {**layout.identity, 'shard': shard})
    try:
        specs = specs_of(tensors, len(layout.items_of(shard)))
    except ValueError as err:
        raise BadShard(str(err)) from err
    if specs != layout.specs:
        raise BadShard(f'holds {specs}, expected {layout.specs}')
    if verify and digest_of(tensors) != digest:
        raise BadShard('does not match its checksum')
    return tensors, digest


def pack(tensors: Batch, **metadata) -> bytes:
    """One safetensors file with our metadata, to which the checksum of the tensors is added as `sha256`."""
    return safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps({**metadata, 'sha256': digest_of(tensors)})})


def unpack(path: Path) -> tuple[dict, Batch]:
    """Metadata and tensors, copied into memory, of a file made by `pack`; the checksum is not compared. Raises one of GARBAGE if it is not ours."""
    with safe_open(path, 'pt') as f:
        metadata = json.loads(f.metadata()[_METADATA_KEY])
        return metadata, {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 (safe_open is no dict)


def write_manifest(cache_dir: Path, layout: Layout, digests: list[str]) -> None:
    """Write `cache.json`, which marks the cache as complete. The caller holds its lock."""
    shards = [{'num_items': len(layout.items_of(k)), 'sha256': digest} for k, digest in enumerate(digests)]
    tensors = {name: {'shape': list(s.shape), 'dtype': _dtype_name(s.dtype)} for name, s in layout.specs.items()}
    manifest = {'format': 'm2m_stylegan features', **layout.identity, 'tensors': tensors, 'shards': shards}
    _store(cache_dir / MANIFEST, json.dumps(manifest, indent=2).encode())


def read_manifest(cache_dir: Path) -> tuple[Layout, list[str]]:
    """Layout of a complete cache and the checksum of each shard. UserError if damaged or not ours."""
    path = cache_dir / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest['format_version'] != FORMAT_VERSION:
            raise ValueError(f'format version {manifest["format_version"]}, expected {FORMAT_VERSION}')
        specs = {name: TensorSpec(tuple(t['shape']), DTYPES[t['dtype']]) for name, t in manifest['tensors'].items()}
        _check_names(specs)
        sizes = [manifest['num_items'], manifest['shard_items'], *(n for s in specs.values() for n in s.shape)]
        if not all(type(n) is int and n >= 0 for n in sizes) or min(sizes[:2]) < 1:
            raise ValueError(f'sizes {sizes}')
        check_fingerprint(manifest['fingerprint'])
        layout = Layout(manifest['fingerprint'], *sizes[:2], specs)
        expected = [len(layout.items_of(k)) for k in range(len(manifest['shards']))]
        if len(expected) != layout.num_shards or [s['num_items'] for s in manifest['shards']] != expected:
            raise ValueError(f'{len(expected)} shards do not hold {layout.num_items} items')
        return layout, [s['sha256'] for s in manifest['shards']]
    except GARBAGE as err:
        raise UserError(f'{path} is damaged, or no feature cache ({type(err).__name__}: {err}). {_WAY_OUT}') from err


def check_fingerprint(fingerprint: Fingerprint) -> None:
    """ValueError unless every value survives JSON and equals itself."""
    for key, value in fingerprint.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | bool | None) or value != value:
            raise ValueError(f'expected a fingerprint of strings, numbers, booleans and None, found {key!r}: {value!r}')


def refuse_stale(cache_dir: Path, found: dict, wanted: dict) -> None:
    """UserError that lists each difference between two identities (or fingerprints alone)."""
    found, wanted = _texts(found), _texts(wanted)
    differences = [
        f'{key}: {found.get(key, "absent")} in the cache, {wanted.get(key, "absent")} wanted'
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        raise UserError(listing(f'{cache_dir} holds features that were made from something else:', differences))


def refuse_foreign_files(cache_dir: Path, layout: Layout) -> None:
    """UserError if the directory holds anything else, e.g. because it is not meant for a cache. Hidden files do not count."""
    ours = {MANIFEST, *(shard_path(cache_dir, k).name for k in range(layout.num_shards))}
    foreign = sorted(p.name for p in cache_dir.iterdir() if p.name not in ours and not p.name.startswith('.'))
    if foreign:
        raise UserError(listing(f'{cache_dir} holds files that are not part of this feature cache:', foreign))


def refuse_full_disk(cache_dir: Path, needed_bytes: int) -> None:
    """UserError if fewer bytes are free."""
    free_bytes = shutil.disk_usage(cache_dir).free
    if needed_bytes > free_bytes:
        raise UserError(
            f'{cache_dir} needs {needed_bytes / 2**30:.2f} GiB more, but only {free_bytes / 2**30:.2f} GiB are free there. '
            f'Make room, cache fewer items, or pass another --cache-dir.'
        )


def missing(cache_dir: Path) -> UserError:
    """The error for a directory without `cache.json`."""
    return UserError(f'{cache_dir} is no complete feature cache: {MANIFEST} is missing, so it was never finished. {_WAY_OUT}')


def listing(title: str, lines: list[str], most: int = 10) -> str:
    """Message with one line per problem and the way out."""
    more = [f'... and {len(lines) - most} more'] if len(lines) > most else []
    return '\n'.join([title, *(f'  {line}' for line in lines[:most] + more), _WAY_OUT])


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing into a UserError."""
    try:
        yield
    except OSError as err:
        raise UserError(f'cannot write {path}: {err.strerror}. Make room there, or pass another --cache-dir.') from err


def _store(path: Path, data: bytes) -> None:
    with disk_errors(path):
        # The lock of `path` is held, so temporary files of this name are left over from a killed process.
        for tmp in path.parent.glob(f'.{path.stem}-*.tmp{path.suffix}'):
            tmp.unlink()
        with atomic_write(path) as tmp:
            tmp.write_bytes(data)


def digest_of(tensors: Batch) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors on the CPU, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f'{name} {_dtype_name(x.dtype)} {list(x.shape)}\n'.encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_names(names: Iterable[str]) -> None:
    bad = [n for n in names if not re.fullmatch(r'[A-Za-z][A-Za-z0-9_.]{0,63}', n)]
    if bad or not names:
        raise ValueError(f'expected tensors with names of letters, digits, _ and ., found {bad}')


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _texts(identity: dict) -> dict[str, str]:
    flat = {key: value for key, value in identity.items() if key != 'fingerprint'}
    flat |= {f'fingerprint {key}': value for key, value in identity['fingerprint'].items()}
    return {key: json.dumps(value) for key, value in flat.items()}
