import json
import zipfile

import numpy as np
import pytest

from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.image_files import DatasetWriter, ImageFiles


@pytest.mark.parametrize('dest', ['out.zip', 'new/folder'])
def test_writer_round_trip(tmp_path, dest):
    images = np.random.RandomState(0).randint(256, size=[1002, 4, 4], dtype=np.uint8)
    with DatasetWriter(tmp_path / dest) as writer:
        names = [writer.add(image, [i, 0.5]) for i, image in enumerate(images)]
        writer.extra['prepared'] = {'by': 'test'}
    assert [names[0], names[-1]] == ['00000/img00000000.png', '00001/img00001001.png']
    dataset = ImageDataset(tmp_path / dest, use_labels=True)
    assert np.array_equal(dataset.decode_all()[:, 0], images)
    assert dataset.get_label(7).tolist() == [7, 0.5]
    assert json.loads(ImageFiles(tmp_path / dest).read('dataset.json'))['prepared'] == {'by': 'test'}
    assert not list(tmp_path.glob('**/.*'))


def test_writer_stores_without_compression_and_reproducibly(tmp_path):
    for name in ('a.zip', 'b.zip'):
        with DatasetWriter(tmp_path / name) as writer:
            writer.add(np.zeros([64, 64, 3], dtype=np.uint8))
    info = zipfile.ZipFile(tmp_path / 'a.zip').infolist()
    assert all(entry.compress_type == zipfile.ZIP_STORED for entry in info) and info[0].file_size > 64 * 64 * 3
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()
    assert json.loads(zipfile.ZipFile(tmp_path / 'a.zip').read('dataset.json')) == {'labels': None}


def test_labels_are_written_only_if_complete(tmp_path):
    with DatasetWriter(tmp_path / 'a.zip') as writer:
        writer.add(np.zeros([4, 4], dtype=np.uint8), 1)
        writer.add(np.zeros([4, 4], dtype=np.uint8))
        assert not writer.labelled
    assert json.loads(ImageFiles(tmp_path / 'a.zip').read('dataset.json')) == {'labels': None}


@pytest.mark.parametrize('dest', ['out.zip', 'folder'])
def test_writer_leaves_nothing_after_an_exception(tmp_path, dest):
    with pytest.raises(KeyError), DatasetWriter(tmp_path / dest) as writer:
        writer.add(np.zeros([4, 4], dtype=np.uint8))
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_writer_refuses_a_folder_with_files(tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a.txt').write_text('-')
    (tmp_path / 'odd.zip').mkdir()
    not_empty = 'not an empty folder'
    for name, message in {'full': not_empty, 'full/a.txt': not_empty, 'odd.zip': 'is a folder'}.items():
        with pytest.raises(UserError, match=message):
            DatasetWriter(tmp_path / name)
