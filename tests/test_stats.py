import json
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from m2m_stylegan.stats import Collector, StatsWriter, _say_once, format_time

NAN = math.nan


def closed(**reports):
    collector = Collector()
    for name, values in reports.items():
        for value in values:
            collector.report(name, value)
    collector.update()
    return collector


@pytest.mark.parametrize(
    'values, num, mean, std',
    [
        ([3.0], 1, 3.0, 0.0),
        ([[1, 2, 3, 4]], 4, 2.5, math.sqrt(1.25)),
        ([1, [2.0, 3.0], torch.tensor([[4]])], 4, 2.5, math.sqrt(1.25)),
        ([torch.tensor([True, False, False, True])], 4, 0.5, 0.5),
        ([torch.tensor([1.0, -1.0], dtype=torch.float16)], 2, 0.0, 1.0),
        ([0.1, 0.1, 0.1], 3, 0.1, 0.0),
        ([NAN, 1.0], 2, NAN, NAN),
        ([math.inf, 1.0], 2, NAN, NAN),
        ([[1e200, 1e200]], 2, 1e200, NAN),
        ([[1e200, -1e200]], 2, 0.0, NAN),
    ],
)
def test_moments_by_hand(values, num, mean, std):
    found = closed(x=values).as_dict()['x']
    assert found == pytest.approx({'num': num, 'mean': mean, 'std': std}, nan_ok=True, abs=1e-8)
    assert isinstance(found['num'], int) and closed(x=values).mean('x') == pytest.approx(mean, nan_ok=True)


def test_moments_against_numpy():
    x = torch.randn(1000, 3) * 0.01 + 25_000  # such as Progress/kimg: float32 squares would lose the deviation
    found = closed(x=x.split(100)).as_dict()['x']
    expected = x.double().numpy()
    assert found['num'] == 3000
    assert found['mean'] == pytest.approx(np.mean(expected), rel=1e-12) and found['std'] == pytest.approx(np.std(expected), rel=1e-3)


def test_ticks():
    collector = Collector()
    assert collector.as_dict() == {} and math.isnan(collector.mean('x'))
    collector.report('x', [1.0, 3.0])
    assert collector.as_dict() == {} and math.isnan(collector.mean('x'))
    collector.update()
    collector.report('y', 5.0)
    collector.report('x', torch.zeros(0))
    collector.update()
    # Nothing new for x: kept from before.
    assert collector.as_dict() == {'x': {'num': 2, 'mean': 2.0, 'std': 1.0}, 'y': {'num': 1, 'mean': 5.0, 'std': 0.0}}
    collector.report('x', 7.0)
    collector.update()
    assert collector.as_dict()['x'] == {'num': 1, 'mean': 7.0, 'std': 0.0} and collector.mean('y') == 5.0


def test_a_reported_tensor_may_change_afterwards_and_keeps_no_graph():
    x = torch.ones(2, requires_grad=True)
    collector = Collector()
    collector.report('x', x * 2)
    buffer = torch.ones(3)
    collector.report('y', buffer)
    buffer.zero_()
    assert not any(m.requires_grad for m in collector.state_dict()['pending'].values())
    collector.update()
    assert collector.mean('x') == 2 and collector.mean('y') == 1


def test_report_stays_on_the_device():
    # The meta device has no values: whatever reads one on the host raises.
    collector = Collector()
    collector.report('x', torch.ones(3, device='meta'))
    collector.report('x', torch.ones(2, device='meta'))


def test_resume_equals_uninterrupted(tmp_path):
    def first(collector):
        collector.report('x', [1.0, 2.0])
        collector.report('y', 4.0)
        collector.update()
        collector.report('x', [3.0, 5.0])

    def second(collector):
        collector.report('x', 10.0)
        collector.update()
        return collector.as_dict()

    whole, before, after = Collector(), Collector(), Collector()
    first(whole)
    first(before)
    torch.save(before.state_dict(), tmp_path / 'state.pt')
    after.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    assert second(after) == second(whole) == {'x': {'num': 3, 'mean': 6.0, 'std': pytest.approx(math.sqrt(26 / 3))}, 'y': whole.as_dict()['y']}


def report_in_process(rank, store, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    collector = Collector()
    collector.report('shared', [1.0, 2.0] if rank == 0 else [6.0])
    collector.report(f'only{rank}', float(rank))
    collector.update()
    collector.update()
    # The group is left to the end of the process: destroying it right after a collective can deadlock before torch 2.8 (PyTorch pull 154976).
    (folder / f'{rank}.json').write_text(json.dumps(collector.as_dict()))


def test_processes_are_summed_even_with_different_names(tmp_path):
    mp.start_processes(report_in_process, (tmp_path / 'store', tmp_path), nprocs=2, start_method='fork')
    found = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]['shared'] == {'num': 3, 'mean': 3.0, 'std': pytest.approx(math.sqrt(14 / 3))}
    assert found[0]['only0']['mean'] == 0 and found[0]['only1'] == {'num': 1, 'mean': 1.0, 'std': 0.0}


STATS = {'Loss/G/loss': {'num': 2, 'mean': 1.5, 'std': 0.5}, 'Loss/r1_penalty': {'num': 0, 'mean': NAN, 'std': NAN}}


def test_jsonl_is_official_and_appended(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # import raises ImportError
    _say_once.cache_clear()
    for _ in range(2):
        writer = StatsWriter(tmp_path)
        writer.write(STATS, cur_nimg=4096, elapsed_s=12.5)
        assert (tmp_path / 'stats.jsonl').read_text().endswith('}\n')  # complete after each tick
        writer.write_metrics({'fid50k_full': 3.5}, cur_nimg=4096, elapsed_s=12.5)
        writer.close()
    assert capsys.readouterr().out.count('the package tensorboard is not installed') == 1  # told once
    lines = (tmp_path / 'stats.jsonl').read_text().splitlines()
    assert len(lines) == 2 and '"mean": NaN' in lines[0]
    line = json.loads(lines[1])
    assert list(line) == [*STATS, 'timestamp'] and line['timestamp'] > 1.6e9
    assert line['Loss/G/loss'] == STATS['Loss/G/loss']
    assert [p.name for p in tmp_path.iterdir()] == ['stats.jsonl']


class FakeSummaryWriter:
    def __init__(self, run_dir):
        self.run_dir, self.calls = run_dir, []
        type(self).last = self

    def add_scalar(self, name, value, global_step, walltime):
        self.calls.append((name, value, global_step, walltime))

    def flush(self):
        self.calls.append('flush')

    def close(self):
        self.calls.append('close')


def test_tfevents_get_the_means(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=FakeSummaryWriter))
    writer = StatsWriter(tmp_path)
    writer.write({'Loss/G/loss': STATS['Loss/G/loss']}, cur_nimg=4999, elapsed_s=12.5)
    writer.write_metrics({'fid50k_full': 3.5}, cur_nimg=5000, elapsed_s=13)
    writer.close()
    assert FakeSummaryWriter.last.run_dir == tmp_path
    expected = [('Loss/G/loss', 1.5, 4, 12.5), 'flush', ('Metrics/fid50k_full', 3.5, 5, 13), 'flush', 'close']
    assert FakeSummaryWriter.last.calls == expected
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    'seconds, text',
    [
        (0, '0s'),
        (12, '12s'),
        (59.4, '59s'),
        (59.6, '1m 00s'),
        (185, '3m 05s'),
        (3599.7, '1h 00m 00s'),
        (3723, '1h 02m 03s'),
        (86399, '23h 59m 59s'),
        (86400, '1d 00h 00m'),
        (2 * 86400 + 3 * 3600 + 4 * 60 + 59, '2d 03h 04m'),
        (100 * 86400, '100d 00h 00m'),
    ],
)
def test_format_time(seconds, text):
    assert format_time(seconds) == text
