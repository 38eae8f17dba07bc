"""Is this image set fit for training? All that is wrong with it in one message, together with the command that repairs it."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from m2m_stylegan.errors import UserError
from m2m_stylegan.image_files import ImageFiles, ImageReadError, problem_list

CHANNELS = {'L': 1, 'RGB': 3}  # by Pillow mode
MAX_CLASSES = 1 << 20  # a class beyond this is a mistake, and its one-hot vectors would fill the memory
WRONG_LABEL = f'have a label that is neither a class from 0 to {MAX_CLASSES - 1} nor a list of numbers'


def check_dataset(files: ImageFiles, resolution: int | None, use_labels: bool) -> tuple[list[int], np.ndarray | None]:
    """Read the header of every image, and the labels if asked for.

    Returns [C, H, W] and the labels in the order of files.image_names: int64 [n] class ids, float32 [n, label_dim], or None.
    Raises UserError listing everything that keeps the set from being trained on.
    """
    headers, unreadable = _read_headers(files)
    image_problems = {'cannot be read as images': unreadable} | _shape_problems(headers, resolution)
    labels, label_problems = _read_labels(files) if use_labels else (None, {})
    if any(image_problems.values()) or any(label_problems.values()):
        text = f'{files.path} is not ready for training:\n'
        text += problem_list(image_problems | label_problems, len(files.image_names))
        if any(image_problems.values()):
            text += '\nPrepare a copy that fits:\n  ' + _prepare_command(files, headers, resolution)
        if any(label_problems.values()):
            text += '\nComplete dataset.json, or train without labels.'
        raise UserError(text)
    width, height, mode = next(iter(headers.values()))
    return [CHANNELS[mode], height, width], labels


def read_label_table(files: ImageFiles) -> dict[str, Any] | None:
    """`labels` of dataset.json at the root as {image name: label}; None if absent or null. Raises UserError."""
    if 'dataset.json' not in files:
        return None
    data = files.read('dataset.json')
    try:
        labels = json.loads(data)['labels']
        return None if labels is None else {str(name).replace('\\', '/'): label for name, label in labels}
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        form = '{"labels": [["00000/img00000000.png", 3], ...]} or {"labels": null}'
        found = f'{type(err).__name__}: {err}'
        raise UserError(f'dataset.json in {files.path} has the wrong form ({found}); expected {form}') from err


def suggest_resolution(sizes: Iterable[tuple[int, int]]) -> int:
    """The largest power of two in [4, 1024] that the shorter side reaches in at least half of the (width, height)."""
    median = int(np.median([min(size) for size in sizes]))
    return 1 << min(max(median.bit_length() - 1, 2), 10)


def _read_headers(files: ImageFiles) -> tuple[dict[str, tuple[int, int, str]], list[str]]:
    headers, unreadable = {}, []
    for name in files.image_names:
        try:
            headers[name] = files.header(name)
        except ImageReadError as err:
            unreadable.append(f'{name} ({err.reason})')
    return headers, unreadable


def _shape_problems(headers: dict[str, tuple[int, int, str]], resolution: int | None) -> dict[str, list[str]]:
    usual_side, _ = _most_common(((w, h) for w, h, _ in headers.values()), (0, 0))
    usual_mode = _most_common((mode for *_, mode in headers.values() if mode in CHANNELS), 'RGB')
    side, origin = (resolution, 'asked for') if resolution else (usual_side, 'most are')
    images = [(f'{name} ({w}x{h} {mode})', w, h, mode) for name, (w, h, mode) in headers.items()]
    return {
        'are not square': [text for text, w, h, _ in images if w != h],
        'have a side that is no power of two from 4 up': [
            text for text, w, h, _ in images if w == h and (w < 4 or w & (w - 1))
        ],
        f'are not {side}x{side} as {origin}': [text for text, w, h, _ in images if w == h != side],
        'are neither grey (L) nor RGB': [text for text, *_, mode in images if mode not in CHANNELS],
        f'are not {usual_mode} as most are': [text for text, *_, mode in images if mode in CHANNELS and mode != usual_mode],
    }


def _prepare_command(files: ImageFiles, headers: dict[str, tuple[int, int, str]], resolution: int | None) -> str:
    resolution = resolution or (suggest_resolution((w, h) for w, h, _ in headers.values()) if headers else 256)
    source = os.path.abspath(files.path)
    dest = f'{os.path.splitext(source)[0]}-{resolution}.zip'
    return f'python tools/dataset.py --source={shlex.quote(source)} --dest={shlex.quote(dest)} --resolution={resolution}'


def _read_labels(files: ImageFiles) -> tuple[np.ndarray | None, dict[str, list[str]]]:
    table = read_label_table(files)
    if table is None:
        raise UserError(f'{files.path} has no labels: expected them in dataset.json; add them, or train without labels')
    kinds = {name: label_kind(table[name]) for name in files.image_names if name in table}
    usual = _most_common((kind for kind in kinds.values() if kind != 'wrong'), 'class')
    shown = {name: f'{name} ({json.dumps(table[name])[:40]})' for name in kinds}
    problems = {
        'have no label in dataset.json': [name for name in files.image_names if name not in kinds],
        WRONG_LABEL: [
            shown[name] for name, kind in kinds.items() if kind == 'wrong'
        ],
        f'have another kind of label than most ({usual})': [
            shown[name] for name, kind in kinds.items() if kind not in ('wrong', usual)
        ],
    }
    if any(problems.values()):
        return None, problems
    return np.array([table[name] for name in files.image_names], dtype=np.int64 if usual == 'class' else np.float32), {}


def _most_common(items: Iterable, default: Any) -> Any:
    return max(Counter(items).items(), key=lambda item: item[1], default=(default, 0))[0]


def label_kind(label: Any) -> str:
    """What a label of dataset.json is, 'wrong' if it is none."""
    if type(label) is int and 0 <= label < MAX_CLASSES:
        return 'class'
    if isinstance(label, list) and label and all(type(x) in (int, float) and abs(x) < 3e38 for x in label):  # NaN fails too
        return f'list of {len(label)} numbers'
    return 'wrong'
