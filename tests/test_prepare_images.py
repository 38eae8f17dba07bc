import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.prepare_images import PrepareOptions, prepare

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
ROOT = Path(__file__).parents[1]


def solid(color, size=(8, 8), mode='RGB'):
    return PIL.Image.new(mode, size, color)


def stripes(*colors, width=8, height=8):
    """Vertical stripes of equal width."""
    pixels = np.repeat(np.array(colors, dtype=np.uint8), width // len(colors), axis=0)
    return PIL.Image.fromarray(np.tile(pixels, (height, 1, 1)))


def converted(tmp_path, img, *, name='a.png', save=None, **options):
    """The pixels [H, W] or [H, W, 3] that `prepare` makes of one picture."""
    source, dest = tmp_path / 'source', tmp_path / 'dest.zip'
    source.mkdir(exist_ok=True)
    img.save(source / name, **(save or {}))
    prepare(source, dest, PrepareOptions.from_command_line(**options))
    pixels = ImageDataset(dest).decode_all()[0].transpose(1, 2, 0)
    return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


def record(path) -> dict:
    return json.loads(zipfile.ZipFile(path).read('dataset.json'))


# ---- colour


# Pillow before 13 (12 is the last for Python 3.10) cannot read the uncompressed YCbCr TIFF it writes (Pillow issue 9770), but compressed ones.
UNCOMPRESSED = pytest.mark.skipif(int(PIL.__version__.split('.')[0]) < 13, reason='Pillow < 13 cannot read uncompressed YCbCr TIFF')


@pytest.mark.parametrize('mode, save', [('RGB', {}), ('RGBA', {}), ('P', {}), ('CMYK', {}), ('YCbCr', {'compression': 'tiff_lzw'}),
                                        pytest.param('YCbCr', {}, marks=UNCOMPRESSED)])
def test_colour_modes_become_rgb(tmp_path, mode, save):
    name = {'CMYK': 'a.tif', 'YCbCr': 'a.tif'}.get(mode, 'a.png')
    pixels = converted(tmp_path, solid(RED).convert(mode), name=name, save=save)
    assert np.abs(pixels.astype(int) - RED).max() <= 2  # YCbCr rounds


@pytest.mark.parametrize('mode', ['L', '1', 'LA'])
def test_grey_modes_stay_grey(tmp_path, mode):
    assert np.array_equal(converted(tmp_path, solid(255, mode='L').convert(mode)), np.full([8, 8], 255))


def test_grey_and_colour_together_become_rgb(tmp_path):
    (tmp_path / 'source').mkdir()
    solid(100, mode='L').save(tmp_path / 'source' / 'grey.png')
    assert converted(tmp_path, solid(RED)).tolist()[0][0] == list(RED)
    assert ImageDataset(tmp_path / 'dest.zip')[1][0][:, 0, 0].tolist() == [100, 100, 100]


def test_sixteen_bits_are_scaled(tmp_path):
    pixels = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16) // 3 * 3
    assert np.array_equal(converted(tmp_path, PIL.Image.fromarray(pixels)), np.rint(pixels / 257))


@pytest.mark.parametrize('pixels', [np.full([8, 8], 70000, dtype=np.int32), np.full([8, 8], 0.5, dtype=np.float32)])
def test_pixels_of_unknown_range_are_skipped(tmp_path, pixels):
    with pytest.raises(UserError, match='save it with 8 or 16'):
        converted(tmp_path, PIL.Image.fromarray(pixels), name='a.tif')


@pytest.mark.parametrize('mode', ['RGBA', 'P'])
@pytest.mark.parametrize('background, expected', [('#ffffff', WHITE), ('blue', BLUE)])
def test_transparency_shows_the_background(tmp_path, mode, background, expected):
    if mode == 'RGBA':
        img, save = solid((255, 0, 0, 0), mode='RGBA'), {}
    else:
        img, save = solid(RED).convert('P', palette=PIL.Image.Palette.ADAPTIVE), {'transparency': 0}
    assert (converted(tmp_path, img, save=save, background=background) == expected).all()


def test_grey_with_transparency_on_a_coloured_background_is_rgb(tmp_path):
    assert (converted(tmp_path, solid((0, 0), mode='LA'), background='#00ff00') == GREEN).all()
    assert (converted(tmp_path, solid((0, 0), mode='LA'), background='#808080') == 128).all()


def test_background_comes_before_resizing(tmp_path):
    img = PIL.Image.fromarray(np.random.RandomState(0).randint(256, size=[16, 16, 4], dtype=np.uint8))
    flat = PIL.Image.alpha_composite(solid((255, 255, 255, 255), (16, 16), 'RGBA'), img).convert('RGB')
    expected = np.asarray(flat.resize((8, 8), PIL.Image.Resampling.LANCZOS))
    assert np.array_equal(converted(tmp_path, img, resolution=8), expected)


def test_exif_rotation(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    pixels = converted(tmp_path, stripes(RED, BLUE), save={'exif': exif})
    assert (pixels[:4] == RED).all() and (pixels[4:] == BLUE).all()


# ---- shape


@pytest.mark.parametrize(
    'crop, first_row, column',
    [
        ('center', [RED, BLUE], [RED] * 8),
        ('stretch', [GREEN, RED, BLUE, GREEN], [GREEN] * 8),
        ('pad', [WHITE], [WHITE, WHITE, GREEN, GREEN, GREEN, GREEN, WHITE, WHITE]),
    ],
)
def test_crops_of_a_wide_picture(tmp_path, crop, first_row, column):
    img = stripes(GREEN, RED, BLUE, GREEN, width=32, height=16)
    pixels = converted(tmp_path, img, resolution=8, crop=crop, resize_filter='box')
    assert pixels[:, 0].tolist() == [list(color) for color in column]
    assert pixels[0].tolist() == np.repeat(first_row, 8 // len(first_row), axis=0).tolist()


def test_center_crop_of_a_tall_picture(tmp_path):
    img = stripes(GREEN, RED, BLUE, GREEN, width=32, height=16).transpose(PIL.Image.Transpose.ROTATE_270)
    pixels = converted(tmp_path, img, transform='center-crop', width=8, height=8, resize_filter='box')
    assert (pixels[:4] == RED).all() and (pixels[4:] == BLUE).all()


def test_center_crop_wide_letterboxes_in_black(tmp_path):
    options = {'transform': 'center-crop-wide', 'width': 16, 'height': 8, 'resize_filter': 'box'}
    pixels = converted(tmp_path, stripes(RED, BLUE, width=32, height=32), **options)
    assert (pixels[:4] == BLACK).all() and (pixels[12:] == BLACK).all()
    assert (pixels[4:12, :8] == RED).all() and (pixels[4:12, 8:] == BLUE).all()
    with pytest.raises(UserError, match='8x32 is smaller than 16x8'):
        converted(tmp_path, solid(RED, (8, 32)), **options)


def test_width_and_height_alone_stretch_as_the_official_tool_does(tmp_path):
    img = stripes(GREEN, RED, BLUE, GREEN, width=32, height=16)
    assert converted(tmp_path, img, width=8, height=8, resize_filter='box')[0, ::2].tolist() == [*map(list, (GREEN, RED, BLUE, GREEN))]


def test_crop_none_skips_what_is_not_square(tmp_path):
    with pytest.raises(UserError, match='8x16 is not square'):
        converted(tmp_path, solid(RED, (8, 16)), resolution=8, crop='none')


@pytest.mark.parametrize('name', ['box', 'lanczos'])
def test_filter_is_the_one_of_pillow(tmp_path, name):
    img = PIL.Image.fromarray(np.random.RandomState(0).randint(256, size=[32, 32, 3], dtype=np.uint8))
    expected = img.resize((8, 8), {'box': PIL.Image.Resampling.BOX, 'lanczos': PIL.Image.Resampling.LANCZOS}[name])
    assert np.array_equal(converted(tmp_path, img, resolution=8, resize_filter=name), np.asarray(expected))


def test_pictures_that_fit_are_kept_exactly(tmp_path):
    img = PIL.Image.fromarray(np.random.RandomState(0).randint(256, size=[16, 16, 3], dtype=np.uint8))
    assert np.array_equal(converted(tmp_path, img), np.asarray(img))
    assert np.array_equal(converted(tmp_path, img, resolution=16), np.asarray(img))


# ---- sets


@pytest.fixture
def mixed(tmp_path):
    """A folder such as people have it: classes, wrong sizes, damage, notes."""
    source = tmp_path / 'mixed'
    for folder in ('cat', 'dog'):
        (source / folder).mkdir(parents=True)
    solid(RED, (20, 30)).save(source / 'cat' / '1.jpg')
    solid(BLUE, (6, 6)).save(source / 'cat' / '2.png')
    solid((0, 0, 0, 0), (16, 16), 'RGBA').save(source / 'dog' / '1.webp')
    PIL.Image.fromarray(np.random.RandomState(0).randint(256, size=[64, 64, 3], dtype=np.uint8)).save(source / 'dog' / '2.png')
    truncated = source / 'dog' / '2.png'
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    (source / 'dog' / '3.png').write_bytes(b'<html>')
    (source / 'notes.txt').write_text('notes')
    return source


def test_mixed_folder(mixed, tmp_path):
    report = prepare(mixed, tmp_path / 'dest.zip', PrepareOptions(8, 8, labels_from_folders=True))
    dataset = ImageDataset(tmp_path / 'dest.zip', use_labels=True)
    assert dataset.image_shape == [3, 8, 8] and [dataset.get_label(i).tolist() for i in range(3)] == [[1, 0], [1, 0], [0, 1]]
    assert dataset[2][0].min() == 255
    assert (report.written, report.labelled, report.enlarged, report.classes) == (3, True, ['cat/2.png'], ['cat', 'dog'])
    assert [text.split(':')[0] for text in report.skipped] == ['dog/3.png', 'dog/2.png']
    text = report.text()
    assert 'not an image that Pillow can read' in text and 'truncated' in text and '1 of 3 were smaller' in text
    assert record(tmp_path / 'dest.zip')['prepared'] == {
        'source': 'mixed',
        'width': 8,
        'height': 8,
        'crop': 'center',
        'resize_filter': 'lanczos',
        'background': '#ffffff',
        'max_images': None,
        'labels_from_folders': True,
        'classes': ['cat', 'dog'],
        'num_skipped': 2,
        'num_enlarged': 1,
        'pillow': PIL.__version__,
    }


def test_zip_source_folder_dest_and_max_images(mixed, tmp_path):
    with zipfile.ZipFile(tmp_path / 'mixed.zip', 'w') as archive:
        for path in mixed.rglob('*.*'):
            archive.write(path, path.relative_to(mixed))
    report = prepare(tmp_path / 'mixed.zip', tmp_path / 'dest', PrepareOptions(8, 8, max_images=2))
    assert report.written == len(ImageDataset(tmp_path / 'dest')) == 2
    assert sorted(path.name for path in (tmp_path / 'dest').rglob('*.*')) == ['dataset.json', 'img00000000.png', 'img00000001.png']


@pytest.mark.parametrize('complete', [True, False])
def test_labels_of_the_source_are_kept_only_if_complete(tmp_path, complete):
    for i in range(3):
        (tmp_path / 'source').mkdir(exist_ok=True)
        solid(RED).save(tmp_path / 'source' / f'{i}.png')
    labels = [[f'{i}.png', 5 - i] for i in range(3 if complete else 2)]
    (tmp_path / 'source' / 'dataset.json').write_text(json.dumps({'labels': labels}))
    report = prepare(tmp_path / 'source', tmp_path / 'dest.zip')
    written = record(tmp_path / 'dest.zip')['labels']
    if complete:
        assert written == [[f'00000/img0000000{i}.png', 5 - i] for i in range(3)] and report.labelled
    else:
        assert written is None and not report.labelled
        assert 'labels left out' in report.text() and '2.png' in report.text()


def test_labels_that_are_none_are_refused(tmp_path):
    (tmp_path / 'source').mkdir()
    solid(RED).save(tmp_path / 'source' / '0.png')
    (tmp_path / 'source' / 'dataset.json').write_text(json.dumps({'labels': [['0.png', 'cat']]}))
    with pytest.raises(UserError, match=r'mend it or take it out.\n  1 of 1 have a label that is neither a class'):
        prepare(tmp_path / 'source', tmp_path / 'dest.zip')
    assert not (tmp_path / 'dest.zip').exists()


def test_preparing_twice_changes_nothing(mixed, tmp_path):
    prepare(mixed, tmp_path / 'one.zip', PrepareOptions(8, 8))
    prepare(tmp_path / 'one.zip', tmp_path / 'two.zip')
    assert np.array_equal(ImageDataset(tmp_path / 'one.zip').decode_all(), ImageDataset(tmp_path / 'two.zip').decode_all())


def test_sizes_that_need_a_decision(mixed, tmp_path):
    with pytest.raises(UserError, match=r'found .*20x30 \(1\).*--resolution=16'):
        prepare(mixed, tmp_path / 'dest.zip')
    assert not (tmp_path / 'dest.zip').exists()


@pytest.mark.parametrize('crop, enlarged', [('center', ['a.png']), ('pad', []), ('stretch', ['a.png'])])
def test_enlarged_is_what_loses_sharpness(tmp_path, crop, enlarged):
    (tmp_path / 'source').mkdir()
    solid(RED, (4, 16)).save(tmp_path / 'source' / 'a.png')
    assert prepare(tmp_path / 'source', tmp_path / 'dest.zip', PrepareOptions(8, 8, crop)).enlarged == enlarged


def test_two_sizes_that_would_both_do_need_a_decision(tmp_path):
    (tmp_path / 'source').mkdir()
    for side in (8, 16, 16):
        solid(RED, (side, side)).save(tmp_path / 'source' / f'{len(list((tmp_path / "source").iterdir()))}.png')
    with pytest.raises(UserError, match=r'found 16x16 \(2\), 8x8 \(1\)\. Give --resolution, for example --resolution=16'):
        prepare(tmp_path / 'source', tmp_path / 'dest.zip')


def test_nothing_usable_leaves_nothing(tmp_path):
    (tmp_path / 'source').mkdir()
    (tmp_path / 'source' / 'a.png').write_bytes(b'-')
    with pytest.raises(UserError, match=r'no usable picture:\n  1 of 1 are skipped:\n    a.png: not an image'):
        prepare(tmp_path / 'source', tmp_path / 'dest.zip', PrepareOptions(8, 8))
    assert not (tmp_path / 'dest.zip').exists()


def test_folders_as_labels_need_folders(mixed, tmp_path):
    solid(RED).save(mixed / 'stray.png')
    with pytest.raises(UserError, match=r'1 of 6 lie in no folder:\n    stray.png'):
        prepare(mixed, tmp_path / 'dest.zip', PrepareOptions(8, 8, labels_from_folders=True))


def test_dest_must_lie_apart_from_source(mixed):
    for dest in (mixed, mixed / 'dest'):
        with pytest.raises(UserError, match='lies in --source'):
            prepare(mixed, dest, PrepareOptions(8, 8))


@pytest.mark.parametrize(
    'options, message',
    [
        ({'resolution': 100}, '100x100'),
        ({'resolution': 2}, '2x2'),
        ({'width': 8}, 'both --width and --height'),
        ({'width': 8, 'height': 16}, '8x16'),
        ({'resolution': 8, 'width': 8, 'height': 8}, 'one or the other'),
        ({'transform': 'center-crop', 'crop': 'pad', 'resolution': 8}, 'one of the two'),
        ({'transform': 'center-crop-wide', 'width': 8, 'height': 16}, 'not larger'),
        ({'resolution': 8, 'background': 'whitish'}, 'not a colour'),
        ({'resolution': 8, 'max_images': 0}, 'at least 1'),
        ({'resolution': 8, 'resize_filter': 'cubic'}, "filter out of \\('box', 'lanczos'\\)"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(UserError, match=message):
        PrepareOptions.from_command_line(**options)


def test_command_line(mixed, tmp_path):
    spec = importlib.util.spec_from_file_location('tool_dataset', ROOT / 'tools' / 'dataset.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    paths = [f'--source={mixed}', f'--dest={tmp_path / "dest.zip"}']
    wrong = CliRunner().invoke(tool.main, paths)
    assert wrong.exit_code == 1 and 'Give --resolution' in wrong.output and 'Traceback' not in wrong.output
    right = CliRunner().invoke(tool.main, [*paths, '--resolution=8', '--crop=pad', '--labels-from-folders'])
    assert right.exit_code == 0 and '3 images written, with labels, 2 skipped' in right.output
    assert ImageDataset(tmp_path / 'dest.zip').resolution == 8
