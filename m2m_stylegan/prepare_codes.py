"""The command `tools/prepare.py`: encoder and codes of a target set, made before the training that needs them, and what they are worth."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from m2m_stylegan import autoencoder, detectors, feature_stats, metrics, preparation, slicing, transfer
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.evaluate import halves
from m2m_stylegan.feature_stats import FeatureStats, StatsCache
from m2m_stylegan.image_sources import Compute, dataset_images
from m2m_stylegan.images import to_uint8
from m2m_stylegan.metric_names import METRICS
from m2m_stylegan.transfer_options import TransferOptions

FLOOR_IMAGES = 1000  # at most so many decoded codes are compared with the target images
METRIC = METRICS['fd_effnetlite0']


class Judge:
    """Frechet distances on the offline detector to the images of a job, all of them, unmirrored; and `floor`, that of two halves of them."""

    def __init__(self, job: transfer.Job, num: int):
        """num: of the images that are compared. Raises UserError if the detector is not installed."""
        self.job, self.num = job, num
        self.detector = detectors.load(detectors.OFFLINE, device=job.device)
        options = job.options
        view = ImageDataset(job.dataset.path, max_size=options.subset, random_seed=options.seed)
        cache = StatsCache(transfer.cache_dir(job))
        # The key of evaluate.Evaluator, so that its caches serve both.
        key = {'dataset': view.name, 'fingerprint': view.fingerprint, 'mirrored': False, 'num': len(view), 'detector': self.detector.identity}
        self.real = cache.read(key, keep=True)
        if self.real is None:
            self.real = self._collect('Features of target images', len(view), dataset_images(view))
            cache.write(key, self.real)
        self.floor = _distance(*halves(self.real, METRIC.with_num(num), options.seed))

    def distance(self, what: str, images: Compute) -> float:
        """Of the first `num` of these uint8 images; `what` names them."""
        return _distance(self.real, self._collect(what, self.num, images))

    def decoded(self, prepared: preparation.Prepared) -> float:
        """Of what the codes of random images of the set decode to: no training of low-res blocks alone can be expected to get below.

        It can lie below `floor`, since these are copies of the images with which they are compared.
        """
        order = np.resize(np.random.RandomState(self.job.options.seed).permutation(len(prepared.codes)), self.num)

        @torch.inference_mode()
        def images(start: int, stop: int) -> torch.Tensor:
            code = preparation.code_of(prepared.codes.gather(torch.from_numpy(order[start:stop])), self.job.device)
            return to_uint8(autoencoder.decode(self.job.snapshot.G_ema, code, prepared.res))
        return self.distance(f'Features of decoded codes, slice {slicing.slice_name(prepared.res)}', images)

    def _collect(self, what: str, num: int, images: Compute) -> FeatureStats:
        with transfer.progress_bar(total=num, desc=what, unit='img') as bar:
            return feature_stats.collect(what, num, lambda start, stop: self.detector.features(images(start, stop).to(self.job.device)), keep=True,
                                         progress=bar.update)


def _distance(real: FeatureStats, fake: FeatureStats) -> float:
    return metrics.frechet_distance(real.mean, real.cov, fake.mean, fake.cov)


def open_judge(job: transfer.Job, num: int, echo: Callable[[str], None]) -> Judge | None:
    """A judge; None, and a line that says what to install, if its detector is not there."""
    try:
        return Judge(job, num)
    except UserError as err:
        echo(f'No Frechet distances: {err}')
        return None


def open_job(options: TransferOptions) -> transfer.Job:
    """The job of tools/transfer.py for these options, its images read and its device set up in the same way. Raises UserError."""
    job = transfer.plan(options)
    if job.device.type == 'cuda':
        torch.cuda.set_device(job.device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    job.dataset.in_memory(progress=functools.partial(transfer.progress_bar, desc='Reading images', unit='img'))
    return job


def codes_of(job: transfer.Job, outdir: Path | None, echo: Callable[[str], None]) -> preparation.Prepared:
    """What transfer.open_codes makes or finds; its picture encoded.png goes to outdir, or nowhere."""
    with contextlib.ExitStack() as stack:
        return transfer.open_codes(job, outdir or Path(stack.enter_context(tempfile.TemporaryDirectory())), echo)


def run(options: TransferOptions, outdir: Path | None, echo: Callable[[str], None] = print) -> preparation.Prepared:
    """Make or find encoder and codes for tools/transfer.py with the same options; says what they are worth and where they are.

    options: with train='low-res'. outdir: where a grid of target images and their decoded codes goes.
    """
    if outdir is not None:
        outdir.mkdir(parents=True, exist_ok=True)  # now, not after an hour of training
    job = open_job(dataclasses.replace(options, train='low-res'))
    prepared = codes_of(job, outdir, echo)
    num = min(len(prepared.codes), FLOOR_IMAGES)
    judge = open_judge(job, num, echo)
    if judge is not None:
        echo(f'Floor: {METRIC.name} {judge.decoded(prepared):.2f} of {num} decoded codes; two halves of the images have {judge.floor:.2f}')
    root = transfer.cache_dir(job)
    codes, = root.glob(f'features/*-codes-{preparation.digest(prepared.codes.fingerprint)}')
    echo(f'Encoders: {root / "encoders"}\nCodes:    {codes} ({len(prepared.codes)} images, {prepared.codes.nbytes / 2 ** 20:.1f} MiB)')
    if outdir is not None:
        echo(f'Picture:  {outdir / "encoded.png"}')
    return prepared
