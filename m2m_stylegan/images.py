"""Pixels between float images of the networks and files: the official quantisation rules and the grids of the run directory."""

import os

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from m2m_stylegan.files import atomic_write


def to_uint8(img: torch.Tensor) -> torch.Tensor:
    """Float images of any shape, nominal range [-1, 1] -> uint8 of the same shape: trunc(clamp(x * 127.5 + 128, 0, 255)).

    The rule of the official generator and metrics; scores and seeds compared across the code bases need exactly this one.
    """
    return (img * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(img: torch.Tensor) -> torch.Tensor:
    """uint8 images of any shape -> float32 in [-1, 1]: x / 127.5 - 1, as training and metrics read real images."""
    return img.to(torch.float32) / 127.5 - 1


def save_image_grid(
    images: torch.Tensor | np.ndarray, path: str | os.PathLike, drange: tuple[float, float], grid_size: tuple[int, int]
) -> None:
    """Write images [N, C, H, W], float or uint8, C 1 or 3, as one picture of (columns, rows), row by row, atomically.

    `drange` are the values shown as black and white: (-1, 1) for networks, (0, 255) for uint8 images. Official rounding:
    rint, then clip to [0, 255]. Raises ValueError if N is not columns * rows.
    """
    images = np.asarray(images.detach().cpu() if isinstance(images, torch.Tensor) else images, dtype=np.float32)
    columns, rows = grid_size
    n, channels, height, width = images.shape
    if n != columns * rows or channels not in (1, 3):
        raise ValueError(f'{columns}x{rows} tiles need {columns * rows} images of 1 or 3 channels, got shape {images.shape}')
    low, high = drange
    pixels = np.rint((images - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    pixels = pixels.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)  # [row, H, column, W, C]
    pixels = pixels.reshape(rows * height, columns * width, channels)
    with atomic_write(path) as tmp:
        PIL.Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(tmp)


def save_panels(path: str | os.PathLike, panels: list[tuple[str, torch.Tensor]], columns: int, scale_to: int = 96) -> None:
    """Write captioned blocks of images side by side as one picture, atomically.

    panels: (caption, float images [N, C, H, W], nominal range [-1, 1]), C 1 or 3. Images of under `scale_to` pixels are magnified
    by a whole factor, so that single pixels stay visible.
    """
    caption_height, gap = 20, 12
    blocks = []
    for _, images in panels:
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()  # [NHWC]
        factor = max(scale_to // pixels.shape[2], 1)
        pixels = np.broadcast_to(pixels, [*pixels.shape[:3], 3]).repeat(factor, axis=1).repeat(factor, axis=2)
        blank = np.full_like(pixels[0], 255)
        cells = [*pixels, *[blank] * (-len(pixels) % columns)]
        blocks.append(np.concatenate([np.concatenate(cells[i: i + columns], axis=1) for i in range(0, len(cells), columns)], axis=0))
    height = caption_height + max(block.shape[0] for block in blocks)
    canvas = PIL.Image.new('RGB', (sum(block.shape[1] for block in blocks) + gap * (len(blocks) - 1), height), 'white')
    draw, left = PIL.ImageDraw.Draw(canvas), 0
    for (caption, _), block in zip(panels, blocks, strict=True):
        draw.text((left + 4, 4), caption, fill='black')
        canvas.paste(PIL.Image.fromarray(np.ascontiguousarray(block)), (left, caption_height))
        left += block.shape[1] + gap
    with atomic_write(path) as tmp:
        canvas.save(tmp)
