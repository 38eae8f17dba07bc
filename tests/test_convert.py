"""tools/convert.py and the formats it writes."""

import json
import os

import pytest
import safetensors
import safetensors.torch
import tf_pickles
import torch
from click.testing import CliRunner
from test_snapshots import assert_same, official_tree

from m2m_stylegan import convert, networks, pickles, snapshots
from tools.convert import main


@pytest.fixture
def source(tmp_path):
    tree, _, _ = official_tree('ada')
    pickles.dump(tree, tmp_path / 'in.pkl')
    return tmp_path / 'in.pkl'


def invoke(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_official_pickle_keeps_its_source_text(source, tmp_path):
    result = invoke(f'--network={source}', f'--dest={tmp_path / "new" / "out.pkl"}')
    assert result.exit_code == 0 and result.output.startswith(f'Wrote {tmp_path / "new" / "out.pkl"} (0.')
    before, after = snapshots.load(source), snapshots.load(tmp_path / 'new' / 'out.pkl')
    assert after.flavour == 'ada' and after.training_set_kwargs == {'path': 'x.zip'}
    assert after.augment_pipe.module_src == '# their pipe\n'
    for name in ('G', 'D', 'G_ema'):
        assert_same(getattr(after, name), getattr(before, name))


def test_tensorflow_becomes_official(tmp_path):
    (tmp_path / 'tf.pkl').write_bytes(tf_pickles.dumps(tuple(tf_pickles.network(name) for name in ('g_skip_cond', 'd_resnet_cond', 'g_skip_cond'))))
    assert invoke(f'--network={tmp_path / "tf.pkl"}', f'--dest={tmp_path / "out.pkl"}').exit_code == 0
    before, after = snapshots.load(tmp_path / 'tf.pkl'), snapshots.load(tmp_path / 'out.pkl')
    assert (before.flavour, after.flavour) == ('tf', 'm2m')
    for name in ('G', 'D', 'G_ema'):
        assert_same(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize('net, names', [('all', ['D', 'G', 'G_ema']), ('G_ema', ['G_ema']), ('D', ['D'])])
def test_safetensors(source, tmp_path, net, names):
    path = convert.convert(source, tmp_path / 'out.safetensors', net)
    with safetensors.safe_open(path, 'pt') as file:
        description = json.loads(file.metadata()['m2m_stylegan'])
    tensors = safetensors.torch.load_file(path)
    snapshot = snapshots.load(source)
    assert description['source_sha256'] == snapshot.sha256 and description['source_flavour'] == 'ada'
    assert sorted(description['networks']) == names == sorted({key.split('.')[0] for key in tensors})
    for name, entry in description['networks'].items():
        rebuilt = getattr(networks, entry['class'])(**entry['kwargs']).eval().requires_grad_(False)
        rebuilt.load_state_dict({key.removeprefix(f'{name}.'): value for key, value in tensors.items() if key.startswith(f'{name}.')})
        assert_same(rebuilt, getattr(snapshot, name))


def test_plain_state_dicts(source, tmp_path):
    snapshot = snapshots.load(source)
    single = torch.load(convert.convert(source, tmp_path / 'one.pt', 'G_ema'), weights_only=True)
    assert list(single) == list(snapshot.G_ema.state_dict())
    snapshot.G.load_state_dict(single)
    together = torch.load(convert.convert(source, tmp_path / 'all.pt'), weights_only=True)
    assert together.keys() == {f'{name}.{key}' for name in ('G', 'D', 'G_ema') for key in getattr(snapshot, name).state_dict()}
    assert torch.equal(together['D.b4.out.weight'], snapshot.D.b4.out.weight)


@pytest.mark.parametrize('args, message', [
    (['--dest={}/out.onnx'], r'--dest={}/out.onnx: the name must end in one of .pkl, .safetensors, .pt'),
    (['--dest={}/out.pkl', '--net=G_ema'],
     '--net=G_ema: an official .pkl always holds G, D and G_ema; leave out --net, or choose .safetensors or .pt'),
    (['--dest={}/bad.pkl', '--network={}/bad.pkl'], 'is not a usable network pickle'),
    (['--dest={}/in.pkl/out.pkl'], 'in.pkl'),
])
def test_mistakes(source, tmp_path, args, message):
    pickles.dump({}, tmp_path / 'bad.pkl')
    before = {child: child.read_bytes() for child in tmp_path.iterdir()}
    result = invoke(f'--network={source}', *(arg.format(tmp_path) for arg in args))
    assert result.exit_code == 1 and result.output.startswith('Error: ') and 'Traceback' not in result.output
    assert message.format(tmp_path) in result.output
    assert {child: child.read_bytes() for child in tmp_path.iterdir()} == before


def test_nothing_half_written_stays(source, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', full_disk)
    result = invoke(f'--network={source}', f'--dest={tmp_path / "out.safetensors"}')
    assert result.exit_code == 1 and 'No space left on device' in result.output
    assert os.listdir(tmp_path) == ['in.pkl']
