"""Perceptual path length: how far images move, by LPIPS, for a small step between two latents (Karras et al., arXiv 1812.04948, 4.1)."""

import copy
import dataclasses
from collections.abc import Callable

import torch

from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.image_sources import Compute, random_labels, random_latents, seeded
from m2m_stylegan.metrics import slerp

EPSILON = 1e-4
BATCH = 2  # Pairs of one pass, officially: they share their image noise and their random numbers.
LPIPS_RESOLUTION = 256


@dataclasses.dataclass(frozen=True)
class PathLength:
    """Which paths: in z (great circles) or w (lines), from a random point of the path (`full`) or from its beginning (`end`).

    crop: compare only rows 3/8 to 7/8 and columns 2/8 to 6/8, where faces are.
    """

    space: str  # 'z' or 'w'
    sampling: str  # 'full' or 'end'
    crop: bool = False


def path_lengths(
    G: torch.nn.Module, labels: ImageDataset | None, lpips: Callable[[torch.Tensor], torch.Tensor], paths: PathLength, seed: int,
    device: torch.device,
) -> Compute:
    """Squared LPIPS distance over epsilon^2 by number: float32 [n, 1]. G is on `device`; `lpips` as in detectors.Detector."""
    G = copy.deepcopy(G)  # Its noise is overwritten.
    noise = [buffer for name, buffer in G.synthesis.named_buffers() if name.endswith('.noise_const')]

    @torch.inference_mode()
    def one_pass(number: int) -> torch.Tensor:
        with seeded(seed, number, device) as rnd:
            z = random_latents(G, rnd, 2 * BATCH, device)
            c = random_labels(labels, rnd, BATCH, device).repeat(2, 1)
            t = torch.from_numpy(rnd.rand(BATCH, 1)).float().to(device) * (paths.sampling == 'full')
            for buffer in noise:
                buffer.copy_(torch.randn_like(buffer))
        ws = _ends(G, z, c, t, paths.space)
        x = _to_compare(G.synthesis(ws, noise_mode='const', force_fp32=True), paths.crop)
        before, after = lpips(x).chunk(2)
        return (before - after).square().sum(dim=1, keepdim=True) / EPSILON ** 2

    def distances(start: int, stop: int) -> torch.Tensor:
        first = start // BATCH
        passes = [one_pass(number) for number in range(first, -(-stop // BATCH))]
        return torch.cat(passes)[start - first * BATCH: stop - first * BATCH]
    return distances


def _ends(G: torch.nn.Module, z: torch.Tensor, c: torch.Tensor, t: torch.Tensor, space: str) -> torch.Tensor:
    """ws [2 * BATCH, num_ws, w_dim] at t (first half) and at t + epsilon (second half) of the paths between the two halves of z."""
    if space == 'z':
        z0, z1 = z.chunk(2)
        return G.mapping(torch.cat([slerp(z0, z1, t), slerp(z0, z1, t + EPSILON)]), c)
    w0, w1 = G.mapping(z, c).chunk(2)  # [BATCH, num_ws, w_dim]
    t = t.unsqueeze(2)
    return torch.cat([w0 + (w1 - w0) * t, w0 + (w1 - w0) * (t + EPSILON)])


def _to_compare(img: torch.Tensor, crop: bool) -> torch.Tensor:
    """Network output [N, C, R, R] => [0, 255], not quantised, cropped and averaged down to the size that LPIPS is meant for."""
    factor, eighth = img.shape[2] // LPIPS_RESOLUTION, img.shape[2] // 8
    if crop:
        img = img[:, :, 3 * eighth: 7 * eighth, 2 * eighth: 6 * eighth]
    if factor > 1:
        img = torch.nn.functional.avg_pool2d(img, factor)
    return (img + 1) * (255 / 2)
