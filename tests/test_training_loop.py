"""The training loop: what moves, what stays, what is written, and that a resumed run is the uninterrupted one."""

import copy
import dataclasses
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import tiny
import torch

from m2m_stylegan import bank, checkpoint, features, phases, slicing
from m2m_stylegan.augment import AugmentPipe, augpipe_kwargs
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.training_loop import Grid, LoopOptions, State, random_labels, training_loop

CPU = torch.device('cpu')
CHUNKS = 3


@pytest.fixture
def dataset(tmp_path):
    return ImageDataset(tiny.dataset_zip(tmp_path / 'data.zip', num_classes=2), use_labels=True)


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
        train=train, slice_res=4 if train == 'high-res' else None, batch_size=4, batch_gpu=4, total_kimg=0.040, kimg_per_tick=0.016,
        snapshot_ticks=1, ada_target=0.6, ada_kimg=1, refresh_interval=2, ema_rampup=None,
        loss=phases.LossOptions(r1_gamma=1, G_reg_interval=2, D_reg_interval=3))
    return dataclasses.replace(options, **changes)


def train(run_dir, dataset, options, *, resume=False, architecture='skip', saved=None):
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(0)
    state, the_bank, grid = start(dataset, options, architecture)
    saved = [] if saved is None else saved
    reason = training_loop(
        run_dir=run_dir, state=state, dataset=dataset, options=options, grid=grid, bank=the_bank, device=CPU, resume=resume,
        save_network=lambda path, state: saved.append(path.name), echo=lambda text: None)
    return state, reason


@pytest.mark.parametrize('architecture', ['skip', 'resnet', 'orig'])
@pytest.mark.parametrize('mode, d_trains', [('full', 'all'), ('high-res', 'all'), ('high-res', 'high-res')])
def test_trained_tensors_move_and_frozen_ones_are_bit_identical(tmp_path, dataset, mode, d_trains, architecture):
    options = options_for(mode, d_trains=d_trains)
    torch.manual_seed(0)
    before = start(dataset, options, architecture)[0]
    after, reason = train(tmp_path / 'run', dataset, options, architecture=architecture)
    assert reason == '0.04 kimg reached'
    parts = {'G': 'all', 'G_ema': 'all', 'D': 'all'} if mode == 'full' else {'G': 'high-res', 'G_ema': 'high-res', 'D': d_trains}
    for key, part in parts.items():
        old, new = getattr(before, key), getattr(after, key)
        trained = slicing.tensor_names(new, options.slice_res, part)
        for name, tensor in new.state_dict().items():
            if name not in trained:
                assert torch.equal(tensor, old.state_dict()[name]), f'{key}.{name} is frozen but moved'
        still = {name for name, param in new.named_parameters() if name in trained and torch.equal(param, old.state_dict()[name])}
        assert not still, f'{key}: trained but unmoved'
        assert all(param.dtype == torch.float32 and torch.isfinite(param).all() for param in new.parameters())


@pytest.mark.parametrize('mode', ['full', 'high-res'])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, dataset, mode):
    """Bit for bit: weights, moving averages, optimiser moments, ADA's p, path length mean, feature bank."""
    whole, _ = train(tmp_path / 'whole', dataset, options_for(mode, total_kimg=0.080))
    train(tmp_path / 'parts', dataset, options_for(mode, total_kimg=0.040))
    resumed, _ = train(tmp_path / 'parts', dataset, options_for(mode, total_kimg=0.080), resume=True)
    for key in ['G', 'D', 'G_ema', 'augment_pipe']:
        for name, tensor in getattr(whole, key).state_dict().items():
            assert torch.equal(tensor, getattr(resumed, key).state_dict()[name]), f'{key}.{name}'
    first, second = (torch.load(tmp_path / run / checkpoint.FILE_NAME, weights_only=True) for run in ('whole', 'parts'))
    for content in (first, second):  # The stop at 40 images closed a tick of its own.
        assert (content['counters']['cur_nimg'], content['counters']['batch_idx']) == (80, 20)
    assert torch.equal(first['pl_mean'], second['pl_mean']) and float(first['pl_mean']) > 0
    for net in 'GD':
        for i, moments in first['optimizers'][net]['state'].items():
            assert all(torch.equal(value, second['optimizers'][net]['state'][i][k]) for k, value in moments.items())


def test_files_of_a_run(tmp_path, dataset):
    saved = []
    train(tmp_path / 'run', dataset, options_for('full', snapshot_ticks=2), saved=saved)
    names = sorted(path.name for path in (tmp_path / 'run').iterdir() if 'tfevents' not in path.name)
    assert names == ['fakes000000.png', checkpoint.FILE_NAME, 'snapshots.jsonl', 'stats.jsonl']
    assert saved == ['network-snapshot-000000.pkl'] * 3  # tick 0, tick 2, the end
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'stats.jsonl').read_text().splitlines()]
    assert [line['Progress/kimg']['mean'] for line in lines] == [0.004, 0.020, 0.036, 0.040]
    official = {f'Loss/{name}' for name in ['scores/fake', 'signs/fake', 'G/loss', 'pl_penalty', 'G/reg', 'scores/real', 'signs/real', 'D/loss',
                                            'r1_penalty', 'D/reg']}
    official |= {'Progress/tick', 'Progress/kimg', 'Progress/augment', 'timestamp', 'Resources/cpu_mem_gb', 'Resources/peak_gpu_mem_gb'}
    official |= {f'Timing/{name}' for name in ['total_sec', 'sec_per_tick', 'sec_per_kimg', 'maintenance_sec', 'total_hours', 'total_days', 'Gmain',
                                               'Greg', 'Dmain', 'Dreg']}
    assert set(lines[-1]) == official
    assert lines[-1]['Progress/augment']['mean'] != pytest.approx(0.3)  # ADA has moved it


def test_low_res_blocks_do_not_run_between_refreshes(tmp_path, dataset, monkeypatch):
    options = options_for('high-res', refresh_interval=1000)
    run_dir = tmp_path / 'run'
    run_dir.mkdir()
    state, the_bank, grid = start(dataset, options)
    monkeypatch.setattr('m2m_stylegan.training_loop.sample_grid', lambda *args, **kwargs: torch.zeros([4, 3, 16, 16]))

    def forbidden(*args, **kwargs):
        raise AssertionError('a cached block ran')

    for G in (state.G, state.G_ema):
        G.mapping.forward = G.synthesis.b4.forward = forbidden
    training_loop(run_dir=run_dir, state=state, dataset=dataset, options=options, grid=grid, bank=the_bank, device=CPU,
                  save_network=lambda path, state: None, echo=lambda text: None)


def test_signal_saves_and_stops(tmp_path, dataset):
    def send():
        while not (tmp_path / 'run' / checkpoint.FILE_NAME).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    saved = []
    threading.Thread(target=send, daemon=True).start()
    state, reason = train(tmp_path / 'run', dataset, options_for('full', total_kimg=1000, snapshot_ticks=10**6), saved=saved)
    assert reason == 'SIGTERM received'
    assert len(saved) == 2 and 0 < state.cur_nimg < 10**6
    assert torch.load(tmp_path / 'run' / checkpoint.FILE_NAME, weights_only=True)['counters']['cur_nimg'] == state.cur_nimg


def test_time_budget_stops(tmp_path, dataset):
    _, reason = train(tmp_path / 'run', dataset, options_for('full', total_kimg=1000, max_seconds=0.5))
    assert reason == 'time budget of 0s used'


def test_resuming_a_finished_run_changes_nothing(tmp_path, dataset):
    train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.008))
    before = (tmp_path / 'run' / checkpoint.FILE_NAME).read_bytes()
    state, reason = train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.008), resume=True)
    assert reason == '0.008 kimg reached' and state.cur_nimg == 8
    assert (tmp_path / 'run' / checkpoint.FILE_NAME).read_bytes() == before


def test_checkpoint_of_another_run_is_refused_with_all_differences(tmp_path, dataset):
    train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.004))
    with pytest.raises(UserError, match='feature bank(.|\n)*the optimiser of G holds'):
        train(tmp_path / 'run', dataset, options_for('high-res'), resume=True)
    path = tmp_path / 'run' / checkpoint.FILE_NAME
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match='is damaged'):
        train(tmp_path / 'run', dataset, options_for('full'), resume=True)
    path.unlink()
    with pytest.raises(UserError, match='there is no m2m-checkpoint.pt'):
        train(tmp_path / 'run', dataset, options_for('full'), resume=True)


def test_bank_chunks_depend_on_their_number_alone(dataset):
    G = tiny.generator(16, c_dim=2)
    first, second = make_bank(G, dataset, 4), make_bank(G, dataset, 4)
    old = copy.deepcopy(first.features.tensors)
    torch.randn(7)  # what else is drawn must not matter
    for _ in range(CHUNKS + 2):
        first.refresh()
    assert all(not torch.equal(old[name], first.features.tensors[name]) for name in ('x', 'img', 'ws'))
    second.rewind(first.next_chunk)
    for name, value in first.features.tensors.items():
        assert torch.equal(value, second.features.tensors[name]), name
    before = torch.random.get_rng_state()
    first.refresh()
    assert torch.equal(before, torch.random.get_rng_state())


def test_bank_features_are_those_of_the_generator(dataset):
    """x, img and ws of an item give the image that the whole generator would have given."""
    G = tiny.generator(16, c_dim=2)
    for block in (G.synthesis.b4, G.synthesis.b8, G.synthesis.b16):  # noise would differ between the two ways
        for layer in [block.conv1, *([block.conv0] if block.in_channels else [])]:
            layer.noise_strength.zero_()
    chunk = bank.make_chunk(G, 8, lambda chunk, num: torch.eye(2).repeat(num // 2, 1), 0, 3, 0.9, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(slicing.g_high(G, chunk['x'], chunk['img'], chunk['ws'], 8), G.synthesis(chunk['ws']), rtol=0, atol=0)
    assert bank.storage_dtype(chunk) == torch.float16
    assert bank.storage_dtype({'x': torch.full([1], 1e4)}) == torch.float32
