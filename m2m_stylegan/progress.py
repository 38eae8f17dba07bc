"""The progress bar of a training run: done, speed, time left, and how the game stands."""

import sys
import time

import tqdm


class Progress:
    """A bar over the nearer of two limits, thousands of images and wall-clock seconds. Use as a context manager."""

    def __init__(self, total_kimg: float, max_seconds: float | None, start_time: float, shown: bool = True):
        """start_time: time.monotonic() from which max_seconds counts."""
        self.total_kimg, self.max_seconds, self.start_time, self.shown = total_kimg, max_seconds, start_time, shown
        self._recent: list[tuple[float, float]] = []

    def __enter__(self) -> 'Progress':
        self._bar = tqdm.tqdm(total=1000, bar_format='{percentage:3.0f}%|{bar:24}| {desc}', dynamic_ncols=True, leave=False, disable=not self.shown,
                              mininterval=0.2 if sys.stderr.isatty() else 30)  # in a log file every refresh is a line
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.close()

    def echo(self, text: str, echo) -> None:
        """Print a line through `echo` without tearing the bar."""
        with self._bar.external_write_mode():
            echo(text)

    def update(self, kimg: float, collector) -> None:
        """Show the state after `kimg` thousand images in all; means since the last tick come from the stats.Collector."""
        now = time.monotonic()
        self._recent = [*self._recent[-20:], (now, kimg)]
        seconds, done = now - self._recent[0][0], kimg - self._recent[0][1]
        speed = done / seconds if seconds > 0 else 0.0  # kimg per second over the last 20 batches
        left = (self.total_kimg - kimg) / speed if speed > 0 else float('inf')
        share = kimg / self.total_kimg
        if self.max_seconds is not None:
            elapsed = now - self.start_time
            left, share = min(left, self.max_seconds - elapsed), max(share, elapsed / self.max_seconds)
        text = f'{kimg:.2f} kimg, {speed * 1000:.1f} img/s'
        if left != float('inf'):
            text += f', {tqdm.tqdm.format_interval(max(left, 0))} left'
        for label, name in [('G', 'Loss/G/loss'), ('D', 'Loss/D/loss')]:
            value = collector.mean(name)
            text += f', {label} {value:.2f}' if value == value else ''
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(min(int(share * 1000), 1000) - self._bar.n)
