"""The results of a comparison on disk: results.jsonl, one line per evaluated snapshot, and a picture of samples for each."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from m2m_stylegan import cells, slicing, snapshots
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.images import from_uint8, save_image_grid

RECORD, RESULTS, PICTURES = 'compare.json', 'results.jsonl', 'pictures'
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,39}')  # of a method: it becomes part of file names
METRIC_NAME = re.compile(r'[A-Za-z0-9_.-]{1,60}')
SOURCE = 'source'  # the method name of the pickle that all methods start from
PICTURE_GRID = (6, 4)  # columns, rows
TILE_PIXELS = 128  # Larger samples are averaged down to this.
NUMBERS = ('cur_nimg', 'elapsed_s', 'img_per_s', 'peak_cpu_gb', 'peak_gpu_gb', 'preparation_s', 'disk_bytes')


@dataclasses.dataclass(frozen=True)
class Score:
    """A line of results.jsonl. None: not known, or without meaning for this method."""

    method: str
    seed: int | None
    slot: int | None  # how many of the comparison's evaluation times had passed; None for snapshots from elsewhere
    pkl: str  # relative to the comparison's folder if it is inside
    metrics: dict[str, float | None]
    error: str | None = None  # why there are no metrics
    cur_nimg: float | None = None
    elapsed_s: float | None = None  # charged to the run; evaluation is not
    img_per_s: float | None = None
    peak_cpu_gb: float | None = None
    peak_gpu_gb: float | None = None
    preparation_s: float | None = None
    disk_bytes: float | None = None

    @property
    def key(self) -> tuple:
        return self.method, self.seed, self.pkl

    @property
    def picture(self) -> str:
        """File name of its sample picture."""
        return re.sub(r'[^A-Za-z0-9._-]', '_', f'{self.method}-{"" if self.seed is None else f"seed{self.seed}-"}{Path(self.pkl).stem}.png')


def read_record(folder: Path) -> dict | None:
    """Content of compare.json, or None if there is none. Raises UserError unless it is {'settings': {...}, 'about': {...}}."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        record['settings'].keys(), record['about'].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise UserError(f'{path} is damaged or is not from tools/compare.py ({type(err).__name__}: {err}).') from err
    return record


def read(folder: Path) -> list[Score]:
    """All results so far, in the order they were made. Raises UserError that names the line that is not one."""
    path = folder / RESULTS
    try:
        lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    except (OSError, ValueError) as err:
        raise UserError(f'{path} cannot be read: {err}') from err
    scores = []
    for number, line in enumerate(lines, 1):
        try:
            score = Score(**json.loads(line))
            _check(score)
        except (ValueError, TypeError, AttributeError) as err:
            raise UserError(f'{path}, line {number} is not a result of tools/compare.py ({err}). Remove the line; its snapshot is then evaluated '
                            'again.') from err
        scores.append(score)
    return scores


def _check(score: Score) -> None:
    """Raise ValueError unless every field is what Score says."""
    if not isinstance(score.method, str) or not NAME.fullmatch(score.method) or not isinstance(score.pkl, str):
        raise ValueError(f'method {score.method!r}, pkl {score.pkl!r}')
    numbers = {name: getattr(score, name) for name in NUMBERS} | {f'metrics.{name}': value for name, value in score.metrics.items()}
    wrong = [f'{name} is {value!r}' for name, value in numbers.items()
             if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value))]
    wrong += [f'a metric is named {name!r}' for name in score.metrics if not METRIC_NAME.fullmatch(name)]
    wrong += [f'{name} is {getattr(score, name)!r}' for name in ('seed', 'slot') if not isinstance(getattr(score, name), int | None)]
    if wrong:
        raise ValueError(', '.join(wrong))


def add(folder: Path, score: Score) -> None:
    """Append one result. The whole file is written anew, it is small: a kill leaves either all of the line or nothing."""
    path = folder / RESULTS
    text = path.read_text(encoding='utf-8') if path.is_file() else ''
    with atomic_write(path) as tmp:
        tmp.write_text(f'{text}{json.dumps(dataclasses.asdict(score), allow_nan=False)}\n', encoding='utf-8')


def at_times(saved: list[cells.Saved], budget_s: float, evals: int) -> dict[int, cells.Saved]:
    """The snapshots of a finished run to evaluate for the times k/evals of its budget: {k: the first made from then on, before time k + 1}.

    k is missing if there was none, as while a method prepares itself. The last time belongs to the last snapshot.
    """
    chosen: dict[int, cells.Saved] = {}
    for entry in saved[:-1]:
        slot = int(entry.elapsed_s / budget_s * evals + 1e-3)
        if slot > 0:
            chosen.setdefault(min(slot, evals), entry)
    return {**chosen, evals: saved[-1]} if saved else {}


@torch.no_grad()
def save_samples(pickle_path: Path, path: Path, device: torch.device) -> None:
    """Write a picture of PICTURE_GRID samples of G_ema; the same latents for every pickle of the same z_dim."""
    G = snapshots.load_G_ema(pickle_path).to(device)
    num = PICTURE_GRID[0] * PICTURE_GRID[1]
    z = torch.from_numpy(np.random.RandomState(0).randn(num, G.z_dim)).float().to(device)
    c = torch.nn.functional.one_hot(torch.arange(num) % max(G.c_dim, 1), max(G.c_dim, 1))[:, :G.c_dim].float().to(device)
    images = [G(z[i:i + 4], c[i:i + 4], noise_mode='const', force_fp32=device.type == 'cpu').float().cpu() for i in range(0, num, 4)]
    save_tiles(torch.cat(images), path)


def save_reals(dataset: ImageDataset, path: Path) -> None:
    """Write a picture of random images of the dataset, one more than once only if it has too few."""
    num = PICTURE_GRID[0] * PICTURE_GRID[1]
    chosen = np.resize(np.random.RandomState(0).permutation(len(dataset)), num)
    save_tiles(from_uint8(torch.from_numpy(np.stack([dataset[i][0] for i in chosen]))), path)


def save_tiles(images: torch.Tensor, path: Path) -> None:
    """Write images [N, C, R, R] in [-1, 1], N as in PICTURE_GRID, as one picture of tiles of at most TILE_PIXELS."""
    factor = max(images.shape[-1] // TILE_PIXELS, 1)
    save_image_grid(torch.nn.functional.avg_pool2d(images, factor), path, (-1, 1), PICTURE_GRID)


def changed_blocks(before: snapshots.Snapshot, after: snapshots.Snapshot) -> list[dict]:
    """What training really changed: {'block', 'resolution', 'parameters', 'changed'} for each block of G_ema and D, counts of parameters."""
    changed = set()
    for old, new in [(before.G_ema, after.G_ema), (before.D, after.D)]:
        tensors = dict([*old.named_parameters(), *old.named_buffers()])
        changed |= {id(x) for name, x in [*new.named_parameters(), *new.named_buffers()] if not torch.equal(x, tensors[name])}
    return [{'block': row.name, 'resolution': row.resolution, 'parameters': row.num_params, 'changed': row.num_trained}
            for row in slicing.block_table(after.G_ema, after.D, changed, lambda name, res: False)]
