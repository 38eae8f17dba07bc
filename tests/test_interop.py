"""Our files in the official tools and theirs in ours. Needs checkouts of the official code, which is run and not read:

    STYLEGAN2_ADA_DIR=.../stylegan2-ada-pytorch STYLEGAN3_DIR=.../stylegan3 python -m pytest tests/test_interop.py

OFFICIAL_PYTHON names the interpreter to run them with, for instance one with Python 3.8 and torch 1.7.1; default: this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import PIL.Image
import pytest
import tf_pickles
import torch

from m2m_stylegan import snapshots
from m2m_stylegan.augment import AugmentPipe

HERE = Path(__file__).parent
SEEDS = [0, 1, 2]


class Official:
    """One checkout."""

    def __init__(self, flavour: str, folder: Path):
        self.flavour, self.folder = flavour, folder
        self.generate = 'generate.py' if flavour == 'ada' else 'gen_images.py'

    def run(self, *commands: list[object]) -> None:
        """Run several scripts in one process, without our package within reach."""
        words = [str(word) for command in commands for word in ['--', *command]][1:]
        environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
        done = subprocess.run(
            [os.environ.get('OFFICIAL_PYTHON', sys.executable), '-W', 'ignore', HERE / 'official_runner.py', self.folder, *words],
            env={**environment, 'OMP_NUM_THREADS': '1'}, cwd='/', capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope='module', params=['ada', 'sg3'])
def official(request):
    variable = {'ada': 'STYLEGAN2_ADA_DIR', 'sg3': 'STYLEGAN3_DIR'}[request.param]
    if not os.environ.get(variable):
        pytest.skip(f'{variable} does not name a checkout of the official code')
    return Official(request.param, Path(os.environ[variable]).resolve())


@pytest.fixture(scope='module')
def files(official, tmp_path_factory):
    """{uncond,cond}.pkl and .npz made by the official classes."""
    folder = tmp_path_factory.mktemp(official.flavour)
    official.run([HERE / 'official_networks.py', official.flavour, folder])
    return folder


def write_copies(path: Path) -> list[Path]:
    """The networks of an official pickle as we write them: with its own source text, and with ours."""
    snapshot = snapshots.load(path)
    nets = {'G': snapshot.G, 'D': snapshot.D, 'G_ema': snapshot.G_ema, 'training_set_kwargs': snapshot.training_set_kwargs}
    same, ours = path.with_name(f'{path.stem}-same.pkl'), path.with_name(f'{path.stem}-ours.pkl')
    snapshots.save(same, **nets, augment_pipe=snapshot.augment_pipe, like=snapshot)
    snapshots.save(ours, **nets, augment_pipe=AugmentPipe(xflip=1, scale=1))
    return [same, ours]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path)).astype(int)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    return (images[0].permute(1, 2, 0) * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy().astype(int)


def latents(seed: int, z_dim: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim)).float()


@pytest.mark.parametrize('name', ['uncond', 'cond'])
def test_values(official, files, name):
    snapshot = snapshots.load(files / f'{name}.pkl')
    assert snapshot.flavour == official.flavour
    assert snapshot.training_set_kwargs == {'resolution': 16}
    data = {key: torch.from_numpy(value) for key, value in np.load(files / f'{name}.npz').items()}
    images = snapshot.G_ema(data['z'], data['c'], truncation_psi=0.7, noise_mode='const', force_fp32=True)
    assert golden.relative_error(images, data['images']) < 1e-5
    assert golden.relative_error(snapshot.D(data['img'], data['c'], force_fp32=True), data['logits']) < 1e-5


@pytest.mark.parametrize('name', ['uncond', 'cond'])
def test_tools_open_our_files(official, files, name):
    paths = [files / f'{name}.pkl', *write_copies(files / f'{name}.pkl')]
    options = ['--trunc=0.7', '--noise-mode=const', *(['--class=1'] if name == 'cond' else [])]
    official.run(*([official.generate, f'--network={path}', f'--outdir={path}-images', f'--seeds={",".join(map(str, SEEDS))}', *options]
                   for path in paths),
                 *(['legacy.py', f'--source={path}', f'--dest={path}-again'] for path in paths),
                 ['legacy.py', f'--source={paths[2]}', f'--dest={paths[2]}-fp16', '--force-fp16=1'])
    G = snapshots.load(paths[0]).G_ema
    c = torch.eye(3)[[1]] if name == 'cond' else torch.zeros(1, 0)
    for path in paths:
        for seed in SEEDS:
            expected = to_pixels(G(latents(seed, G.z_dim), c, truncation_psi=0.7, noise_mode='const', force_fp32=True))
            found = pixels(Path(f'{path}-images') / f'seed{seed:04d}.png')
            assert expected.std() > 10
            assert abs(found - expected).max() <= 1
            if path == paths[1]:  # Same source text, same tensors: same bits.
                assert (found == pixels(Path(f'{paths[0]}-images') / f'seed{seed:04d}.png')).all()
    original = snapshots.load(paths[0])
    for path in paths:
        again = snapshots.load(f'{path}-again')
        for key in ('G', 'D', 'G_ema'):
            assert_same_tensors(getattr(again, key), getattr(original, key))
    half = snapshots.load(Path(f'{paths[2]}-fp16'))  # Rebuilt with our recorded constructor arguments and our classes.
    assert [block.use_fp16 for block in half.G_ema.synthesis.children()] == [False, True, True]
    assert_same_tensors(half.G_ema, original.G_ema)


def assert_same_tensors(net, expected):
    found, wanted = net.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_style_mixing(official, files):
    if official.flavour != 'ada':
        pytest.skip('stylegan3 has no style_mixing.py')
    path = write_copies(files / 'uncond.pkl')[1]
    official.run(['style_mixing.py', f'--network={path}', f'--outdir={path}-mixed', '--rows=0,1', '--cols=2', '--styles=0-2', '--trunc=0.5'])
    G = snapshots.load(path).G_ema
    row, col = (G.mapping(latents(seed, G.z_dim), truncation_psi=0.5) for seed in (1, 2))
    mixed = torch.cat([col[:, :3], row[:, 3:]], dim=1)
    assert abs(pixels(Path(f'{path}-mixed') / '1-2.png') - to_pixels(G.synthesis(mixed, noise_mode='const', force_fp32=True))).max() <= 1


@pytest.mark.parametrize('g, d', [('g_skip_cond', 'd_resnet_cond'), ('g_resnet', 'd_skip')])
def test_tensorflow_conversion(official, tmp_path, g, d):
    path = tmp_path / 'tf.pkl'
    path.write_bytes(tf_pickles.dumps((tf_pickles.network(g), tf_pickles.network(d), tf_pickles.network(g))))
    official.run(['legacy.py', f'--source={path}', f'--dest={tmp_path / "converted.pkl"}'])
    theirs, ours = snapshots.load(tmp_path / 'converted.pkl'), snapshots.load(path)
    for key in ('G', 'D', 'G_ema'):
        assert_same_tensors(getattr(ours, key), getattr(theirs, key))
