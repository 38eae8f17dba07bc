"""The bank of cached low-res features that high-res training draws from.

An item is what a latent has become after the frozen low-res blocks: x, img, ws (style mixing applied) and its label c, noise included.
Items are made in chunks whose content depends only on the seed and the chunk's number, so the bank at any moment is known by
one integer, `next_chunk`: nothing else has to be saved to resume it exactly.
"""

from collections.abc import Callable

import torch

from m2m_stylegan import slicing
from m2m_stylegan.features import ResidentFeatures
from m2m_stylegan.phases import Batch, mix_styles

CHUNK_ITEMS = 16


@torch.no_grad()
def make_chunk(G, slice_res: int, labels: Callable[[int, int], torch.Tensor], seed: int, chunk: int, style_mixing_prob: float, dtype: torch.dtype,
               **block_kwargs) -> Batch:
    """Features of chunk number `chunk`: x [16, C(r), r, r] and img [16, img_channels, r, r] (absent in orig and resnet nets) in `dtype`, ws
    [16, num_ws, w_dim] float32, c [16, c_dim] float32.

    labels(chunk, n): label vectors [n, c_dim] on G's device. G must be in eval mode: w_avg belongs to the frozen part.
    """
    device = next(G.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(seed * 1_000_003 + chunk)
        c = labels(chunk, CHUNK_ITEMS)
        z = torch.randn([CHUNK_ITEMS, G.z_dim], device=device)
        ws = mix_styles(G, G.mapping(z, c), c, style_mixing_prob)
        x, img = slicing.g_low(G, ws, slice_res, **block_kwargs)
    batch = {'x': x.to(dtype, memory_format=torch.contiguous_format), 'ws': ws, 'c': c}
    return batch if img is None else {**batch, 'img': img.to(dtype)}


def storage_dtype(chunk: Batch) -> torch.dtype:
    """float16 if the features of this chunk leave a margin of 16 below its largest number, else float32."""
    largest = max(float(chunk[name].abs().max()) for name in ('x', 'img') if name in chunk)
    return torch.float16 if largest < 65504 / 16 else torch.float32


class Bank:
    """A ring of chunks in memory: `sample` draws items, `refresh` replaces the oldest chunk by a new one."""

    def __init__(self, features: ResidentFeatures, make: Callable[[int], Batch]):
        """features: the items of the first chunks; make(chunk): the features of any one chunk, in the same dtypes."""
        self.features, self.make = features, make
        self.next_chunk = self.num_chunks = len(features) // CHUNK_ITEMS

    def sample(self, num: int) -> Batch:
        """`num` items, drawn with replacement, in float32 on the bank's device."""
        index = torch.randint(len(self.features), [num], device=self.features.device)
        return {name: value.float() for name, value in self.features.gather(index).items()}

    def refresh(self) -> None:
        """Replace the oldest chunk, so that the high-res blocks cannot fit themselves to a fixed set of features."""
        first = (self.next_chunk % self.num_chunks) * CHUNK_ITEMS
        self.features.replace(torch.arange(first, first + CHUNK_ITEMS), self.make(self.next_chunk))
        self.next_chunk += 1

    def rewind(self, next_chunk: int) -> None:
        """Make the bank what it was, or will be, when `next_chunk` is next: resuming a run."""
        kept = self.next_chunk if next_chunk >= self.next_chunk else 0
        for chunk in range(max(next_chunk - self.num_chunks, kept), next_chunk):
            self.next_chunk = chunk
            self.refresh()
        self.next_chunk = next_chunk
