"""Statistics of a training run: collected on the device, summed over processes, written as official `stats.jsonl` and tfevents."""

import functools
import json
import math
import os
import time
from pathlib import Path

import torch

from m2m_stylegan import distributed


class Collector:
    """Moments of named quantities, tick by tick.

    `report` may be called any number of times between two calls of `update`, which closes a tick. The readers see closed
    ticks only; a name of which a tick brought nothing keeps its values from before.
    """

    def __init__(self):
        # float64 [3]: number of values, their sum, sum of their squares. Pending ones stay on the device they were reported from.
        self._pending: dict[str, torch.Tensor] = {}
        self._closed: dict[str, torch.Tensor] = {}

    def report(self, name: str, value: torch.Tensor | float | list[float]) -> None:
        """Add every element of `value`, of any shape and dtype. Does not wait for the device."""
        x = value.detach().double() if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=torch.float64)
        moments = torch.stack([x.new_full([], x.numel()), x.sum(), x.square().sum()])
        self._pending[name] = moments + self._pending[name].to(x.device) if name in self._pending else moments

    def update(self) -> None:
        """Close a tick. Waits for the device; if torch.distributed is initialised, every process must call it, with any names."""
        pending = {name: moments.tolist() for name, moments in self._pending.items()}
        self._pending.clear()
        for name, moments in _sum_over_processes(pending).items():
            if moments[0] > 0:
                self._closed[name] = moments

    def mean(self, name: str) -> float:
        """Mean of the values; NaN if none was ever reported or they are not finite."""
        return self._summary(name)['mean']

    def as_dict(self) -> dict[str, dict[str, float]]:
        """{name: {'num': int, 'mean': float, 'std': float}}; std is that of the population, 0 for a single value."""
        return {name: self._summary(name) for name in self._closed}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """All of it, for a checkpoint of this process."""
        return {'pending': {name: m.cpu() for name, m in self._pending.items()}, 'closed': dict(self._closed)}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Go on from `state_dict`."""
        self._pending, self._closed = dict(state['pending']), dict(state['closed'])

    def _summary(self, name: str) -> dict[str, float]:
        num, total, total_sq = self._closed[name].tolist() if name in self._closed else (0, 0, 0)
        if num == 0 or not math.isfinite(total):
            return {'num': int(num), 'mean': math.nan, 'std': math.nan}
        mean = total / num
        variance = total_sq / num - mean * mean if num > 1 else 0
        # Rounding can make the difference slightly negative; an overflow of the squares must stay visible.
        return {'num': int(num), 'mean': mean, 'std': math.sqrt(max(variance, 0)) if math.isfinite(variance) else math.nan}


def _sum_over_processes(pending: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    totals = {}
    # Objects rather than an all-reduce: processes may have reported different names, and one exchange costs less than two.
    for part in distributed.gather(pending):
        for name, moments in part.items():
            totals[name] = totals.get(name, 0) + torch.tensor(moments, dtype=torch.float64)
    return totals


@functools.cache
def _say_once(text: str) -> None:
    print(text)


class StatsWriter:
    """Writes the statistics of one run into its directory; only the first process makes one.

    `stats.jsonl` gets one line per tick; tfevents are written too if the package tensorboard is installed.
    """

    def __init__(self, run_dir: str | os.PathLike):
        self._path = Path(run_dir) / 'stats.jsonl'
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(run_dir)
        except ImportError:
            self._events = None
            _say_once('No tfevents will be written: the package tensorboard is not installed.')

    def write(self, stats: dict[str, dict[str, float]], *, cur_nimg: int, elapsed_s: float) -> None:
        """One tick: `stats` as from `Collector.as_dict`, `elapsed_s` since the start of the run."""
        with open(self._path, 'a', encoding='utf-8') as file:  # anew for each tick: going back to a checkpoint replaces the file
            file.write(json.dumps({**stats, 'timestamp': time.time()}) + '\n')
        self._add_scalars({name: s['mean'] for name, s in stats.items()}, cur_nimg, elapsed_s)

    def write_metrics(self, results: dict[str, float], *, cur_nimg: int, elapsed_s: float) -> None:
        """Metrics as `Metrics/...`, into the tfevents only: their own files are metric-*.jsonl."""
        self._add_scalars({f'Metrics/{name}': value for name, value in results.items()}, cur_nimg, elapsed_s)

    def close(self) -> None:
        """Close the tfevents."""
        if self._events is not None:
            self._events.close()

    def _add_scalars(self, scalars: dict[str, float], cur_nimg: int, elapsed_s: float) -> None:
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, global_step=cur_nimg // 1000, walltime=elapsed_s)
            self._events.flush()


def format_time(seconds: float) -> str:
    """Official time string: `12s`, `3m 05s`, `1h 02m 03s`, `2d 03h 04m`."""
    s = round(seconds)
    if s < 60:
        return f'{s}s'
    if s < 60 * 60:
        return f'{s // 60}m {s % 60:02}s'
    if s < 24 * 60 * 60:
        return f'{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s'
    return f'{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m'
