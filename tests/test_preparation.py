"""What is made before low-res training: found again, gone on with after a kill, refused when damaged; and the files of small modules."""

import math

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from tiny_run import CPU, Killed

from m2m_stylegan import autoencoder, module_files, preparation, snapshots
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError

SOURCE_STEPS, TARGET_STEPS = 4, 3


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp('network') / 'source.pkl'
    tiny.save_pickle(path)
    return snapshots.load(path)


@pytest.fixture
def dataset(tmp_path):
    return ImageDataset(tiny.dataset_zip(tmp_path / 'data.zip'))


def prepare(snapshot, dataset, cache_dir, res=8, *, echo=lambda text: None, **kwargs):
    kimg = {'source_kimg': SOURCE_STEPS * preparation.BATCH / 1000, 'target_kimg': TARGET_STEPS * preparation.BATCH / 1000}
    return preparation.prepare(snapshot, dataset, res, cache_dir=cache_dir, device=CPU, echo=echo, **{**kimg, **kwargs})


def codes_of(prepared):
    return prepared.codes.gather(torch.arange(len(prepared.codes)))


def assert_same(first, second):
    """Bit for bit."""
    pairs = [(first.encoder.state_dict(), second.encoder.state_dict()), (codes_of(first), codes_of(second))]
    for a, b in pairs:
        assert a.keys() == b.keys()
        assert not [name for name in a if not torch.equal(a[name], b[name])]
    assert (first.metric is None and second.metric is None) or torch.equal(first.metric, second.metric)
    assert (first.psnr, first.feature_error) == (second.psnr, second.feature_error)


def encoder_files(cache_dir):
    return {path.name: path for path in (cache_dir / 'encoders').glob('*/*.safetensors')}


def target_file(cache_dir):
    path, = (path for name, path in encoder_files(cache_dir).items() if name.startswith('target-'))
    return path


def forbid(monkeypatch, *names):
    def forbidden(*args, **kwargs):
        raise AssertionError('computed anew')

    for name in names:
        monkeypatch.setattr(autoencoder, name, forbidden)


@pytest.mark.parametrize('res, names', [(2, {'w'}), (8, {'x', 'img', 'w'})])
def test_second_call_neither_trains_nor_encodes(tmp_path, snapshot, dataset, monkeypatch, res, names):
    state = torch.random.get_rng_state()
    first = prepare(snapshot, dataset, tmp_path, res)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(param.requires_grad for net in (first.encoder, snapshot.G_ema, snapshot.D) for param in net.parameters())
    codes = codes_of(first)
    assert codes.keys() == names and len(first.codes) == 20 and all(torch.isfinite(value).all() for value in codes.values())
    assert first.metric is None if res == 2 else first.metric.shape == (11, 11)
    forbid(monkeypatch, 'source_loss', 'target_loss')
    monkeypatch.setattr(autoencoder.Encoder, 'forward', None)
    torch.randn(7)
    assert_same(first, prepare(snapshot, dataset, tmp_path, res))


def test_both_trainings_move_the_encoder(tmp_path, snapshot, dataset):
    new = prepare(snapshot, dataset, tmp_path / 'new', source_kimg=0, target_kimg=0)
    source = prepare(snapshot, dataset, tmp_path / 'source', target_kimg=0)
    both = prepare(snapshot, dataset, tmp_path / 'both')
    tensors = [prepared.encoder.state_dict() for prepared in (new, source, both)]
    learned = {name for name, _ in both.encoder.named_parameters()}
    for before, after in [(tensors[0], tensors[1]), (tensors[1], tensors[2])]:
        assert {name for name in before if not torch.equal(before[name], after[name])} == learned


@pytest.mark.parametrize('loss, call', [('source_loss', 2), ('target_loss', 1)])
@pytest.mark.parametrize('seconds, redone', [(-1.0, 0), (1e9, 1)], ids=['saved', 'not yet saved'])
def test_killed_preparation_goes_on_to_the_same_bits(tmp_path, snapshot, dataset, monkeypatch, loss, call, seconds, redone):
    whole = prepare(snapshot, dataset, tmp_path / 'whole')
    monkeypatch.setattr(preparation, 'SAVE_SECONDS', seconds)
    calls = {'source_loss': 0, 'target_loss': 0}
    limit = {loss: call}

    def counted(name, original):
        def compute(*args):
            if calls[name] == limit.get(name):
                raise Killed
            calls[name] += 1
            return original(*args)
        return compute

    for name in calls:
        monkeypatch.setattr(autoencoder, name, counted(name, getattr(autoencoder, name)))
    with pytest.raises(Killed):
        prepare(snapshot, dataset, tmp_path / 'parts')
    assert any('.partial.' in name for name in encoder_files(tmp_path / 'parts')) == (not redone)
    limit.clear()
    resumed = prepare(snapshot, dataset, tmp_path / 'parts')
    assert_same(whole, resumed)
    total = {'source_loss': SOURCE_STEPS, 'target_loss': TARGET_STEPS}
    total[loss] += redone * call
    assert calls == total
    assert len(encoder_files(tmp_path / 'parts')) == 2 and not any('.partial.' in name for name in encoder_files(tmp_path / 'parts'))


def test_killed_encoding_goes_on(tmp_path, snapshot, dataset, monkeypatch):
    whole = prepare(snapshot, dataset, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, 'items_per_pass', lambda resolution: 8)

        def images_of(dataset, index, device, original=preparation.images_of):
            if 16 in index and len(index) < 8:  # the last 4 images
                raise Killed
            return original(dataset, index, device)

        patch.setattr(preparation, 'images_of', images_of)
        with pytest.raises(Killed):
            prepare(snapshot, dataset, tmp_path / 'parts')
    forbid(monkeypatch, 'source_loss', 'target_loss')
    assert_same(whole, prepare(snapshot, dataset, tmp_path / 'parts'))


def test_large_images_go_through_a_few_at_a_time(tmp_path, snapshot, monkeypatch):
    """The gradient is the mean over the batch, however it is cut."""
    assert [autoencoder.items_per_pass(res) for res in (64, 128, 256, 512, 1024)] == [32, 32, 8, 2, 1]
    monkeypatch.setattr(preparation, 'BATCH', 8)
    found = []
    for per_pass in (8, 3):
        torch.manual_seed(0)
        encoder, nums = autoencoder.new_encoder(snapshot.G_ema, snapshot.D, 8, lambda num: torch.zeros(num, 0)), []

        def loss_of(num, encoder=encoder, nums=nums):
            nums.append(num)
            return encoder.stem.weight.square().sum() + encoder.stem.bias.sum()

        preparation._fit(encoder, tmp_path / f'{per_pass}.safetensors', {}, loss_of, 2, None, 0, 'test', per_pass)
        found.append((nums, encoder.stem.weight.detach().clone()))
    assert [nums for nums, _ in found] == [[8, 8], [3, 3, 2] * 2]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_another_dataset_re_uses_the_source_encoder(tmp_path, snapshot, dataset, monkeypatch):
    first = prepare(snapshot, dataset, tmp_path)
    source, target = encoder_files(tmp_path)['source.safetensors'].read_bytes(), target_file(tmp_path)
    other = ImageDataset(tiny.dataset_zip(tmp_path / 'other.zip', seed=1))
    alone = prepare(snapshot, other, tmp_path / 'alone')
    forbid(monkeypatch, 'source_loss')
    second = prepare(snapshot, other, tmp_path)
    assert_same(alone, second)
    assert not torch.equal(codes_of(first)['w'], codes_of(second)['w'])
    names = set(encoder_files(tmp_path))
    assert len(names) == 3 and {'source.safetensors', target.name} < names
    assert encoder_files(tmp_path)['source.safetensors'].read_bytes() == source
    assert_same(first, prepare(snapshot, dataset, tmp_path))  # still there


def test_options_that_change_the_encoder_change_its_name(tmp_path, snapshot, dataset):
    prepare(snapshot, dataset, tmp_path)
    other = snapshots.load(save(tmp_path / 'other.pkl', seed=7))
    for i, (net, kwargs) in enumerate([(snapshot, {'seed': 1}), (snapshot, {'res': 4}), (snapshot, {'source_kimg': 0.016}), (other, {}),
                                       (snapshot, {'max_seconds': 1e9})]):
        prepare(net, dataset, tmp_path, **kwargs)
        assert len(list((tmp_path / 'encoders').iterdir())) == len(list((tmp_path / 'features').iterdir())) == i + 2


def save(path, seed, c_dim=0):
    snapshots.save(path, G=tiny.generator(seed=seed, c_dim=c_dim), D=tiny.discriminator(c_dim=c_dim), G_ema=tiny.generator(seed=seed, c_dim=c_dim))
    return path


def test_mirroring_doubles_the_codes(tmp_path, snapshot, dataset):
    """The second half are the codes of the flipped images."""
    mirrored = ImageDataset(dataset.path, xflip=True)
    prepared = prepare(snapshot, mirrored, tmp_path / 'mirrored')
    codes = codes_of(prepared)
    assert len(prepared.codes) == 40
    images = preparation.images_of(dataset, torch.arange(20), CPU)
    for half, found in [(images, slice(0, 20)), (images.flip(3), slice(20, 40))]:
        x, img, w = prepared.encoder(*autoencoder.inputs_of(snapshot.D, half, 8))
        for name, expected in [('x', x), ('img', img), ('w', w)]:
            torch.testing.assert_close(codes[name][found], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(codes['w'][:20], codes['w'][20:], rtol=1e-2)


def test_mirrored_and_plain_runs_share_a_cache_directory(tmp_path, snapshot, dataset):
    plain = prepare(snapshot, dataset, tmp_path)
    mirrored = prepare(snapshot, ImageDataset(dataset.path, xflip=True), tmp_path)
    assert (len(plain.codes), len(mirrored.codes)) == (20, 40)
    assert_same(mirrored, prepare(snapshot, ImageDataset(dataset.path, xflip=True), tmp_path / 'alone'))


@pytest.mark.parametrize('which', ['source.safetensors', 'target', 'partial'])
def test_damaged_encoder_is_refused_with_the_way_out(tmp_path, snapshot, dataset, monkeypatch, which):
    if which == 'partial':
        monkeypatch.setattr(preparation, 'SAVE_SECONDS', -1.0)
        with monkeypatch.context() as patch:
            patch.setattr(module_files, 'write', lambda path, *args, write=module_files.write: (write(path, *args), kill())[0])
            with pytest.raises(Killed):
                prepare(snapshot, dataset, tmp_path)
    else:
        prepare(snapshot, dataset, tmp_path)
    path, = (path for name, path in encoder_files(tmp_path).items() if name.startswith(which) or f'.{which}.' in name)
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xff
    path.write_bytes(data)
    with pytest.raises(UserError, match=f'{path.name} is damaged.*Delete it'):
        prepare(snapshot, dataset, tmp_path)
    path.unlink()
    monkeypatch.undo()
    assert_same(prepare(snapshot, dataset, tmp_path), prepare(snapshot, dataset, tmp_path / 'other'))


def kill():
    raise Killed


def test_labels_of_the_encoder_are_those_of_the_images(tmp_path, monkeypatch):
    """A conditional source makes its images with labels that occur in the target set."""
    snapshot = snapshots.load(save(tmp_path / 'cond.pkl', seed=2, c_dim=3))
    dataset = ImageDataset(tiny.dataset_zip(tmp_path / 'data.zip', num_classes=3), use_labels=True, max_size=4, random_seed=1)
    present = {tuple(label) for label in dataset.get_labels(range(4)).tolist()}
    seen, original = [], autoencoder.source_samples

    def source_samples(G, num, c, res):
        seen.extend(tuple(label) for label in c.tolist())
        return original(G, num, c, res)

    monkeypatch.setattr(autoencoder, 'source_samples', source_samples)
    prepared = prepare(snapshot, dataset, tmp_path)
    assert set(seen) == present and len(present) < 3 and len(prepared.codes) == 4


def test_conditional_source_encoders_of_other_labels_do_not_mix(tmp_path):
    """What is found in the cache equals what would have been made anew."""
    snapshot = snapshots.load(save(tmp_path / 'cond.pkl', seed=2, c_dim=3))
    first, second = (ImageDataset(tiny.dataset_zip(tmp_path / f'{seed}.zip', num_classes=3, seed=seed), use_labels=True, max_size=4, random_seed=seed)
                     for seed in (1, 2))
    assert first.get_labels(range(4)).tolist() != second.get_labels(range(4)).tolist()
    prepare(snapshot, first, tmp_path / 'both')
    assert_same(prepare(snapshot, second, tmp_path / 'alone'), prepare(snapshot, second, tmp_path / 'both'))


def test_time_limit_ends_both_trainings(tmp_path, snapshot, dataset, monkeypatch):
    forbid(monkeypatch, 'source_loss', 'target_loss')
    assert len(prepare(snapshot, dataset, tmp_path, max_seconds=0.0).codes) == 20


def read_picture(path):
    with PIL.Image.open(path) as picture:
        return np.asarray(picture)


def test_quality_against_known_values(tmp_path, snapshot, dataset, monkeypatch):
    prepared, told = prepare(snapshot, dataset, tmp_path), []
    images, position = preparation.images_of(dataset, torch.arange(20), CPU), [0]

    def decode(G, code, res, noise_mode='const', offset=0.0):
        start = position[0]
        position[0] += len(code[2])
        return images[start: position[0]] + offset

    for offset, psnr in [(0.1, pytest.approx(10 * math.log10(2 ** 2 / 0.1 ** 2), rel=1e-4)), (0.0, pytest.approx(120, abs=10))]:
        position[0] = 0
        monkeypatch.setattr(autoencoder, 'decode', lambda *args, offset=offset, **kwargs: decode(*args, **kwargs, offset=offset))
        found = preparation.quality(snapshot.G_ema, snapshot.D, prepared.codes, dataset, 8, CPU, tmp_path / 'pairs.png')
        assert found[0] == psnr and (found[1] == 0) == (offset == 0) and found[1] < 1
    columns = min(preparation.PICTURE_COLUMNS, 20)
    pixels = read_picture(tmp_path / 'pairs.png')
    assert pixels.shape == (32, columns * 16, 3)
    assert np.array_equal(pixels[:16], pixels[16:]) and np.array_equal(pixels[:16, :16], dataset[0][0].transpose(1, 2, 0))
    monkeypatch.undo()
    again = prepare(snapshot, dataset, tmp_path, echo=told.append)  # from the cache
    assert f'{again.psnr:.1f} dB' in told[0] and 'slice 8' in told[0]


def test_picture_is_written_on_request(tmp_path, snapshot, dataset):
    prepare(snapshot, dataset, tmp_path, picture=tmp_path / 'encoded.png')
    pixels = read_picture(tmp_path / 'encoded.png')
    assert np.array_equal(pixels[:16, :16], dataset[0][0].transpose(1, 2, 0))  # images over what their codes decode to
    assert pixels.shape[0] == 32 and not np.array_equal(pixels[:16], pixels[16:])


@pytest.mark.parametrize('num', [1, 20, 256, 1000])
def test_spread_covers_the_set(num):
    index = preparation.spread(num).tolist()
    assert len(set(index)) == len(index) == min(num, preparation.QUALITY_IMAGES) and index == sorted(index)
    assert index[0] == 0 and index[-1] == num - 1


# Files of modules

TENSORS = {'a': torch.arange(6.0).view(2, 3), 'b': torch.tensor(3, dtype=torch.int64), 'c|d': torch.randn(2, 2, dtype=torch.float64).T}
FINGERPRINT = {'kind': 'test', 'kimg': 0.1, 'seconds': None, 'seed': 0}


def test_module_file_round_trip(tmp_path):
    path = tmp_path / 'module.safetensors'
    assert module_files.read(path, FINGERPRINT) is None
    module_files.write(path, FINGERPRINT, TENSORS)
    found = module_files.read(path, FINGERPRINT)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with open(path, 'r+b') as f:  # what was read is no view of the file
        f.write(bytes(path.stat().st_size))
    assert torch.equal(found['a'], TENSORS['a'])


def test_module_file_with_any_damage_is_refused(tmp_path):
    """Every byte, every length."""
    path = tmp_path / 'module.safetensors'
    module_files.write(path, FINGERPRINT, TENSORS)
    data = path.read_bytes()
    damaged = [data[:i] + bytes([data[i] ^ flip]) + data[i + 1:] for i in range(len(data)) for flip in (0xff, 0x01)]
    damaged += [data[:i] for i in range(len(data))] + [data + b'0', b'no safetensors', bytes(64)]
    for content in damaged:
        path.write_bytes(content)
        try:
            found = module_files.read(path, FINGERPRINT)
        except UserError as err:
            assert str(path) in str(err) and 'Delete it' in str(err)
        else:
            raise AssertionError(f'{content} gives {found}')


@pytest.mark.parametrize('metadata', [None, {'other': '{}'}, {'m2m_stylegan': 'x'}, {'m2m_stylegan': '[]'}, {'m2m_stylegan': '{"fingerprint": 3}'},
                                      {'m2m_stylegan': '[' * 100_000}, {'m2m_stylegan': '{"fingerprint": {}}'}])
def test_foreign_safetensors_are_refused(tmp_path, metadata):
    import safetensors.torch

    path = tmp_path / 'module.safetensors'
    path.write_bytes(safetensors.torch.save({'a': torch.zeros(1)}, metadata))
    with pytest.raises(UserError, match='is damaged'):
        module_files.read(path, FINGERPRINT)


def test_module_file_of_something_else_lists_the_differences(tmp_path):
    path = tmp_path / 'module.safetensors'
    module_files.write(path, FINGERPRINT, TENSORS)
    with pytest.raises(UserError, match='made from something else. Delete it') as err:
        module_files.read(path, {'kind': 'test', 'kimg': 0.2, 'seconds': None, 'slice': 'w'})
    assert str(err.value).splitlines()[1:] == ['  * kimg: 0.1 in the file, 0.2 wanted', '  * seed: 0 in the file, None wanted',
                                               '  * slice: None in the file, w wanted']


def test_module_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'module.safetensors'
    module_files.write(path, FINGERPRINT, TENSORS)

    write_bytes = type(path).write_bytes

    def killed(self, data):
        write_bytes(self, data[:100])
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(type(path), 'write_bytes', killed)
        with pytest.raises(OSError, match='No space'):
            module_files.write(path, FINGERPRINT, {'a': torch.zeros(100)})
    assert module_files.read(path, FINGERPRINT).keys() == TENSORS.keys()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('tensors', [{'weight': torch.zeros(3, 2)}, {'weight': torch.zeros(2, 3), 'bias': torch.zeros(2)},
                                     {'weight': torch.zeros(3, 2), 'bias': torch.zeros(3), 'more': torch.zeros(1)}])
def test_module_that_does_not_fit(tmp_path, tensors):
    with pytest.raises(UserError, match='does not fit this version of the program. Delete it'):
        module_files.load_into(torch.nn.Linear(2, 3), tensors, tmp_path / 'module.safetensors')


def test_an_encoder_that_has_diverged_is_not_kept(snapshot, dataset, tmp_path, monkeypatch):
    calls, original = [], autoencoder.source_loss
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, 'source_loss', lambda *args: calls.append(0) or original(*args) * (math.nan if len(calls) == 2 else 1))
        with pytest.raises(UserError, match='Encoder: source network: training it has diverged, and nothing of it was kept'):
            prepare(snapshot, dataset, tmp_path / 'cache')
    assert not encoder_files(tmp_path / 'cache')
    assert_same(prepare(snapshot, dataset, tmp_path / 'cache'), prepare(snapshot, dataset, tmp_path / 'other'))
