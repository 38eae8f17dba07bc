"""m2m_stylegan/generate.py with tools/generate.py and tools/style_mixing.py."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from click.testing import CliRunner

from m2m_stylegan import generate, snapshots
from m2m_stylegan.errors import UserError
from m2m_stylegan.images import to_uint8
from tools import generate as generate_tool
from tools import style_mixing as style_mixing_tool

ROOT = Path(__file__).parents[1]


def save(path, G):
    D = tiny.discriminator(G.img_resolution, c_dim=G.c_dim, img_channels=G.img_channels)
    snapshots.save(path, G=G, D=D, G_ema=G)
    return path


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('networks')
    made = {'plain': tiny.generator(num_fp16_res=2), 'cond': tiny.generator(c_dim=3), 'grey': tiny.generator(img_channels=1),
            'odd': tiny.generator(img_channels=2), 'dot': tiny.generator(4)}
    return {name: (save(folder / f'{name}.pkl', G), G) for name, G in made.items()}


def invoke(tool, *args):
    return CliRunner().invoke(tool.main, [str(arg) for arg in args])


def pixels(path):
    return np.asarray(PIL.Image.open(path)).astype(int)


def expected_pixels(G, ws):
    """[HWC] or [HW], computed in one go."""
    img = to_uint8(G.synthesis(ws, noise_mode='const', force_fp32=True))[0].permute(1, 2, 0).numpy().astype(int)
    return img[:, :, 0] if G.img_channels == 1 else img


def official_z(seed, z_dim=6):
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim)).float()


@pytest.mark.parametrize('text, expected', [
    ('0', [0]), ('3,1,3', [3, 1, 3]), ('5-8', [5, 6, 7, 8]), ('0, 3,5-6', [0, 3, 5, 6]), ('7-7', [7]), ('4294967295', [2 ** 32 - 1]),
])
def test_numbers(text, expected):
    assert generate.parse_numbers(text, '--seeds') == expected


@pytest.mark.parametrize('text, found', [
    ('', ''), ('1,,2', ''), ('a', 'a'), ('-1', '-1'), ('8-5', '8-5'), ('1.5', '1.5'), ('4294967296', '4294967296'), ('1_0', '1_0'), ('٣', '٣'),
    ('0-4294967295', '0-4294967295'), ('0-999999,7', '7'), ('9' * 5000, '9' * 5000),
])
def test_bad_numbers(text, found):
    with pytest.raises(UserError) as err:
        generate.parse_numbers(text, '--seeds')
    assert str(err.value).startswith(f'--seeds={text}: expected whole numbers from 0 to 4294967295') and str(err.value).endswith(f'found {found!r}')


@pytest.mark.parametrize('batch', [1, 2, 5])
def test_one_seed_one_picture_whatever_the_batch(networks, tmp_path, batch):
    path, G = networks['plain']
    result = invoke(generate_tool, f'--network={path}', '--seeds=0,2-3', '--trunc=0.7', f'--outdir={tmp_path}', f'--batch={batch}')
    assert result.exit_code == 0 and result.output == f'Wrote 3 images to {tmp_path}: seed0000.png, seed0002.png, seed0003.png\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['seed0000.png', 'seed0002.png', 'seed0003.png']
    for seed in (0, 2, 3):
        ws = G.mapping(official_z(seed), torch.zeros(1, 0), truncation_psi=0.7)
        assert abs(pixels(tmp_path / f'seed{seed:04d}.png') - expected_pixels(G, ws)).max() <= 1


@pytest.mark.parametrize('trunc', ['nan', 'inf'])
def test_truncation_is_a_number(networks, tmp_path, trunc):
    path, _ = networks['grey']
    for tool, options in [(generate_tool, ['--seeds=0']), (style_mixing_tool, ['--rows=0', '--cols=1'])]:
        result = invoke(tool, f'--network={path}', f'--trunc={trunc}', f'--outdir={tmp_path / "out"}', *options)
        assert result.exit_code == 1 and f'--trunc={trunc}: expected a number' in result.output and not list(tmp_path.glob('out/*.png'))


def test_grey_and_conditional(networks, tmp_path):
    grey, G = networks['grey']
    assert invoke(generate_tool, f'--network={grey}', '--seeds=1', f'--outdir={tmp_path}/grey').exit_code == 0
    assert abs(pixels(tmp_path / 'grey' / 'seed0001.png') - expected_pixels(G, G.mapping(official_z(1), None))).max() <= 1
    cond, G = networks['cond']
    for label in (0, 2):
        assert invoke(generate_tool, f'--network={cond}', '--seeds=1', f'--class={label}', f'--outdir={tmp_path}/{label}').exit_code == 0
        ws = G.mapping(official_z(1), torch.eye(3)[[label]])
        assert abs(pixels(tmp_path / f'{label}' / 'seed0001.png') - expected_pixels(G, ws)).max() <= 1
    assert (pixels(tmp_path / '0' / 'seed0001.png') != pixels(tmp_path / '2' / 'seed0001.png')).any()


def test_noise_modes(networks, tmp_path):
    path, _ = networks['plain']
    shown = {}
    for name, mode in [('a', 'const'), ('b', 'const'), ('c', 'random'), ('d', 'random'), ('e', 'none'), ('f', 'none')]:
        assert invoke(generate_tool, f'--network={path}', '--seeds=1', f'--noise-mode={mode}', f'--outdir={tmp_path / name}').exit_code == 0
        shown[name] = (tmp_path / name / 'seed0001.png').read_bytes()
    assert shown['a'] == shown['b'] and shown['e'] == shown['f']
    assert len(set(shown.values())) == 4


def test_projected_w(networks, tmp_path):
    path, G = networks['plain']
    ws = torch.randn(3, G.num_ws, G.w_dim)
    np.savez(tmp_path / 'w.npz', w=ws.numpy())
    result = invoke(generate_tool, f'--network={path}', f'--projected-w={tmp_path}/w.npz', '--seeds=0', '--class=1', f'--outdir={tmp_path}/out')
    assert result.output.splitlines()[:2] == [f'warn: {option} is ignored when using --projected-w' for option in ('--seeds', '--class')]
    for i in range(3):
        assert abs(pixels(tmp_path / 'out' / f'proj{i:02d}.png') - expected_pixels(G, ws[i: i + 1])).max() <= 1


@pytest.mark.parametrize('content, message', [
    (None, 'No such file'),
    (b'', 'expected the projected_w.npz'),
    (b'PK\3\4 broken', 'File is not a zip file'),
    ({'v': np.zeros([1, 6, 8])}, 'it holds no array `w`'),
    ({'w': np.zeros([1, 5, 8])}, 'shape [N, 6, 8] for this network; found float64 [1, 5, 8]'),
    ({'w': np.zeros([6, 8], np.float32)}, 'found float32 [6, 8]'),
    ({'w': np.zeros([1, 6, 8], int)}, 'found int64 [1, 6, 8]'),
    ({'w': np.full([1, 6, 8], np.nan)}, 'found NaN or infinite values'),
    ({'w': np.array([[[print]]])}, 'Object arrays cannot be loaded'),
])
def test_bad_projected_w(networks, tmp_path, content, message):
    file = tmp_path / 'w.npz'
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    result = invoke(generate_tool, f'--network={networks["plain"][0]}', f'--projected-w={file}', f'--outdir={tmp_path}/out')
    assert result.exit_code == 1 and result.output.startswith(f'Error: --projected-w={file}: ') and message in result.output
    assert not (tmp_path / 'out').exists()


def test_a_plain_npy_file_is_refused(networks, tmp_path):
    np.save(tmp_path / 'w.npy', np.zeros([1, 6, 8], np.float32))
    result = invoke(generate_tool, f'--network={networks["plain"][0]}', f'--projected-w={tmp_path}/w.npy', f'--outdir={tmp_path}/out')
    assert result.exit_code == 1 and 'it holds no array `w`' in result.output


@pytest.mark.parametrize('network, args, message', [
    ('plain', [], '--seeds is required when not using --projected-w'),
    ('plain', ['--seeds=x'], "--seeds=x: expected whole numbers from 0 to 4294967295 and ranges, such as 0,3,5-8; found 'x'"),
    ('plain', ['--seeds=0', '--device=tpu'], 'expected auto, cpu, cuda or cuda:N'),
    ('cond', ['--seeds=0'], 'this network is conditional: choose a class from 0 to 2 with --class; found none'),
    ('cond', ['--seeds=0', '--class=3'], 'from 0 to 2 with --class; found --class=3'),
    ('cond', ['--seeds=0', '--class=-1'], 'from 0 to 2 with --class; found --class=-1'),
    ('odd', ['--seeds=0'], 'makes images of 2 channels; pictures have 1 (grey) or 3 (RGB)'),
])
def test_mistakes(networks, tmp_path, network, args, message):
    result = invoke(generate_tool, f'--network={networks[network][0]}', f'--outdir={tmp_path}/out', *args)
    assert result.exit_code == 1 and result.output.startswith('Error: ') and message in result.output
    assert not (tmp_path / 'out').exists()


def test_files_in_the_way(networks, tmp_path):
    (tmp_path / 'file').write_text('x')
    for args, message in [([f'--network={tmp_path}/no.pkl', f'--outdir={tmp_path}/out'], 'expected an existing file'),
                          ([f'--network={tmp_path}/file', f'--outdir={tmp_path}/out'], str(tmp_path / 'file')),
                          ([f'--network={networks["plain"][0]}', f'--outdir={tmp_path}/file'], str(tmp_path / 'file'))]:
        result = invoke(generate_tool, '--seeds=0', *args)
        assert result.exit_code == 1 and result.output.startswith('Error: ') and message in result.output


def test_class_of_an_unconditional_network_only_warns(networks, tmp_path):
    result = invoke(generate_tool, f'--network={networks["plain"][0]}', '--seeds=0', '--class=1', f'--outdir={tmp_path}')
    assert result.exit_code == 0 and result.output.startswith('warn: --class=1 ignored when running on an unconditional network\n')


def test_style_mixing(networks, tmp_path):
    path, G = networks['plain']
    result = invoke(style_mixing_tool, f'--network={path}', '--rows=4,1', '--cols=1-2,4', '--styles=0-2', '--trunc=0.5', f'--outdir={tmp_path}')
    assert result.exit_code == 0 and result.output == f'Wrote 7 images and grid.png to {tmp_path}\n'
    names = ['1-1', '1-2', '1-4', '2-2', '4-1', '4-2', '4-4']
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f'{name}.png' for name in names), 'grid.png']
    ws = {seed: G.mapping(official_z(seed), None, truncation_psi=0.5) for seed in (1, 2, 4)}
    for name in names:
        row, col = map(int, name.split('-'))
        mixed = torch.cat([ws[col][:, :3], ws[row][:, 3:]], dim=1)
        assert abs(pixels(tmp_path / f'{name}.png') - expected_pixels(G, mixed)).max() <= 1
    rows = [[None, '1-1', '2-2', '4-4'], ['4-4', '4-1', '4-2', '4-4'], ['1-1', '1-1', '1-2', '1-4']]
    cells = [[np.zeros([16, 16, 3], int) if name is None else pixels(tmp_path / f'{name}.png') for name in row] for row in rows]
    assert (pixels(tmp_path / 'grid.png') == np.concatenate([np.concatenate(row, axis=1) for row in cells])).all()


def test_style_mixing_of_conditional_and_grey_networks(networks, tmp_path):
    assert invoke(style_mixing_tool, f'--network={networks["cond"][0]}', '--rows=0', '--cols=1', '--class=2', f'--outdir={tmp_path}/c').exit_code == 0
    assert invoke(style_mixing_tool, f'--network={networks["grey"][0]}', '--rows=0', '--cols=1', f'--outdir={tmp_path}/g').exit_code == 0
    assert pixels(tmp_path / 'g' / 'grid.png').shape == (32, 32)


@pytest.mark.parametrize('network, num_ws, styles', [('plain', 6, '0-4'), ('dot', 2, '0')])
def test_default_styles_of_small_networks_leave_the_last_layer(networks, tmp_path, network, num_ws, styles):
    path, G = networks[network]
    assert G.num_ws == num_ws
    for name, args in [('default', []), ('explicit', [f'--styles={styles}'])]:
        assert invoke(style_mixing_tool, f'--network={path}', '--rows=0', '--cols=1', f'--outdir={tmp_path / name}', *args).exit_code == 0
    assert (pixels(tmp_path / 'default' / '0-1.png') == pixels(tmp_path / 'explicit' / '0-1.png')).all()


@pytest.mark.parametrize('args, message', [
    (['--rows=0-', '--cols=1'], "--rows=0-: expected whole numbers from 0 to 4294967295 and ranges, such as 0,3,5-8; found '0-'"),
    (['--rows=0', '--cols=1', '--styles=0-6'], "--styles=0-6: expected whole numbers from 0 to 5 and ranges, such as 0,3,5-8; found '0-6'"),
])
def test_style_mixing_mistakes(networks, tmp_path, args, message):
    result = invoke(style_mixing_tool, f'--network={networks["plain"][0]}', f'--outdir={tmp_path}/out', *args)
    assert (result.exit_code, result.output) == (1, f'Error: {message}\n')


@pytest.mark.parametrize('tool', ['generate', 'style_mixing', 'interpolate', 'project'])
def test_help_does_not_wait_for_torch(tool):
    code = (f'import sys; from tools import {tool}\ntry:\n    {tool}.main(["--help"])\nexcept SystemExit as end:\n    assert end.code == 0\n'
            'assert "torch" not in sys.modules')
    done = subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and '--network PKL' in done.stdout
