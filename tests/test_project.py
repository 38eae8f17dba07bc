"""m2m_stylegan/project.py with tools/project.py."""

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from click.testing import CliRunner
from golden import load

from m2m_stylegan import generate, project, snapshots, video
from tools.project import main

NO_LABEL = torch.zeros(1, 0)
# Recorded from the optimiser of the official projector.py, run with --num-steps=10 and 40.
OFFICIAL_LR = [0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.09045084971874735, 0.03454915028125262], [
    0, 0.05] + [0.1] * 29 + [0.09755282581475767, 0.09045084971874735, 0.07938926261462367, 0.06545084971874737, 0.049999999999999996,
                             0.03454915028125262, 0.02061073738537632, 0.009549150281252645, 0.0024471741852423235]


def of_pixels(img):
    return img.flatten(1) / 127.5


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Pickles, and target.png, the picture that plain.pkl makes of seed 4."""
    folder = tmp_path_factory.mktemp('networks')
    for name, kwargs in [('plain', {}), ('cond', {'c_dim': 3}), ('grey', {'img_channels': 1})]:
        G = tiny.generator(**kwargs)
        snapshots.save(folder / f'{name}.pkl', G=G, D=tiny.discriminator(**kwargs), G_ema=G)
    generate.generate(str(folder / 'plain.pkl'), folder, seeds='4', echo=str)
    return folder


def invoke(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize('expected', OFFICIAL_LR, ids=len)
def test_learning_rate_is_official(expected):
    assert [project.schedule(step / len(expected))[0] for step in range(len(expected))] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('t, lr, spread', [
    (0, 0, 0.05), (0.025, 0.05, 0.05 * (29 / 30) ** 2), (0.375, 0.1, 0.0125), (0.75, 0.1, 0), (0.875, 0.05, 0), (0.99999, 0, 0),
])
def test_schedule_by_hand(t, lr, spread):
    assert project.schedule(t) == pytest.approx((lr, spread), abs=1e-6)


def test_w_statistics_by_numpy():
    G = tiny.generator(c_dim=3)
    c = torch.eye(3)[[1]]
    z = torch.from_numpy(np.random.RandomState(123).randn(10000, 6)).float()
    w = G.mapping(z, c.repeat(10000, 1))[:, 0].double().numpy()
    mean, std = project.w_statistics(G, c)
    assert mean.shape == (1, 1, 8)
    np.testing.assert_allclose(mean[0, 0], w.mean(axis=0), atol=1e-5)
    assert std == pytest.approx(np.sqrt(((w - w.mean(axis=0)) ** 2).sum() / 10000), rel=1e-5)


def test_noise_regularisation_by_loops():
    noises = [np.random.RandomState(i).randn(size, size) for i, size in enumerate([4, 8, 32])]
    expected = 0.0
    for noise in noises:
        while True:
            size = len(noise)
            for dy, dx in [(0, 1), (1, 0)]:
                products = [noise[y, x] * noise[(y + dy) % size, (x + dx) % size] for y in range(size) for x in range(size)]
                expected += np.mean(products) ** 2
            if size <= 8:
                break
            noise = noise.reshape(size // 2, 2, size // 2, 2).mean(axis=(1, 3))
    assert project.noise_regularisation([torch.from_numpy(noise) for noise in noises]).item() == pytest.approx(expected, rel=1e-6)
    white, striped = torch.randn(64, 64), torch.randn(64, 1).repeat(1, 64)
    assert project.noise_regularisation([striped]) > 100 * project.noise_regularisation([white])
    assert project.noise_regularisation([]) == 0


def test_quantisation_is_the_official_projectors():
    golden = load('data_and_schedules').under('quant/', torch.float32)
    assert torch.equal(project.to_projector_uint8(golden['in']), golden['projector_png'])


@pytest.mark.parametrize('features', ['pixels', 'discriminator'])
def test_a_known_w_is_found_again(features):
    G = tiny.generator(use_noise=False)
    w = generate.map_seeds(G, [4], NO_LABEL, 1)[:, :1]
    target = (G.synthesis(w.expand(-1, G.num_ws, -1), force_fp32=True)[0] + 1) * 127.5
    function = of_pixels if features == 'pixels' else project.discriminator_features(tiny.discriminator())
    steps = list(project.project(G, target, function, NO_LABEL, num_steps=150))
    assert len(steps) == 150 and steps[-1].w.shape == (1, 1, 8)
    assert steps[-1].loss == steps[-1].dist < 1e-5 * steps[0].dist
    assert (steps[-1].w - w).norm() < 2e-3 * w.norm()


def test_loss_falls_with_noise_inputs_and_fp16_blocks_and_the_network_stays():
    G = tiny.generator(num_fp16_res=2)
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    target = torch.randint(0, 256, [3, 16, 16], dtype=torch.uint8)
    steps = list(project.project(G, target, of_pixels, NO_LABEL, num_steps=40))
    assert steps[-1].loss < 0.2 * steps[0].loss and steps[-1].dist < 0.9 * steps[0].dist
    assert all(torch.equal(before[name], tensor) and not tensor.requires_grad for name, tensor in G.state_dict().items())


def test_the_seed_decides():
    G, target = tiny.generator(), torch.full([3, 16, 16], 90.0)
    runs = [list(project.project(G, target, of_pixels, NO_LABEL, num_steps=4, seed=seed))[-1] for seed in (1, 1, 2)]
    assert torch.equal(runs[0].w, runs[1].w) and runs[0].loss == runs[1].loss != runs[2].loss


def test_noise_images_are_weighed_and_normalised_as_officially():
    """The first step has the learning rate 0, so the noise of the first two is known."""
    G, target = tiny.generator(), torch.full([3, 16, 16], 90.0)
    generator = torch.Generator().manual_seed(7)
    noises = [torch.randn(size, size, generator=generator) for size in (4, 8, 8, 16, 16)]
    first, second = list(project.project(G, target, of_pixels, NO_LABEL, num_steps=2, seed=7))
    assert first.loss - first.dist == pytest.approx(1e5 * project.noise_regularisation(noises).item(), rel=1e-4)
    noises = [(noise - noise.mean()) / noise.std(correction=0) for noise in noises]
    assert second.loss - second.dist == pytest.approx(1e5 * project.noise_regularisation(noises).item(), rel=1e-4)


def test_the_label_counts():
    G, target = tiny.generator(c_dim=3), torch.full([3, 16, 16], 90.0)
    a, b = (next(project.project(G, target, of_pixels, torch.eye(3)[[i]], num_steps=4)).w for i in (0, 2))
    assert not torch.allclose(a, b)


def test_discriminator_features_compare_colour_and_structure():
    features = project.discriminator_features(tiny.discriminator())
    img = torch.rand(2, 3, 16, 16) * 255
    found = features(img)
    assert found.shape == (2, 3 * 16 ** 2 + 8 * 8 ** 2 + 8 * 4 ** 2)
    squares = found.square().split([3 * 16 ** 2, 8 * 8 ** 2, 8 * 4 ** 2], dim=1)
    torch.testing.assert_close(squares[0].sum(dim=1), (img / 127.5 - 1).square().flatten(1).sum(dim=1) / 16 ** 2)
    for level in squares[1:]:
        torch.testing.assert_close(level.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize('size, seen', [(512, 256), (256, 256), (16, 16)])
def test_vgg16_gets_large_images_averaged_down(size, seen):
    img = torch.rand(2, 1, size, size) * 255
    factor = size // seen
    torch.testing.assert_close(project.vgg16_features(torch.Tensor.abs)(img), img.reshape(2, 1, seen, factor, seen, factor).mean(dim=(3, 5)))


class StandIn(torch.nn.Module):
    """Called as the official vgg16.pt is."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_features: bool = False, return_lpips: bool = False) -> torch.Tensor:
        assert not resize_images and return_lpips and img.shape[1] == 3
        return img.flatten(1) / 1000


@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
def test_vgg16_from_a_file(folder, tmp_path):
    torch.jit.script(StandIn()).save(str(tmp_path / 'vgg16.pt'))
    args = [f'--network={folder}/grey.pkl', f'--target={folder}/seed0004.png', '--num-steps=3', '--save-video=0', f'--outdir={tmp_path}/out',
            f'--detector={tmp_path}/vgg16.pt']
    result = invoke(*args)
    assert result.exit_code == 1 and 'pass --trust-detector' in result.output and 'pass --features=discriminator' in result.output
    result = invoke(*args, '--trust-detector')
    assert result.exit_code == 0 and 'Wrote target.png, proj.png, projected_w.npz to' in result.output


def test_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(video, 'find_ffmpeg', lambda: None)
    monkeypatch.setattr(project, 'find_ffmpeg', lambda: None)
    args = [f'--network={folder}/plain.pkl', '--features=discriminator', f'--target={folder}/seed0004.png', '--num-steps=60']
    result = invoke(*args, f'--outdir={tmp_path}')
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ['proj.png', 'projected_w.npz', 'target.png']
    assert result.output.count('not by the official VGG16') == 1 and 'No proj.mp4: that needs ffmpeg' in result.output
    target, proj, given = (np.asarray(PIL.Image.open(path)).astype(int)
                           for path in (tmp_path / 'target.png', tmp_path / 'proj.png', folder / 'seed0004.png'))
    assert (target == given).all()
    w = np.load(tmp_path / 'projected_w.npz')['w']
    assert w.shape == (1, 6, 8) and w.dtype == np.float32 and (w == w[:, :1]).all()
    first = generate.generate(str(folder / 'plain.pkl'), tmp_path / 'again', projected_w=tmp_path / 'projected_w.npz', echo=str)[0]
    assert abs(np.asarray(PIL.Image.open(first)).astype(int) - proj).max() <= 1  # the same but for the rounding rule
    average = generate.generate(str(folder / 'plain.pkl'), tmp_path / 'average', seeds='0', trunc=0, echo=str)[0]
    assert abs(proj - target).mean() < 0.5 * abs(np.asarray(PIL.Image.open(average)).astype(int) - target).mean()


@pytest.mark.skipif(video.find_ffmpeg() is None, reason='no ffmpeg here')
def test_video(folder, tmp_path):
    assert invoke(f'--network={folder}/grey.pkl', '--features=discriminator', f'--target={folder}/seed0004.png', '--num-steps=3',
                  f'--outdir={tmp_path}').exit_code == 0
    assert (tmp_path / 'proj.mp4').read_bytes()[4:8] == b'ftyp'
    assert np.asarray(PIL.Image.open(tmp_path / 'proj.png')).ndim == np.asarray(PIL.Image.open(tmp_path / 'target.png')).ndim == 2


def test_target_is_cropped_turned_upright_and_put_on_white(folder, tmp_path):
    G = tiny.generator()
    picture = np.zeros([40, 60, 4], np.uint8)
    picture[:, 10:50] = [200, 100, 50, 255]
    PIL.Image.fromarray(picture).save(tmp_path / 'wide.png')
    assert (project.read_target(tmp_path / 'wide.png', G) == torch.tensor([200, 100, 50])[:, None, None]).all()
    picture[:] = 0
    PIL.Image.fromarray(picture).save(tmp_path / 'clear.png')
    assert (project.read_target(tmp_path / 'clear.png', G) == 255).all()
    halves = PIL.Image.fromarray(np.repeat(np.uint8([[0], [255]]), 20, axis=0).repeat(40, axis=1))
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    halves.save(tmp_path / 'turned.png', exif=exif)
    turned = project.read_target(tmp_path / 'turned.png', tiny.generator(img_channels=1))
    assert turned.shape == (1, 16, 16) and turned[0, 0].min() > 250 and turned[0, -1].max() < 5


@pytest.mark.parametrize('args, message', [
    (['--target=no.png'], '--target=no.png: no such file; expected an image'),
    (['--target={}/plain.pkl'], '--target={}/plain.pkl: expected an image file; cannot identify image file'),
    (['--target={}/seed0004.png', '--network={}/cond.pkl'], 'this network is conditional: choose a class from 0 to 2'),
    (['--target={}/seed0004.png', '--network={}/seed0004.png'], '{}/seed0004.png'),
])
def test_mistakes(folder, tmp_path, args, message):
    result = invoke(f'--network={folder}/plain.pkl', '--features=discriminator', f'--outdir={tmp_path}/out', *(arg.format(folder) for arg in args))
    assert result.exit_code == 1 and result.output.startswith('Error: ') and message.format(folder) in result.output
    assert not (tmp_path / 'out').exists()
