"""Draws the image sets of the demonstration from openly licensed vector art, see assets/CREDITS.md. For maintainers."""

import functools
import hashlib
import importlib.resources
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from m2m_stylegan.image_files import DatasetWriter

PERSONAS_VIEW = '6 4 52 52'  # of 64 x 64: head and shoulders then fill the frame as they do in the emoji
SUBCATEGORIES = ('person', 'person-gesture', 'person-role', 'person-fantasy')
# Parts of the names of designs that are no frontal head and shoulders: whole bodies, profiles, covered faces.
NO_BUSTS = (
    *('superhero', 'supervillain', 'fairy', 'merperson', 'merman', 'mermaid', 'genie', 'zombie', 'troll'),
    *('deaf', 'face_palm', 'facepalming', 'pregnant', 'feeding'),
)


def write_personas(dest: str | os.PathLike, num_images: int, resolution: int, first_seed: int = 0) -> int:
    """Write DiceBear Personas portraits from seeds `first_seed` on, no two with the same pixels; returns the next unused seed.

    Needs dicebear-core, dicebear-styles and resvg_py. 3 ms an image at 64 x 64 with two processes.
    """
    seen: set[bytes] = set()
    draw = functools.partial(_draw_persona, resolution=resolution)
    with DatasetWriter(dest) as writer, multiprocessing.Pool(2) as pool:
        # Twice as many seeds as images: of 10,000 portraits at 64 x 64, 19 were repeats.
        seeds = range(first_seed, first_seed + 2 * num_images)
        for seed, image in zip(seeds, pool.imap(draw, seeds, chunksize=64), strict=True):
            if _is_new(image, seen):
                writer.add(image)
            if len(writer) == num_images:
                return seed + 1
    raise AssertionError('more than half of the portraits are repeats')


def write_noto_busts(dest: str | os.PathLike, resolution: int, noto_dir: Path, emoji_dir: Path) -> int:
    """Write the frontal Noto emoji portraits as small PNGs, in Unicode order with all skin tones; returns their number.

    `noto_dir` and `emoji_dir` are the unpacked npm packages @iconify-json/noto and emoji-datasource-google; needs resvg_py.
    dataset.json gets the extra key `names`, one `design/tone` per image: hold out by design, or skin tones leak.
    """
    icons, icon_of = (json.loads((noto_dir / name).read_text()) for name in ('icons.json', 'chars.json'))

    def draw(code: str) -> np.ndarray:
        body, box = icons['icons'][icon_of[code]]['body'], f'0 0 {icons["width"]} {icons["height"]}'
        xmlns = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return render(f'<svg {xmlns} viewBox="{box}">{body}</svg>', resolution)

    return _write_busts(dest, emoji_dir, draw)


def write_fluent_busts(dest: str | os.PathLike, resolution: int, fluent_dir: Path, emoji_dir: Path) -> int:
    """The same portraits as Fluent 3D emoji; `fluent_dir` is the unpacked npm package @lobehub/fluent-emoji-3d."""
    files = {path.stem.replace('-fe0f', ''): path for path in (fluent_dir / 'assets').iterdir()}

    def draw(code: str) -> np.ndarray:
        img = PIL.Image.open(files[code]).convert('RGBA')
        square = PIL.Image.new('RGBA', [max(img.size)] * 2, 'white')
        square.alpha_composite(img, ((square.width - img.width) // 2, (square.height - img.height) // 2))
        return np.asarray(square.convert('RGB').resize((resolution, resolution), PIL.Image.Resampling.BOX))

    return _write_busts(dest, emoji_dir, draw)


def _write_busts(dest: str | os.PathLike, emoji_dir: Path, draw: Callable[[str], np.ndarray]) -> int:
    seen: set[bytes] = set()
    with DatasetWriter(dest, optimize=True) as writer:
        writer.extra['names'] = []
        for name, code in _bust_codes(json.loads((emoji_dir / 'emoji.json').read_text())):
            image = draw(code)
            if _is_new(image, seen):
                writer.add(image)
                writer.extra['names'].append(name)
        return len(writer)


def render(svg: str, resolution: int) -> np.ndarray:
    """SVG text -> uint8 [resolution, resolution, 3] on white, drawn at twice the size and averaged."""
    import resvg_py

    size = 2 * resolution
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background='#ffffff', skip_system_fonts=True)
    img = PIL.Image.open(io.BytesIO(png)).convert('RGB')
    return np.asarray(img.resize((resolution, resolution), PIL.Image.Resampling.BOX))


def _draw_persona(seed: int, resolution: int) -> np.ndarray:
    import dicebear

    svg = dicebear.Avatar(_personas_style(), {'seed': str(seed)}).to_string()
    return render(svg.replace('viewBox="0 0 64 64"', f'viewBox="{PERSONAS_VIEW}"', 1), resolution)


@functools.cache
def _personas_style():
    import dicebear

    return dicebear.Style(json.loads(importlib.resources.files('dicebear_styles').joinpath('personas.json').read_text('utf-8')))


def _bust_codes(designs: list[dict]) -> Iterator[tuple[str, str]]:
    for design in sorted(designs, key=lambda design: design['sort_order']):
        name = design['short_name']
        if design['subcategory'] in SUBCATEGORIES and not any(part in name for part in NO_BUSTS):
            for tone, entry in {'default': design, **design.get('skin_variations', {})}.items():
                yield f'{name}/{tone}', entry['unified'].lower().replace('-fe0f', '')


def _is_new(image: np.ndarray, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(image.tobytes()).digest()
    return digest not in seen and not seen.add(digest)
