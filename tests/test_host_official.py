"""The official scripts under the plugin, hosted and patched, on pickles that they wrote and on ours. Needs checkouts, which are run and not read:

    STYLEGAN2_ADA_DIR=.../stylegan2-ada-pytorch STYLEGAN3_DIR=.../stylegan3 python -m pytest tests/test_host_official.py

calc_metrics.py is not run here: every official metric makes 50,000 images.
"""

import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import test_host
import test_interop
import tiny
import torch
from test_host import ROOT, start, succeed

from m2m_stylegan import host_patch_files, snapshots

# train.py of stylegan2-ada-pytorch has no options for networks that are small enough for a test.
NARROW = '''
import os, runpy, sys
if __name__ == '__main__':
    from m2m_stylegan import host
    patch, script = host.patch, sys.argv[1]
    def narrow(path):
        host.patch = patch
        patch(path)  # does nothing in a process that is hosted already
        import training.training_loop as loop
        real = loop.training_loop
        def training_loop(G_kwargs, D_kwargs, **kwargs):
            size = {'channel_base': 64, 'channel_max': 8}
            G_kwargs.update(z_dim=8, w_dim=8)
            G_kwargs.synthesis_kwargs.update(size)
            D_kwargs.update(size)
            real(G_kwargs=G_kwargs, D_kwargs=D_kwargs, **kwargs)
        loop.training_loop = training_loop
    if host.SPAWNED in os.environ:
        narrow(script)
    else:
        host.patch = narrow
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name='__main__')
'''


class Checkout(test_interop.Official):
    """A copy of a checkout, run hosted or patched."""

    def __init__(self, flavour, folder, mode):
        super().__init__(flavour, folder)
        self.mode = mode
        self.env = {'M2M_HOST_FILES': str(folder.parent / 'files')}

    def script(self, name, *words):
        """Run a script of the checkout, or another one by its absolute path."""
        command = [self.folder / name] if self.mode == 'patched' else [ROOT / 'tools' / 'host.py', 'run', f'--host={self.folder}', name]
        return succeed(start(*command, *words, env=self.env))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and '__pycache__' not in path.parts}


@pytest.fixture(scope='module', params=['ada-hosted', 'ada-patched', 'sg3-hosted', 'sg3-patched'])
def checkout(request, tmp_path_factory):
    flavour, mode = request.param.split('-')
    variable = {'ada': 'STYLEGAN2_ADA_DIR', 'sg3': 'STYLEGAN3_DIR'}[flavour]
    if not os.environ.get(variable):
        pytest.skip(f'{variable} does not name a checkout of the official code')
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(os.environ[variable], folder / 'host', ignore=shutil.ignore_patterns('.git', '__pycache__'))
    (folder / 'files').mkdir()
    torch.jit.save(torch.jit.script(Vgg()), folder / 'files' / 'vgg16.pt')
    original = contents(folder / 'host')
    if mode == 'patched':
        _name, states = host_patch_files.choose(ROOT / 'patches', folder / 'host')
        assert host_patch_files.apply(folder / 'host', states)
    yield Checkout(flavour, folder / 'host', mode)
    if mode == 'patched':
        host_patch_files.revert(folder / 'host', host_patch_files.choose(ROOT / 'patches', folder / 'host')[1])
    assert contents(folder / 'host') == original


class Vgg(torch.nn.Module):
    """Called as the VGG16 is."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(img, 2).flatten(1) / 100


pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')


@pytest.fixture(scope='module')
def networks(checkout):
    """Theirs, and ours with our own source text."""
    folder = checkout.folder.parent
    checkout.run([ROOT / 'tests' / 'official_networks.py', checkout.flavour, folder])
    return [folder / 'uncond.pkl', test_interop.write_copies(folder / 'uncond.pkl')[1]]


def test_generate_and_legacy(checkout, networks, tmp_path):
    for network in networks:
        checkout.script(checkout.generate, f'--network={network}', '--seeds=3', f'--outdir={tmp_path}/{network.stem}', '--trunc=0.7')
        G = snapshots.load_G_ema(network)
        expected = test_interop.to_pixels(G(test_interop.latents(3, G.z_dim), torch.zeros(1, 0), truncation_psi=0.7, noise_mode='const'))
        assert abs(test_interop.pixels(tmp_path / network.stem / 'seed0003.png') - expected).max() <= 1
        checkout.script('legacy.py', f'--source={network}', f'--dest={tmp_path}/new.pkl')
        assert test_host.same_tensors(snapshots.load(tmp_path / 'new.pkl').G_ema, G)


def test_other_scripts(checkout, networks, tmp_path):
    size = ['--width=8', '--height=8'] if checkout.flavour == 'ada' else ['--resolution=8x8']
    checkout.script('dataset_tool.py', f'--source={tiny.dataset_zip(tmp_path / "data.zip", num=3)}', f'--dest={tmp_path}/out.zip', *size)
    assert (tmp_path / 'out.zip').stat().st_size > 500
    if checkout.flavour == 'ada':
        PIL.Image.fromarray(np.full([16, 16, 3], 99, np.uint8)).save(tmp_path / 'target.png')
        words = [f'--network={networks[1]}', f'--outdir={tmp_path}']
        checkout.script('projector.py', f'--target={tmp_path}/target.png', '--num-steps=2', '--save-video=0', *words)
        assert np.load(tmp_path / 'projected_w.npz')['w'].shape == (1, 6, 16)
        checkout.script('style_mixing.py', '--rows=0', '--cols=1', '--styles=0-2', *words)
        assert (tmp_path / 'grid.png').exists()


def test_train_with_ada(checkout, tmp_path):
    words = [f'--outdir={tmp_path}/runs', f'--data={tiny.dataset_zip(tmp_path / "data.zip", resolution=8)}', '--kimg=1', '--snap=1', '--metrics=none',
             '--aug=ada', '--gamma=0.1', '--batch=32', '--workers=1']
    if checkout.flavour == 'sg3':
        checkout.script('train.py', *words, '--gpus=1', '--cfg=stylegan2', '--cbase=64', '--cmax=8', '--map-depth=2', '--tick=1')
    else:
        (tmp_path / 'narrow.py').write_text(NARROW)
        checkout.script(tmp_path / 'narrow.py', checkout.folder / 'train.py', *words)
    run, = (tmp_path / 'runs').iterdir()
    stats = [json.loads(line) for line in (run / 'stats.jsonl').read_text().splitlines()]
    assert [line['Progress/tick']['mean'] for line in stats] == [0, 1]
    assert all(np.isfinite(stats[1][name]['mean']) for name in ('Loss/r1_penalty', 'Loss/pl_penalty', 'Progress/augment'))
    assert snapshots.load(max(run.glob('*.pkl'))).flavour == checkout.flavour


def test_hand_over(checkout, networks, tmp_path):
    words = [f'--outdir={tmp_path}/runs', f'--data={tiny.dataset_zip(tmp_path / "data.zip")}', f'--resume={networks[0]}', '--batch=4', '--kimg=1']
    if checkout.flavour == 'sg3':
        words += ['--gpus=1', '--cfg=stylegan2', '--gamma=1']
    checkout.script('train.py', *words, '--m2m-slice=8', '--m2m-bank=256', '--m2m-minutes=0.01', f'--m2m-cache-dir={tmp_path}')
    run, = (tmp_path / 'runs').iterdir()
    assert snapshots.load(max(run.glob('network-snapshot-*.pkl'))).flavour == checkout.flavour
