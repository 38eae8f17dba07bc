"""m2m_stylegan/interpolate.py with tools/interpolate.py, and the files of m2m_stylegan/video.py."""

import math
import sys
import types

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import scipy.interpolate
import tiny
import torch
from click.testing import CliRunner

from m2m_stylegan import generate, interpolate, snapshots, video
from m2m_stylegan.errors import UserError
from tools.interpolate import main

LOOPS = {'linear': interpolate.linear_loop, 'cubic': interpolate.cubic_loop, 'slerp': interpolate.slerp_loop}


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp('network') / 'G.pkl'
    G = tiny.generator()
    snapshots.save(path, G=G, D=tiny.discriminator(), G_ema=G)
    return path


def invoke(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def frames_of(path):
    with PIL.Image.open(path) as file:
        return [np.asarray(frame.convert('RGB')).astype(int) for frame in PIL.ImageSequence.Iterator(file)]


def test_great_circles_by_hand():
    found = interpolate.slerp_loop(torch.tensor([[2.0, 0, 0], [0, 5.0, 0], [0, 5.0, 0]]), 2)
    half = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[1, 0, 0], [half, half, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [half, half, 0]]))


@pytest.mark.parametrize('loop', LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize('num', [2, 5])
def test_loops_pass_through_the_points_and_close(loop, num):
    points = torch.randn(2, num, 7, dtype=torch.float64)
    directions = points / points.norm(dim=-1, keepdim=True) if loop is interpolate.slerp_loop else points
    curve = loop(points, 8)
    assert curve.shape == (2, num * 8, 7)
    torch.testing.assert_close(curve[:, ::8], directions)
    # Starting at another point shifts the loop and changes nothing else: there is no seam.
    torch.testing.assert_close(loop(points.roll(-1, dims=1), 8), curve.roll(-8, dims=1))


def test_linear_and_cubic_against_scipy():
    points = torch.randn(6, 3, dtype=torch.float64)
    t = np.arange(60) / 10
    closed = np.concatenate([points, points[:1]])
    np.testing.assert_allclose(interpolate.linear_loop(points, 10), scipy.interpolate.interp1d(range(7), closed, axis=0)(t), atol=1e-12)
    speed = (np.roll(points, -1, axis=0) - np.roll(points, 1, axis=0)) / 2
    spline = scipy.interpolate.CubicHermiteSpline(range(7), closed, np.concatenate([speed, speed[:1]]), axis=0)
    np.testing.assert_allclose(interpolate.cubic_loop(points, 10), spline(t), atol=1e-12)


def test_only_the_polygon_has_kinks():
    points = torch.randn(4, 3, dtype=torch.float64)
    for name, loop in LOOPS.items():
        if name != 'slerp':
            speed = loop(points, 1000).diff(dim=0, append=loop(points, 1000)[:1]) * 1000
            jump = (speed - speed.roll(1, dims=0)).norm(dim=1).max()
            assert (jump < 0.05) == (name == 'cubic')


@pytest.mark.parametrize('path', interpolate.PATHS)
def test_keyframes_are_the_pictures_of_the_seeds(path):
    G, c = tiny.generator(), torch.zeros(1, 0)
    w = interpolate.loop_w(G, [3, 1, 2], c, 0.7, path, 4)
    assert w.shape == (12, 8)
    torch.testing.assert_close(w[::4], generate.map_seeds(G, [3, 1, 2], c, 0.7)[:, 0])


def test_gif_of_a_grid(network, tmp_path):
    result = invoke(f'--network={network}', '--seeds=0-5', f'--dest={tmp_path}/loop.gif', '--frames=3', '--grid=1x3', '--fps=20', '--batch=2')
    assert (result.exit_code, result.output) == (0, f'Wrote {tmp_path}/loop.gif: 6 frames, 0.3 s\n')
    with PIL.Image.open(tmp_path / 'loop.gif') as file:
        assert (file.size, file.n_frames, file.info['duration'], file.info['loop']) == ((16, 48), 6, 50, 0)
    assert invoke(f'--network={network}', '--seeds=2-3', f'--dest={tmp_path}/one.gif', '--frames=3').exit_code == 0
    for whole, cell in zip(frames_of(tmp_path / 'loop.gif'), frames_of(tmp_path / 'one.gif'), strict=True):
        assert abs(whole[16:32] - cell).mean() < 6  # two palettes


def test_size_and_grey(tmp_path):
    G = tiny.generator(img_channels=1)
    snapshots.save(tmp_path / 'G.pkl', G=G, D=tiny.discriminator(img_channels=1), G_ema=G)
    assert invoke(f'--network={tmp_path}/G.pkl', '--seeds=0,1', f'--dest={tmp_path}/x.gif', '--frames=2', '--grid=1x1', '--size=40').exit_code == 0
    frame = frames_of(tmp_path / 'x.gif')[0]
    assert frame.shape == (40, 40, 3) and (frame == frame[:, :, :1]).all()


@pytest.mark.parametrize('args, message', [
    (['--seeds=0'], '--seeds=0 gives 1; --grid=1x1 needs a multiple of 1, at least two for each loop'),
    (['--seeds=0-4', '--grid=2x1'], '--seeds=0-4 gives 5; --grid=2x1 needs a multiple of 2'),
    (['--seeds=0-3', '--grid=2'], '--grid=2: expected COLUMNSxROWS, such as 3x2'),
    (['--seeds=0-3', '--grid=0x1'], '--grid=0x1: expected COLUMNSxROWS'),
    (['--seeds=no'], "--seeds=no: expected whole numbers from 0 to 4294967295 and ranges, such as 0,3,5-8; found 'no'"),
    (['--seeds=0-3', '--fps=60'], '--fps=60: expected more than 0 and at most 240; a .gif at most 50'),
    (['--seeds=0-3', '--fps=nan'], '--fps=nan: expected more than 0'),
    (['--seeds=0-3', '--dest=x.avi'], 'x.avi: the name must end in .mp4 or .gif'),
])
def test_mistakes(network, tmp_path, args, message):
    result = invoke(f'--network={network}', f'--dest={tmp_path}/loop.gif', *args)
    assert result.exit_code == 1 and result.output.startswith(f'Error: {message}')
    assert not list(tmp_path.iterdir())


def no_ffmpeg(monkeypatch):
    monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', None)
    monkeypatch.setenv('PATH', '')


def test_mp4_without_ffmpeg_says_so_before_the_work(network, tmp_path, monkeypatch):
    no_ffmpeg(monkeypatch)
    result = invoke('--network=not-even-opened.pkl', '--seeds=0-3', f'--dest={tmp_path}/loop.mp4')
    assert result.exit_code == 1 and "pip install 'm2m-stylegan[video]'" in result.output and 'or choose a name that ends in .gif' in result.output


def test_which_ffmpeg(monkeypatch, tmp_path):
    no_ffmpeg(monkeypatch)
    assert video.find_ffmpeg() is None
    (tmp_path / 'ffmpeg').write_text('#!/bin/sh\n')
    (tmp_path / 'ffmpeg').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert video.find_ffmpeg() == str(tmp_path / 'ffmpeg')
    monkeypatch.setitem(sys.modules, 'imageio_ffmpeg', types.SimpleNamespace(get_ffmpeg_exe=lambda: 'packaged'))
    assert video.find_ffmpeg() == 'packaged'


def fake_ffmpeg(tmp_path, monkeypatch, script):
    no_ffmpeg(monkeypatch)
    (tmp_path / 'ffmpeg').write_text(f'#!/bin/sh\n{script}\n')
    (tmp_path / 'ffmpeg').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/bin:/usr/bin')


def test_mp4_pipes_every_frame(tmp_path, monkeypatch):
    fake_ffmpeg(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/words\nfor last; do :; done\ncat > "$last"')
    frames = [np.full([3, 5, 3], i, np.uint8) for i in range(4)]
    video.write_video(tmp_path / 'x.mp4', iter(frames), 12.5)
    assert (tmp_path / 'x.mp4').read_bytes() == np.stack(frames).tobytes()
    assert '-s 5x3 -r 12.5 ' in (tmp_path / 'words').read_text()


@pytest.mark.parametrize('script', ['echo "no such codec" >&2\ncat > /dev/null\nexit 1', 'echo "no such codec" >&2\nexit 1'])
def test_what_ffmpeg_complains_about_is_shown(tmp_path, monkeypatch, script):
    fake_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(UserError, match='could not write the video: no such codec'):
        video.write_video(tmp_path / 'x.mp4', iter([np.zeros([64, 64, 3], np.uint8)] * 50), 10)
    assert [p.name for p in tmp_path.iterdir()] == ['ffmpeg']


@pytest.mark.parametrize('suffix', ['.gif', '.mp4'])
def test_nothing_half_written_stays(tmp_path, monkeypatch, suffix):
    fake_ffmpeg(tmp_path, monkeypatch, 'cat > /dev/null')

    def frames():
        yield np.zeros([8, 8, 3], np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.write_video(tmp_path / f'x{suffix}', frames(), 10)
    assert [p.name for p in tmp_path.iterdir()] == ['ffmpeg']


@pytest.mark.skipif(video.find_ffmpeg() is None, reason='no ffmpeg here')
def test_real_mp4(network, tmp_path):
    result = invoke(f'--network={network}', '--seeds=0-1', f'--dest={tmp_path}/loop.mp4', '--frames=4', '--size=33')
    assert result.exit_code == 0 and (tmp_path / 'loop.mp4').read_bytes()[4:8] == b'ftyp'
