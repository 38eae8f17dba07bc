from pathlib import Path

import m2m_stylegan
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.demo_data import _bust_codes
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
