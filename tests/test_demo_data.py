import json
from pathlib import Path

import numpy as np
import PIL.Image

import m2m_stylegan
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.demo_data import _bust_codes, write_fluent_busts
from m2m_stylegan.files import sha256_of

ASSETS = Path(m2m_stylegan.__file__).parent / 'assets'


def test_target_is_the_one_of_the_credits():
    dataset = ImageDataset(ASSETS / 'demo-target-64.zip', resolution=64)
    dataset.verify()
    assert len(dataset) == 828 and dataset.image_shape == [3, 64, 64]
    assert sha256_of(ASSETS / 'demo-target-64.zip') in (ASSETS / 'CREDITS.md').read_text()


def test_busts_are_chosen_by_subcategory_and_name_in_unicode_order():
    def design(name, code, order, subcategory='person', tones=()):
        variations = {tone: {'unified': f'{code}-{tone}-FE0F'} for tone in tones}
        return {'short_name': name, 'unified': code, 'sort_order': order, 'subcategory': subcategory, 'skin_variations': variations}

    designs = [
        design('man', '1F468', 3, tones=['1F3FB']),
        design('baby', '1F476-FE0F', 1),
        design('female_fairy', '1F9DA', 2, 'person-fantasy'),
        design('cat', '1F408', 0, 'animal-mammal'),
    ]
    assert list(_bust_codes(designs)) == [('baby/default', '1f476'), ('man/default', '1f468'), ('man/1F3FB', '1f468-1f3fb')]


def test_fluent_portraits_are_padded_to_squares_on_white(tmp_path):
    """The package has a few pictures that are higher than wide, transparent ones, and names with variation selectors."""
    (tmp_path / 'fluent' / 'assets').mkdir(parents=True)
    red, clear = (255, 0, 0, 255), (0, 255, 0, 0)
    for name, size, colour in [('1f476-fe0f', (16, 32), red), ('1f468', (16, 16), clear), ('1f408', (16, 16), red)]:
        PIL.Image.new('RGBA', size, colour).save(tmp_path / 'fluent' / 'assets' / f'{name}.webp', lossless=True)
    designs = [{'short_name': name, 'unified': code, 'sort_order': i, 'subcategory': 'person'}
               for i, (name, code) in enumerate([('baby', '1F476-FE0F'), ('man', '1F468')])]
    (tmp_path / 'emoji.json').write_text(json.dumps(designs))
    assert write_fluent_busts(tmp_path / 'set.zip', 8, tmp_path / 'fluent', tmp_path) == 2
    images = np.stack([image for image, _ in ImageDataset(tmp_path / 'set.zip')])
    assert images.shape == (2, 3, 8, 8) and (images[1] == 255).all()
    assert (images[0][:, :, [0, 1, 6, 7]] == 255).all() and (images[0][:, :, 2:6] == np.array([255, 0, 0])[:, None, None]).all()
