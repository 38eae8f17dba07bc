"""Low-res training in feature space through the main job: what moves, what never runs, that it resumes bit for bit, what is refused."""

import dataclasses
import itertools
import shutil
import time

import numpy as np
import pytest
import ranks
import tiny
import tiny_run
import torch

from m2m_stylegan import checkpoint, code_game, distributed, features, networks, phases, preparation, slicing, snapshots, training_loop, transfer
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError
from m2m_stylegan.transfer_options import TransferOptions, check_options

STEPS, BATCH = 6, 4


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return tiny.files(tmp_path_factory.mktemp('files'))


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    """Shared by the tests that do not care where codes come from."""
    return tmp_path_factory.mktemp('cache')


def options_for(tmp_path, **options):
    """Every step is a tick, every second tick a snapshot; the encoder is trained for a few steps."""
    options = {'cache_dir': tmp_path / 'cache', 'kimg': STEPS * BATCH / 1000, 'batch': BATCH, 'tick': BATCH / 1000, 'snap': 2,
               'prepare_kimg': 0.032, 'device': 'cpu', 'train': 'low-res', **options}
    options['cache_dir'] = str(options['cache_dir'])
    return TransferOptions(outdir=str(tmp_path / 'runs'), **options)


def run(tmp_path, *, echo=lambda text: None, **options):
    return transfer.run(options_for(tmp_path, **options), echo=echo)


def tensors_of(snapshot):
    return {f'{key}.{name}': tensor for key in ('G', 'D', 'G_ema') for name, tensor in getattr(snapshot, key).state_dict().items()}


@pytest.mark.parametrize('slice_at, critic', [('w', 'wgan-gp'), ('4', 'wgan-gp'), ('8', 'logistic')])
def test_low_res_tensors_move_and_all_others_are_bit_identical(tmp_path, files, cache, slice_at, critic):
    told = []
    directory = run(tmp_path, **files, slice=slice_at, critic=critic, cache_dir=cache, echo=told.append)
    assert directory.name.endswith(f'-m2m-low-res-slice{slice_at}')
    old, new = (tensors_of(snapshots.load(path)) for path in (files['network'], directory / 'network-snapshot-000000.pkl'))
    moved = {name for name in new if not torch.equal(old[name], new[name])}
    G = tiny.generator()
    res = 2 if slice_at == 'w' else int(slice_at)
    trained = {f'{key}.{name}' for key in ('G', 'G_ema') for name, _ in G.named_parameters() if slicing.is_low_res(name, res)}
    copied = {f'G_ema.{name}' for name, _ in G.named_buffers() if name.endswith('noise_const') and slicing.is_low_res(name, res)}
    assert moved == trained | copied | {'G.mapping.w_avg', 'G_ema.mapping.w_avg'}
    assert all('mapping' in name for name in moved) == (slice_at == 'w')
    assert (directory / 'encoded.png').is_file() and (directory / 'before-after.png').is_file()
    states = {line.split()[0]: line.split()[-1] for text in told for line in text.splitlines() if line.startswith(('G.', 'D.'))}
    assert states == {'G.mapping': 'trained', **{f'G.b{r}': 'trained' if r <= res else 'idle' for r in (4, 8, 16)},
                      'D.b16': 'idle', 'D.b8': 'idle', 'D.b4': 'idle'}


@pytest.mark.parametrize('slice_at', ['w', '4', '8'])
def test_high_res_blocks_and_d_never_run_while_training(tmp_path, files, cache, monkeypatch, slice_at):
    """From the first step to the last, apart from the sample pictures of the snapshots."""
    training, ran = [False], set()
    res = 2 if slice_at == 'w' else int(slice_at)

    def watched(cls, name_of, forbidden):
        original = cls.forward

        def forward(self, *args, **kwargs):
            if training[0]:
                assert not forbidden(self), f'{name_of(self)} ran'
                ran.add(name_of(self))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, 'forward', forward)

    watched(networks.SynthesisBlock, lambda block: f'b{block.resolution}', lambda block: block.resolution > res)
    for cls in (networks.DiscriminatorBlock, networks.DiscriminatorEpilogue):
        watched(cls, lambda block: f'D.{type(block).__name__}', lambda block: True)
    watched(networks.MappingNetwork, lambda net: 'mapping', lambda net: False)

    def switched(function, state):
        def call(*args, **kwargs):
            before, training[0] = training[0], state
            try:
                return function(*args, **kwargs)
            finally:
                training[0] = before
        return call

    monkeypatch.setattr(transfer, 'training_loop', switched(transfer.training_loop, True))
    monkeypatch.setattr(training_loop, '_save_snapshot', switched(training_loop._save_snapshot, False))
    run(tmp_path, **files, slice=slice_at, cache_dir=cache)
    assert ran == {'mapping', *(f'b{r}' for r in (4, 8) if r <= res)}


@pytest.mark.parametrize('slice_at, critic', [('w', 'wgan-gp'), ('8', 'wgan-gp'), ('8', 'logistic')])
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(tmp_path, files, cache, monkeypatch, slice_at, critic):
    """Bit for bit: weights, moving averages, critic, offsets of w, Adam moments, statistics. First stopped by its limit, then killed in mid-step."""
    common = {**files, 'slice': slice_at, 'critic': critic, 'cache_dir': cache}
    whole = run(tmp_path, **common, kimg=0.036)
    parts = run(tmp_path, **common, kimg=0.012)
    assert parts != whole
    with monkeypatch.context() as patch:
        tiny_run.kill_at_step(patch, 4)
        with pytest.raises(tiny_run.Killed):
            run(tmp_path, resume=str(parts), kimg=0.036)
    assert 12 < int(checkpoint.read(parts / checkpoint.FILE_NAME)['counters']['cur_nimg']) < 36
    assert run(tmp_path, resume=str(parts), kimg=0.036) == parts
    tiny_run.assert_same_run(whole, parts)
    content = checkpoint.read(whole / checkpoint.FILE_NAME)
    assert int(content['counters']['cur_nimg']) == 36
    assert {'G', 'G_ema', 'critic', 'image_latents'} <= set(content['modules'])
    offset = content['modules']['image_latents']['offset']
    assert offset.shape == (20, 8) and bool(offset.any()) == (slice_at != 'w')
    assert set(content['optimizers']) == {'G', 'D'} | ({'Gpairs'} if slice_at != 'w' else set())
    assert all(optimizer['state'] for optimizer in content['optimizers'].values())
    first, second = (tensors_of(snapshots.load(path / 'network-snapshot-000000.pkl')) for path in (whole, parts))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_codes_from_the_cache_train_like_freshly_computed_ones(tmp_path, files, monkeypatch):
    first = run(tmp_path, **files, slice='8', kimg=0.012)
    codes, = (tmp_path / 'cache' / 'features').iterdir()
    with monkeypatch.context() as patch:
        for name in ('source_loss', 'target_loss'):
            patch.setattr(preparation.autoencoder, name, None)
        patch.setattr(preparation.autoencoder.Encoder, 'forward', None)
        found = run(tmp_path, **files, slice='8', kimg=0.012)  # all of it
    shutil.rmtree(codes)
    encoded = run(tmp_path, **files, slice='8', kimg=0.012)  # the encoder alone
    anew = run(tmp_path, **files, slice='8', kimg=0.012, cache_dir=tmp_path / 'other')
    for directory in (found, encoded, anew):
        tiny_run.assert_same_run(first, directory)


def test_codes_on_disk_train_like_codes_in_memory(tmp_path, files, cache, monkeypatch):
    first = run(tmp_path, **files, slice='8', cache_dir=cache)
    monkeypatch.setattr(training_loop, 'CODE_BYTES', 0)
    monkeypatch.setattr(features.FeatureCache, 'resident', None)
    tiny_run.assert_same_run(first, run(tmp_path, **files, slice='8', cache_dir=cache))


def test_random_numbers_of_the_preparation_do_not_reach_the_training(tmp_path, files, cache, monkeypatch):
    """The first weights of the critic are those of --seed, whatever was drawn before."""
    first = run(tmp_path, **files, slice='w', cache_dir=cache, seed=3, kimg=0.008)
    original = transfer.open_codes
    monkeypatch.setattr(transfer, 'open_codes', lambda *args: (original(*args), torch.randn(7))[0])
    tiny_run.assert_same_run(first, run(tmp_path, **files, slice='w', cache_dir=cache, seed=3, kimg=0.008))
    other = run(tmp_path, **files, slice='w', cache_dir=cache, seed=4, kimg=0.008)
    weights = [checkpoint.read(path / checkpoint.FILE_NAME)['modules']['critic']['layers.0.weight'] for path in (first, other)]
    assert not torch.allclose(*weights, atol=0.02)


@pytest.mark.parametrize('slice_at', ['w', '8'])
@pytest.mark.parametrize('architecture', ['skip', 'orig'])
def test_conditional_mirrored_subset(tmp_path, slice_at, architecture):
    """Architecture orig has no img at the slice."""
    pickle = tiny.save_pickle(tmp_path / 'cond.pkl', c_dim=3, architecture=architecture)
    data = tiny.dataset_zip(tmp_path / 'data.zip', num_classes=3)
    directory = run(tmp_path, network=str(pickle), data=str(data), cond=True, mirror=True, subset=9, slice=slice_at, kimg=0.008)
    assert f'-cond-subset9-mirror-auto1-kimg0.008-batch4-resumecustom-m2m-low-res-slice{slice_at}' in directory.name
    manifest, = (tmp_path / 'cache' / 'features').glob('*/cache.json')
    assert '"num_items": 18' in manifest.read_text()
    before = tensors_of(snapshots.load(pickle))
    moved = {name for name, x in tensors_of(snapshots.load(directory / 'network-snapshot-000000.pkl')).items()
             if not torch.equal(x, before[name])}
    assert {'G.mapping.embed.weight', 'G_ema.mapping.embed.weight'} < moved


def test_critic_steps_per_step_of_the_mapping_network(tmp_path, files, cache, monkeypatch):
    for critic, each in [('wgan-gp', code_game.CodeOptions().n_critic), ('logistic', 1)]:
        names, original = [], phases.run_phase
        with monkeypatch.context() as patch:
            patch.setattr(phases, 'run_phase', lambda phase, *args, n=names, o=original: (n.append(phase.name), o(phase, *args)))
            run(tmp_path, **files, slice='8', critic=critic, cache_dir=cache, kimg=0.028)
        assert [names.count(name) for name in ('Dmain', 'Gpairs', 'Gmain')] == [7, 7, len(range(0, 7, each))]


class Codes(torch.nn.Module):
    """Stands for the codes of 10 images: item i is i."""

    nbytes = 1 << 40

    def __len__(self):
        return 10

    def fits(self, device, reserve_bytes):
        return False

    def gather(self, indices):
        return {'w': indices[:, None].half()}


def test_batches_of_codes_come_in_the_order_of_images_with_their_labels(tmp_path, monkeypatch):
    dataset = ImageDataset(tiny.dataset_zip(tmp_path / 'data.zip', 10, num_classes=3), use_labels=True)
    prepared = type('Prepared', (), {'codes': Codes()})
    options = tiny_run.options_for('low-res', batch_size=4, seed=3)

    def take(make, options):
        return [next(data) for data in [make(options)] for _ in range(6)]

    found = take(lambda o: training_loop.code_batches(prepared, dataset, o, 8, tiny_run.CPU), options)
    images = take(lambda o: training_loop.batches(dataset, o, 8, tiny_run.CPU, 0), options)
    for codes, batch in zip(found, images, strict=True):
        assert codes['w'].dtype == torch.float32 and torch.equal(codes['c'], batch['c'])
        index = codes['w'][:, 0].long().tolist()
        assert torch.equal(batch['img'], preparation.images_of(dataset, torch.tensor(index), tiny_run.CPU))
        assert codes['index'].dtype == torch.int64 and codes['index'].tolist() == index
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, 'rank', lambda rank=rank: rank)
        shares.append(take(lambda o: training_loop.code_batches(prepared, dataset, o, 8, tiny_run.CPU), dataclasses.replace(options, num_gpus=2)))
    for whole, *parts in zip(found, *shares, strict=True):
        for name in ('w', 'c', 'index'):
            assert torch.equal(whole[name], torch.stack([part[name] for part in parts], 1).flatten(0, 1))


REFUSED = [
    ({'slice': 'w', 'train': 'high-res'}, '--slice=w is only there for --train=low-res without --no-bypass'),
    ({'slice': 'w', 'no_bypass': True}, '--slice=w is only there for --train=low-res without --no-bypass'),
    ({'critic': 'logistic', 'train': 'full'}, '--critic belongs to training in feature space: --train=both, or low-res without --no-bypass'),
    ({'critic': 'wgan-gp', 'no_bypass': True}, '--critic belongs to'),
    ({'prepare_kimg': 1.0, 'no_bypass': True}, '--prepare-kimg belongs to'),
    ({'prepare_minutes': 1.0, 'train': 'high-res'}, '--prepare-minutes belongs to'),
    ({'prepare_minutes': 0.0}, '--prepare-minutes=0.0 must be positive'),
    ({'prepare_kimg': -1.0}, '--prepare-kimg=-1.0 must be positive'),
    ({'aug': 'fixed', 'p': 0.5}, '--aug=fixed augments pixels'),
    ({'slice': 'x'}, '--slice=x: expected a resolution, or w'),
    ({'slice': '-4'}, '--slice=-4: expected a resolution, or w'),
    ({'network': 'none'}, '--network=none (train from scratch) needs --train=full'),
]


@pytest.mark.parametrize('options, message', REFUSED)
def test_a_contradiction_gives_one_message(options, message):
    with pytest.raises(UserError) as err:
        check_options(TransferOptions(outdir='x', **{'train': 'low-res', **options}))
    problems = str(err.value).splitlines()[1:]
    assert len(problems) == 1 and problems[0].startswith(f'  * {message}')


@pytest.mark.parametrize('slice_at, message', [
    ('16', '--slice=16 is the image resolution'), ('12', '--slice=12: expected one of w, 4, 8, 16'), ('2', '--slice='), ('0', '--slice=')])
def test_slices_that_are_not_there(tmp_path, files, slice_at, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **files, slice=slice_at)
    assert not (tmp_path / 'runs').exists() and not (tmp_path / 'cache').exists()


def test_the_critic_of_a_run_stays_what_it_was(tmp_path, files, cache):
    """--resume takes it from the run, not from the new command line."""
    directory = run(tmp_path, **files, slice='w', critic='logistic', cache_dir=cache, kimg=0.008)
    told = []
    run(tmp_path, resume='latest', slice='8', critic='wgan-gp', kimg=0.012, echo=told.append)
    assert '"critic": "logistic"' in (directory / 'training_options.json').read_text() and '"slice": "w"' in told[1]
    assert told[0].startswith('WARNING: --slice=8, --critic=wgan-gp, ') and 'ignored' in told[0]
    assert int(checkpoint.read(directory / checkpoint.FILE_NAME)['counters']['cur_nimg']) == 12


# Several processes


def still_game(critic):
    """A game without random numbers of its own in its gradients, in float64."""
    G = tiny.generator().double().train()
    torch.manual_seed(5)
    offsets, net = code_game.ImageLatents(10, 8).double().requires_grad_(False), code_game.Critic(8, 0).double().requires_grad_(False)
    offsets.offset.normal_()
    options = code_game.CodeOptions(critic=critic, n_critic=1, w_jitter=0.0)
    metric = torch.randn(11, 11, dtype=torch.float64)
    return code_game.CodeGame(G, offsets, net, metric, 8, options, lambda name, value: None, {'noise_mode': 'const'})


def gradients(critic, latents, real, share):
    game = still_game(critic)
    torch.rand = lambda size, device: torch.full(size, 0.3, dtype=torch.float64)  # of the gradient penalty
    found = {}
    for phase in code_game.make_phases(game):
        parts = [{k: v[slice(distributed.rank() if share else 0, None, 2 if share else 1)] for k, v in batch.items()} for batch in (latents, real)]
        for group in phase.optimizer.param_groups:
            group['lr'] = 0.0
        phases.run_phase(phase, *parts, 8)
        found |= {f'{phase.name} {i}': param.grad.numpy() for i, param in enumerate(phase.params) if param.grad is not None}
    return found


@pytest.mark.parametrize('critic', ['wgan-gp', 'logistic'])
def test_gradients_of_two_processes_are_those_of_one_on_the_whole_batch(critic, monkeypatch):
    torch.manual_seed(0)
    kwargs = {'dtype': torch.float64}
    latents = {'z': torch.randn(8, 6, **kwargs), 'c': torch.zeros(8, 0, **kwargs)}
    real = {'x': torch.randn(8, 8, 8, 8, **kwargs), 'img': torch.randn(8, 3, 8, 8, **kwargs), 'w': torch.randn(8, 8, **kwargs),
            'index': torch.tensor([7, 2, 9, 4, 0, 5, 3, 2]), 'c': latents['c']}
    exits, results = ranks.run(2, gradients, critic, latents, real, True)
    assert exits == [0, 0], results
    monkeypatch.setattr(torch, 'rand', torch.rand)  # restores what `gradients` replaces
    whole = gradients(critic, latents, real, False)
    assert {name.split()[0] for name, grad in whole.items() if np.abs(grad).max() > 1e-6} == {'Gmain', 'Gpairs', 'Dmain'}
    for result in results.values():
        assert result.keys() == whole.keys()
        for name, grad in whole.items():
            np.testing.assert_allclose(result[name], grad, rtol=1e-9, atol=1e-12, err_msg=name)


def job(options):
    """The whole job as one of several processes; what this process trained."""
    found, original = [], transfer.build_state
    transfer.build_state = lambda job: found.append(original(job)) or found[0]
    directory = transfer.run_process(transfer.match_processes(options), time.monotonic(), lambda text: None)
    return str(directory), {name: x.numpy() for name, x in itertools.chain(found[0].G.named_parameters(), found[0].G_ema.named_parameters('ema'))}


def test_two_processes_train_one_network(tmp_path, files):
    exits, results = ranks.run(2, job, options_for(tmp_path, **files, slice='8', batch=8))
    assert exits == [0, 0], results
    directory, = (tmp_path / 'runs').iterdir()
    assert results[0][0] == results[1][0] == str(directory) and (directory / 'encoded.png').is_file()
    assert all(np.array_equal(x, results[1][1][name]) for name, x in results[0][1].items())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two processes: sums over more threads are rounded otherwise
    try:
        prepared = preparation.prepare(
            snapshots.load(files['network']), ImageDataset(files['data']), 8, cache_dir=tmp_path / 'alone', device=tiny_run.CPU, name='source',
            **{key: 0.032 * share for key, share in shares().items()}, echo=lambda text: None)
    finally:
        torch.set_num_threads(threads)
    codes, = (tmp_path / 'cache' / 'features').iterdir()
    again, = (tmp_path / 'alone' / 'features').iterdir()
    assert codes.name == again.name  # the name holds a checksum of the encoder: process 0 made it as a single process does
    assert len(prepared.codes) == 20


def shares():
    total = preparation.SOURCE_KIMG + preparation.TARGET_KIMG
    return {'source_kimg': preparation.SOURCE_KIMG / total, 'target_kimg': 1 - preparation.SOURCE_KIMG / total}
