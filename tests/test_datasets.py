import json
import multiprocessing
import pickle
import struct
import zipfile
import zlib
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from golden import load

from m2m_stylegan.dataset_checks import suggest_resolution
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.image_files import ImageFiles, ImageReadError

GOLDEN = load('data_and_schedules').arrays


def png(size=(8, 8), mode='RGB', seed=0, **options) -> bytes:
    pixels = np.random.RandomState(seed).randint(256, size=[size[1], size[0], 3], dtype=np.uint8)
    data = BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(data, 'png', **options)
    return data.getvalue()


def write_zip(path, files: dict[str, bytes], method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path, files: dict[str, bytes]):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def labels_json(labels) -> bytes:
    return json.dumps({'labels': labels}).encode()


@pytest.fixture
def golden_zip(tmp_path):
    files = {}
    for name, pixels in zip(GOLDEN['dataset/names'], GOLDEN['dataset/images_hwc'], strict=True):
        data = BytesIO()
        PIL.Image.fromarray(pixels).save(data, 'png')
        files[str(name)] = data.getvalue()
    labels = zip(GOLDEN['dataset/names'].tolist(), GOLDEN['dataset/class_ids'].tolist(), strict=True)
    files['dataset.json'] = labels_json([*labels][::-1])
    return write_zip(tmp_path / 'golden.zip', files)


# ---- the official set


@pytest.mark.parametrize(
    'case, options',
    [
        ('all', {}),
        ('mirror', {'xflip': True}),
        ('max5', {'max_size': 5}),
        ('max5_seed1_mirror', {'max_size': 5, 'random_seed': 1, 'xflip': True}),
    ],
)
@pytest.mark.parametrize('in_memory', [False, True])
def test_items_equal_the_official_ones(golden_zip, case, options, in_memory):
    dataset = ImageDataset(golden_zip, use_labels=True, **options)
    assert not in_memory or dataset.in_memory()
    items, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    assert np.array_equal(np.stack(items), GOLDEN[f'dataset/{case}/items'])
    assert np.array_equal(np.stack(labels), GOLDEN[f'dataset/{case}/labels'])
    assert [dataset.raw_idx(i) for i in range(len(dataset))] == GOLDEN[f'dataset/{case}/raw_idx'].tolist()
    assert [dataset.xflip(i) for i in range(len(dataset))] == GOLDEN[f'dataset/{case}/xflip'].tolist()
    assert all(item.dtype == np.uint8 and item.flags.writeable and item.flags.c_contiguous for item in items)
    assert all(label.dtype == np.float32 for label in labels)


def test_attributes(golden_zip):
    dataset = ImageDataset(golden_zip, use_labels=True, resolution=4)
    assert (dataset.name, dataset.path, dataset.image_shape) == ('golden', str(golden_zip), [3, 4, 4])
    assert (dataset.num_channels, dataset.resolution, len(dataset)) == (3, 4, 12)
    assert (dataset.has_labels, dataset.label_dim, dataset.label_shape) == (True, 3, [3])
    unlabelled = ImageDataset(golden_zip)
    assert (unlabelled.has_labels, unlabelled.label_dim, unlabelled.get_label(0).shape) == (False, 0, (0,))


def test_classes_are_counted_over_all_files(golden_zip):
    dataset = ImageDataset(golden_zip, use_labels=True, max_size=1)
    assert dataset.label_shape == [3] and dataset[0][1].shape == (3,)


def test_float_labels_are_taken_as_they_are(tmp_path):
    labels = labels_json([['b.png', [3, 4.5]], ['a.png', [0, -1]]])
    dataset = ImageDataset(write_folder(tmp_path, {'a.png': png(), 'b.png': png(), 'dataset.json': labels}), use_labels=True)
    assert dataset.label_shape == [2] and [dataset.get_label(i).tolist() for i in (0, 1)] == [[0, -1], [3, 4.5]]


def test_grey_images_and_nested_folders(tmp_path):
    write_folder(tmp_path / 'set.v1', {'b/x.png': png(mode='L'), 'a.png': png(mode='L'), 'note.txt': b'-'})
    dataset = ImageDataset(f'{tmp_path}/set.v1/')
    assert dataset.image_shape == [1, 8, 8] and dataset[1][0].shape == (1, 8, 8) and dataset.name == 'set'


def test_items_are_copies(golden_zip):
    dataset = ImageDataset(golden_zip, use_labels=True)
    dataset.in_memory()
    dataset[0][0][:] = 0
    assert dataset[0][0].any()


def test_index_out_of_range(golden_zip):
    with pytest.raises(IndexError):
        ImageDataset(golden_zip)[12]


def test_in_memory_respects_the_budget_and_decodes_only_what_is_used(golden_zip):
    dataset = ImageDataset(golden_zip, max_size=5, xflip=True)
    assert not dataset.in_memory(max_bytes=5 * 48 - 1)
    assert dataset.in_memory(max_bytes=5 * 48)
    assert dataset.decode_all().shape == (5, 3, 4, 4)


def test_fingerprint(tmp_path):
    files = {'a.png': png(seed=1), 'b/c.png': png(seed=2)}
    dataset = ImageDataset(write_zip(tmp_path / 'x.zip', files, zipfile.ZIP_DEFLATED))
    same = [
        ImageDataset(write_folder(tmp_path / 'x', files)),
        ImageDataset(write_zip(tmp_path / 'y.zip', files | {'dataset.json': labels_json([['a.png', 0], ['b/c.png', 1]])})),
        ImageDataset(tmp_path / 'x.zip', xflip=True),
    ]
    other = [
        ImageDataset(tmp_path / 'x.zip', max_size=1),
        ImageDataset(tmp_path / 'y.zip', use_labels=True),
        ImageDataset(write_zip(tmp_path / 'z.zip', {'a.png': png(seed=2), 'b/c.png': png(seed=1)})),
        ImageDataset(write_zip(tmp_path / 'w.zip', {'a.png': png(seed=1), 'c.png': png(seed=2)})),
    ]
    assert {d.fingerprint for d in same} == {dataset.fingerprint}
    assert len({d.fingerprint for d in [dataset, *other]}) == 5


# ---- processes


def _sum(dataset, queue):
    queue.put(sum(int(dataset[i][0].astype(int).sum()) for _ in range(20) for i in range(len(dataset))))


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_open_handle_survives_a_new_process(golden_zip, start):
    context = multiprocessing.get_context(start)
    dataset = ImageDataset(golden_zip)
    queue = context.Queue()
    workers = [context.Process(target=_sum, args=(dataset, queue)) for _ in range(2 if start == 'fork' else 1)]
    for worker in workers:
        worker.start()
    _sum(dataset, mine := SimpleNamespace(put=lambda total: mine.__setattr__('total', total)))
    assert [queue.get(timeout=60) for _ in workers] == [mine.total] * len(workers)
    for worker in workers:
        worker.join()


def test_no_handle_is_shared_with_another_process(golden_zip, monkeypatch):
    files = ImageFiles(golden_zip)
    mine = files._open_zip()
    assert files._open_zip() is mine
    monkeypatch.setattr('os.getpid', lambda: -1)
    assert files._open_zip() is not mine


def test_pickle_and_close(golden_zip):
    dataset = ImageDataset(golden_zip, use_labels=True)
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert np.array_equal(copy[3][0], dataset[3][0])


def test_errors_cross_from_data_loader_workers():
    err = pickle.loads(pickle.dumps(ImageReadError('cannot read a.png', 'why')))
    assert (str(err), err.reason) == ('cannot read a.png', 'why')
    assert str(type(err)('Caught in worker 0')) == 'Caught in worker 0'  # PyTorch builds it anew from one string


# ---- wrong sets


def test_all_problems_in_one_message(tmp_path):
    files = {f'n{i:02d}.png': png((8, 6)) for i in range(13)} | {f'ok{i:02d}.png': png() for i in range(20)}
    files |= {'c.png': png((16, 16)), 'd.png': png((12, 12)), 'e.png': png(mode='RGBA'), 'f.png': png(mode='L'), 'g.png': b'?'}
    labels = labels_json([[name, 0] for name in files if name != 'f.png'])
    path = write_zip(tmp_path / 'my set.zip', files | {'dataset.json': labels})
    with pytest.raises(UserError) as caught:
        ImageDataset(path, use_labels=True)
    assert str(caught.value).splitlines() == [
        f'{path} is not ready for training:',
        '  1 of 38 cannot be read as images:',
        '    g.png (not an image that Pillow can read)',
        '  13 of 38 are not square:',
        *(f'    n{i:02d}.png (8x6 RGB)' for i in range(10)),
        '    ... and 3 more',
        '  1 of 38 have a side that is no power of two from 4 up:',
        '    d.png (12x12 RGB)',
        '  2 of 38 are not 8x8 as most are:',
        '    c.png (16x16 RGB)',
        '    d.png (12x12 RGB)',
        '  1 of 38 are neither grey (L) nor RGB:',
        '    e.png (8x8 RGBA)',
        '  1 of 38 are not RGB as most are:',
        '    f.png (8x8 L)',
        '  1 of 38 have no label in dataset.json:',
        '    f.png',
        'Prepare a copy that fits:',
        f"  python tools/dataset.py --source='{path}' --dest='{tmp_path}/my set-8.zip' --resolution=8",
        'Complete dataset.json, or train without labels.',
    ]


@pytest.mark.parametrize('size', [(2, 2), (1, 1), (24, 24)])
def test_sides_that_no_network_has(tmp_path, size):
    with pytest.raises(UserError, match='no power of two'):
        ImageDataset(write_folder(tmp_path, {'a.png': png(size)}))


def test_resolution_is_only_checked(golden_zip):
    with pytest.raises(UserError, match=r'12 of 12 are not 8x8 as asked for[\s\S]*--resolution=8'):
        ImageDataset(golden_zip, resolution=8)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', '1'])
def test_modes_that_need_conversion(tmp_path, mode):
    with pytest.raises(UserError, match='neither grey'):
        ImageDataset(write_folder(tmp_path, {'a.png': png(mode=mode)}))


def test_places_that_hold_no_set(tmp_path):
    (tmp_path / 'empty').mkdir()
    write_folder(tmp_path / 'texts', {'a.txt': b'-'})
    (tmp_path / 'file.tar').write_bytes(b'-')
    (tmp_path / 'broken.zip').write_bytes(write_zip(tmp_path / 'x.zip', {'a.png': png()}).read_bytes()[:-10])
    (tmp_path / 'none.zip').write_bytes(b'')
    for name, message in {
        'missing': 'does not exist',
        'empty': 'holds no images.*found nothing',
        'texts': 'found 1 other files, e.g. a.txt',
        'file.tar': 'neither a folder nor a .zip',
        'broken.zip': 'cannot be opened as a zip',
        'none.zip': 'cannot be opened as a zip',
    }.items():
        with pytest.raises(UserError, match=message):
            ImageDataset(tmp_path / name)


def test_max_size_below_one(golden_zip):
    with pytest.raises(UserError, match='max_size=0'):
        ImageDataset(golden_zip, max_size=0)


@pytest.mark.parametrize(
    'data, message',
    [
        (None, 'has no labels'),
        (b'{"labels": null}', 'has no labels'),
        (b'{"label": []}', 'wrong form.*KeyError'),
        (b'[]', 'wrong form'),
        (b'\xff\xfe', 'wrong form'),
        (b'{"labels": [["a.png"]]}', 'wrong form'),
        (b'{"labels": 3}', 'wrong form'),
        (b'[' * 100_000, 'wrong form.*RecursionError'),
        (labels_json([]), '2 of 2 have no label'),
        (labels_json([['a.png', 0], ['b.png', -1]]), r'neither a class[^\n]*\n    b.png \(-1\)'),
        (labels_json([['a.png', 0], ['b.png', True]]), 'b.png'),
        (labels_json([['a.png', 0], ['b.png', 10**9]]), 'b.png'),
        (labels_json([['a.png', [0.0]], ['b.png', [float('nan')]]]), 'b.png'),
        (labels_json([['a.png', [0.0]], ['b.png', [10**400]]]), 'b.png'),
        (labels_json([['a.png', [0.0]], ['b.png', [0.0, 1.0]]]), 'another kind'),
        (labels_json([['a.png', 0], ['b.png', [1.0]]]), 'another kind'),
        (labels_json([['a.png', {}], ['b.png', 'x']]), '2 of 2 have a label that is neither'),
    ],
)
def test_wrong_labels(tmp_path, data, message):
    write_folder(tmp_path, {'a.png': png(), 'b.png': png()} | ({} if data is None else {'dataset.json': data}))
    with pytest.raises(UserError, match=message):
        ImageDataset(tmp_path, use_labels=True)
    assert not ImageDataset(tmp_path).has_labels


@pytest.mark.parametrize(
    'sizes, expected', [([(640, 480)], 256), ([(64, 64), (64, 900), (65, 64)], 64), ([(3, 9)], 4), ([(5000, 5000)], 1024)]
)
def test_suggested_resolution(sizes, expected):
    assert suggest_resolution(sizes) == expected


# ---- hostile files


def test_verify_and_decode_all_name_every_damaged_file(tmp_path):
    good = png()
    flipped = bytearray(good)
    flipped[60] ^= 0xFF
    files = {'a.png': good, 'b.png': good[:-60], 'c.png': bytes(flipped), 'd.png': good}
    dataset = ImageDataset(write_zip(tmp_path / 'x.zip', files))
    with pytest.raises(ImageReadError, match=r'b\.png'):
        dataset[1]
    for check in (dataset.verify, dataset.decode_all, dataset.in_memory):
        with pytest.raises(UserError, match=r'2 of 4 images cannot be read:\n    b.png .*\n    c.png'):
            check()
    assert np.array_equal(dataset[0][0], dataset[3][0])


def test_zip_whose_crc_is_wrong(tmp_path):
    path = write_zip(tmp_path / 'x.zip', {'a.bmp': to_bmp(png())})
    data = bytearray(path.read_bytes())
    data[150] ^= 1  # a pixel: BMP itself has no check sum
    path.write_bytes(data)
    with pytest.raises(UserError, match='CRC'):
        ImageDataset(path).verify()


def to_bmp(data: bytes) -> bytes:
    out = BytesIO()
    PIL.Image.open(BytesIO(data)).save(out, 'bmp')
    return out.getvalue()


def test_header_that_promises_a_giant(tmp_path):
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 1 << 17, 1 << 17, 8, 2, 0, 0, 0))
    giant = b'\x89PNG\r\n\x1a\n' + header + chunk(b'IEND', b'')
    with pytest.raises(UserError, match='DecompressionBomb'):
        ImageDataset(write_zip(tmp_path / 'x.zip', {'a.png': giant}))


def test_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr('m2m_stylegan.image_files.MAX_FILE_BYTES', 1 << 16)
    files = ImageFiles(write_zip(tmp_path / 'x.zip', {'a.png': png() + bytes(1 << 20)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ImageReadError, match='the limit is 65536'):
        files.image('a.png')
    with pytest.raises(ImageReadError, match='the limit'):
        files.read('a.png')


def test_zip_member_larger_than_it_says(tmp_path):
    path = write_zip(tmp_path / 'x.zip', {'a.png': png() + bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    real, claimed = struct.pack('<I', len(png()) + (1 << 20)), struct.pack('<I', 100)
    path.write_bytes(path.read_bytes().replace(real, claimed))
    with pytest.raises(ImageReadError, match=r'a\.png'):
        ImageFiles(path).read('a.png')


@pytest.mark.parametrize('method', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_that_cannot_be_bounded(tmp_path, method):
    with pytest.raises(UserError, match='another method than store or deflate'):
        ImageDataset(write_zip(tmp_path / 'x.zip', {'a.png': png()}, method))


def test_encrypted_zip(tmp_path):
    path = write_zip(tmp_path / 'x.zip', {'a.png': png()})
    data = bytearray(path.read_bytes())
    for magic, offset in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        data[data.index(magic) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match='encrypted'):
        ImageDataset(path)


def test_names_that_climb_or_break_lines_stay_names(tmp_path):
    files = {'../../up.png': png(), '/abs.png': png(), 'line\nbreak.png': png()[:-60]}
    dataset = ImageDataset(write_zip(tmp_path / 'x.zip', files))
    with pytest.raises(UserError, match=r'line\\nbreak\.png'):
        dataset.verify()
    assert [path.name for path in tmp_path.rglob('*')] == ['x.zip']


def test_random_damage_is_always_a_user_error(tmp_path):
    rnd = np.random.RandomState(0)
    formats = {'png': png(), 'bmp': to_bmp(png())}
    for extension in ('jpg', 'gif', 'tif', 'webp', 'tga', 'ico', 'ppm', 'jp2', 'sgi', 'pcx', 'dds'):
        out = BytesIO()
        PIL.Image.open(BytesIO(png())).save(out, PIL.Image.registered_extensions()[f'.{extension}'])
        formats[extension] = out.getvalue()
    files = {}
    for extension, data in formats.items():
        for i in range(25):
            damaged = bytearray(data)
            for _ in range(rnd.randint(1, 8)):
                damaged[rnd.randint(min(len(damaged), 200))] = rnd.randint(256)
            files[f'{extension}{i}.{extension}'] = bytes(damaged[: rnd.randint(1, len(damaged) + 1)])
    images = ImageFiles(write_folder(tmp_path, files))
    outcomes = set()
    for name in images.image_names:
        for read in (images.header, images.image):
            try:
                read(name)
                outcomes.add('read')
            except ImageReadError as err:
                outcomes.add(type(err.__cause__).__name__)
    assert 'read' in outcomes and len(outcomes) > 3
