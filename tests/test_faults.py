"""What the loop does when the machine, the data or the training itself fails; each fault is made here."""

import errno
import json
import math
import os
import signal
import time

import pytest
import tiny_run
import torch
from tiny_run import options_for, train

from m2m_stylegan import checkpoint, faults, losses, phases, stats, training_loop
from m2m_stylegan.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    return tiny_run.dataset(tmp_path / 'data.zip')


# Divergence


def spoil(monkeypatch, name, steps, value=math.nan):
    """Let a function of `losses` return NaN in its calls with these numbers; returns the list of calls."""
    original, calls = getattr(losses, name), []

    def spoilt(*args):
        result = original(*args)
        calls.append(None)
        return result * value if len(calls) - 1 in steps else result

    monkeypatch.setattr(losses, name, spoilt)
    return calls


def test_a_passing_nan_is_undone_by_going_back(tmp_path, dataset, monkeypatch):
    calls, told = spoil(monkeypatch, 'discriminator_real_loss', [7]), []
    state, reason = train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.048), echo=told.append)
    assert reason == '0.048 kimg reached' and state.backoffs == 1
    assert len(calls) == 12 + 4  # steps 5 to 8 were made again
    warnings = [line for line in told if line.startswith('WARNING')]
    assert len(warnings) == 1 and 'diverged at 0.04 kimg: Loss/D/loss is not finite (phase Dmain, the adversarial loss of D)' in warnings[0]
    assert all(math.isfinite(line['Loss/D/loss']['mean']) for line in tiny_run.read_stats(tmp_path / 'run'))
    assert not faults.symptoms({}, {'G': state.G, 'D': state.D, 'G_ema': state.G_ema})


def test_statistics_go_on_after_going_back(tmp_path, dataset, monkeypatch):
    spoil(monkeypatch, 'discriminator_real_loss', [18])
    train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.160, snapshot_ticks=3))
    ticks = [line['Progress/kimg']['mean'] for line in tiny_run.read_stats(tmp_path / 'run')]
    assert ticks == pytest.approx([0.004 + 0.016 * i for i in range(10)] + [0.160])


def test_a_state_that_is_not_finite_is_not_rescued(tmp_path, dataset, monkeypatch):
    """A weight becomes NaN, and before a tick can notice it the images cannot be read: the checkpoint from before is the one to go on with."""
    original, steps, batches = phases.run_phase, [], training_loop.batches

    def run_phase(phase, *args):
        original(phase, *args)
        if phase.name == 'Dmain':
            steps.append(phase)
            if len(steps) == 12:
                phase.params[3].data.view(-1)[0] = math.nan

    def failing(*args):
        for batch in batches(*args):
            if len(steps) == 14:
                raise OSError(errno.EIO, 'Input/output error', 'img.png')
            yield batch

    options = options_for('full', total_kimg=0.080, kimg_per_tick=0.032)
    with monkeypatch.context() as patch:
        patch.setattr(phases, 'run_phase', run_phase)
        patch.setattr(training_loop, 'batches', failing)
        with pytest.raises(OSError, match='img.png'):
            train(tmp_path / 'run', dataset, options)
    assert int(checkpoint.read(tmp_path / 'run' / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 36
    train(tmp_path / 'run', dataset, options, resume=True)
    train(tmp_path / 'whole', dataset, options)
    tiny_run.assert_same_run(tmp_path / 'whole', tmp_path / 'run')


def test_after_going_back_the_random_numbers_are_others(tmp_path, dataset, monkeypatch):
    spoil(monkeypatch, 'discriminator_real_loss', [7])
    options = options_for('high-res', total_kimg=0.036)
    train(tmp_path / 'a', dataset, options)
    monkeypatch.undo()
    train(tmp_path / 'b', dataset, options)
    first, second = (checkpoint.read(tmp_path / run / checkpoint.FILE_NAME) for run in 'ab')
    assert int(first['bank']['next_chunk']) == int(second['bank']['next_chunk'])
    assert not torch.equal(first['modules']['G']['synthesis.b16.conv1.weight'], second['modules']['G']['synthesis.b16.conv1.weight'])


def test_a_run_that_was_killed_after_going_back_is_still_the_uninterrupted_one(tmp_path, dataset, monkeypatch):
    options = options_for('full', total_kimg=0.064)
    spoil(monkeypatch, 'discriminator_real_loss', [7])
    train(tmp_path / 'whole', dataset, options)
    monkeypatch.undo()
    spoil(monkeypatch, 'discriminator_real_loss', [7])
    tiny_run.kill_at_step(monkeypatch, 14)  # step 10, since four were made twice
    with pytest.raises(tiny_run.Killed):
        train(tmp_path / 'parts', dataset, options)
    train(tmp_path / 'parts', dataset, options, resume=True)
    tiny_run.assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('name, phase', [('generator_loss', 'Gmain'), ('discriminator_fake_loss', 'Dmain'), ('r1_penalty', 'Dreg')])
def test_a_lasting_one_stops_with_a_diagnosis(tmp_path, dataset, monkeypatch, name, phase):
    told = []
    spoil(monkeypatch, name, range(2, 1000), math.inf)
    with pytest.raises(UserError, match=rf'diverged at 0\.0\d kimg, again after going back(.|\n)*phase {phase}') as err:
        train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.048), echo=told.append)
    text = str(err.value)
    assert 'scores real' in text and '--gamma=1' in text and 'Learning rates: G 0.0025' in text and 'half the --lr' in text
    assert [line.split(':')[0] for line in told if 'WARNING' in line] == ['WARNING']
    content = checkpoint.read(tmp_path / 'run' / checkpoint.FILE_NAME)  # the last good one
    assert int(content['counters']['cur_nimg']) in (4, 20) and all(torch.isfinite(x).all() for x in content['modules']['G'].values())


def test_weights_that_are_not_finite(tmp_path, dataset, monkeypatch):
    original = phases.run_phase

    def run_phase(phase, *args):
        original(phase, *args)
        phase.params[3].data[0] = math.inf

    monkeypatch.setattr(phases, 'run_phase', run_phase)
    with pytest.raises(UserError, match=r'before there was a good state to go back to(.|\n)*G: 1 of \d+ tensors are not finite, the first is G\.'):
        train(tmp_path / 'run', dataset, options_for('full'))
    assert not checkpoint.files(tmp_path / 'run')


# The disk


@pytest.mark.parametrize('where, number', [('picture', errno.EROFS), ('pickle', errno.ENOSPC), ('stats', errno.EDQUOT)])
def test_a_write_that_fails_loses_nothing(tmp_path, dataset, monkeypatch, where, number):
    """At the end of the third tick the write fails; the state is saved all the same, and the resumed run is the uninterrupted one."""
    options, count = options_for('full', total_kimg=0.048), [0]

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] == 3:
            raise OSError(number, os.strerror(number), 'a file')

    def run(directory, **kwargs):
        with faults.explained(directory, options, 4):
            return train(directory, dataset, options, **kwargs)

    run(tmp_path / 'whole')
    with monkeypatch.context() as patch:
        if where == 'stats':
            original = stats.StatsWriter.write
            patch.setattr(stats.StatsWriter, 'write', lambda *args, **kwargs: failing() or original(*args, **kwargs))
        elif where == 'picture':
            patch.setattr('m2m_stylegan.training_loop.save_image_grid', failing)
        with pytest.raises(UserError, match=rf'cannot write a file: {os.strerror(number)}; .*\n?Go on with --resume='):
            run(tmp_path / 'parts', save_network=failing if where == 'pickle' else lambda path, state: None)
    assert int(checkpoint.read(tmp_path / 'parts' / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 36
    run(tmp_path / 'parts', resume=True)
    if where == 'stats':  # the one line that could not be written is missing
        (tmp_path / 'parts' / 'stats.jsonl').write_text((tmp_path / 'whole' / 'stats.jsonl').read_text())
    tiny_run.assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_other_errors_are_not_explained_away(tmp_path):
    for err in (OSError(errno.ENOENT, 'gone'), RuntimeError('a bug'), KeyError('x')):
        with pytest.raises(type(err)), faults.explained(tmp_path, options_for('full'), 4):
            raise err


# Memory, loader processes, clock


@pytest.mark.parametrize('batch_gpu, group, message', [
    (32, 4, '32 images per pass .* Try --batch-gpu=16'), (12, 4, 'Try --batch-gpu=4'), (4, 4, 'Try --batch-gpu=2'), (1, 4, 'There is no smaller')])
def test_out_of_memory_says_what_to_try(tmp_path, dataset, monkeypatch, batch_gpu, group, message):
    def run_phase(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nmore')

    monkeypatch.setattr(phases, 'run_phase', run_phase)
    options = options_for('full', batch_size=batch_gpu * 2, batch_gpu=batch_gpu)
    with pytest.raises(UserError, match=message) as err, faults.explained(tmp_path / 'run', options, group):
        train(tmp_path / 'run', dataset, options)
    assert 'Tried to allocate 2.00 GiB' in str(err.value) and 'more' not in str(err.value)
    assert not checkpoint.files(tmp_path / 'run')  # in the middle of a step there is no state to save


class Dying:
    """A dataset in whose loader process an item kills it."""

    def __init__(self, dataset, item):
        self.dataset, self.item, self.parent = dataset, item, os.getpid()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, idx):
        if idx == self.item and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.dataset[idx]

    def in_memory(self):
        return False

    def get_labels(self, indices):
        return self.dataset.get_labels(indices)


@pytest.mark.filterwarnings('ignore:.*use of fork')  # Python 3.12 on forking with threads
def test_a_loader_process_that_dies(tmp_path, dataset):
    options = options_for('full', total_kimg=1)
    message = r'A loader process ended \(DataLoader worker(.|\n)*--workers=0'
    with pytest.raises(UserError, match=message), faults.explained(tmp_path / 'run', options, 4):
        train(tmp_path / 'run', Dying(dataset, 5), options, workers=2)


def test_loader_processes_outlive_the_signal_to_the_group():
    """Slurm and Ctrl-C signal every process of the group; the loop must still get its data until it has saved."""
    pid = os.fork()
    if pid == 0:
        faults.ignore_signals(0)
        for number in faults.SIGNALS:
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize('step_s', [-3600, 3600])
def test_a_clock_that_is_set_changes_no_budget(tmp_path, dataset, monkeypatch, step_s):
    now = time.time()
    monkeypatch.setattr(time, 'time', lambda jumps=[]: jumps.append(0) or now + len(jumps) * step_s)
    options = options_for('full', total_kimg=1000, max_seconds=0.6, snapshot_seconds=0.2, snapshot_ticks=10 ** 6)
    state, reason = train(tmp_path / 'run', dataset, options)
    assert reason == 'time budget of 1s used'
    assert 0.6 <= state.elapsed_seconds < 10
    snapshots = [json.loads(line) for line in (tmp_path / 'run' / 'snapshots.jsonl').read_text().splitlines()]
    periods = [int(entry['elapsed_s'] / 0.2) for entry in snapshots[1:-1]]  # each of these was due because a period of the run's own time had ended
    assert snapshots[0]['cur_nimg'] == 4 and snapshots[-1]['cur_nimg'] == state.cur_nimg
    assert len(set(periods)) == len(periods) and all(period >= 1 for period in periods)
