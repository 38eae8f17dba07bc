"""The command of the main job, end to end on tiny networks: what it writes, what it keeps, what it refuses."""

import dataclasses
import json
import re
import resource
import subprocess
import sys

import pytest
import tiny
import torch
from click.testing import CliRunner

from m2m_stylegan import checkpoint, downloads, resume, slicing, snapshots, transfer
from m2m_stylegan.errors import UserError
from tools.transfer import main


@pytest.fixture
def files(tmp_path):
    return tiny.files(tmp_path)


def run(tmp_path, *args, **options):
    options = {'outdir': tmp_path / 'runs', 'cache_dir': tmp_path / 'cache', 'kimg': 0.016, 'batch': 4, 'bank': 32, 'device': 'cpu',
               'train': 'high-res', **options}
    options = [f'--{name.replace("_", "-")}={value}' for name, value in options.items() if value is not None]
    return CliRunner().invoke(main, [*options, *args], catch_exceptions=False)


def test_high_res_transfer(tmp_path, files):
    result = run(tmp_path, **files, slice=8)
    assert result.exit_code == 0, result.output
    directory, = (tmp_path / 'runs').iterdir()
    assert directory.name == '00000-data-auto1-kimg0.016-batch4-resumecustom-m2m-high-res-slice8'
    written = {path.name for path in directory.iterdir() if 'tfevents' not in path.name}
    assert written == {'training_options.json', 'log.txt', 'reals.png', 'fakes_init.png', 'fakes000000.png', 'network-snapshot-000000.pkl',
                       'stats.jsonl', 'snapshots.jsonl', checkpoint.FILE_NAME, 'm2m-checkpoint.1.safetensors', 'before-after.png', '.lock'}
    before, after = snapshots.load(files['network']), snapshots.load(directory / 'network-snapshot-000000.pkl')
    for key in ['G', 'D', 'G_ema']:
        old, new = (getattr(snapshot, key).state_dict() for snapshot in (before, after))
        moved = {name for name in new if not torch.equal(old[name], new[name])}
        assert moved, key
        assert all(not slicing.is_low_res(name, 8) for name in moved), key
    assert after.training_set_kwargs['path'] == str(tmp_path / 'data.zip')
    log = (directory / 'log.txt').read_text()
    assert '"total_kimg": 0.016' in log and 'G.b8 ' in log and 'idle' in log and 'tick 0 ' in log and 'Result:' in log and '\r' not in log
    options = json.loads((directory / 'training_options.json').read_text())
    assert list(options)[:9] == ['num_gpus', 'image_snapshot_ticks', 'network_snapshot_ticks', 'metrics', 'random_seed', 'training_set_kwargs',
                                 'data_loader_kwargs', 'G_kwargs', 'D_kwargs']
    assert options['m2m']['network_sha256'] == before.sha256


def test_second_run_finds_the_cache(tmp_path, files, monkeypatch):
    assert run(tmp_path, **files, slice=8, seed=3).exit_code == 0
    calls = []
    original = transfer.feature_bank.make_chunk
    monkeypatch.setattr(transfer.feature_bank, 'make_chunk', lambda *args, **kwargs: calls.append(args[4]) or original(*args, **kwargs))
    assert run(tmp_path, **files, slice=8, seed=3).exit_code == 0
    assert calls == [0, 2]  # the probe of the value range, and one refresh of the bank: nothing of the cached part
    assert len(list((tmp_path / 'cache' / 'features').iterdir())) == 1
    assert run(tmp_path, **files, slice=4, seed=3).exit_code == 0
    assert len(list((tmp_path / 'cache' / 'features').iterdir())) == 2


def test_low_res_without_bypass(tmp_path, files):
    result = run(tmp_path, '--no-bypass', **files, slice=8, train='low-res', bank=None)
    assert result.exit_code == 0, result.output
    directory, = (tmp_path / 'runs').iterdir()
    before, after = snapshots.load(files['network']), snapshots.load(directory / 'network-snapshot-000000.pkl')
    for key in ['G', 'D', 'G_ema']:
        old, new = (getattr(snapshot, key).state_dict() for snapshot in (before, after))
        moved = {name for name in new if not torch.equal(old[name], new[name])}
        assert moved and all(slicing.is_low_res(name, 8) for name in moved), key
    assert 'mapping.w_avg' in moved


def test_snapshots_by_the_clock(tmp_path, files):
    assert run(tmp_path, **files, slice=8, snap_minutes=1e-5, tick=1000).exit_code == 0
    directory, = (tmp_path / 'runs').iterdir()
    lines = [json.loads(line) for line in (directory / 'snapshots.jsonl').read_text().splitlines()]
    assert [line['cur_nimg'] for line in lines] == [4, 8, 12, 16]
    assert [line['pkl'] for line in lines] == [f'network-snapshot-000000_{n:03d}.pkl' for n in (4, 8, 12, 16)]
    assert {path.name for path in directory.glob('*.pkl')} == {line['pkl'] for line in lines}
    assert lines == sorted(lines, key=lambda line: line['elapsed_s'])


def test_full_training_and_freezed(tmp_path, files):
    assert run(tmp_path, **files, train='full', bank=None, freezed=2, aug='fixed', p=0.5, augpipe='blit').exit_code == 0
    directory, = (tmp_path / 'runs').iterdir()
    assert directory.name == '00000-data-auto1-kimg0.016-batch4-fixed-p0.5-blit-resumecustom-freezed2'
    before, after = snapshots.load(files['network']), snapshots.load(directory / 'network-snapshot-000000.pkl')
    still = {name for name, param in after.D.named_parameters() if torch.equal(param, before.D.state_dict()[name])}
    assert still == {f'b16.{layer}.{kind}' for layer in ('fromrgb', 'conv0') for kind in ('weight', 'bias')}
    assert float(after.augment_pipe.state['_buffers']['p']) == 0.5


def test_from_scratch_then_resume(tmp_path, files):
    shape = {'cbase': 64, 'cmax': 8, 'latent_dim': 8, 'bank': None, 'train': 'full', 'network': 'none', 'data': files['data']}
    assert run(tmp_path, **shape).exit_code == 0
    result = run(tmp_path, resume='latest', kimg=0.032)
    assert result.exit_code == 0, result.output
    directory, = (tmp_path / 'runs').iterdir()
    assert int(checkpoint.read(directory / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 32
    whole = run(tmp_path, **{**shape, 'kimg': 0.032})
    assert whole.exit_code == 0
    other = max((tmp_path / 'runs').iterdir())
    first, second = (snapshots.load(path / 'network-snapshot-000000.pkl').G_ema.state_dict() for path in (directory, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_that_a_resumed_run_ignores_are_named(tmp_path, files):
    assert run(tmp_path, **files, slice=8).exit_code == 0
    result = run(tmp_path, '-n', resume='latest', **files, slice=8, kimg=0.032)
    assert result.exit_code == 0 and 'WARNING' not in result.output
    result = run(tmp_path, '-n', resume='latest', network=files['network'], data='other.zip', lr=1, metrics='kd_effnetlite0', kimg=0.032)
    assert result.exit_code == 0 and 'WARNING: --data=other.zip, --lr=1.0, --metrics=kd_effnetlite0: ignored.' in result.output


def test_a_run_directory_needs_no_outdir(tmp_path, files):
    assert run(tmp_path, **files, slice=8).exit_code == 0
    directory, = (tmp_path / 'runs').iterdir()
    result = run(tmp_path, outdir=None, resume=directory, kimg=0.032)
    assert result.exit_code == 0, result.output
    assert int(checkpoint.read(directory / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 32
    for wrong in (None, 'latest', files['network']):
        result = run(tmp_path, outdir=None, resume=wrong)
        assert result.exit_code == 1 and 'Only --resume=RUN_DIR goes without' in result.output


def test_torchrun_restarting_the_command_resumes_the_run_of_this_job(tmp_path, files, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'job 1')
    assert run(tmp_path, **files, slice=8).exit_code == 0
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert run(tmp_path, **files, slice=8, kimg=0.02).exit_code == 0
    directory, = (tmp_path / 'runs').iterdir()
    assert int(checkpoint.read(directory / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 20
    assert run(tmp_path, **files, slice=8, gamma=7).exit_code == 0  # another command that calls its job the same: torchrun has a default name
    assert len(list((tmp_path / 'runs').iterdir())) == 2
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'job 2')
    assert run(tmp_path, **files, slice=8).exit_code == 0
    assert len(list((tmp_path / 'runs').iterdir())) == 3


def test_the_batch_does_not_change_with_the_machine(tmp_path, files):
    assert run(tmp_path, **files, slice=8, batch=None).exit_code == 0
    directory, = (tmp_path / 'runs').iterdir()
    options = resume.resumed_options(transfer.TransferOptions(outdir='', device='cuda', gpus=4), directory)
    assert options.batch == 16 and transfer.stages(options, 16, torch.device('cuda'))[0].batch_size == 16
    assert transfer.stages(dataclasses.replace(options, batch=None), 16, torch.device('cuda'))[0].batch_size == 64  # what it would have become


@pytest.mark.parametrize('content', ['', '[]', '{"m2m": 3}', '{"m2m": {}}', '{"m2m": {"options": {"eval": "x"}}}', '[' * 100_000])
def test_resume_of_a_directory_that_is_not_ours(tmp_path, content):
    (tmp_path / 'training_options.json').write_text(content)
    result = run(tmp_path, resume=tmp_path)
    assert result.exit_code == 1 and 'not from this' in result.output and 'Traceback' not in result.output


def test_resume_from_a_pickle_and_then_from_elsewhere(tmp_path, files, monkeypatch):
    """--resume=PKL takes its weights, and a later --resume=RUN must find that same pickle from another working directory."""
    monkeypatch.chdir(tmp_path)
    result = run(tmp_path, network='demo', data='data.zip', resume='source.pkl', slice=8)
    assert result.exit_code == 0, result.output
    assert 'weights alone' in result.output and 'optimiser moments, augmentation strength, path length mean, counters' in result.output
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    result = run(tmp_path, resume='latest', kimg=0.032)
    assert result.exit_code == 0, result.output
    directory, = (tmp_path / 'runs').iterdir()
    assert int(checkpoint.read(directory / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 32
    before, after = snapshots.load(files['network']), snapshots.load(directory / 'network-snapshot-000000.pkl')
    assert torch.equal(before.G_ema.synthesis.b8.conv0.weight, after.G_ema.synthesis.b8.conv0.weight)
    snapshots.save(files['network'], G=tiny.generator(seed=7), D=tiny.discriminator(), G_ema=tiny.generator(seed=7))
    result = run(tmp_path, resume='latest', kimg=0.048)
    assert result.exit_code == 1 and f'source.pkl: {before.sha256} when the run was started' in result.output
    assert 'data_fingerprint' not in result.output
    tiny.dataset_zip(files['data'], seed=1)
    result = run(tmp_path, resume='latest', kimg=0.048)
    assert 'network_sha256 of ' in result.output and 'data_fingerprint of ' in result.output and 'start a new run' in result.output


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, files):
    assert run(tmp_path, **files, slice=8).exit_code == 0
    directory, = (tmp_path / 'runs').iterdir()
    holder = subprocess.Popen([sys.executable, '-c', f'''import fcntl
f = open({str(directory / '.lock')!r}, 'w')
fcntl.lockf(f, fcntl.LOCK_EX)
print('held', flush=True)
input()'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b'held\n'
        result = run(tmp_path, resume='latest', kimg=0.032)
    assert result.exit_code == 1 and 'is being trained by another process' in result.output
    (directory / '.m2m-checkpoint-abc.tmp.safetensors').write_bytes(b'left by kill -9')
    assert run(tmp_path, resume='latest', kimg=0.032, batch_gpu=2).exit_code == 0
    assert not list(directory.glob('.*.tmp*'))


def test_a_disk_that_takes_no_more(tmp_path, files):
    """The kernel refuses to let a file grow beyond 50 kB: no snapshot fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        result = run(tmp_path, **files, train='full', bank=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    directory, = (tmp_path / 'runs').iterdir()
    assert result.exit_code == 1 and f'cannot write {directory}' in result.output and 'File too large; make room' in result.output
    assert 'Traceback' not in result.output and not list(directory.glob('*.pkl')) and not list(directory.glob('.*.tmp*'))


def test_conditional_transfer(tmp_path):
    pickle = tmp_path / 'cond.pkl'
    tiny.save_pickle(pickle, c_dim=3)
    data = tiny.dataset_zip(tmp_path / 'data.zip', num_classes=3)
    assert run(tmp_path, network=pickle, data=data, cond=1, mirror=1, subset=9).exit_code == 0
    directory, = (tmp_path / 'runs').iterdir()
    assert '-cond-subset9-mirror-auto1' in directory.name
    result = run(tmp_path, network=pickle, data=data)
    assert result.exit_code == 1 and 'the network is conditional (3 label values): pass --cond=1' in result.output
    result = run(tmp_path, network=pickle, data=tiny.dataset_zip(tmp_path / 'two.zip', num_classes=2), cond=1)
    assert 'the network takes 3 label values, the dataset has 2' in result.output


def test_dry_run_writes_nothing(tmp_path, files):
    result = run(tmp_path, '-n', **files)
    assert result.exit_code == 0 and '"total_kimg": 0.016' in result.output and 'nothing was written' in result.output
    assert not (tmp_path / 'runs').exists() and not (tmp_path / 'cache').exists()


def test_contradictions_are_listed_at_once(tmp_path):
    with pytest.raises(UserError) as err:
        transfer.check_options(transfer.TransferOptions(
            outdir='x', aug='noaug', p=2.0, target=0.5, augpipe='bgc', train='full', slice=8, bank=15, cbase=3, kimg=0, gamma=-1,
            metrics='fid49k,none'))
    text = str(err.value)
    for part in ['--p is only used with --aug=fixed', '--p=2.0 must lie in [0, 1]', '--target is only used with --aug=ada',
                 '--augpipe has no meaning',
                 '--slice cuts the networks for --train=high-res, low-res and both', '--bank is only used', '--cbase shapes a new network',
                 '--kimg=0 must be positive',
                 '--gamma=-1 must be a number from 0 up', '--bank=15 must be a multiple of 16',
                 '--metrics=fid49k,none: unknown metrics fid49k; there are: fid50k_full']:
        assert part in text, part


def test_mismatched_data_is_refused_with_the_way_out(tmp_path, files):
    data = tiny.dataset_zip(tmp_path / 'gray8.zip', resolution=8, channels=1)
    result = run(tmp_path, network=files['network'], data=data)
    assert result.exit_code == 1
    assert 'the network makes 16 x 16 images, the dataset has 8 x 8: run python tools/dataset.py' in result.output
    assert 'the network makes images of 3 channels, the dataset has 1' in result.output
    assert 'Traceback' not in result.output and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('options, message', [
    ({'slice': 12}, '--slice=12: expected one of 4, 8, 16'),
    ({'slice': 16}, 'leaves no high-res block to train'),
    ({'device': 'tpu'}, '--device=tpu: expected auto, cpu, cuda or cuda:N'),
    ({'device': 'cuda:99'}, r'--device=cuda:99: PyTorch \S+ sees \d+ CUDA devices'),
    ({'cond': 1}, 'has no labels'),
    ({'batch': 6}, 'cannot be divided into the groups of 4 images'),
    ({'subset': 21}, '--subset=21: .* has only 20 images'),
    ({'batch_gpu': 3}, '--batch=4 must be a multiple of --batch-gpu=3'),
    ({'train': 'full', 'network': 'none', 'bank': None, 'batch': 6}, r'groups of 4 images'),
    ({'seed': -1}, r'--seed=-1 must be at least 0'),
    ({'train': 'full', 'bank': None, 'freezed': -1, 'pl_weight': -1},
     r'--pl-weight=-1.0 must be a number from 0 up.*--freezed=-1 must not be negative'),
    ({'train': 'full', 'bank': None, 'network': 'none', 'map_depth': 0, 'cbase': -1}, r'--cbase=-1 must be positive.*--map-depth=0 must be'),
    ({'train': 'full', 'bank': None, 'network': 'none', 'cbase': 8}, r'--cbase=8 leaves blocks without channels: choose at least 16'),
    ({'train': 'full', 'bank': None, 'network': 'none', 'resume': 'x.pkl'}, r'leave one of the two out'),
    ({'augpipe': 'bgcfnc'}, r'the filters of --augpipe=bgcfnc need 32 x 32: choose bgc'),
    ({'resume': 'nowhere'}, '--resume=nowhere: expected a run directory'),
    ({'resume': 'latest'}, 'no run directory in .* holds a checkpoint'),
    ({'network': 'missing.pkl'}, 'missing.pkl'),
    ({'data': 'missing.zip'}, 'missing.zip'),
])
def test_refused(tmp_path, files, options, message):
    result = run(tmp_path, **{**files, **options})
    assert result.exit_code == 1 and re.search(message, result.output.replace('\n', ' ')), result.output
    assert 'Traceback' not in result.output


def test_bundled_demo_fits_together():
    snapshot = snapshots.load(downloads.resolve('demo'))
    assert downloads.DEMO_PICKLE.stat().st_size <= 8e6
    transfer.check_match(snapshot.G_ema, transfer.ImageDataset(transfer.DEMO_DATA))
    assert snapshot.training_set_kwargs['path'] == 'personas64.zip'  # nobody's home directory


def test_corner_of_a_grid():
    assert transfer.corner_of((7, 4), list(range(28))) == ((7, 4), list(range(28)))  # 1024 px: smaller than the corner
    size, indices = transfer.corner_of((32, 32), list(range(1024)))
    assert size == (8, 8) and indices[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 32] and indices[-1] == 7 * 32 + 7


def test_help_needs_no_torch():
    result = CliRunner().invoke(main, ['--help'])
    assert result.exit_code == 0 and '--network' in result.output
