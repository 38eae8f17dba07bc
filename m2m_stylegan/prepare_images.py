"""Turning any folder or zip of pictures into an image set that every tool here, and the official code, can train on."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps

from m2m_stylegan.dataset_checks import WRONG_LABEL, label_kind, read_label_table, suggest_resolution
from m2m_stylegan.errors import UserError
from m2m_stylegan.image_files import DatasetWriter, ImageFiles, ImageReadError, printable, problem_list

FILTERS = {'box': PIL.Image.Resampling.BOX, 'lanczos': PIL.Image.Resampling.LANCZOS}
CROPS = ('center', 'pad', 'stretch', 'none', 'center-wide')
GREY_MODES = ('1', 'L', 'LA', 'La', 'I;16', 'I;16L', 'I;16B', 'I')


class SkipImage(Exception):
    """This picture is left out; the text says why."""


@dataclass(frozen=True)
class PrepareOptions:
    """How pictures become training images.

    width, height         pixels of the result; None = pictures keep their size, the same square power of two for all.
    crop                  what happens before the resize. center: largest central square. pad: background added up to a square.
                          stretch: nothing. none: nothing, pictures that are not square are left out. center-wide: central part
                          of the aspect width:height, resized and put on a black square of side width; pictures smaller than
                          width x height are left out.
    resize_filter         box or lanczos.
    background            behind transparent pixels, and the border of `pad`; anything PIL.ImageColor reads.
    max_images            stop after this many.
    labels_from_folders   class = rank of the top-level folder among the sorted ones, instead of dataset.json.
    """

    width: int | None = None
    height: int | None = None
    crop: str = 'center'
    resize_filter: str = 'lanczos'
    background: str = '#ffffff'
    max_images: int | None = None
    labels_from_folders: bool = False

    @classmethod
    def from_command_line(
        cls,
        resolution: int | None = None,
        transform: str | None = None,
        width: int | None = None,
        height: int | None = None,
        crop: str | None = None,
        **others,
    ) -> 'PrepareOptions':
        """Official --transform, --width and --height (alone: stretch) beside --resolution and --crop. Raises UserError."""
        if resolution is not None and (width is not None or height is not None):
            raise UserError('--resolution=N means --width=N --height=N; give one or the other')
        if transform is not None and crop is not None:
            raise UserError('--transform is the official name for --crop=center and center-wide; give one of the two')
        if transform is not None:
            crop = {'center-crop': 'center', 'center-crop-wide': 'center-wide'}[transform]
        elif crop is None:
            crop = 'stretch' if width is not None or height is not None else 'center'
        return cls(width=resolution or width, height=resolution or height, crop=crop, **others)

    def __post_init__(self):
        problems = []
        if (self.width is None) != (self.height is None):
            problems.append('give both --width and --height, or --resolution')
        if self.crop == 'center-wide' and not (self.width and self.height and self.height <= self.width):
            problems.append('--transform=center-crop-wide needs --width and a --height that is not larger')
        side, other = self.width, self.width if self.crop == 'center-wide' else self.height
        if side is not None and (side != other or side < 4 or side & (side - 1)):
            problems.append(f'the result would be {side}x{other}; networks need a square with a power of two >= 4')
        if self.crop not in CROPS or self.resize_filter not in FILTERS:
            problems.append(f'expected a crop out of {CROPS} and a filter out of {tuple(FILTERS)}')
        if self.max_images is not None and self.max_images < 1:
            problems.append(f'--max-images={self.max_images}: expected at least 1')
        try:
            PIL.ImageColor.getrgb(self.background)
        except ValueError:
            problems.append(f'--background={self.background} is not a colour; examples: #ffffff, white, rgb(255,255,255)')
        if problems:
            raise UserError('; '.join(problems))


@dataclass
class PrepareReport:
    """What `prepare` did: images written, names enlarged or without a label, and the pictures left out as `name: reason`."""

    written: int = 0
    classes: list[str] | None = None
    labelled: bool = False
    unlabelled: list[str] = field(default_factory=list)
    enlarged: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Several lines for people: the counts, everything skipped, and warnings."""
        lines = [f'{self.written} images written, {"with" if self.labelled else "without"} labels, {len(self.skipped)} skipped']
        lines += [f'  skipped {printable(text)}' for text in self.skipped]
        if self.unlabelled and len(self.unlabelled) < self.written:
            lines += ['warning: labels left out, because', problem_list({'have none': self.unlabelled}, self.written)]
        if self.enlarged:
            kind = 'were smaller than the result and had to be enlarged; a lower --resolution would not be blurred'
            lines += ['warning:', problem_list({kind: self.enlarged}, self.written)]
        return '\n'.join(lines)


def prepare(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    options: PrepareOptions = PrepareOptions(),
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> PrepareReport:
    """Convert all pictures of a folder or zip and write them in the official format to a folder or zip, all or nothing.

    Rotated by EXIF, put on the background, cropped and resized once, in this order, to 8-bit RGB, or grey if all pictures are.
    Labels are written if every written image has one. The options are stored under "prepared" in dataset.json.
    `progress` wraps the loop over names, e.g. tqdm.tqdm. Pictures that cannot be used are skipped and reported.
    Raises UserError if source or dest is unsuitable or no picture is left.
    """
    files, report = ImageFiles(source), PrepareReport()
    _check_apart(Path(source).resolve(), Path(dest).resolve())
    labels = _folder_labels(files, report) if options.labels_from_folders else read_label_table(files) or {}
    wrong = [name for name in files.image_names if name in labels and label_kind(labels[name]) == 'wrong']
    if wrong:
        raise UserError(f'dataset.json of {files.path}: mend it or take it out.\n' + problem_list({WRONG_LABEL: wrong}, len(files.image_names)))
    headers = {}
    for name in files.image_names:
        try:
            headers[name] = files.header(name)
        except ImageReadError as err:
            report.skipped.append(f'{name}: {err.reason}')
    if options.width is None and headers:
        side = _common_side(files, headers)
        options = replace(options, width=side, height=side, crop='none')
    red, green, blue = PIL.ImageColor.getrgb(options.background)[:3]
    mode = 'L' if red == green == blue and all(mode in GREY_MODES for *_, mode in headers.values()) else 'RGB'

    with DatasetWriter(dest) as writer:
        for name in progress(list(headers)):
            if len(writer) == options.max_images:
                break
            try:
                flat = flatten(files.image(name), options.background, mode)
                writer.add(np.asarray(reshape(flat, options)), labels.get(name))
            except (ImageReadError, SkipImage) as err:
                report.skipped.append(f'{name}: {getattr(err, "reason", err)}')
                continue
            side = max(flat.size) if options.crop == 'pad' else min(flat.size)
            report.enlarged += [name] if side < min(options.width, options.height) else []
            report.unlabelled += [] if name in labels else [name]
        report.written, report.labelled = len(writer), not report.unlabelled
        if not report.written:
            listed = problem_list({'are skipped': report.skipped}, len(files.image_names))
            raise UserError(f'{files.path} holds no usable picture:\n{listed}')
        writer.extra['prepared'] = asdict(options) | {
            'source': os.path.basename(os.path.abspath(source)),
            'classes': report.classes,
            'num_skipped': len(report.skipped),
            'num_enlarged': len(report.enlarged),
            'pillow': PIL.__version__,
        }
    return report


def flatten(img: PIL.Image.Image, background: str, mode: str) -> PIL.Image.Image:
    """Any picture -> opaque `mode` (L or RGB) with 8 bits, upright, transparency put on `background`. Raises SkipImage."""
    try:
        img = PIL.ImageOps.exif_transpose(img)
    except Exception as err:  # whatever damaged EXIF bytes provoke in Pillow
        raise SkipImage(f'damaged EXIF data: {type(err).__name__}: {err}') from err
    if img.mode == 'F':
        raise SkipImage('floating-point pixels, whose range is unknown; save it with 8 or 16 bits')
    if img.mode == 'I' or img.mode.startswith('I;16'):
        pixels = np.asarray(img).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise SkipImage(f'32-bit pixels from {pixels.min()} to {pixels.max()}, more than 16 bits; save it with 8 or 16')
        return PIL.Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert(mode)
    if img.mode in ('RGBA', 'RGBa', 'LA', 'La', 'PA') or 'transparency' in img.info:
        img = img.convert('RGBA')
        img = PIL.Image.alpha_composite(PIL.Image.new('RGBA', img.size, PIL.ImageColor.getrgb(background)[:3]), img)
    try:
        return img.convert(mode)
    except ValueError as err:
        raise SkipImage(f'colour mode {img.mode} cannot be converted to {mode}') from err


def reshape(img: PIL.Image.Image, options: PrepareOptions) -> PIL.Image.Image:
    """Crop or pad and resize one opaque picture as the options say. Raises SkipImage."""
    size = (options.width, options.height)
    w, h = img.size
    if options.crop == 'none' and w != h:
        raise SkipImage(f'{w}x{h} is not square')
    if options.crop == 'center':
        img = _central(img, min(w, h), min(w, h))
    elif options.crop == 'pad':
        canvas = PIL.Image.new(img.mode, (max(w, h),) * 2, PIL.ImageColor.getcolor(options.background, img.mode))
        canvas.paste(img, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
        img = canvas
    elif options.crop == 'center-wide':
        if w < size[0] or h < size[1]:
            raise SkipImage(f'{w}x{h} is smaller than {size[0]}x{size[1]}')
        scale = min(w / size[0], h / size[1])
        img = _central(img, round(scale * size[0]), round(scale * size[1]))
    img = img.resize(size, FILTERS[options.resize_filter])
    if options.crop == 'center-wide':
        canvas = PIL.Image.new(img.mode, (size[0], size[0]))
        canvas.paste(img, (0, (size[0] - size[1]) // 2))
        img = canvas
    return img


def _central(img: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    left, top = (img.width - width) // 2, (img.height - height) // 2
    return img.crop((left, top, left + width, top + height))


def _check_apart(source: Path, dest: Path) -> None:
    if dest == source or (source in dest.parents and dest.suffix.lower() != '.zip'):
        raise UserError(f'--dest={dest} lies in --source={source}; give a place outside of it')


def _folder_labels(files: ImageFiles, report: PrepareReport) -> dict[str, int]:
    stray = [name for name in files.image_names if '/' not in name]
    if stray:
        listed = problem_list({'lie in no folder': stray}, len(files.image_names))
        raise UserError(f'--labels-from-folders needs every picture in a folder named after its class:\n{listed}')
    report.classes = sorted({name.split('/')[0] for name in files.image_names})
    return {name: report.classes.index(name.split('/')[0]) for name in files.image_names}


def _common_side(files: ImageFiles, headers: dict[str, tuple[int, int, str]]) -> int:
    sizes = Counter((w, h) for w, h, _ in headers.values())
    width, height = next(iter(sizes))
    if len(sizes) == 1 and width == height >= 4 and width & (width - 1) == 0:
        return width
    found = ', '.join(f'{w}x{h} ({count})' for (w, h), count in sizes.most_common(5)) + (', ...' if len(sizes) > 5 else '')
    raise UserError(
        f'the pictures of {files.path} are not all of one square size with a power of two as its side; found {found}. '
        f'Give --resolution, for example --resolution={suggest_resolution(sizes.elements())}'
    )
