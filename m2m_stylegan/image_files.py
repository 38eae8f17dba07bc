"""Image files in a folder or a zip, read without trusting them, and the official dataset format, written atomically."""

import contextlib
import io
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write

MAX_FILE_BYTES = 1 << 28  # of one file, unpacked: no training image comes near, and a zip bomb ends here


class ImageReadError(UserError):
    """One file of a set cannot be read; `reason` says why in a few words."""

    def __init__(self, message: str, reason: str = ''):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.args[0], self.reason)  # DataLoader workers send their exceptions pickled


class ImageFiles:
    """The files of a folder (recursive) or a zip, named by relative path with forward slashes; nothing is extracted to disk.

    path          as given.
    image_names   files whose extension Pillow knows, sorted: the official choice and order.
    Can be pickled and used after a fork: every process opens its own zip handle.
    Raises UserError if `path` does not exist, is neither a folder nor a readable zip, or holds no image.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._zip: zipfile.ZipFile | None = None
        self._zip_pid = 0
        self._is_folder = os.path.isdir(self.path)
        if self._is_folder:
            self._sizes = dict(_walk(self.path))
        elif not os.path.exists(self.path):
            raise UserError(f'{self.path} does not exist; expected a folder of images or a .zip')
        elif not self.path.lower().endswith('.zip'):
            raise UserError(f'{self.path} is neither a folder nor a .zip; give the folder that holds the images')
        else:
            self._sizes = {info.filename: info.file_size for info in self._open_zip().infolist() if not info.is_dir()}
        PIL.Image.init()
        known = PIL.Image.EXTENSION
        self.image_names = sorted(name for name in self._sizes if os.path.splitext(name)[1].lower() in known)
        if not self.image_names:
            found = f'{len(self._sizes)} other files, e.g. {printable(min(self._sizes))}' if self._sizes else 'nothing'
            raise UserError(f'{self.path} holds no images: expected files such as .png or .jpg, found {found}')

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def __getstate__(self) -> dict:
        return self.__dict__ | {'_zip': None}

    def close(self) -> None:
        """Close the zip handle; the next read opens it again."""
        if self._zip is not None and self._zip_pid == os.getpid():
            self._zip.close()
        self._zip = None

    def size(self, name: str) -> int:
        """Bytes of the unpacked file, by the directory's word."""
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        """The whole file. Raises ImageReadError, also if it is larger than MAX_FILE_BYTES."""
        with self._reading(name):
            if self._sizes[name] > MAX_FILE_BYTES:
                raise ValueError(f'it unpacks to {self._sizes[name]} bytes, the limit is {MAX_FILE_BYTES}')
            with self._open(name) as f:
                # Without a length zipfile inflates up to 2 GiB at once, whatever size the directory declares.
                return f.read(self._sizes[name])

    def crc32(self, name: str) -> int:
        """CRC-32 of the file's bytes; free for a zip, one pass over the file for a folder."""
        if not self._is_folder:
            return self._open_zip().getinfo(name).CRC
        crc = 0
        with self._open(name) as f:
            while chunk := f.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
        return crc

    def header(self, name: str) -> tuple[int, int, str]:
        """(width, height, Pillow mode) without decoding the pixels. Raises ImageReadError."""
        with self._reading(name), self._open(name) as f, open_image(f) as img:
            _check_pixels(img)
            return img.width, img.height, img.mode

    def image(self, name: str) -> PIL.Image.Image:
        """The decoded image (the first frame of an animation), with Pillow's `info`. Raises ImageReadError."""
        data = self.read(name)
        with self._reading(name):
            img = open_image(io.BytesIO(data))
            _check_pixels(img)
            img.load()
            return img

    def _open(self, name: str) -> BinaryIO:
        if self._is_folder:
            return open(os.path.join(self.path, name), 'rb')
        if self._open_zip().getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError('packed by another method than store or deflate, which cannot be unpacked piece by piece')
        return self._open_zip().open(name)

    def _open_zip(self) -> zipfile.ZipFile:
        # A handle that crossed a fork shares its file position with the parent, so that both would read garbage.
        if self._zip is None or self._zip_pid != os.getpid():
            try:
                self._zip, self._zip_pid = zipfile.ZipFile(self.path), os.getpid()
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as err:
                raise UserError(f'{self.path} cannot be opened as a zip ({err}); was it copied completely?') from err
        return self._zip

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # damaged bytes make Pillow and zipfile raise a dozen types, from SyntaxError to struct.error
            unknown = isinstance(err, PIL.UnidentifiedImageError)
            reason = 'not an image that Pillow can read' if unknown else f'{type(err).__name__}: {err}'
            raise ImageReadError(f'cannot read {printable(name)} in {self.path}: {reason}', reason) from err


class DatasetWriter:
    """Context manager that numbers and stores images in the official format; nothing appears at `dest` if the block raises.

    dest       *.zip, replaced if it exists, or a folder, which must be absent or empty; UserError otherwise.
    optimize   False: PNG without compression, as the official tool writes and fast to read. True: the smallest PNG.
    extra      attribute: more keys for dataset.json beside `labels`; official readers ignore them.
    """

    def __init__(self, dest: str | os.PathLike, *, optimize: bool = False):
        self.dest = Path(dest)
        self.extra: dict[str, Any] = {}
        self._labels: list[tuple[str, Any]] = []
        self._png_options = {'optimize': True} if optimize else {'compress_level': 0}
        self._to_zip = self.dest.suffix.lower() == '.zip'
        if self._to_zip and self.dest.is_dir():
            raise UserError(f'--dest={self.dest} is a folder, although it is named like a zip')
        if not self._to_zip and self.dest.exists() and not (self.dest.is_dir() and not any(self.dest.iterdir())):
            raise UserError(f'--dest={self.dest} exists and is not an empty folder; give a new folder or a name ending in .zip')

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labelled(self) -> bool:
        """Does every image so far have a label? Only then are labels written."""
        return bool(self._labels) and all(label is not None for _, label in self._labels)

    def __enter__(self) -> 'DatasetWriter':
        self._stack = contextlib.ExitStack()
        if self._to_zip:
            tmp = self._stack.enter_context(atomic_write(self.dest))
            self._zip = self._stack.enter_context(zipfile.ZipFile(tmp, 'w', zipfile.ZIP_STORED))
        else:
            self.dest.parent.mkdir(parents=True, exist_ok=True)
            self._tmp = Path(tempfile.mkdtemp(prefix=f'.{self.dest.name}-', suffix='.tmp', dir=self.dest.parent))
            self._stack.callback(shutil.rmtree, self._tmp, ignore_errors=True)
        return self

    def add(self, image: np.ndarray, label: int | Sequence[float] | None = None) -> str:
        """Store one uint8 image [H, W] or [H, W, 3] as the next `{5 digits}/img{8 digits}.png` and return that name."""
        index = len(self._labels)
        name = f'{index // 1000:05d}/img{index:08d}.png'
        png = io.BytesIO()
        PIL.Image.fromarray(image).save(png, 'png', **self._png_options)
        self._put(name, png.getvalue())
        self._labels.append((name, label))
        return name

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc_type is not None:
            self._stack.__exit__(exc_type, exc, traceback)
            return
        with self._stack:
            labels = self._labels if self.labelled else None
            self._put('dataset.json', json.dumps({'labels': labels} | self.extra).encode())
            if not self._to_zip:
                os.chmod(self._tmp, self.dest.parent.stat().st_mode & 0o777)  # mkdtemp's 0700 would shut out colleagues
                os.replace(self._tmp, self.dest)

    def _put(self, name: str, data: bytes) -> None:
        if self._to_zip:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # fixed: the same images make the same bytes
            info.external_attr = 0o644 << 16
            self._zip.writestr(info, data)
        else:
            path = self._tmp / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)


def problem_list(problems: Mapping[str, Sequence[str]], total: int, limit: int = 10) -> str:
    """One indented block per kind of problem: how many of `total` have it, and the first `limit` of them."""
    lines = []
    for kind, items in problems.items():
        if items:
            lines.append(f'  {len(items)} of {total} {kind}:')
            lines += [f'    {printable(item)}' for item in items[:limit]]
            lines += [f'    ... and {len(items) - limit} more'] if len(items) > limit else []
    return '\n'.join(lines)


def printable(name: str) -> str:
    """File names may hold bytes that no terminal can encode, or line breaks; show those as escapes."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in name)


def open_image(f: BinaryIO) -> PIL.Image.Image:
    """PIL.Image.open without EPS, whose pixels Pillow would have Ghostscript compute: a program interpreter, in a process of its own."""
    PIL.Image.init()
    return PIL.Image.open(f, formats=[name for name in PIL.Image.ID if name != 'EPS'])


def _walk(root: str) -> Iterator[tuple[str, int]]:
    for folder, _, files in os.walk(root):
        for file in files:
            path = os.path.join(folder, file)
            if os.path.isfile(path):  # not a pipe, a socket or a broken link
                yield os.path.relpath(path, root).replace(os.sep, '/'), os.path.getsize(path)


def _check_pixels(img: PIL.Image.Image) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and img.width * img.height > limit:
        raise ValueError(f'{img.width}x{img.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}')
