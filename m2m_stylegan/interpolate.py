"""Smooth endless loops through the pictures of several seeds."""

import itertools
import os
import re
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from m2m_stylegan import generate
from m2m_stylegan.errors import UserError
from m2m_stylegan.metrics import slerp
from m2m_stylegan.networks import Generator
from m2m_stylegan.video import check_video, write_video


def linear_loop(points: torch.Tensor, frames: int) -> torch.Tensor:
    """Closed polygon through points [..., K, D], `frames` steps per side => [..., K * frames, D]; frame k * frames is point k."""
    t = _steps(points, frames)
    sides = points.unsqueeze(-2).lerp(points.roll(-1, dims=-2).unsqueeze(-2), t)
    return sides.flatten(-3, -2)


def slerp_loop(points: torch.Tensor, frames: int) -> torch.Tensor:
    """Closed path of great circles through the directions of points [..., K, D] => unit vectors [..., K * frames, D]."""
    return slerp(points.unsqueeze(-2), points.roll(-1, dims=-2).unsqueeze(-2), _steps(points, frames)).flatten(-3, -2)


def cubic_loop(points: torch.Tensor, frames: int) -> torch.Tensor:
    """Closed Catmull-Rom spline (the speed at a point is half the way between its neighbours) through points [..., K, D]
    => [..., K * frames, D]; no kinks, unlike the polygon."""
    t = _steps(points, frames)
    before, start, end, after = (points.roll(shift, dims=-2).unsqueeze(-2) for shift in (1, 0, -1, -2))
    speed_start, speed_end = (end - before) / 2, (after - start) / 2
    curve = start * (2 * t ** 3 - 3 * t ** 2 + 1) + speed_start * (t ** 3 - 2 * t ** 2 + t)  # cubic Hermite form
    curve = curve + end * (3 * t ** 2 - 2 * t ** 3) + speed_end * (t ** 3 - t ** 2)
    return curve.flatten(-3, -2)


PATHS: dict[str, tuple[str, Callable]] = {'cubic-w': ('w', cubic_loop), 'linear-w': ('w', linear_loop), 'slerp-z': ('z', slerp_loop)}


@torch.no_grad()
def loop_w(G: Generator, seeds: list[int], c: torch.Tensor, trunc: float, path: str, frames: int) -> torch.Tensor:
    """w [len(seeds) * frames, w_dim] on G's device of a closed path through the seeds, `frames` from one to the next; path: a key of PATHS."""
    space, loop = PATHS[path]
    points = generate.latents(seeds, G.z_dim).to(c.device)
    if space == 'z':
        points = loop(points, frames)
    generate.check_trunc(trunc)
    w = G.mapping(points, c.expand(len(points), -1), truncation_psi=trunc)[:, 0]  # The same for all layers, so one is kept.
    return loop(w, frames) if space == 'w' else w


def interpolate(
    network: str,
    seeds: str,
    dest: str | os.PathLike,
    *,
    path: str = 'cubic-w',
    frames: int = 60,
    fps: float = 25,
    grid: str = '1x1',
    size: int | None = None,
    trunc: float = 1,
    class_idx: int | None = None,
    noise_mode: str = 'const',
    device: str = 'auto',
    batch: int = 4,
    echo: Callable[[str], object] = print,
) -> None:
    """Write an .mp4 or .gif that runs through the seeds and ends where it began.

    * `frames`: from one seed to the next. `path`: a key of PATHS.
    * `grid`: 'COLUMNSxROWS' loops side by side; the seeds are dealt out in order, the same number to each, at least two.
    * `size`: width and height in pixels of one picture; None: as the network makes it.

    Raises UserError, before anything is computed if possible.
    """
    check_video(dest, fps)
    numbers, (columns, rows) = generate.parse_numbers(seeds, '--seeds'), parse_grid(grid)
    each, rest = divmod(len(numbers), columns * rows)
    if each < 2 or rest:
        raise UserError(f'--seeds={seeds} gives {len(numbers)}; --grid={grid} needs a multiple of {columns * rows}, at least two for each loop')
    G = generate.open_generator(network, device)
    c = generate.class_label(G, class_idx, echo)
    loops = [loop_w(G, numbers[i: i + each], c, trunc, path, frames) for i in range(0, len(numbers), each)]
    w = torch.stack(loops, dim=1).flatten(0, 1)  # frame by frame, in it cell by cell
    parts = (part.unsqueeze(1).expand(-1, G.num_ws, -1) for part in w.split(batch))
    images = (img for ws in parts for img in generate.synthesize(G, ws, noise_mode, batch))
    pictures = tqdm(_tiles(images, columns, rows, size), total=each * frames, unit='frame', disable=None)
    write_video(dest, pictures, fps)
    echo(f'Wrote {dest}: {each * frames} frames, {each * frames / fps:.1f} s')


def parse_grid(text: str) -> tuple[int, int]:
    """'3x2' => (3, 2), columns and rows. Raises UserError."""
    match = re.fullmatch(r'([1-9][0-9]{0,2})x([1-9][0-9]{0,2})', text)
    if match is None:
        raise UserError(f'--grid={text}: expected COLUMNSxROWS, such as 3x2')
    return int(match[1]), int(match[2])


def _steps(points: torch.Tensor, frames: int) -> torch.Tensor:
    return torch.arange(frames, dtype=points.dtype, device=points.device).unsqueeze(-1) / frames  # [frames, 1], 1 itself is the next side's 0


def _tiles(images: Iterator[torch.Tensor], columns: int, rows: int, size: int | None) -> Iterator[np.ndarray]:
    """Groups of columns * rows uint8 images [C, H, W] => pictures [rows * H, columns * W, 3]."""
    while cells := [as_rgb(img, size) for img in itertools.islice(images, columns * rows)]:
        yield np.concatenate([np.concatenate(cells[y * columns: (y + 1) * columns], axis=1) for y in range(rows)], axis=0)


def as_rgb(img: torch.Tensor, size: int | None = None) -> np.ndarray:
    """uint8 image [C, H, W], C 1 or 3 => [H, W, 3], or [size, size, 3]."""
    pixels = img.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()  # [HWC]
    if size is None or size == pixels.shape[0]:
        return pixels
    return np.asarray(PIL.Image.fromarray(pixels).resize((size, size), PIL.Image.Resampling.LANCZOS))
