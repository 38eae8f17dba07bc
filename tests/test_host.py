"""The host code base under the plugin, with a small host of our own (tests/mini_host) in the place of the official code."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import click
import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from click.testing import CliRunner
from pickle_assembler import call, program

from m2m_stylegan import host_patches, host_revisions, host_train, pickles, snapshots
from m2m_stylegan.errors import UserError
from m2m_stylegan.transfer_options import TransferOptions

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkout, and a network pickle that we wrote."""
    folder = tmp_path_factory.mktemp('host')
    shutil.copytree(ROOT / 'tests' / 'mini_host', folder / 'host', ignore=shutil.ignore_patterns('__pycache__'))
    G = tiny.generator(use_noise=False)
    snapshots.save(folder / 'net.pkl', G=G, D=tiny.discriminator(), G_ema=G)
    tiny.dataset_zip(folder / 'data.zip')
    return folder


def start(*words, env=None, cwd=None) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'M2M_OPS': 'ref', **(env or {})}
    return subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, cwd=cwd)


def hosted(folder, *words, force=True, options=()) -> subprocess.CompletedProcess:
    return start(ROOT / 'tools' / 'host.py', 'run', *(['--force'] if force else []), *options, f'--host={folder / "host"}', *words)


def same_tensors(net, other) -> bool:
    tensors, others = net.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def succeed(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def assert_right_picture(path, network):
    G = snapshots.load_G_ema(network)
    z = torch.from_numpy(np.random.RandomState(0).randn(1, G.z_dim)).float()
    expected = (G(z, torch.zeros(1, 0), noise_mode='const')[0].permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).numpy()
    assert abs(np.asarray(PIL.Image.open(path)) - expected).max() <= 1


def test_generate(folder, tmp_path):
    words = ['run', '--force', 'host/generate.py', '--network=net.pkl', f'--outdir={tmp_path}']
    done = succeed(start('-m', 'm2m_stylegan.host', *words, cwd=folder))
    assert_right_picture(tmp_path / 'seed0000.png', folder / 'net.pkl')
    assert done.stderr.count('under m2m_stylegan') == 1
    assert 'safe pickles' in done.stderr and 'compiled bias_act' in done.stderr and 'unknown revision, forced' in done.stderr
    assert 'is not changed' not in done.stderr


def test_unknown_revision_is_refused_with_all_differences(folder):
    done = hosted(folder, 'generate.py', '--help', force=False)
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    files = host_revisions.REVISIONS['stylegan2-ada-pytorch d72cc7d']
    assert all(f'* {path}: ' in done.stderr for path in files)
    assert '--force' in done.stderr


def test_known_revision(folder, monkeypatch):
    files = ('legacy.py', 'torch_utils/misc.py')
    ids = {path: host_revisions.git_id((folder / 'host' / path).read_bytes()) for path in files}
    monkeypatch.setattr(host_revisions, 'REVISIONS', {'stylegan2-ada-pytorch abc': ids, 'stylegan2-ada-pytorch def': {**ids, 'train.py': ''}})
    host = host_revisions.detect(folder / 'host')
    assert (host.name, host.differences) == ('stylegan2-ada-pytorch abc', ())
    host_revisions.check(host)


def test_line_ends_and_our_call_do_not_make_a_revision_unknown():
    data = b'\xef\xbb\xbf# a\nimport b\n'
    assert host_revisions.git_id(b'') == 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'  # Git's id of an empty file
    patched = b'\xef\xbb\xbf# a\r\nimport m2m_stylegan.host; m2m_stylegan.host.patch(__file__)\r\nimport b\r\n'
    assert host_revisions.blob_id(patched) == host_revisions.git_id(data)
    assert host_revisions.blob_id(patched + b'x') != host_revisions.git_id(data)


def test_what_is_no_checkout(tmp_path):
    done = hosted(tmp_path, 'generate.py')
    assert done.returncode == 1 and 'does not exist' in done.stderr
    with pytest.raises(UserError, match='no checkout of stylegan2-ada-pytorch or stylegan3'):
        host_revisions.detect(tmp_path)


def hostile_source(folder, path, canary):
    """A good network pickle whose source text leaves a trace where it is executed."""
    tree = pickles.load(folder / 'net.pkl')

    def poison(record):
        record.module_src = f'open({str(canary)!r}, "w").close()\n{record.module_src}'
        for child in record.state['_modules'].values():
            poison(child)
    for name in ('G', 'D', 'G_ema'):
        poison(tree[name])
    pickles.dump(tree, path)
    return path


def test_source_text_in_a_pickle_is_not_executed(folder, tmp_path):
    canary, network = tmp_path / 'canary', hostile_source(folder, tmp_path / 'net.pkl', tmp_path / 'canary')
    words = ['generate.py', f'--network={network}', f'--outdir={tmp_path}/out']
    succeed(hosted(folder, *words))
    assert_right_picture(tmp_path / 'out' / 'seed0000.png', network)
    assert not canary.exists()
    succeed(hosted(folder, *words, options=['--trust-pickles']))  # The trap works.
    assert canary.exists()


@pytest.mark.parametrize('script', ['generate.py', 'legacy.py'])
def test_a_pickle_that_calls_is_refused(folder, tmp_path, script):
    network, canary = tmp_path / 'net.pkl', tmp_path / 'canary'
    network.write_bytes(program(call('os.system', f'touch {canary}')))
    arguments = {'generate.py': [f'--network={network}', f'--outdir={tmp_path}'], 'legacy.py': [f'--source={network}', f'--dest={tmp_path}/new.pkl']}
    done = hosted(folder, script, *arguments[script])
    assert done.returncode == 1
    assert 'os.system' in done.stderr and '--trust-pickles' in done.stderr and str(network) in done.stderr
    assert 'Traceback' not in done.stderr
    assert not canary.exists()


def test_legacy_writes_what_we_read(folder, tmp_path):
    succeed(hosted(folder, 'legacy.py', f'--source={folder}/net.pkl', f'--dest={tmp_path}/new.pkl'))
    found, expected = snapshots.load(tmp_path / 'new.pkl'), snapshots.load(folder / 'net.pkl')
    for name in ('G', 'D', 'G_ema'):
        assert same_tensors(getattr(found, name), getattr(expected, name))


def test_stylegan3(folder, tmp_path):
    shutil.copytree(folder / 'host', tmp_path / 'host')
    (tmp_path / 'host' / 'training' / 'networks.py').unlink()
    done = succeed(hosted(tmp_path, 'generate.py', f'--network={folder}/net.pkl', f'--outdir={tmp_path}/out'))
    assert done.stderr.startswith('stylegan3 under')
    assert_right_picture(tmp_path / 'out' / 'seed0000.png', folder / 'net.pkl')


@pytest.mark.parametrize('gpus', [1, 2])
def test_train(folder, tmp_path, gpus):
    """Summary, sampler, events, pinned memory, second derivatives, Adam's betas, deepcopy and pickling of what was read; spawned processes."""
    words = [f'--outdir={tmp_path}/runs', '--data=x', f'--resume={folder}/net.pkl', f'--gpus={gpus}', '--mirror=yes']
    done = succeed(hosted(folder, 'train.py', *words))
    assert sorted(line.split(',')[0::2] for line in done.stdout.splitlines()) == [['2 steps', f' rank {rank}'] for rank in range(gpus)]
    assert 'conv2d_gradfix' not in done.stderr and 'is not changed' not in done.stderr
    assert done.stderr.count('under m2m_stylegan') == 1
    found = snapshots.load(next(tmp_path.glob('runs/*/network-snapshot-*.pkl')))
    assert not same_tensors(found.G, snapshots.load(folder / 'net.pkl').G)


@pytest.mark.parametrize('gpus', [1, 2])
def test_hand_over(folder, tmp_path, gpus):
    words = ['train.py', f'--outdir={tmp_path}/runs', f'--data={folder}/data.zip', f'--resume={folder}/net.pkl', '--batch=4', '--snap=1',
             '--aug=noaug', '--m2m-train=high-res', '--m2m-slice=8', '--m2m-bank=256', '--m2m-tick=0.008',
             '--m2m-device=cpu', f'--m2m-cache-dir={tmp_path}/cache', f'--gpus={gpus}']
    succeed(hosted(folder, *words, '--kimg=1', '--m2m-minutes=0.02'))
    run, = (tmp_path / 'runs').iterdir()
    options = json.loads((run / 'training_options.json').read_text())
    assert (options['m2m']['slice'], options['batch_size'], options['total_kimg'], options['num_gpus']) == (8, 4, 1, gpus)
    result = snapshots.load(max(run.glob('network-snapshot-*.pkl')))
    before = snapshots.load(folder / 'net.pkl').G
    same = [name for name, tensor in result.G.state_dict().items() if torch.equal(tensor, before.state_dict()[name])]
    assert any('b8' in name for name in same) and not any('b16.conv' in name and name.endswith('weight') for name in same)


def test_hand_over_lists_what_does_not_fit():
    given = {'outdir': 'runs', 'data': 'x', 'cfg': 'paper256', 'desc': 'y', 'glr': 0.1, 'dlr': 0.2}
    with pytest.raises(UserError) as caught:
        host_train.transfer_options(given, {'slice': 8})
    assert all(text in str(caught.value) for text in ('--cfg=paper256', '--desc has no counterpart', '--dlr', '--resume=PKL is missing'))


def test_hand_over_translates():
    given = {'outdir': 'runs', 'data': 'x', 'gpus': 1, 'cfg': 'stylegan2', 'glr': 0.1, 'resume': 'ffhq256', 'metrics': ['a', 'b'], 'mirror': True}
    expected = TransferOptions(outdir='runs', data='x', lr=0.1, network='ffhq256', metrics='a,b', mirror=True, train='low-res', slice=8)
    assert host_train.transfer_options(given, {'train': 'low-res', 'slice': 8}) == expected
    assert host_train.transfer_options({'outdir': 'r', 'resume': 'noresume', 'metrics': []}, {'train': 'full'}).network == 'none'


@pytest.mark.parametrize('args, expected', [(['--outdir=r'], {'outdir': 'r', 'kimg': 25}), (['--outdir=r', '--m2m-slice=8'], None)])
def test_train_gains_our_options(monkeypatch, args, expected):
    """Without one of them the host trains, with its defaults; with one we do, and its defaults do not count."""
    calls = []
    options = [click.Option(['--outdir']), click.Option(['--kimg'], type=int, default=25), click.Option(['--resume'], default='net.pkl')]
    command = host_train.extend(click.Command('train', params=options, callback=lambda **options: calls.append(options)))
    monkeypatch.setattr(host_train.transfer, 'run', lambda options, echo, command: calls.append(options))
    result = CliRunner().invoke(command, [*args, *([] if expected else ['--resume=x.pkl'])])
    assert result.exit_code == 0, result.output
    assert calls == ([{**expected, 'resume': 'net.pkl'}] if expected else [TransferOptions(outdir='r', network='x.pkl', slice='8')])
    text = CliRunner().invoke(command, ['--help']).output
    assert '--m2m-train' in text and '--m2m-slice' in text and '--m2m-kimg' not in text


def mini_module(name):
    spec = importlib.util.spec_from_file_location(f'mini_{name.replace("/", "_")}', ROOT / 'tests' / 'mini_host' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(name, only, **situation):
    """A module of the mini host with one of its patches."""
    module = mini_module(name)
    patch, = (patch for patch in host_patches.PATCHES if patch.module == name.replace('/', '.') and only in patch.what)
    patch.apply(module, host_patches.Situation(**situation))
    return module


def test_percentile():
    values = np.random.RandomState(0).randn(101)
    low, high = changed('metrics/perceptual_path_length', 'percentile').trimmed(values)
    assert (low, high) == (sorted(values)[1], sorted(values)[99])
    assert np.percentile.__module__ == 'numpy'


def test_sqrtm():
    matrix = np.array([[5.0, 4.0], [4.0, 5.0]])
    np.testing.assert_allclose(changed('metrics/frechet_inception_distance', 'sqrtm').root(matrix), [[2, 1], [1, 2]], atol=1e-12)


def test_cached_statistics(tmp_path):
    module = changed('metrics/metric_utils', 'statistics')
    stats = module.FeatureStats(capture_all=True, max_items=7)
    stats.features, stats.mean = [np.ones([2, 3], np.float32)], np.arange(3.0)
    stats.save(tmp_path / 'stats.pkl')
    found = module.FeatureStats.load(tmp_path / 'stats.pkl')
    assert isinstance(found, module.FeatureStats) and (found.capture_all, found.max_items) == (True, 7)
    np.testing.assert_array_equal(found.features[0], stats.features[0])
    np.testing.assert_array_equal(found.mean, stats.mean)
    (tmp_path / 'stats.pkl').write_bytes(program(call('os.getcwd')))
    with pytest.raises(UserError, match=r'os\.getcwd'):
        module.FeatureStats.load(tmp_path / 'stats.pkl')
    with pytest.raises(UserError, match=r'os\.getcwd'):
        module.get_feature_detector(tmp_path / 'stats.pkl')


def test_detectors_of_stylegan3(tmp_path):
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.Flatten()), tmp_path / 'vgg16.pt')
    module = changed('metrics/metric_utils', 'TorchScript', flavour=host_revisions.SG3, files=tmp_path)
    net = module.get_feature_detector('https://host/vgg16.pkl', device=torch.device('cpu'), num_gpus=1, rank=0, verbose=True)
    assert net(torch.ones(2, 3, 4)).shape == (2, 12)
    assert net is module.get_feature_detector('https://host/vgg16.pkl', device=torch.device('cpu'))


def test_grid_sample_has_a_second_derivative():
    module = changed('torch_utils/ops/grid_sample_gradfix', 'grid_sample')
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    turn = torch.tensor([[[0.9, 0.2, 0.0], [-0.2, 0.9, 0.1]]], dtype=torch.float64)
    grid = torch.nn.functional.affine_grid(turn, [1, 1, 4, 4], align_corners=False)
    assert torch.autograd.gradgradcheck(lambda x: module.grid_sample(x, grid), x)
    torch.testing.assert_close(module.grid_sample(x, grid.clone().requires_grad_()), module.grid_sample(x, grid))


@pytest.mark.parametrize('name', ['bias_act', 'upfirdn2d'])
def test_operators_are_ours_where_compiled(monkeypatch, name):
    from m2m_stylegan import ops
    states, seen, real = ['compiled'], [], getattr(ops, name)
    monkeypatch.setattr(ops, 'prepare', lambda kind: types.SimpleNamespace(state=states[-1]))
    monkeypatch.setattr(ops, name, lambda *args, **kwargs: (seen.append(name), real(*args, **kwargs))[1])
    original, routed = getattr(mini_module(f'torch_utils/ops/{name}'), name), getattr(changed(f'torch_utils/ops/{name}', name), name)
    arguments = {'x': torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))}
    arguments |= {'f': torch.tensor([1.0, 3.0])} if name == 'upfirdn2d' else {'b': torch.tensor([1.0, 2.0]), 'act': 'lrelu', 'clamp': 1}
    for state, impl, ours in [('compiled', 'cuda', True), ('reference', 'cuda', False), ('compiled', 'ref', False)]:
        states.append(state)
        seen.clear()
        torch.testing.assert_close(routed(**arguments, impl=impl), original(**arguments))
        assert bool(seen) == ours


def test_failed_plugin_is_not_tried_at_every_call(monkeypatch):
    module = changed('torch_utils/ops/upfirdn2d', 'upfirdn2d')
    for _ in range(3):
        module.upfirdn2d(torch.ones(1, 1, 4, 4), torch.ones(2), impl='ref')
    assert module.tries == ['init']


def test_plugin_is_found_by_name(monkeypatch):
    from torch.utils import cpp_extension
    built = types.ModuleType('mini_plugin')
    monkeypatch.setattr(cpp_extension, 'load', lambda name, sources: built)
    monkeypatch.delitem(sys.modules, 'mini_plugin', raising=False)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '7.0;9.0')
    assert changed('torch_utils/custom_ops', 'plugins').get_plugin('mini_plugin', []) is built
    monkeypatch.delitem(sys.modules, 'mini_plugin')


@pytest.mark.parametrize('archs, cuda, expected', [('7.0;7.5;9.0+PTX', '13.0', '7.5;9.0+PTX'), ('6.1 8.6', '13.2', '8.6'), ('7.0', '12.8', '7.0'),
                                                   ('9.0a;10.0f', '13.0', '9.0a;10.0f'), ('Hopper', '13.0', 'Hopper'), ('7.0', None, '7.0')])
def test_old_architectures_are_dropped(archs, cuda, expected):
    assert host_patches.supported_archs(archs, cuda) == expected


def test_without_gpu():
    """torch.device as scripts, annotations and isinstance use it; in a process of its own."""
    code = '''
import torch
from m2m_stylegan import host_patches
patch, = (patch for patch in host_patches.PATCHES if patch.module == 'torch')
patch.apply(torch, host_patches.Situation())
assert str(torch.device('cuda', 1)) == str(torch.device('cuda:0')) == 'cpu' and torch.device(type='cuda').type == 'cpu'
assert torch.device('meta').type == 'meta' and isinstance(torch.device('cpu'), torch.device) and not isinstance('cpu', torch.device)
with torch.device('meta'):
    assert torch.empty(1).is_meta
assert torch.ones(2).pin_memory().to(torch.device('cuda')).cuda().sum() == 2 and torch.nn.ReLU().cuda().training
torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); torch.cuda.max_memory_allocated()
assert torch.jit.script(lambda_module := torch.nn.ReLU())(torch.ones(1)) == 1
'''
    succeed(start('-W', 'ignore', '-c', code))


def test_stand_ins():
    """What is not installed can be imported, says what to do when it is used, and stands in where that is simple."""
    code = '''
import sys
from m2m_stylegan import host_stand_ins
for name in ('psutil', 'imageio', 'requests', 'pkg_resources', 'distutils'):
    sys.modules.pop(name, None)
host_stand_ins.importlib.util.find_spec = lambda name: None
assert sorted(host_stand_ins.stand_ins()) == ['distutils', 'imageio', 'pkg_resources', 'psutil', 'requests']
from distutils.util import strtobool
from pkg_resources import parse_version
import imageio, psutil, requests, os
assert [strtobool(text) for text in ('YES', '0')] == [1, 0]
assert parse_version('2.13.0+cpu') >= parse_version('1.12.0a') and not parse_version('1.9.1') >= parse_version('1.11')
assert 2**24 < psutil.Process(os.getpid()).memory_info().rss < 2**36
try:
    imageio.get_writer('x.mp4')
except ValueError as err:
    assert 'pip install imageio' in str(err)
else:
    raise AssertionError
'''
    succeed(start('-c', code))
