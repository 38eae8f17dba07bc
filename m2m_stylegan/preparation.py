"""What low-res training needs before it starts: an encoder for the source network and slice, adapted to the target images, and their codes.

Everything is kept in the cache directory under names that contain a checksum of what it was made from:
  encoders/<pickle>-slice<r>-<digest>/source.safetensors             once per source network and slice, re-used for every target
  encoders/<pickle>-slice<r>-<digest>/target-<digest>.safetensors    adapted to one set of images
  features/<pickle>-slice<r>-codes-<digest>/                         the codes of that set
A killed preparation goes on where it last saved itself.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tqdm

from m2m_stylegan import autoencoder, distributed, feature_files, features, locks, module_files, slicing
from m2m_stylegan.autoencoder import Batch, Encoder
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.images import from_uint8, save_image_grid

SAVE_SECONDS = 60.0
BATCH = 8
LR = 2e-3
SOURCE_KIMG, TARGET_KIMG = 2.0, 4.0  # of 64 px networks on two CPU cores: under a minute together (docs/method.md)
QUALITY_IMAGES, PICTURE_COLUMNS = 256, 16


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that was prepared; tensors on the training device."""

    res: int
    encoder: Encoder
    codes: features.FeatureCache  # x, img (where G has them), w of each image of the set, mirrored ones included
    metric: torch.Tensor | None  # [K, K], of the channels of (x, img): autoencoder.sensitivity; None at slice w
    psnr: float           # dB, of the decoded codes against the images
    feature_error: float  # squared distance of D's high-res features, relative to their size
    seconds: float        # wall clock of what was not found in the cache


def digest(fingerprint: dict) -> str:
    """Twelve hexadecimal digits that stand for a fingerprint in file names."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def prepare(
    snapshot,
    dataset: ImageDataset,
    res: int,
    *,
    cache_dir: Path,
    device: torch.device,
    name: str = 'network',
    source_kimg: float = SOURCE_KIMG,
    target_kimg: float = TARGET_KIMG,
    max_seconds: float | None = None,
    seed: int = 0,
    picture: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Prepared:
    """Make or find the encoder, the codes and their metric for low-res training of `snapshot` (with G_ema and D) on `dataset` at slice `res`.

    max_seconds: wall clock for both trainings of the encoder together; what is found in the cache costs none. picture: where a grid of target
    images and their decoded codes goes. In a distributed session process 0 trains the encoder, all encode.
    """
    start = time.monotonic()
    G, D = (net.to(device).eval().requires_grad_(False) for net in (snapshot.G_ema, snapshot.D))

    def labels(num: int) -> torch.Tensor:
        return torch.from_numpy(dataset.get_labels(torch.randint(len(dataset), [num]).tolist())).to(device, non_blocking=True)

    slice_name = slicing.slice_name(res)
    base = {'kind': 'encoder 4', 'network_sha256': snapshot.sha256, 'slice': slice_name, 'kimg': source_kimg, 'seconds': max_seconds, 'seed': seed,
            'batch': BATCH, 'lr': LR, 'labels_sha256': labels_digest(dataset) if G.c_dim else None}
    directory = cache_dir / 'encoders' / f'{name}-slice{slice_name}-{digest(base)}'
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(seed)
        encoder = autoencoder.new_encoder(G, D, res, labels)
        share = source_kimg / max(source_kimg + target_kimg, 1e-8)

        def source_step(num: int) -> torch.Tensor:
            code, images = autoencoder.source_samples(G, num, labels(num), res)
            return autoencoder.source_loss(encoder, code, *autoencoder.inputs_of(D, images, res))

        def target_step(num: int) -> torch.Tensor:
            images = images_of(dataset, torch.randint(len(dataset), [num]), device)
            return autoencoder.target_loss(encoder, G, D, *autoencoder.inputs_of(D, images, res), images, res)

        target = {**base, 'target_kimg': target_kimg, 'data_fingerprint': dataset.fingerprint, 'num_items': len(dataset)}
        for path, fingerprint, step, kimg, part, what in [
                (directory / 'source.safetensors', base, source_step, source_kimg, share, 'Encoder: source network'),
                (directory / f'target-{digest(target)}.safetensors', target, target_step, target_kimg, 1 - share, 'Encoder: target images')]:
            seconds = None if max_seconds is None else max_seconds * part
            distributed.from_main(_fit, encoder, path, fingerprint, step, math.ceil(kimg * 1000 / BATCH), seconds, seed, what,
                                  min(BATCH, autoencoder.items_per_pass(G.img_resolution)))
            distributed.copy_from_main_([*encoder.parameters(), *encoder.buffers()])
        encoder.requires_grad_(False)

        fingerprint = {'kind': 'codes 2', **target, 'encoder': digest_of_module(encoder), 'dtype': 'float32'}
        codes_dir = cache_dir / 'features' / f'{name}-slice{slice_name}-codes-{digest(fingerprint)}'
        codes = encode(encoder, D, dataset, res, device, codes_dir, fingerprint)
        torch.manual_seed(seed)
        metric = None if res == slicing.W_SLICE else autoencoder.sensitivity(G, codes.gather(spread(len(codes))), res, device)
        psnr, feature_error = quality(G, D, codes, dataset, res, device, picture)
    seconds = time.monotonic() - start
    echo(f'Encoder at slice {slice_name}: decoded target images have {psnr:.1f} dB PSNR, relative error of D\'s features {feature_error:.3f}; '
         f'prepared in {seconds:.0f} s')
    return Prepared(res, encoder, codes, metric, psnr, feature_error, seconds)


def labels_digest(dataset: ImageDataset) -> str:
    """Checksum of all labels of a set."""
    return hashlib.sha256(dataset.get_labels(range(len(dataset))).tobytes()).hexdigest()


def digest_of_module(module: torch.nn.Module, names: frozenset[str] | None = None) -> str:
    """Checksum of a module's tensors, or of those of these names."""
    return features.files.digest_of({name: x.detach().cpu() for name, x in module.state_dict().items() if names is None or name in names})


def images_of(dataset: ImageDataset, index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Images [N, C, R, R] float32 in [-1, 1] by number."""
    return from_uint8(torch.stack([torch.as_tensor(dataset[int(i)][0]) for i in index]).to(device, non_blocking=True))


def _fit(encoder: Encoder, path: Path, fingerprint: dict, loss_of: Callable[[int], torch.Tensor], num_steps: int, max_seconds: float | None,
         seed: int, what: str, per_pass: int) -> None:
    """Train the encoder for num_steps or max_seconds, whichever ends first, unless `path` holds the result; the learning rate falls to zero
    over the second half. Saves itself every SAVE_SECONDS and goes on from there: with a limit on steps alone, to the same bits."""
    with locks.exclusive(_lock(path)):
        found = module_files.read(path, fingerprint)
        if found is not None:
            module_files.load_into(encoder, found, path)
            return
        encoder.requires_grad_(True)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=LR, betas=(0.9, 0.99), fused=True)
        partial = path.with_suffix('.partial.safetensors')
        step, before = _load_partial(partial, fingerprint, encoder, optimizer)
        start = saved = time.monotonic()
        with tqdm.tqdm(total=num_steps * BATCH, initial=step * BATCH, desc=what, unit='img', leave=False, dynamic_ncols=True) as bar:
            while step < num_steps:
                now = time.monotonic()
                elapsed = before + now - start
                if max_seconds is not None and elapsed >= max_seconds:
                    break
                done = max(step / num_steps, 0 if max_seconds is None else elapsed / max_seconds)
                optimizer.param_groups[0]['lr'] = LR * min(1.0, 2 * (1 - done))
                torch.manual_seed(seed * 1_000_003 + step)
                optimizer.zero_grad(set_to_none=True)
                for first in range(0, BATCH, per_pass):
                    num = min(per_pass, BATCH - first)
                    (loss_of(num) * (num / BATCH)).backward()
                optimizer.step()
                step += 1
                bar.update(BATCH)
                if now - saved > SAVE_SECONDS:
                    _check_finite(encoder, what)
                    _save_partial(partial, fingerprint, encoder, optimizer, step, elapsed)
                    saved = now
        encoder.requires_grad_(False)
        _check_finite(encoder, what)
        module_files.write(path, fingerprint, encoder.state_dict())
        partial.unlink(missing_ok=True)


def _check_finite(encoder: Encoder, what: str) -> None:
    """Raise UserError rather than keep an encoder that training has ruined: it would be found again by every later run."""
    if not all(bool(parameter.isfinite().all()) for parameter in encoder.parameters()):
        raise UserError(f'{what}: training it has diverged, and nothing of it was kept. Are there images, or weights of the network, that are not '
                        'finite? If not, try another --seed.')


def _lock(path: Path) -> Path:
    with feature_files.disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f'.{path.stem}.lock'


def _save_partial(path: Path, fingerprint: dict, encoder: Encoder, optimizer: torch.optim.Optimizer, step: int, elapsed: float) -> None:
    moments = {f'{key}|{i}': value for i, state in optimizer.state_dict()['state'].items() for key, value in state.items()}
    module_files.write(path, fingerprint, {**{f'encoder|{name}': t for name, t in encoder.state_dict().items()}, **moments,
                                           'progress': torch.tensor([step, elapsed], dtype=torch.float64)})


def _load_partial(path: Path, fingerprint: dict, encoder: Encoder, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    found = module_files.read(path, fingerprint)
    if found is None:
        return 0, 0.0
    module_files.load_into(encoder, {name.split('|', 1)[1]: t for name, t in found.items() if name.startswith('encoder|')}, path)
    state: dict[int, dict] = {}
    for name, tensor in found.items():
        key, _, i = name.partition('|')
        if i.isdigit():
            state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({'state': state, 'param_groups': optimizer.state_dict()['param_groups']})
    step, elapsed = found['progress'].tolist()
    return int(step), elapsed


def encode(encoder: Encoder, D, dataset: ImageDataset, res: int, device: torch.device, directory: Path, fingerprint: dict) -> features.FeatureCache:
    """The codes of all images of the set, from the cache or computed: one pass through D's high-res part and the encoder's head."""
    @torch.no_grad()
    def make(start: int, stop: int) -> Batch:
        x, img, w = encoder(*autoencoder.inputs_of(D, images_of(dataset, torch.arange(start, stop), device), res))
        return {name: value.contiguous() for name, value in [('x', x), ('img', img), ('w', w)] if value is not None}

    with tqdm.tqdm(total=len(dataset), desc='Encoding target images', unit='img', leave=False, dynamic_ncols=True,
                   disable=distributed.rank() != 0) as bar:
        return features.write(directory, fingerprint, len(dataset), make, batch_size=autoencoder.items_per_pass(dataset.resolution),
                              rank=distributed.rank(), num_replicas=distributed.world_size(), progress=bar.update)


def code_of(batch: Batch, device: torch.device) -> tuple:
    """(x, img, w) of cached codes, on `device`; None for what is not there."""
    return tuple(batch[name].to(device) if name in batch else None for name in ('x', 'img', 'w'))


def spread(num: int) -> torch.Tensor:
    """Numbers of up to QUALITY_IMAGES items, evenly spread over `num`."""
    return torch.linspace(0, num - 1, min(num, QUALITY_IMAGES)).long()


@torch.no_grad()
def quality(G, D, codes: features.FeatureCache, dataset: ImageDataset, res: int, device: torch.device, picture: Path | None) -> tuple[float, float]:
    """PSNR in dB and relative error of D's features of up to 256 decoded codes; writes a grid, images over what their codes decode to."""
    chosen = spread(len(dataset))
    squared = error = size = 0.0
    pairs = []
    for index in chosen.split(autoencoder.items_per_pass(dataset.resolution)):
        images = images_of(dataset, index, device)
        found = autoencoder.decode(G, code_of(codes.gather(index), device), res)
        h, g = (autoencoder.inputs_of(D, x, res)[0] for x in (images, found))
        squared += float((found - images).square().mean(dim=(1, 2, 3)).sum())
        error, size = error + float((h - g).square().sum()), size + float(h.square().sum())
        pairs.append(torch.stack([images, found], dim=1).cpu())
    if picture is not None:
        pairs = torch.cat(pairs)
        pairs = pairs[torch.linspace(0, len(pairs) - 1, min(len(pairs), PICTURE_COLUMNS)).long()]
        save_image_grid(pairs.transpose(0, 1).flatten(0, 1), picture, (-1, 1), (len(pairs), 2))
    return 10 * math.log10(4 / max(squared / len(chosen), 1e-12)), error / max(size, 1e-12)
