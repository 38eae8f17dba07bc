"""Images by number, from a dataset or from a generator. Item i depends on i and the seed alone, whatever the batches and processes."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.images import to_uint8

GENERATOR_BATCH = 8  # Images of one pass through G. Their random numbers are drawn together, so another value gives other images.
_DECODE_THREADS = 4

Compute = Callable[[int, int], torch.Tensor]
"""(start, stop) -> what belongs to the items [start, stop), one row each. A pure function."""


def dataset_images(dataset: torch.utils.data.Dataset) -> Compute:
    """Images of an ImageDataset, or of a part of one, by number: uint8 [n, C, H, W]."""
    def images(start: int, stop: int) -> torch.Tensor:
        with concurrent.futures.ThreadPoolExecutor(_DECODE_THREADS) as pool:  # decoding works without the GIL
            return torch.from_numpy(np.stack([img for img, _label in pool.map(dataset.__getitem__, range(start, stop))]))
    return images


def generated_images(G: torch.nn.Module, labels: ImageDataset | None, seed: int, device: torch.device) -> Compute:
    """Samples of G (in eval mode, on `device`) by number: uint8 [n, C, H, W], by the official protocol.

    Fresh z for every item, random image noise, no truncation; labels of random items of the dataset `labels`, None for an unconditional
    G. Half-precision blocks run in float32 on a CPU, which has no fast half precision.
    """
    options = {'force_fp32': device.type == 'cpu'}

    @torch.inference_mode()
    def one_pass(number: int) -> torch.Tensor:
        with seeded(seed, number, device) as rnd:
            z = random_latents(G, rnd, GENERATOR_BATCH, device)
            return to_uint8(G(z, random_labels(labels, rnd, GENERATOR_BATCH, device), **options))

    def images(start: int, stop: int) -> torch.Tensor:
        first = start // GENERATOR_BATCH
        passes = [one_pass(number) for number in range(first, -(-stop // GENERATOR_BATCH))]
        return torch.cat(passes)[start - first * GENERATOR_BATCH: stop - first * GENERATOR_BATCH]
    return images


def random_latents(G: torch.nn.Module, rnd: np.random.RandomState, num: int, device: torch.device) -> torch.Tensor:
    """z [num, z_dim] float32."""
    return torch.from_numpy(rnd.randn(num, G.z_dim).astype(np.float32)).to(device)


def random_labels(labels: ImageDataset | None, rnd: np.random.RandomState, num: int, device: torch.device) -> torch.Tensor:
    """Labels [num, label_dim] float32 of random items; [num, 0] without a dataset."""
    if labels is None:
        return torch.zeros([num, 0], device=device)
    return torch.from_numpy(labels.get_labels(rnd.randint(len(labels), size=num))).to(device)


@contextlib.contextmanager
def seeded(seed: int, number: int, device: torch.device) -> Iterator[np.random.RandomState]:
    """Make torch's generators inside, and the RandomState given, a function of (seed, number); torch's state comes back afterwards."""
    words = np.random.SeedSequence([seed, number]).generate_state(3)
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        yield np.random.RandomState(words[2])
