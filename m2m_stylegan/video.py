"""Frames into a moving picture: .mp4 through ffmpeg where there is one, .gif through Pillow everywhere."""

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write

GET_FFMPEG = "pip install 'm2m-stylegan[video]' (imageio-ffmpeg), or put an ffmpeg on the PATH"


def find_ffmpeg() -> str | None:
    """The ffmpeg that comes with the package imageio-ffmpeg, else one on the PATH, else None."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # RuntimeError: the package came without its binary
        return shutil.which('ffmpeg')


def check_video(path: str | os.PathLike, fps: float) -> None:
    """Raise UserError unless `write_video` can make a file of this name here; for use before the frames are computed."""
    suffix = Path(path).suffix.lower()
    if suffix not in ('.mp4', '.gif'):
        raise UserError(f'{path}: the name must end in .mp4 or .gif')
    if suffix == '.mp4' and find_ffmpeg() is None:
        raise UserError(f'{path}: writing an .mp4 needs ffmpeg: {GET_FFMPEG}; or choose a name that ends in .gif')
    if not 0 < fps <= (50 if suffix == '.gif' else 240):
        raise UserError(f'--fps={fps:g}: expected more than 0 and at most 240; a .gif at most 50, since viewers slow down faster ones')


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames, uint8 [H, W, 3] and all of one size, at least one, to an .mp4 (H.264) or an endless .gif, atomically.

    The frames are taken one by one. A .gif has 256 colours per frame and whole 1/100 s per frame. Raises UserError as `check_video`,
    and if ffmpeg fails.
    """
    check_video(path, fps)
    with atomic_write(path) as tmp:
        (_write_gif if tmp.suffix.lower() == '.gif' else _write_mp4)(tmp, iter(frames), fps)


def _write_gif(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    # Without dithering: its noise would crawl over still surfaces, and triple the file.
    pictures = (PIL.Image.fromarray(frame).quantize(256, dither=PIL.Image.Dither.NONE) for frame in frames)
    with open(path, 'wb') as file:  # Pillow leaves the file open if a frame cannot be made
        next(pictures).save(file, 'GIF', save_all=True, append_images=pictures, duration=10 * round(100 / fps), loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    first = next(frames)
    height, width = first.shape[:2]
    # yuv420p is what every player shows; it needs even sizes. crf 16: no loss that the eye sees, as the official 16 Mbit/s.
    command = [find_ffmpeg(), '-y', '-loglevel', 'error', '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}', '-r', str(fps), '-i', '-',
               '-vf', 'pad=ceil(iw/2)*2:ceil(ih/2)*2', '-c:v', 'libx264', '-pix_fmt', 'yuv420p', '-crf', '16', '-movflags', '+faststart', str(path)]
    with tempfile.TemporaryFile() as messages, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=messages, stderr=messages) as ffmpeg:
        try:
            for frame in itertools.chain([first], frames):
                ffmpeg.stdin.write(np.ascontiguousarray(frame))
            ffmpeg.stdin.close()
            failed = ffmpeg.wait() != 0
        except BrokenPipeError:
            failed = True
        if failed:
            ffmpeg.wait()
            messages.seek(0)
            raise UserError(f'{command[0]} could not write the video: {messages.read().decode(errors="replace").strip()[-500:]}')
