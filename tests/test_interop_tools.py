"""Our tools beside the official ones of the same name, picture by picture. Needs a checkout, see test_interop.py:

    STYLEGAN2_ADA_DIR=.../stylegan2-ada-pytorch python -m pytest tests/test_interop_tools.py
"""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from test_interop import HERE, Official, pixels

from tools import generate, project, style_mixing


@pytest.fixture(scope='module')
def official():
    if not os.environ.get('STYLEGAN2_ADA_DIR'):
        pytest.skip('STYLEGAN2_ADA_DIR does not name a checkout of the official code')
    return Official('ada', Path(os.environ['STYLEGAN2_ADA_DIR']).resolve())


@pytest.fixture(scope='module')
def files(official, tmp_path_factory):
    """{uncond,cond}.pkl made by the official classes."""
    folder = tmp_path_factory.mktemp('ada')
    official.run([HERE / 'official_networks.py', 'ada', folder])
    return folder


def ours(tool, *args):
    result = CliRunner().invoke(tool.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output


def assert_same_pictures(found, expected):
    names = sorted(path.name for path in expected.glob('*.png'))
    assert names and sorted(path.name for path in found.glob('*.png')) == names
    differences = [abs(pixels(found / name) - pixels(expected / name)) for name in names]
    assert max(d.max() for d in differences) <= 1  # where a value lies on the edge between two
    assert np.mean([d.mean() for d in differences]) < 0.01


def test_generate(official, files, tmp_path):
    np.savez(tmp_path / 'w.npz', w=np.random.RandomState(0).randn(3, 6, 16).astype(np.float32))
    cases = [('uncond', ['--seeds=0,7,100000']), ('uncond', ['--seeds=0-2', '--trunc=0.5']), ('uncond', ['--seeds=3', '--noise-mode=none']),
             ('cond', ['--seeds=0-2', '--class=2', '--trunc=0.7']), ('cond', ['--seeds=1', '--class=0', '--noise-mode=none']),
             ('uncond', ['--seeds=5', '--trunc=0']), ('uncond', ['--seeds=5', '--trunc=-1.5']), ('uncond', [f'--projected-w={tmp_path}/w.npz'])]
    official.run(*(['generate.py', f'--network={files / name}.pkl', f'--outdir={tmp_path}/{i}-official', *args]
                   for i, (name, args) in enumerate(cases)))
    for i, (name, args) in enumerate(cases):
        ours(generate, f'--network={files / name}.pkl', f'--outdir={tmp_path}/{i}-ours', *args)
        assert_same_pictures(tmp_path / f'{i}-ours', tmp_path / f'{i}-official')


def test_style_mixing(official, files, tmp_path):
    cases = [['--rows=0,1', '--cols=1,2,3', '--styles=0-2'], ['--rows=4', '--cols=5-6', '--styles=1,3', '--trunc=0.5'],
             ['--rows=0', '--cols=1', '--styles=0-5', '--noise-mode=none']]
    official.run(*(['style_mixing.py', f'--network={files}/uncond.pkl', f'--outdir={tmp_path}/{i}-official', *args] for i, args in enumerate(cases)))
    for i, args in enumerate(cases):
        ours(style_mixing, f'--network={files}/uncond.pkl', f'--outdir={tmp_path}/{i}-ours', *args)
        assert_same_pictures(tmp_path / f'{i}-ours', tmp_path / f'{i}-official')


@pytest.mark.parametrize('num_steps', [10, 40])
@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
def test_project(official, files, tmp_path, num_steps):
    picture = np.random.RandomState(0).randint(0, 256, [5, 7, 3], dtype=np.uint8)
    PIL.Image.fromarray(picture).resize((70, 50), PIL.Image.Resampling.BICUBIC).save(tmp_path / 'photo.png')
    args = [f'--network={files}/uncond.pkl', f'--target={tmp_path}/photo.png', f'--num-steps={num_steps}', '--save-video=0', '--seed=5']
    official.run([HERE / 'official_projector.py', official.folder, tmp_path / 'vgg16.pt', f'--outdir={tmp_path}/official', *args])
    ours(project, f'--detector={tmp_path}/vgg16.pt', '--trust-detector', f'--outdir={tmp_path}/ours', *args)
    found, expected = (np.load(tmp_path / name / 'projected_w.npz')['w'] for name in ('ours', 'official'))
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert abs(found - expected).max() < 1e-3 * abs(expected).max()
    assert (pixels(tmp_path / 'ours' / 'target.png') == pixels(tmp_path / 'official' / 'target.png')).all()
    assert abs(pixels(tmp_path / 'ours' / 'proj.png') - pixels(tmp_path / 'official' / 'proj.png')).max() <= 1
