"""The comparison: what is run, skipped, resumed and refused, with a stand-in for the training; and one small real one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from click.testing import CliRunner

from m2m_stylegan import cells, checkpoint, compare, report_data, scores, slicing, snapshots
from m2m_stylegan.cells import Saved
from m2m_stylegan.compare_plan import CompareOptions, cell_options, command_line
from m2m_stylegan.errors import UserError
from tools.compare import main

HERE = Path(__file__).parent
RUNNER = [sys.executable, str(HERE / 'fake_transfer.py')]
pytest.importorskip('jinja2')
pytest.importorskip('matplotlib')


class FakeEvaluator:
    """Values that fall with time and differ by method and seed."""

    calls: ClassVar[list[str]] = []

    def __init__(self, data, names, num, device, batch, cache_dir, show):
        self.names = names

    def run(self, pkl):
        FakeEvaluator.calls.append(str(pkl))
        cell = re.search(r'/([a-z0-9-]+)-seed(\d)/', str(pkl))
        method, seed = cell.groups() if cell else ('', 0)
        nimg = int(''.join(re.findall(r'\d', Path(pkl).stem)) or 0)
        return {name: 100 / (1 + nimg / {'full': 500, 'high-res': 400}.get(method, 1000)) + int(seed) for name in self.names}

    def floor(self):
        return dict.fromkeys(self.names, 3.5)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An 8 x 8 pickle, a matching dataset, no real evaluation and no drawing."""
    orders = tmp_path / 'orders'
    orders.mkdir()
    (orders / 'checkpoint-name').write_text(checkpoint.FILE_NAME)
    snapshots.save(orders / 'source.pkl', G=tiny.generator(8, seed=1), D=tiny.discriminator(8), G_ema=tiny.generator(8, seed=2))
    tiny.dataset_zip(orders / 'data.zip', resolution=8)
    monkeypatch.setattr(compare.evaluate, 'Evaluator', FakeEvaluator)
    monkeypatch.setattr(compare.report, 'build', lambda folder: folder / 'report.html')
    monkeypatch.setattr(FakeEvaluator, 'calls', [])
    return orders


def options(files, **changes):
    standard = {'outdir': str(files.parent / 'out'), 'network': str(files / 'source.pkl'), 'data': str(files / 'data.zip'),
                'methods': ('full', 'high-res'), 'seeds': (0,), 'minutes': 3.0, 'evals': 3, 'num': 50,
                'training': {'batch': 4, 'slice': 4, 'device': 'cpu'}}
    return CompareOptions(**{**standard, **changes})


def run(files, echo=lambda text: None, **changes):
    return compare.run(options(files, **changes), echo, RUNNER)


def calls(files):
    path = files / 'calls.txt'
    return path.read_text().splitlines() if path.exists() else []


def results(files):
    return scores.read(files.parent / 'out')


def test_every_method_and_seed_once(files):
    run(files, methods=('full', 'high-res', 'swap'), seeds=(0, 1))
    assert calls(files) == ['full-seed0 new', 'high-res-seed0 new', 'full-seed1 new', 'high-res-seed1 new']
    found = results(files)
    assert {(s.method, s.seed, s.slot) for s in found} == {('source', None, 0), *(
        (method, seed, slot) for method in ('full', 'high-res', 'swap') for seed in (0, 1) for slot in (1, 2, 3))}
    last = next(s for s in found if (s.method, s.seed, s.slot) == ('high-res', 1, 3))
    assert (last.cur_nimg, last.elapsed_s, last.img_per_s, last.peak_cpu_gb, last.preparation_s) == (3605, 180.25, 20, 1.3, 5)
    assert last.metrics == {'fd_effnetlite0': 100 / (1 + 3605 / 400) + 1, 'kd_effnetlite0': 100 / (1 + 3605 / 400) + 1}
    assert last.disk_bytes > 1000 and not (files.parent / 'out/cells/full-seed0/cache').exists()
    assert all((files.parent / 'out/pictures' / s.picture).is_file() for s in found)
    assert len({s.picture for s in found}) == len(found)
    record = json.loads((files.parent / 'out/compare.json').read_text())
    assert record['about']['commands'] == [command_line(options(files, methods=('full', 'high-res', 'swap'), seeds=(0, 1)))]
    assert record['about']['floor'] == {'fd_effnetlite0': 3.5, 'kd_effnetlite0': 3.5}
    cell = json.loads((files.parent / 'out/cells/high-res-seed1/cell.json').read_text())
    assert '--train=full' not in cell['sessions'][0]['command'] and '--slice=4' in cell['sessions'][0]['command']
    assert cell['request']['versions']['torch'] == torch.__version__
    assert {block['changed'] for block in cell['outcome']['blocks']} == {0}  # the stand-in trains nothing


def test_finished_work_is_not_done_again(files):
    run(files)
    evaluated = len(FakeEvaluator.calls)
    run(files)
    assert len(calls(files)) == 2 and len(FakeEvaluator.calls) == evaluated == 7
    run(files, methods=('full', 'freezed2'), seeds=(0, 1))
    assert calls(files)[2:] == ['freezed2-seed0 new', 'full-seed1 new', 'freezed2-seed1 new'] and len(FakeEvaluator.calls) == evaluated + 9


@pytest.mark.parametrize('after', [0, 2])
def test_a_killed_run_is_reported_and_taken_up_again(files, after):
    (files / f'die-full-{after}').touch()
    with pytest.raises(UserError) as err:
        run(files)
    assert f'full, seed 0: stopped after {60 * after} of 180 s with exit status -9' in str(err.value)
    assert calls(files) == ['full-seed0 new', 'high-res-seed0 new']  # one failure stops no other run
    assert report_data.read(files.parent / 'out').missing == ['full, seed 0']
    run(files)
    assert calls(files)[2:] == [f'full-seed0 {"resumed" if after else "new"}']
    assert [s.slot for s in results(files) if s.method == 'full'] == [1, 2, 3]
    assert report_data.read(files.parent / 'out').missing == []
    assert len(json.loads((files.parent / 'out/cells/full-seed0/cell.json').read_text())['sessions']) == 2


def test_a_failing_run_shows_its_last_words(files):
    (files / 'fail-high-res').touch()
    with pytest.raises(UserError) as err:
        run(files)
    assert '1 of 2 runs failed' in str(err.value) and 'exit status 1' in str(err.value) and 'the machine is on fire' in str(err.value)


def test_resumed_with_no_time_left(files):
    """Starting up can take longer than what is left of the budget: the run then makes no further snapshot, and is finished all the same."""
    (files / 'die-full-2').touch()
    with pytest.raises(UserError):
        run(files, methods=('full',))
    compare.run(options(files, methods=('full',)), lambda text: None, [sys.executable, '-c', ''])
    assert [s.slot for s in results(files) if s.method == 'full'] == [1, 3]


def test_other_settings_are_refused(files):
    run(files, methods=('full',))
    tiny.dataset_zip(files / 'other.zip', num=12, resolution=8)
    with pytest.raises(UserError) as err:
        run(files, seeds=(0, 1), methods=('full',), minutes=6.0, num=60, training={'batch': 8, 'device': 'cpu'}, data=str(files / 'other.zip'))
    text = str(err.value)
    for part in ['compare.json: minutes: 3.0 there, 6.0 now', 'compare.json: num: 50 there, 60 now', 'compare.json: data_fingerprint: ',
                 'cells/full-seed0/cell.json: options.batch: 4 there, 8 now', 'cells/full-seed0/cell.json: options.snap_minutes: 1.0 there, 2.0 now']:
        assert part in text
    assert len(calls(files)) == 1
    snapshots.save(files / 'source.pkl', G=tiny.generator(8, seed=5), D=tiny.discriminator(8), G_ema=tiny.generator(8, seed=5))
    with pytest.raises(UserError, match='network_sha256'):
        run(files, methods=('full',), dry_run=True)


def test_kill_9_of_the_comparison(files):
    """The run goes on without its parent, keeps the lock, and counts as soon as it has ended."""
    (files / 'wait-full').touch()
    script = f'''
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import test_compare as t
from pathlib import Path
t.torch.set_num_threads({torch.get_num_threads()})
t.compare.evaluate.Evaluator = t.FakeEvaluator
t.compare.report.build = None
t.run(Path({str(files)!r}))'''
    parent = subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: calls(files))
    finally:
        parent.kill()
        parent.wait()
    said = []

    def echo(text):
        said.append(text)
        if 'waiting' in text:
            (files / 'wait-full').unlink()

    run(files, echo)
    assert 'is at work in' in said[0] and not (files / 'wait-full').exists()
    assert calls(files) == ['full-seed0 new', 'high-res-seed0 new']


def test_ctrl_c_is_passed_on_and_waited_for(files, tmp_path):
    """The process is told once, gets the time to save, and the comparison ends only after it."""
    child = tmp_path / 'child.py'
    child.write_text('import signal, sys, time, pathlib\n'
                     'def stop(*_):\n    time.sleep(0.3); pathlib.Path(sys.argv[1], "saved").touch(); sys.exit(0)\n'
                     'signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[1], "started").touch(); time.sleep(60)\n')
    script = f'''
import sys, pathlib
sys.path[:0] = [{str(HERE.parent)!r}]
from m2m_stylegan import cells
folder = pathlib.Path({str(tmp_path)!r})
with cells.locked(folder, print) as fd:
    cells.execute([sys.executable, {str(child)!r}, str(folder)], folder / 'console.txt', fd, 'x', 0, 60)'''
    parent = subprocess.Popen([sys.executable, '-c', script], stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / 'started').exists)
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=20)
    assert (tmp_path / 'saved').exists() and 'KeyboardInterrupt' in err


def wait_for(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def test_problems_are_listed_at_once(files):
    with pytest.raises(UserError) as err:
        run(files, methods=('full', 'half', 'full'), seeds=(), minutes=0, evals=-1, detector='eyes', swap_with='x.pkl',
            extra=('full=*.pkl', 'a/b=*.pkl', 'nothing=/nowhere/*.pkl'))
    text = str(err.value)
    for part in ['half is unknown; known are full, high-res, low-res, both, w, no-bypass, freezedN', 'none twice, got full, half, full',
                 '--seeds: expected at least one', '--minutes=0 must be positive', '--evals=-1 must be positive',
                 '--detector=eyes: expected one of efficientnet-lite0, inception', '--swap-with is only used with',
                 '--extra=full=*.pkl: expected name=pattern', '--extra=a/b=', '--extra=nothing=/nowhere/*.pkl: no file']:
        assert part in text
    with pytest.raises(UserError, match='add full, or name a pickle with --swap-with'):
        run(files, methods=('high-res', 'swap'))
    with pytest.raises(UserError, match='full: .*\n.*--p is only used'):
        run(files, training={'p': 0.5})
    assert not (files.parent / 'out').exists()


def test_options_reach_the_methods_that_they_apply_to(files):
    asked = options(files, minutes=5.0, evals=5, training={'slice': 8, 'bank': 32, 'batch': 4, 'mirror': True})

    def arguments(method):
        return cells.arguments(cell_options(asked, method, 3, Path('cell'), Path('net.pkl'), Path('data.zip')))

    common = ['--outdir=cell', '--network=net.pkl', '--data=data.zip']
    tail = ['--mirror=True', '--kimg=1000000.0', '--minutes=5.0', '--batch=4']
    assert arguments('full') == [*common, '--train=full', '--cache-dir=cell/cache', *tail, '--ema-rampup=0.05', '--snap-minutes=1.0', '--seed=3']
    assert '--freezed=10' in arguments('freezed10') and '--slice=8' not in arguments('freezed10')
    assert {'--slice=8', '--bank=32'} <= set(arguments('high-res'))
    assert {'--slice=8', '--no-bypass', '--batch=4'} <= set(arguments('no-bypass')) and '--bank=32' not in arguments('no-bypass')
    for method, at in [('low-res', '8'), ('w', 'w')]:
        assert {'--train=low-res', f'--slice={at}', '--mirror=True'} <= set(arguments(method))
        assert not {'--no-bypass', '--batch=4', '--bank=32'} & set(arguments(method))
    assert command_line(asked).startswith('python tools/compare.py --outdir=')
    assert command_line(asked).endswith('--methods=full,high-res --seeds=0 --num=50 --slice=8 --bank=32 --batch=4 --mirror=True')


def test_swap_layers():
    low, high = tiny.generator(seed=1), tiny.generator(seed=2)
    G = compare.swap_layers(low, high, 8)
    upper = slicing.tensor_names(G, 8, 'high-res')
    for name, tensor in G.state_dict().items():
        assert torch.equal(tensor, (high if name in upper else low).state_dict()[name]), name
    z, c = torch.randn(2, 6), torch.zeros(2, 0)
    ws = low.mapping(z, c)
    x, img = slicing.g_low(low, ws, 8, noise_mode='const')
    assert torch.equal(G(z, c, noise_mode='const'), slicing.g_high(high, x, img, ws, 8, noise_mode='const'))
    with pytest.raises(UserError, match='differ in the shape of'):
        compare.swap_layers(low, tiny.generator(32, seed=2), 8)


def test_swap_with_a_pickle_and_extra_snapshots(files):
    official = files / '00000-official'
    official.mkdir()
    for kimg in (0, 2):
        shutil.copy(files / 'source.pkl', official / f'network-snapshot-{kimg:06d}.pkl')
    with open(official / 'stats.jsonl', 'w') as f:
        for kimg, seconds in [(0.0, 4.0), (2.0, 70.0)]:
            means = {'Progress/kimg': kimg, 'Timing/total_sec': seconds, 'Timing/sec_per_kimg': 33.0}
            f.write(json.dumps({name: {'mean': mean} for name, mean in means.items()}) + '\n')
    (files / 'broken.pkl').write_bytes(b'cposix\nsystem\n')
    run(files, methods=('high-res', 'swap'), swap_with=str(official / 'network-snapshot-000002.pkl'),
        extra=(f'official={official}/*.pkl', f'broken={files}/broken.pkl'))
    found = {(s.method, Path(s.pkl).name): s for s in results(files)}
    assert [(s.cur_nimg, s.elapsed_s) for (method, _), s in found.items() if method == 'official'] == [(0, 4.0), (2000, 70.0)]
    assert found['official', 'network-snapshot-000002.pkl'].img_per_s == pytest.approx(1000 / 33)
    assert found['broken', 'broken.pkl'].metrics == {} and found['broken', 'broken.pkl'].error
    swap, = (s for (method, _), s in found.items() if method == 'swap')
    assert (swap.seed, swap.slot, swap.elapsed_s) == (None, None, None) and (files.parent / 'out' / swap.pkl).is_file()


def test_times_of_evaluation():
    def chosen(*elapsed):
        return {slot: entry.elapsed_s for slot, entry in scores.at_times([Saved(Path('x'), i, t) for i, t in enumerate(elapsed)], 50, 5).items()}

    assert chosen(0.1, 10.2, 20.3, 30.4, 40.5, 50.1) == {1: 10.2, 2: 20.3, 3: 30.4, 4: 40.5, 5: 50.1}
    assert chosen(10.2, 10.9, 20.3, 50.1, 50.2) == {1: 10.2, 2: 20.3, 5: 50.2}
    assert chosen(31.0, 41.0, 50.1) == {3: 31.0, 4: 41.0, 5: 50.1}  # prepared itself for half of the time
    assert chosen(9.999, 50.1) == {1: 9.999, 5: 50.1}  # rounded in the file
    assert chosen(49.0) == {5: 49.0} and chosen() == {}


def test_snapshots_of_a_run_that_was_killed_while_writing(tmp_path):
    for name in 'abcd':
        (tmp_path / f'{name}.pkl').touch()
    lines = [{'pkl': 'a.pkl', 'cur_nimg': 10, 'elapsed_s': 1.0}, {'pkl': 'b.pkl', 'cur_nimg': 20, 'elapsed_s': 2.0},
             {'pkl': 'c.pkl', 'cur_nimg': 30, 'elapsed_s': 3.0}, {'pkl': 'b.pkl', 'cur_nimg': 20, 'elapsed_s': 4.0},
             {'pkl': '../../d.pkl', 'cur_nimg': 40, 'elapsed_s': 5.0}, {'pkl': 'gone.pkl', 'cur_nimg': 50, 'elapsed_s': 6.0},
             {'pkl': 'a.pkl', 'cur_nimg': 60, 'elapsed_s': float('inf')}, {'pkl': 7, 'cur_nimg': 60, 'elapsed_s': 1}, [], None]
    (tmp_path / 'snapshots.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"pkl": "a.p')
    found = [(s.pkl, s.cur_nimg, s.elapsed_s) for s in cells.read_snapshots(tmp_path)]
    assert found == [(tmp_path / 'a.pkl', 10, 1.0), (tmp_path / 'b.pkl', 20, 4.0), (tmp_path / 'd.pkl', 40, 5.0)]
    assert cells.read_snapshots(tmp_path / 'nothing') == []


def test_dry_run_and_help(files):
    said = []
    assert run(files, said.append, dry_run=True) is None
    assert 'full, seed 0: to run\n  ' in said[0] and '6m 00s of training' in said[0] and not (files.parent / 'out').exists()
    result = CliRunner().invoke(main, ['--help'])
    assert result.exit_code == 0 and '--swap-with' in result.output and '--batch' in result.output
    result = CliRunner().invoke(main, ['--outdir=x', '--methods=full,quick', '--seeds=0-2', f'--network={files / "source.pkl"}'])
    assert result.exit_code == 1 and 'quick is unknown' in result.output


def test_a_real_one(files, monkeypatch):
    """Tiny networks, seconds of training: the stand-in's files are those of the real command, and trained blocks have changed."""
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]))
    training = {'batch': 4, 'bank': 32, 'slice': 4, 'device': 'cpu'}
    compare.run(options(files, methods=('high-res',), minutes=0.02, evals=2, training=training), print,
                [sys.executable, str(HERE.parent / 'tools/transfer.py')])
    last = next(s for s in results(files) if (s.method, s.slot) == ('high-res', 2))
    assert last.elapsed_s >= 1.2 and last.cur_nimg > 0 and last.img_per_s > 0 and last.peak_cpu_gb > 0 and last.preparation_s > 0
    outcome = json.loads((files.parent / 'out/cells/high-res-seed0/cell.json').read_text())['outcome']
    changed = {block['block']: block['changed'] / block['parameters'] for block in outcome['blocks']}
    assert changed['G.mapping'] == changed['G.b4'] == changed['D.b4'] == 0 and changed['G.b8'] > 0.9 and changed['D.b8'] > 0.9
