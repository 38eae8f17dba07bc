"""--train=both: low-res training in feature space, then high-res training on the features of the new low-res part, as one run."""

import contextlib
import json
import signal
import time

import numpy as np
import pytest
import ranks
import tiny
import tiny_run
import torch

from m2m_stylegan import checkpoint, slicing, snapshots, training_loop, transfer
from m2m_stylegan.errors import UserError
from m2m_stylegan.faults import StopRequest
from m2m_stylegan.transfer_options import TransferOptions, check_options, stages

LOW, TOTAL = 48, 72  # images: 3 steps of 16, then 6 of 4


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return tiny.files(tmp_path_factory.mktemp('files'))


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp('cache'))


def options_for(tmp_path, **options):
    """Every step of low-res training is a tick with a snapshot, and every fourth of high-res training."""
    return TransferOptions(**{'outdir': str(tmp_path / 'runs'), 'train': 'both', 'split': LOW / TOTAL, 'kimg': TOTAL / 1000, 'batch': 4,
                              'tick': 0.016, 'snap': 1, 'slice': '8', 'bank': 64, 'prepare_kimg': 0.032, 'device': 'cpu', **options})


def run(tmp_path, *, echo=lambda text: None, **options):
    return transfer.run(options_for(tmp_path, **options), echo=echo)


def watch_stages(monkeypatch):
    """(stage, options.train, reason, tensors of G and G_ema at the start and at the end) of each call of the loop."""
    calls, original = [], transfer.training_loop

    def tensors(state):
        return {f'{key}.{name}': t.clone() for key in ('G', 'G_ema', 'D') for name, t in getattr(state, key).state_dict().items()}

    def call(**kwargs):
        before = tensors(kwargs['state'])
        reason = original(**kwargs)
        calls.append((kwargs['state'].stage, kwargs['options'].train, reason, before, tensors(kwargs['state'])))
        return reason

    monkeypatch.setattr(transfer, 'training_loop', call)
    return calls


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_first_the_low_res_part_then_the_high_res_part(tmp_path, files, cache, monkeypatch):
    calls, told = watch_stages(monkeypatch), []
    directory = run(tmp_path, **files, cache_dir=cache, echo=told.append)
    assert [call[:3] for call in calls] == [(0, 'low-res', '0.048 kimg reached'), (1, 'high-res', '0.072 kimg reached')]
    low, high = (slicing.tensor_names(tiny.generator(), 8, part) for part in ('low-res', 'high-res'))
    first, second = (changed(before, after) for *_, before, after in calls)
    assert first and first <= {f'{key}.{name}' for key in ('G', 'G_ema') for name in low}
    assert {name for name in second if name.startswith('G')} <= {f'{key}.{name}' for key in ('G', 'G_ema') for name in high}
    assert {name.split('.')[1] for name in second if name.startswith('D.')} == {'b16'}
    assert not any(name.endswith('noise_strength') for name in second)
    end, start = calls[0][4], calls[1][3]
    assert all(torch.equal(start[f'G.{name}'], end[f'G_ema.{name}']) for name in low)  # G goes on with the low-res part whose features are cached
    assert all(torch.equal(start[name], end[name]) for name in end if not name.startswith('G.'))
    new = snapshots.load(directory / 'network-snapshot-000000.pkl')
    for key in ('G', 'G_ema', 'D'):
        assert all(torch.equal(tensor, calls[1][4][f'{key}.{name}']) for name, tensor in getattr(new, key).state_dict().items())
    assert '-both-slice8' in directory.name and not (directory / 'features').exists() and (directory / 'before-after.png').is_file()
    assert [text.split(',')[0] for text in told if text.startswith('Stage')] == ['Stage 1 of 2: low-res training', 'Stage 2 of 2: high-res training']


def test_features_of_the_second_stage_are_those_of_the_new_low_res_part(tmp_path, files, cache, monkeypatch):
    banks, original = [], transfer.open_bank
    monkeypatch.setattr(transfer, 'open_bank', lambda job, G_ema, *args: banks.append((G_ema, original(job, G_ema, *args))) or banks[-1][1])
    run(tmp_path, **files, cache_dir=cache)
    (G_ema, bank), = banks
    batch = bank.sample(8)
    x, _ = slicing.g_low(G_ema, batch['ws'], 8, noise_mode='const', force_fp32=True)
    x_other, _ = slicing.g_low(snapshots.load(files['network']).G_ema, batch['ws'], 8, noise_mode='const', force_fp32=True)
    assert (x - batch['x']).abs().mean() < (x_other - batch['x']).abs().mean() / 2


def killing_update_ema(start, stop):
    """phases.update_ema that kills the run in the step that begins with `stop` images."""
    seen, original = [start], training_loop.phases.update_ema

    def update_ema(*args):
        original(*args)
        if seen[0] >= stop:
            raise tiny_run.Killed
        seen[0] += 16 if seen[0] < LOW else 4

    return update_ema


@pytest.mark.parametrize('stops', [[32], [48], [56], [16, 48, 60]])
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(tmp_path, files, cache, monkeypatch, stops):
    """Bit for bit, killed in the first stage, between the two, in the second."""
    common = {**files, 'cache_dir': cache}
    whole = run(tmp_path, **common)
    parts = None
    for stop in stops:
        start = 0 if parts is None else int(checkpoint.read(parts / checkpoint.FILE_NAME)['counters']['cur_nimg'])
        with monkeypatch.context() as patch:
            patch.setattr(training_loop.phases, 'update_ema', killing_update_ema(start, stop))
            patch.setattr(training_loop.faults, 'rescue', lambda *args: contextlib.nullcontext())
            with pytest.raises(tiny_run.Killed):
                run(tmp_path, **({'resume': str(parts)} if parts else common))
        parts = sorted((tmp_path / 'runs').iterdir())[1]
    assert run(tmp_path, resume=str(parts)) == parts
    tiny_run.assert_same_run(whole, parts)
    assert int(checkpoint.read(parts / checkpoint.FILE_NAME)['counters']['stage']) == 1
    first, second = (snapshots.load(path / 'network-snapshot-000000.pkl').G_ema.state_dict() for path in (whole, parts))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_killed_before_its_second_stage_goes_on_with_a_higher_limit(tmp_path, files, cache, monkeypatch):
    """The features of its second stage lie there already, but of a low-res part that is trained on now."""
    with monkeypatch.context() as patch:
        patch.setattr(transfer.feature_bank, 'Bank', lambda *args: (_ for _ in ()).throw(tiny_run.Killed))
        with pytest.raises(tiny_run.Killed):
            run(tmp_path, **files, cache_dir=cache)
    directory, = (tmp_path / 'runs').iterdir()
    assert list((directory / 'features').iterdir())
    assert run(tmp_path, resume=str(directory), kimg=2 * TOTAL / 1000) == directory
    assert int(checkpoint.read(directory / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 2 * TOTAL and not (directory / 'features').exists()


def test_a_finished_run_goes_on_with_a_higher_limit(tmp_path, files, cache):
    whole = run(tmp_path, **files, cache_dir=cache, kimg=0.104, split=0.46)
    parts = run(tmp_path, **files, cache_dir=cache, kimg=0.08, split=0.6)
    assert run(tmp_path, resume=str(parts), kimg=0.104) == parts
    tiny_run.assert_same_run(whole, parts)


def test_signal_in_the_first_stage_ends_the_run(tmp_path, files, cache, monkeypatch):
    calls = watch_stages(monkeypatch)
    monkeypatch.setattr(StopRequest, 'received', signal.SIGTERM, raising=False)
    original = StopRequest.__init__
    monkeypatch.setattr(StopRequest, '__init__', lambda self: (original(self), setattr(self, 'received', signal.SIGTERM))[0])
    directory = run(tmp_path, **files, cache_dir=cache)
    assert [call[:3] for call in calls] == [(0, 'low-res', 'SIGTERM received')]
    monkeypatch.undo()
    calls = watch_stages(monkeypatch)
    assert run(tmp_path, resume=str(directory)) == directory
    assert [call[:2] for call in calls] == [(0, 'low-res'), (1, 'high-res')]


def test_nan_right_after_the_change_goes_back_to_its_start(tmp_path, files, cache, monkeypatch):
    """There is a checkpoint of the second stage from its first moment on."""
    original, told, done = training_loop.phases.run_phase, [], []

    def poisoned(phase, *args):
        original(phase, *args)
        if phase.name == 'Dmain' and phase.optimizer_name == 'D' and not done and len(told) and 'Stage 2' in ''.join(told):
            done.append(True)
            with torch.no_grad():
                phase.params[0].fill_(float('nan'))

    monkeypatch.setattr(training_loop.phases, 'run_phase', poisoned)
    run(tmp_path, **files, cache_dir=cache, echo=told.append)
    assert done and any('training diverged' in text for text in told)


def test_own_features_do_not_go_into_the_cache_directory(tmp_path, files):
    run(tmp_path, **files, cache_dir=str(tmp_path / 'cache'))
    assert [path.name.split('-')[2] for path in (tmp_path / 'cache' / 'features').iterdir()] == ['codes']


def job(options):
    """The whole job as one of several processes; its directory, and what this process has in the end."""
    found, original = [], transfer.build_state
    transfer.build_state = lambda job: found.append(original(job)) or found[0]
    start = time.monotonic()
    options = transfer.match_processes(options)
    resume_dir = transfer.distributed.from_main(transfer.resume.find_run, options)
    directory = transfer.run_process(options, start, lambda text: None)
    return resume_dir is not None, directory.name, {name: x.numpy() for name, x in found[0].G_ema.named_parameters()}


def test_two_processes_train_one_network_and_resume_in_the_second_stage(tmp_path, files):
    options = options_for(tmp_path, **files, cache_dir=str(tmp_path / 'cache'))
    for resumed in (False, True):
        exits, results = ranks.run(2, job, options)
        assert exits == [0, 0], results
        assert [results[rank][0] for rank in (0, 1)] == [resumed] * 2 and results[0][1] == results[1][1]
        assert all(np.array_equal(x, results[1][2][name]) for name, x in results[0][2].items())
        counters = checkpoint.read(tmp_path / 'runs' / results[0][1] / checkpoint.FILE_NAME)['counters']
        assert int(counters['stage']) == 1 and int(counters['cur_nimg']) == (96 if resumed else TOTAL)
        options = TransferOptions(outdir=str(tmp_path / 'runs'), resume='latest', kimg=0.096, device='cpu')


@pytest.mark.parametrize('seconds, expected', [(30, False), (50, True)])
def test_preparation_that_takes_all_the_time_is_told(tmp_path, files, cache, monkeypatch, seconds, expected):
    clock, told, original = [1000.0], [], transfer.open_codes
    monkeypatch.setattr(time, 'monotonic', lambda: clock[0])

    def open_codes(*args):
        clock[0] += seconds
        return original(*args)

    monkeypatch.setattr(transfer, 'open_codes', open_codes)
    run(tmp_path, **files, cache_dir=cache, echo=told.append, minutes=1)
    assert any(text.startswith('WARNING: the preparation has taken') for text in told) == expected


# What the options come down to


def test_budget_is_divided():
    low, high = stages(TransferOptions(outdir='', train='both', kimg=10, minutes=5, split=0.3, gamma=3, lr=0.1, batch=8), 64, torch.device('cpu'))
    assert (low.train, low.total_kimg, low.max_seconds, low.batch_size) == ('low-res', 3, 90, 16)
    assert (high.train, high.total_kimg, high.max_seconds, high.batch_size, high.d_trains) == ('high-res', 10, 300, 8, 'high-res')
    assert (low.train_noise, high.train_noise) == (True, False)
    assert low.slice_res == high.slice_res == 16 and (low.ema_rampup, high.ema_rampup) == (0.05, 0.3)
    assert low.codes.pair_lr != 0.1 and high.G_lr == 0.1 and low.codes.r1_gamma != 3 and high.loss.r1_gamma == 3
    assert low.codes is not None and high.codes is None and low.ada_target is None and high.ada_target == 0.6
    given = {'slice': '8', 'critic': 'wgan-gp', 'd_trains': 'all', 'ema_rampup': 0.1}
    low, high = stages(TransferOptions(outdir='', train='both', **given), 64, torch.device('cpu'))
    assert low.slice_res == high.slice_res == 8 and low.codes.critic == 'wgan-gp' and high.d_trains == 'all' and low.max_seconds is None
    assert low.ema_rampup == high.ema_rampup == 0.1
    low, high = stages(TransferOptions(outdir='', train='both', train_noise=True), 64, torch.device('cpu'))
    assert high.train_noise
    only, = stages(TransferOptions(outdir='', train='high-res'), 64, torch.device('cpu'))
    assert only.d_trains == 'high-res' and only.slice_res == 8 and only.train_noise


@pytest.mark.parametrize('gpus', range(1, 34))
def test_every_number_of_gpus_has_a_batch(gpus):
    device = torch.device('cuda')
    low, high = stages(TransferOptions(outdir='', gpus=gpus), 256, device)
    full, = stages(TransferOptions(outdir='', train='full', gpus=gpus), 256, device)
    assert low.batch_size % gpus == 0 and 16 <= low.batch_size < 16 + gpus
    assert full.batch_size == high.batch_size and high.batch_size % gpus == 0 and (gpus > 16 or high.batch_size // gpus % 4 == 0)
    if gpus & (gpus - 1) == 0:
        assert high.batch_size == max(min(gpus * 16, 64), gpus)  # the official auto configuration


def test_dry_run_tells_both_stages():
    told = []
    transfer.run(TransferOptions(outdir='runs', dry_run=True, kimg=10, device='cpu'), told.append)
    low, high = json.loads(told[0])['m2m']['stages']
    assert (low['train'], low['total_kimg'], low['batch_size'], low['codes']['pair_lr']) == ('low-res', 4, 16, 0.01) and 'G_lr' not in low
    assert (high['train'], high['total_kimg'], high['G_lr']) == ('high-res', 10, 0.0025) and 'codes' not in high


def test_contradictions_are_listed():
    with pytest.raises(UserError) as caught:
        check_options(TransferOptions(outdir='', train='both', split=1.5, slice='w', no_bypass=True, freezed=3))
    text = str(caught.value)
    for part in ('--split=1.5', '--slice=w', '--no-bypass', '--freezed'):
        assert part in text
    with pytest.raises(UserError, match=r'(?s)--split is only used.*|--d-trains is only used'):
        check_options(TransferOptions(outdir='', train='low-res', split=0.5, d_trains='all'))
    fine = {'split': 0.5, 'd_trains': 'all', 'bank': 64, 'critic': 'wgan-gp', 'prepare_kimg': 1, 'gamma': 1, 'p': 0.2, 'aug': 'fixed'}
    check_options(TransferOptions(outdir='', train='both', **fine))


def test_time_of_both_stages_counts(tmp_path, files, cache, monkeypatch):
    """The clock of the second stage goes on where that of the first one stopped, the making of features included."""
    clock, original = [1000.0], transfer.open_bank
    monkeypatch.setattr(time, 'monotonic', lambda: clock[0])

    def open_bank(*args):
        clock[0] += 100
        return original(*args)

    def update_ema(*args, original=training_loop.phases.update_ema):
        clock[0] += 1
        original(*args)

    monkeypatch.setattr(transfer, 'open_bank', open_bank)
    monkeypatch.setattr(training_loop.phases, 'update_ema', update_ema)
    directory = run(tmp_path, **files, cache_dir=cache)
    entries = [json.loads(line) for line in (directory / 'snapshots.jsonl').read_text().splitlines()]
    assert [(entry['cur_nimg'], entry['elapsed_s']) for entry in entries] == [(16, 1), (32, 2), (48, 3), (64, 107), (72, 109)]
    counters = checkpoint.read(directory / checkpoint.FILE_NAME)['counters']
    assert int(counters['stage_start_nimg']) == LOW and float(counters['elapsed_seconds']) == 109
