"""Several processes: the same gradients as one, the same run after a kill, one message for one failure."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import tiny_run
import torch
from click.testing import CliRunner

from m2m_stylegan import checkpoint, distributed
from m2m_stylegan.errors import UserError
from m2m_stylegan.training_loop import batches, seed_step
from tools.transfer import main

ROOT = Path(__file__).parents[1]
STEPS = {'total_kimg': 0.048}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return str(tiny.dataset_zip(tmp_path_factory.mktemp('data') / 'data.zip', num_classes=2))


def test_exchanges():
    codes, results = ranks.run(2, ranks.collectives)
    assert codes == [0, 0], results
    for result in results.values():
        assert result['from_main'] == 'of 0' and result['gather'] == [{'rank': 0}, {'rank': 1}] and result['max_each'] == [1, 0]
        assert result['average'][:2] == [[0.5, 0.5], 5.0] and np.isnan(result['average'][2][0])
        assert result['sum'] == [2.0, 1.0] and result['copied'] == 0.0 and result['size'] == 2


def test_a_process_alone_exchanges_nothing():
    x = torch.tensor([float('nan'), 2.0])
    distributed.average_([x])
    distributed.sum_(x)
    distributed.copy_from_main_([x])
    assert x[1] == 2 and distributed.max_each([3, 4]) == [3, 4] and distributed.gather('a') == ['a'] and distributed.from_main(max, 1, 2) == 2
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)


@pytest.mark.parametrize('phase', ['Gmain', 'Dmain', 'Dreg'])
def test_gradients_of_two_processes_are_those_of_one_on_the_whole_batch(phase):
    torch.manual_seed(0)
    latents = {'z': torch.randn(8, 6, dtype=torch.float64), 'c': torch.zeros(8, 0, dtype=torch.float64)}
    real = {'img': torch.randn(8, 3, 8, 8, dtype=torch.float64), 'c': latents['c']}
    codes, results = ranks.run(2, ranks.gradients, phase, latents, real, 0)
    assert codes == [0, 0], results
    whole = ranks.phase_gradients(phase, latents, real, 0)
    assert len(whole) > 5 and max(np.abs(grad).max() for grad in whole.values()) > 1e-3
    for result in results.values():
        assert result.keys() == whole.keys()
        for name, grad in whole.items():
            np.testing.assert_allclose(result[name], grad, rtol=1e-9, atol=1e-12, err_msg=name)


def test_path_length_gradients_are_the_mean_over_the_processes():
    """The running mean of the lengths is each process's own, as in the official code; so is the noise that the images are weighted with."""
    torch.manual_seed(0)
    latents = {'z': torch.randn(8, 6, dtype=torch.float64), 'c': torch.zeros(8, 0, dtype=torch.float64)}
    codes, results = ranks.run(2, ranks.gradients, 'Greg', latents, {'img': latents['z']}, 0)
    assert codes == [0, 0], results
    parts = [ranks.phase_gradients('Greg', {k: v[r::2] for k, v in latents.items()}, {}, r) for r in range(2)]
    assert len(results[0]) > 5
    for name, grad in results[0].items():
        np.testing.assert_allclose(grad, (parts[0][name] + parts[1][name]) / 2, rtol=1e-9, atol=1e-12, err_msg=name)


def test_seeds_and_order_of_images_are_the_official_ones(data, monkeypatch):
    options = tiny_run.options_for('full', num_gpus=2, batch_size=8, seed=3)
    state = tiny_run.State(None, None, None, None, batch_idx=5)
    drawn = {}
    for rank in range(2):
        monkeypatch.setattr(distributed, 'rank', lambda rank=rank: rank)
        drawn[rank] = seed_step(options, state).randint(1 << 30), float(torch.randn([]))
        single = tiny_run.options_for('full', seed=3 * 2 + rank)
        monkeypatch.setattr(distributed, 'rank', lambda: 0)
        assert drawn[rank] == (seed_step(single, state).randint(1 << 30), float(torch.randn([])))
    assert drawn[0] != drawn[1]
    dataset = tiny_run.ImageDataset(data, use_labels=True)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, 'rank', lambda rank=rank: rank)
        parts.append(next(batches(dataset, options, 16, tiny_run.CPU, 0))['img'])
    monkeypatch.undo()
    whole = next(batches(dataset, tiny_run.options_for('full', batch_size=8, seed=3), 16, tiny_run.CPU, 0))['img']
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_killed_and_resumed_run_of_two_equals_the_uninterrupted_one(tmp_path, data):
    """A process dies in the middle of a step; the other one ends, and both go on from the last checkpoint."""
    codes, whole = ranks.run(2, ranks.training, str(tmp_path / 'whole'), data, STEPS, False)
    assert codes == [0, 0], whole
    codes, results = ranks.run(2, ranks.training, str(tmp_path / 'parts'), data, STEPS, False, 1, 9)
    assert codes == [distributed.PEERS_LOST, -signal.SIGKILL] and results == {}
    codes, resumed = ranks.run(2, ranks.training, str(tmp_path / 'parts'), data, STEPS, True)
    assert codes == [0, 0], resumed
    tiny_run.assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    for result in (*whole.values(), *resumed.values()):  # every process holds the same weights, and the same p
        assert result[0] == '0.048 kimg reached' and result[2] == whole[0][2]
        assert all(np.array_equal(x, whole[0][1][name]) for name, x in result[1].items())
    (*_, own0, means0), (*_, own1, means1) = whole[0], whole[1]
    assert own0 != own1 and means0 == means1 == [(a[0] + b[0]) / (a[1] + b[1]) for a, b in zip(own0, own1, strict=True)]
    parts = checkpoint.read(tmp_path / 'whole' / checkpoint.FILE_NAME)['ranks']
    assert sorted(parts) == ['0', '1'] and not torch.equal(parts['0']['pl_mean'], parts['1']['pl_mean'])
    last = tiny_run.read_stats(tmp_path / 'whole')[-1]
    assert last['Loss/scores/real']['num'] % 2 == 0 and len(tiny_run.read_stats(tmp_path / 'whole')) == 4  # written once


def test_going_on_with_another_number_of_processes(tmp_path, data):
    codes, results = ranks.run(2, ranks.training, str(tmp_path / 'run'), data, {'total_kimg': 0.020}, False)
    assert codes == [0, 0], results
    told, dataset = [], tiny_run.ImageDataset(data, use_labels=True)
    state, _ = tiny_run.train(tmp_path / 'run', dataset, tiny_run.options_for('full', total_kimg=0.024), resume=True, echo=told.append)
    assert state.cur_nimg == 24 and 'written by 2 processes and is read by 1' in told[0]


def test_a_signal_to_one_process_stops_all_in_the_same_step(tmp_path, data):
    codes, results = ranks.run(2, ranks.stop_by_signal, str(tmp_path / 'run'), data)
    assert codes == [0, 0] and set(results.values()) == {'SIGTERM received'}


# The command line


def command(tmp_path, data, *args):
    pickle = tmp_path / 'source.pkl'
    tiny.save_pickle(pickle, c_dim=2)
    return [sys.executable, str(ROOT / 'tools' / 'transfer.py'), f'--network={pickle}', f'--data={data}', f'--outdir={tmp_path / "runs"}',
            f'--cache-dir={tmp_path / "cache"}', '--cond=1', '--train=high-res', '--batch=8', '--bank=32', '--slice=8', '--device=cpu', '--gpus=2',
            *args]


def test_gpus_2_from_the_command_line(tmp_path, data):
    """Started, and told to stop by SIGUSR1: one log, one set of files, saved within a step."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen(command(tmp_path, data, '--kimg=1000'), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob(f'runs/*/{checkpoint.FILE_NAME}')):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and output.count('Stopped: SIGTERM received') == 1 and output.count('Result: ') == 1, output
    directory, = (tmp_path / 'runs').iterdir()
    assert '-auto2-' in directory.name and '"num_gpus": 2' in (directory / 'training_options.json').read_text()
    content = checkpoint.read(directory / checkpoint.FILE_NAME)
    assert int(content['counters']['cur_nimg']) % 8 == 0 and len(content['ranks']) == 2


def commands_naming(path) -> list[str]:
    """Command lines of all running processes that name this path."""
    found = []
    for file in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):  # It has just ended.
            found.append(file.read_bytes().decode(errors='replace'))
    return [line for line in found if str(path) in line]


@pytest.mark.skipif(sys.platform != 'linux', reason='needs prctl and /proc')
@pytest.mark.parametrize('moment', ['training', 'starting'])
def test_kill_9_of_the_launcher_ends_all_processes(tmp_path, data, moment):
    """torchrun's launcher starts them in sessions of their own, where nothing that happens to it reaches them."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen(command(tmp_path, data, '--kimg=1000'), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(commands_naming(tmp_path)) < 3 or (moment == 'training' and not list(tmp_path.glob(f'runs/*/{checkpoint.FILE_NAME}'))):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while commands_naming(tmp_path):
        assert time.monotonic() < deadline, commands_naming(tmp_path)
        time.sleep(0.05)
    assert moment == 'training' or not (tmp_path / 'runs').exists()


@pytest.fixture
def launch():
    """distributed.launch of a few lines of Python; the launcher changes signal handlers and does not restore them."""
    saved = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)}
    yield lambda code: distributed.launch(2, [sys.executable, '-c', 'import json, os, signal, sys, time\nrank = int(os.environ["RANK"])\n' + code])
    for number, handler in saved.items():
        signal.signal(number, handler)


FAILS = '''
if rank == 0:
    time.sleep(60)
message = {'message': 'UserError: data.zip is damaged', 'extraInfo': {'py_callstack': 'Traceback', 'timestamp': '1'}}
json.dump({'message': message}, open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w'))
sys.exit(1)'''


@pytest.mark.parametrize('code, told', [
    (FAILS, 'data.zip is damaged'), (FAILS.replace('UserError', 'KeyError'), 'Traceback'),
    ('time.sleep(60 - 60 * rank)\nsys.exit(3)', 'exit status 3'),
    ('time.sleep(60 - 60 * rank)\nos.kill(os.getpid(), 9)', 'SIGKILL')], ids=['user error', 'bug', 'exit', 'kill'])
def test_one_failure_ends_all_with_one_message(launch, capfd, code, told):
    start = time.monotonic()
    with pytest.raises(UserError, match=f'^Process 1 of 2 failed, and the others were ended with it:\n.*{told}'):
        launch(code)
    assert time.monotonic() - start < 30
    assert 'Traceback' not in capfd.readouterr().err


def test_launch_passes_signals_on_and_waits(launch, tmp_path):
    code = f'''
def leave(number, frame):
    open({str(tmp_path)!r} + f'/left{{rank}}', 'w').close()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
open({str(tmp_path)!r} + f'/here{{rank}}', 'w').close()
time.sleep(60)'''

    def send():
        while len(list(tmp_path.glob('here*'))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=send, daemon=True).start()
    launch(code)
    assert len(list(tmp_path.glob('left*'))) == 2


@pytest.mark.parametrize('error', [UserError('data.zip is damaged'), distributed.PeersLost('Connection closed')])
def test_a_process_hands_its_error_over_and_says_nothing_itself(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / 'error.json'))
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, timeout: None)
    with pytest.raises(SystemExit) as left, distributed.session():
        raise error
    lost = isinstance(error, distributed.PeersLost)
    assert left.value.code == (distributed.PEERS_LOST if lost else 1)
    assert (tmp_path / 'error.json').exists() != lost and capsys.readouterr() == ('', '')
    if not lost:
        assert json.loads((tmp_path / 'error.json').read_text())['message']['message'] == 'UserError: data.zip is damaged'


@pytest.mark.parametrize('args, message', [
    (['--batch=9'], '--batch=9 must be a multiple of --gpus=2'), (['--batch-gpu=3'], '--batch=8 must be a multiple of --batch-gpu=3 times --gpus=2')])
def test_shares_must_be_whole(tmp_path, data, args, message):
    result = CliRunner().invoke(main, [*command(tmp_path, data)[2:], '--dry-run', *args])
    assert result.exit_code == 1 and message in result.output


@pytest.mark.parametrize('exitcodes, number', [({0: 75, 1: -9}, 1), ({0: 1, 1: 75}, 0), ({0: 3, 1: 3}, 0)])
def test_the_cause_is_the_process_that_failed_by_itself(exitcodes, number):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    failures = {rank: ProcessFailure(rank, 100 + rank, code, 'no file') for rank, code in exitcodes.items()}
    assert distributed._cause(failures, 2).startswith(f'Process {number} of 2 failed')


def test_gpus_in_a_program_need_a_command():
    from m2m_stylegan import transfer

    with pytest.raises(UserError, match='torchrun'):
        transfer.run(transfer.TransferOptions(outdir='x', gpus=2))
