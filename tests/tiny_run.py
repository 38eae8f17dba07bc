"""Training runs of a few steps on tiny networks, for the tests of the loop, of its faults and of several processes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import tiny
import torch

from m2m_stylegan import bank, checkpoint, features, phases
from m2m_stylegan.augment import AugmentPipe, augpipe_kwargs
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.training_loop import Grid, LoopOptions, State, random_labels, training_loop

CPU = torch.device('cpu')
CHUNKS = 3


class Killed(BaseException):
    """Stands for kill -9: nothing in the loop catches it."""


def dataset(path):
    return ImageDataset(tiny.dataset_zip(path, num_classes=2), use_labels=True)


def make_bank(G_ema, dataset, res):
    def make(chunk):
        def labels(chunk, num):
            return random_labels(dataset, np.random.RandomState(chunk), num, CPU)

        return bank.make_chunk(G_ema, res, labels, 0, chunk, 0.9, torch.float16)

    chunks = [make(i) for i in range(CHUNKS)]
    tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    specs = {name: features.TensorSpec(tuple(x.shape[1:]), x.dtype) for name, x in tensors.items()}
    return bank.Bank(features.ResidentFeatures(specs, CHUNKS * bank.CHUNK_ITEMS, CPU, tensors), make)


def start(dataset, options, architecture='skip'):
    """State, bank and grid of a new run; the raw and the averaged generator differ, as in a real pickle."""
    G, G_ema = (tiny.generator(16, c_dim=2, seed=seed, architecture=architecture) for seed in (0, 5))
    D = tiny.discriminator(16, c_dim=2, architecture='resnet' if architecture == 'skip' else architecture)
    pipe = AugmentPipe(**augpipe_kwargs('bgc')).requires_grad_(False)
    pipe.p.fill_(0.3)
    grid = Grid((2, 2), torch.randn([4, G.z_dim]), torch.eye(2).repeat(2, 1))
    return State(G, D, G_ema, pipe), make_bank(G_ema, dataset, options.slice_res) if options.train == 'high-res' else None, grid


def options_for(train, **changes):
    options = LoopOptions(
        train=train, slice_res=None if train == 'full' else 4 if train == 'high-res' else 8, batch_size=4, batch_gpu=4, total_kimg=0.040,
        kimg_per_tick=0.016, snapshot_ticks=1, ada_target=0.6, ada_kimg=1, refresh_interval=2, ema_rampup=None,
        loss=phases.LossOptions(r1_gamma=1, G_reg_interval=2, D_reg_interval=3))
    return dataclasses.replace(options, **changes)


def train(run_dir, dataset, options, *, resume=False, architecture='skip', save_network=lambda path, state: None, echo=lambda text: None, **kwargs):
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(0)
    state, the_bank, grid = start(dataset, options, architecture)
    reason = training_loop(run_dir=run_dir, state=state, dataset=dataset, options=options, grid=grid, bank=the_bank, device=CPU, resume=resume,
                           save_network=save_network, echo=echo, **kwargs)
    return state, reason


def kill_at_step(monkeypatch, step, exception=Killed):
    """The loop ends in the middle of that step, counted from 0, but only once."""
    original, left = phases.run_phase, [step]

    def run_phase(phase, *args):
        if phase.name == 'Dmain' and left:
            if left[0] == 0:
                left.clear()
                raise exception
            left[0] -= 1
        original(phase, *args)

    monkeypatch.setattr(phases, 'run_phase', run_phase)


def assert_same_run(first: Path, second: Path):
    """Two run directories hold the same state, bit for bit, and the same statistics, but for times and memory."""
    contents = [flat(checkpoint.read(run / checkpoint.FILE_NAME)) for run in (first, second)]
    assert contents[0].keys() == contents[1].keys()
    different = [name for name, tensor in contents[0].items() if not torch.equal(tensor, contents[1][name])]
    assert not different
    assert read_stats(first) == read_stats(second)


def flat(content):
    tensors = checkpoint._flatten(content)
    return {name: x for name, x in tensors.items() if not any(word in name for word in ('elapsed_seconds', 'Timing/', 'Resources/'))}


def read_stats(run_dir):
    lines = [json.loads(line) for line in (run_dir / 'stats.jsonl').read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.split('/')[0] in ('Loss', 'Progress')} for line in lines]
