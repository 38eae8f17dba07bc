"""Images of a trained generator: from seeds, from projected w vectors, and with the layers of two seeds mixed.

Seeds, options and file names are those of the official generate.py and style_mixing.py: the same seed gives the same picture.
"""

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from m2m_stylegan import downloads, snapshots
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.images import to_uint8
from m2m_stylegan.networks import Generator
from m2m_stylegan.transfer_options import choose_device

Echo = Callable[[str], object]

LARGEST_SEED = 2 ** 32 - 1  # of numpy.random.RandomState
MOST_NUMBERS = 1_000_000  # in one option: 0-4000000000 is a slip, not a wish


def parse_numbers(text: str, option: str, largest: int = LARGEST_SEED) -> list[int]:
    """'0,3,5-8' => [0, 3, 5, 6, 7, 8]: numbers and ranges with both ends, in the order given.

    Raises UserError that names `option` unless all are whole numbers from 0 to `largest`.
    """
    numbers: list[int] = []
    for part in text.split(','):
        match = re.fullmatch(r'\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*', part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last <= largest or len(numbers) + last - first >= MOST_NUMBERS:
            raise UserError(f'{option}={text}: expected whole numbers from 0 to {largest} and ranges, such as 0,3,5-8; found {part.strip()!r}')
        numbers += range(first, last + 1)
    return numbers


def open_generator(network: str, device: str = 'auto') -> Generator:
    """G_ema of a pickle (path, URL, short name or `demo`) on the device 'auto', 'cpu', 'cuda' or 'cuda:N', ready to make pictures.

    Raises UserError if there is no such pickle or device, or if the images have neither 1 nor 3 channels.
    """
    chosen = choose_device(device)
    G = snapshots.load_G_ema(downloads.resolve(network))
    if G.img_channels not in (1, 3):
        raise UserError(f'{network} makes images of {G.img_channels} channels; pictures have 1 (grey) or 3 (RGB)')
    return G.to(chosen)


def device_of(net: torch.nn.Module) -> torch.device:
    """Where a network lives that lives in one place."""
    return next(net.parameters()).device


def class_label(G: Generator, class_idx: int | None, echo: Echo) -> torch.Tensor:
    """One-hot label [1, c_dim] on G's device. An unconditional network (c_dim 0) takes none and warns, as the official tool does.

    Raises UserError if a conditional network is given no class, or one that it does not have.
    """
    if G.c_dim == 0 and class_idx is not None:
        echo(f'warn: --class={class_idx} ignored when running on an unconditional network')
    elif G.c_dim > 0 and (class_idx is None or not 0 <= class_idx < G.c_dim):
        found = 'found none' if class_idx is None else f'found --class={class_idx}'
        raise UserError(f'this network is conditional: choose a class from 0 to {G.c_dim - 1} with --class; {found}')
    c = torch.zeros([1, G.c_dim], device=device_of(G))
    if G.c_dim > 0:
        c[:, class_idx] = 1
    return c


def latents(seeds: list[int], z_dim: int) -> torch.Tensor:
    """The official z of every seed: float32 [N, z_dim]. One seed, one picture, whatever the other seeds are."""
    return torch.from_numpy(np.stack([np.random.RandomState(seed).randn(z_dim) for seed in seeds])).to(torch.float32)


def check_trunc(trunc: float) -> None:
    """Raise UserError unless it is a number by which w can be multiplied."""
    if not math.isfinite(trunc):
        raise UserError(f'--trunc={trunc}: expected a number, usually from 0 to 1')


@torch.no_grad()
def map_seeds(G: Generator, seeds: list[int], c: torch.Tensor, trunc: float) -> torch.Tensor:
    """ws [N, num_ws, w_dim] of seeds with label c [1, c_dim], truncated towards w_avg: 1 is no truncation, 0 gives w_avg."""
    check_trunc(trunc)
    z = latents(seeds, G.z_dim).to(c.device)
    return G.mapping(z, c.expand(len(seeds), -1), truncation_psi=trunc)


def synthesize(G: Generator, ws: torch.Tensor, noise_mode: str, batch: int) -> Iterator[torch.Tensor]:
    """Yield one uint8 image [C, H, W] on the CPU per row of ws [N, num_ws, w_dim], computed `batch` at a time.

    fp16 blocks run in float32 on a CPU, where half precision is slow and coarse for nothing.
    """
    for part in ws.split(batch):
        with torch.no_grad():
            img = G.synthesis(part, noise_mode=noise_mode, force_fp32=part.device.type == 'cpu')
        yield from to_uint8(img).cpu()


def save_png(img: torch.Tensor, path: str | os.PathLike) -> None:
    """Write one uint8 image [C, H, W], C 1 or 3, atomically."""
    pixels = img.permute(1, 2, 0).numpy()  # [HWC]
    with atomic_write(path) as tmp:
        PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)).save(tmp)


def read_projected_w(path: str | os.PathLike, G: Generator) -> torch.Tensor:
    """ws [N, num_ws, w_dim] float32 on G's device out of the `w` of a projected_w.npz. Raises UserError if it does not fit this network."""
    expected = f'expected the projected_w.npz of tools/project.py: an array `w` of finite numbers, shape [N, {G.num_ws}, {G.w_dim}] for this network'
    try:
        with open(path, 'rb') as file:  # np.load would leave a broken zip open
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, Mapping) or 'w' not in content:
                raise ValueError('it holds no array `w`')
            ws = content['w']
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as err:
        raise UserError(f'--projected-w={path}: {err}; {expected}') from err
    if ws.ndim != 3 or ws.shape[1:] != (G.num_ws, G.w_dim) or ws.dtype.kind != 'f':
        raise UserError(f'--projected-w={path}: {expected}; found {ws.dtype} {list(ws.shape)}')
    if not np.isfinite(ws).all():
        raise UserError(f'--projected-w={path}: {expected}; found NaN or infinite values')
    return torch.from_numpy(ws).to(device_of(G), torch.float32)


def generate(
    network: str,
    outdir: str | os.PathLike,
    *,
    seeds: str | None = None,
    trunc: float = 1,
    class_idx: int | None = None,
    noise_mode: str = 'const',
    projected_w: str | os.PathLike | None = None,
    device: str = 'auto',
    batch: int = 4,
    echo: Echo = print,
) -> list[Path]:
    """Write seed0000.png ... for `seeds` ('0,3,5-8'), or proj00.png ... for every w in the npz file `projected_w`; returns the paths.

    `noise_mode`: const (as stored in the network: the same picture every time), random or none. Raises UserError.
    """
    if seeds is None and projected_w is None:
        raise UserError('--seeds is required when not using --projected-w')
    numbers = [] if seeds is None else parse_numbers(seeds, '--seeds')
    G = open_generator(network, device)
    if projected_w is None:
        c = class_label(G, class_idx, echo)
        paths = [Path(outdir) / f'seed{seed:04d}.png' for seed in numbers]
        parts = (map_seeds(G, numbers[i: i + batch], c, trunc) for i in range(0, len(numbers), batch))
    else:
        for option, value in (('--seeds', seeds), ('--class', class_idx)):
            if value is not None:
                echo(f'warn: {option} is ignored when using --projected-w')
        ws = read_projected_w(projected_w, G)
        paths = [Path(outdir) / f'proj{i:02d}.png' for i in range(len(ws))]
        parts = ws.split(batch)
    images = (img for ws in parts for img in synthesize(G, ws, noise_mode, batch))
    for path, img in zip(paths, tqdm(images, total=len(paths), unit='img', disable=None), strict=True):
        save_png(img, path)
    echo(f'Wrote {len(paths)} images to {outdir}: {", ".join(path.name for path in paths[:3])}{" ..." if len(paths) > 3 else ""}')
    return paths


def style_mixing(
    network: str,
    rows: str,
    cols: str,
    outdir: str | os.PathLike,
    *,
    styles: str | None = None,
    trunc: float = 1,
    class_idx: int | None = None,
    noise_mode: str = 'const',
    device: str = 'auto',
    batch: int = 4,
    echo: Echo = print,
) -> list[Path]:
    """Write {row}-{col}.png, the row seed's image with the layers `styles` of the column seed, {seed}-{seed}.png for every seed, and grid.png.

    `styles`: indices of ws, 0 the coarsest; None: the official 0-6, or all but the last if there are no more than 7. Raises UserError.
    """
    row_seeds, col_seeds = parse_numbers(rows, '--rows'), parse_numbers(cols, '--cols')
    G = open_generator(network, device)
    layers = parse_numbers(styles or f'0-{min(6, max(G.num_ws - 2, 0))}', '--styles', G.num_ws - 1)
    c = class_label(G, class_idx, echo)

    seeds = sorted({*row_seeds, *col_seeds})
    names = [(seed, seed) for seed in seeds] + [(row, col) for row in dict.fromkeys(row_seeds) for col in dict.fromkeys(col_seeds) if row != col]
    w = {seed: map_seeds(G, [seed], c, trunc)[0] for seed in seeds}  # each [num_ws, w_dim]
    parts = (torch.stack([_mixed(w[row], w[col], layers) for row, col in names[i: i + batch]]) for i in range(0, len(names), batch))
    images = (img for ws in parts for img in synthesize(G, ws, noise_mode, batch))
    grid = torch.zeros([len(row_seeds) + 1, len(col_seeds) + 1, G.img_channels, G.img_resolution, G.img_resolution], dtype=torch.uint8)
    for (row, col), img in zip(names, tqdm(images, total=len(names), unit='img', disable=None), strict=True):
        save_png(img, Path(outdir) / f'{row}-{col}.png')
        ys, xs = _places(row_seeds, row), _places(col_seeds, col)
        grid[np.ix_(ys, xs)] = img
        if row == col:  # The unmixed images of the row seeds begin the rows, those of the column seeds head the columns.
            grid[ys, 0] = grid[0, xs] = img
    save_png(grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), Path(outdir) / 'grid.png')  # [row, col, C, H, W] => [C, row H, col W]
    echo(f'Wrote {len(names)} images and grid.png to {outdir}')
    return [Path(outdir) / f'{row}-{col}.png' for row, col in names] + [Path(outdir) / 'grid.png']


def _places(seeds: list[int], seed: int) -> list[int]:
    """Rows, or columns, of the grid that belong to a seed; number 0 holds the unmixed images."""
    return [i for i, other in enumerate(seeds, 1) if other == seed]


def _mixed(row: torch.Tensor, col: torch.Tensor, layers: list[int]) -> torch.Tensor:
    mixed = row.clone()
    mixed[layers] = col[layers]
    return mixed

