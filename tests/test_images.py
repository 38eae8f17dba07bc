import numpy as np
import PIL.Image
import pytest
import torch
from golden import load

from m2m_stylegan.images import from_uint8, save_image_grid, save_panels, to_uint8

QUANT = load('data_and_schedules').under('quant/', torch.float32)


def test_to_uint8_is_the_rule_of_generate_and_metrics():
    assert torch.equal(to_uint8(QUANT['in']), QUANT['generate_png_and_metrics'])


def test_from_uint8_is_exact():
    assert torch.equal(from_uint8(QUANT['real_uint8']), QUANT['real_float'])
    assert torch.equal(to_uint8(from_uint8(QUANT['real_uint8'])), QUANT['real_uint8'])


def test_grid_quantises_like_the_official_grid(tmp_path):
    save_image_grid(QUANT['in'].reshape(-1, 1, 1, 1), tmp_path / 'grid.png', (-1, 1), (QUANT['in'].numel(), 1))
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / 'grid.png')).ravel(), QUANT['grid_png'].numpy())


@pytest.mark.parametrize('channels', [1, 3])
def test_grid_places_images_row_by_row_and_keeps_uint8(tmp_path, channels):
    images = np.random.RandomState(0).randint(256, size=[6, channels, 4, 5], dtype=np.uint8)
    save_image_grid(images, tmp_path / 'grid.png', (0, 255), (3, 2))
    pixels = np.asarray(PIL.Image.open(tmp_path / 'grid.png')).reshape(8, 15, channels)
    for i, image in enumerate(images):
        top, left = i // 3 * 4, i % 3 * 5
        assert np.array_equal(pixels[top : top + 4, left : left + 5].transpose(2, 0, 1), image)


@pytest.mark.parametrize('shape', [(5, 3, 4, 4), (6, 2, 4, 4)])
def test_grid_of_wrong_shape_leaves_no_file(tmp_path, shape):
    with pytest.raises(ValueError, match='3x2 tiles need 6 images'):
        save_image_grid(torch.zeros(shape), tmp_path / 'grid.png', (-1, 1), (3, 2))
    assert not list(tmp_path.iterdir())


def test_panels_side_by_side(tmp_path):
    white, black = torch.ones(3, 3, 32, 32), -torch.ones(4, 1, 32, 32)
    save_panels(tmp_path / 'panels.png', [('before', white), ('after', black)], columns=2)
    picture = np.asarray(PIL.Image.open(tmp_path / 'panels.png'))
    side = 2 * 96  # 32 pixels, magnified three times, in two columns
    assert picture.shape == (20 + side, 2 * side + 12, 3)
    assert (picture[20:, :side] == 255).all()  # three white images and a blank place
    assert (picture[20:, side + 12:] == 0).all()
    assert (picture[:20] < 128).any()  # captions
