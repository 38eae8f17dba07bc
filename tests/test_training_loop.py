"""The training loop: what moves, what stays, what is written, and that a resumed run is the uninterrupted one."""

import copy
import json
import os
import signal
import time

import pytest
import tiny
import tiny_run
import torch
from tiny_run import CPU, options_for, start, train

from m2m_stylegan import bank, checkpoint, faults, slicing
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.training_loop import training_loop


@pytest.fixture
def dataset(tmp_path):
    return tiny_run.dataset(tmp_path / 'data.zip')


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


@pytest.mark.parametrize('mode', ['full', 'high-res', 'low-res'])
def test_noise_strengths_alone_stay_if_they_are_not_trained(tmp_path, dataset, mode):
    options = options_for(mode, train_noise=False)
    torch.manual_seed(0)
    before = start(dataset, options)[0]
    after, _ = train(tmp_path / 'run', dataset, options)
    part = 'all' if mode == 'full' else mode
    trained = slicing.tensor_names(after.G, options.slice_res, part)
    moved = {name for name, param in after.G.named_parameters() if not torch.equal(param, before.G.state_dict()[name])}
    assert moved == {name for name, _ in after.G.named_parameters() if name in trained and not name.endswith('noise_strength')}


def test_every_step_of_adam_reaches_every_tensor(tmp_path, dataset):
    """Regularisers do not reach all biases; Adam's moments of these fade all the same, as with the zeros of the official code."""
    train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.024))  # 6 steps, Greg in each second, Dreg in each third of them
    content = checkpoint.read(tmp_path / 'run' / checkpoint.FILE_NAME)
    for key, steps in [('G', 6 + 3), ('D', 6 + 2)]:
        moments = content['optimizers'][key]['state']
        assert {int(state['step']) for state in moments.values()} == {steps} and len(moments) == int(content['optimizers'][key]['num_params'])


@pytest.mark.parametrize('mode', ['full', 'high-res', 'low-res'])
def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path, dataset, monkeypatch, mode):
    """Bit for bit: weights, moving averages, optimiser moments, ADA's p, path length mean, feature bank, and the statistics."""
    options = options_for(mode, total_kimg=0.064, snapshot_ticks=2)
    train(tmp_path / 'whole', dataset, options)
    tiny_run.kill_at_step(monkeypatch, 14)  # the tick that ended with step 12 has no snapshot and will be trained again
    with pytest.raises(tiny_run.Killed):
        train(tmp_path / 'parts', dataset, options)
    with open(tmp_path / 'parts' / 'stats.jsonl', 'a') as f:  # what a kill in mid-write leaves
        f.write('{"Loss/sco')
    resumed, reason = train(tmp_path / 'parts', dataset, options, resume=True)
    assert reason == '0.064 kimg reached' and resumed.cur_nimg == 64
    tiny_run.assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    content = checkpoint.read(tmp_path / 'whole' / checkpoint.FILE_NAME)
    assert float(content['ranks']['0']['pl_mean']) > 0 and float(content['modules']['augment_pipe']['p']) != 0.3
    assert ('bank' in content) == (mode == 'high-res')
    lines = [json.loads(line) for line in (tmp_path / 'parts' / 'snapshots.jsonl').read_text().splitlines()]
    assert [line['cur_nimg'] for line in lines] == [4, 36, 64]


def test_run_stopped_in_mid_tick_goes_on_with_the_same_ticks(tmp_path, dataset, monkeypatch):
    """An error between two steps: nothing is lost, and nobody can tell afterwards."""
    options = options_for('full', total_kimg=0.048)
    train(tmp_path / 'whole', dataset, options)
    original, calls = ImageDataset.__getitem__, []

    def getitem(self, idx):
        calls.append(idx)
        if len(calls) == 7 * 4 + 1:
            raise UserError('image 7 is damaged')
        return original(self, idx)

    monkeypatch.setattr(ImageDataset, '__getitem__', getitem)
    told = []
    with pytest.raises(UserError, match='image 7'):
        train(tmp_path / 'parts', dataset, options, echo=told.append)
    assert told[-1] == 'The state at 0.03 kimg has been saved.'
    assert int(checkpoint.read(tmp_path / 'parts' / checkpoint.FILE_NAME)['counters']['batch_idx']) == 7
    train(tmp_path / 'parts', dataset, options, resume=True)
    tiny_run.assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_files_of_a_run(tmp_path, dataset):
    saved = []
    train(tmp_path / 'run', dataset, options_for('full', snapshot_ticks=2), save_network=lambda path, state: saved.append(path.name))
    names = sorted(path.name for path in (tmp_path / 'run').iterdir() if 'tfevents' not in path.name)
    assert names == ['fakes000000.png', 'm2m-checkpoint.1.safetensors', checkpoint.FILE_NAME, 'snapshots.jsonl', 'stats.jsonl']
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


@pytest.mark.parametrize('number', ['SIGTERM', 'SIGINT', 'SIGUSR1'])
def test_signal_saves_and_stops_within_a_step(tmp_path, dataset, number):
    """As a cluster does it: the same signal twice at once, from two sides."""
    seen = []

    def save_network(path, state):
        seen.append(state.cur_nimg)
        if len(seen) == 1:  # in the snapshot after the first step
            os.kill(os.getpid(), signal.Signals[number])
            os.kill(os.getpid(), signal.Signals[number])

    _, reason = train(tmp_path / 'run', dataset, options_for('full', total_kimg=1000, snapshot_ticks=10**6), save_network=save_network)
    assert reason == f'{number} received' and seen == [4, 8]
    assert int(checkpoint.read(tmp_path / 'run' / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 8


def test_a_later_second_signal_interrupts_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    with faults.StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        now[0] += 1.5
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_time_budget_stops(tmp_path, dataset):
    _, reason = train(tmp_path / 'run', dataset, options_for('full', total_kimg=1000, max_seconds=0.5))
    assert reason == 'time budget of 0s used'


def test_resuming_a_finished_run_changes_nothing(tmp_path, dataset):
    train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.008))
    before = (tmp_path / 'run' / checkpoint.FILE_NAME).read_bytes()
    state, reason = train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.008), resume=True)
    assert reason == '0.008 kimg reached' and state.cur_nimg == 8
    assert (tmp_path / 'run' / checkpoint.FILE_NAME).read_bytes() == before


def test_bank_chunks_depend_on_their_number_alone(dataset):
    G = tiny.generator(16, c_dim=2)
    first, second = tiny_run.make_bank(G, dataset, 4), tiny_run.make_bank(G, dataset, 4)
    old = copy.deepcopy(first.features.tensors)
    torch.randn(7)  # what else is drawn must not matter
    for _ in range(tiny_run.CHUNKS + 2):
        first.refresh()
    assert all(not torch.equal(old[name], first.features.tensors[name]) for name in ('x', 'img', 'ws'))
    second.rewind(first.next_chunk)
    for name, value in first.features.tensors.items():
        assert torch.equal(value, second.features.tensors[name]), name
    for _ in range(2):
        second.refresh()
    second.rewind(first.next_chunk)  # back
    assert all(torch.equal(value, second.features.tensors[name]) for name, value in first.features.tensors.items())
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
