import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2m_stylegan import feature_files, features, locks
from m2m_stylegan.errors import UserError

FINGERPRINT = {'pickle_sha256': 'ab' * 32, 'slice': 16, 'mirror': False, 'dataset': None, 'truncation': 0.5}
NUM_ITEMS, SHARD_ITEMS = 11, 4
SHARDS = [f'features-{k:05d}.safetensors' for k in range(3)]
fork = multiprocessing.get_context('fork')


def items(start, stop, dtype=torch.float16):
    # Item i is a function of i alone.
    i = torch.arange(start, stop)
    x = torch.sin(i[:, None, None].double() + torch.arange(6).reshape(2, 3)).to(dtype)
    return {'x': x, 'ws': i[:, None].float() / 3, 'label': i}


def write(cache_dir, make_batch=items, fingerprint=FINGERPRINT, num_items=NUM_ITEMS, **kwargs):
    kwargs = {'batch_size': 3, 'shard_items': SHARD_ITEMS, **kwargs}
    return features.write(cache_dir, fingerprint, num_items, make_batch, **kwargs)


def contents(cache_dir):
    return {p.name: p.read_bytes() for p in sorted(cache_dir.iterdir())}


def never(start, stop):
    raise AssertionError(f'computed items {start} to {stop} once more')


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / 'cache'


# Round trip


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_items_come_back_bit_for_bit(cache_dir, dtype):
    write(cache_dir, lambda a, b: items(a, b, dtype))
    cache = features.open(cache_dir, FINGERPRINT)
    everything = items(0, NUM_ITEMS, dtype)
    indices = torch.tensor([10, 3, 0, 7, 4, 3])
    assert len(cache) == NUM_ITEMS and set(cache.names) == {'x', 'ws', 'label'}
    assert cache.shapes['x'] == (2, 3) and cache.dtypes['x'] == dtype
    for bank in (cache, cache.resident('cpu')):
        batch = bank.gather(indices)
        assert all(torch.equal(batch[name], everything[name][indices]) for name in everything)
        assert all(batch[name].dtype == everything[name].dtype for name in everything)
        assert {name: x.shape[1:] for name, x in bank.gather(indices[:0]).items()} == bank.shapes


def test_files_are_plain_safetensors_and_the_manifest_tells_everything(cache_dir):
    write(cache_dir)
    torch.testing.assert_close(load_file(cache_dir / SHARDS[1]), items(4, 8), rtol=0, atol=0)
    manifest = json.loads((cache_dir / 'cache.json').read_text())
    assert manifest['fingerprint'] == FINGERPRINT
    assert manifest['tensors']['x'] == {'shape': [2, 3], 'dtype': 'float16'}
    assert [s['num_items'] for s in manifest['shards']] == [4, 4, 3]
    assert all(len(s['sha256']) == 64 for s in manifest['shards'])
    assert sorted(contents(cache_dir)) == ['.lock', 'cache.json', *SHARDS]


def test_bytes_depend_neither_on_batch_size_nor_on_ranks(tmp_path):
    write(tmp_path / 'a')
    write(tmp_path / 'b', batch_size=4)
    write(tmp_path / 'c', rank=1, num_replicas=2)
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b') == contents(tmp_path / 'c')


def test_sizes(cache_dir):
    shapes, dtypes = {'x': (512, 16, 16), 'ws': (14, 512)}, {'x': torch.float16, 'ws': torch.float32}
    per_item = 512 * 16 * 16 * 2 + 14 * 512 * 4
    assert features.estimate_nbytes(shapes, dtypes, 10) == 10 * per_item
    assert features.items_for_budget(per_item, 10 * per_item) == features.items_for_budget(per_item, 11 * per_item - 1) == 10
    assert features.items_for_budget(per_item, 0) == features.items_for_budget(per_item, -5) == 0
    cache = write(cache_dir)
    assert cache.nbytes == NUM_ITEMS * (6 * 2 + 4 + 8)
    assert cache.fits('cpu')


def test_default_shard_size_keeps_to_the_limit(cache_dir, monkeypatch):
    monkeypatch.setattr(features, 'SHARD_BYTES', 5 * (6 * 2 + 4 + 8))
    write(cache_dir, shard_items=None)
    assert json.loads((cache_dir / 'cache.json').read_text())['shard_items'] == 4


def test_gather_reads_only_the_items_asked_for(cache_dir):
    cache = write(cache_dir)
    (cache_dir / SHARDS[2]).unlink()  # the mapping stays; nothing else is opened
    assert cache.gather(torch.tensor([9]))['label'].item() == 9


@pytest.mark.parametrize('index', [-1, NUM_ITEMS])
def test_gather_refuses_indices_outside(cache_dir, index):
    cache = write(cache_dir)
    with pytest.raises(IndexError, match=rf'\[0, {NUM_ITEMS}\), found .*{index}'):
        cache.gather(torch.tensor([2, index]))


def test_replace_changes_memory_and_not_the_disk(cache_dir):
    cache = write(cache_dir)
    before = contents(cache_dir)
    bank = cache.resident('cpu')
    indices = torch.tensor([6, 1])
    bank.replace(indices, items(106, 108))
    expected = items(0, NUM_ITEMS)
    for name, x in items(106, 108).items():
        expected[name][indices] = x
    torch.testing.assert_close(bank.gather(torch.arange(NUM_ITEMS)), expected, rtol=0, atol=0)
    assert contents(cache_dir) == before
    torch.testing.assert_close(cache.gather(indices)['label'], indices, rtol=0, atol=0)
    with pytest.raises(ValueError, match='expected new items'):
        bank.replace(indices, {'x': items(0, 2)['x']})
    with pytest.raises(ValueError, match='expected new items'):
        bank.replace(indices, items(0, 2, torch.float32))


def test_progress_counts_every_item_once(cache_dir):
    steps = []
    write(cache_dir, progress=steps.append)
    assert sum(steps) == NUM_ITEMS and len(steps) > 3
    (cache_dir / SHARDS[0]).unlink()
    steps.clear()
    write(cache_dir, progress=steps.append)
    assert sum(steps) == NUM_ITEMS


# Interrupted and parallel writers


def write_until_killed(cache_dir, file_name):
    write_bytes = Path.write_bytes

    def write_half(path, data):
        if not path.name.startswith(f'.{Path(file_name).stem}-'):
            return write_bytes(path, data)
        with path.open('wb') as f:
            f.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = write_half
    write(cache_dir)


@pytest.mark.parametrize('file_name', [*SHARDS, 'cache.json'])
def test_resume_after_a_kill_in_mid_write_gives_the_same_bytes(tmp_path, cache_dir, file_name):
    process = fork.Process(target=write_until_killed, args=(cache_dir, file_name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = contents(cache_dir)
    assert file_name not in left and any(n.startswith(f'.{Path(file_name).stem}-') for n in left)
    with pytest.raises(UserError, match=r'cache\.json is missing'):
        features.open(cache_dir, FINGERPRINT)

    computed = []
    write(cache_dir, lambda a, b: computed.extend(range(a, b)) or items(a, b))
    write(tmp_path / 'uninterrupted')
    assert contents(cache_dir) == contents(tmp_path / 'uninterrupted')
    kept = [k for k, name in enumerate(SHARDS) if name in left]
    probe = [0, 1, 2]
    assert computed == probe + [i for i in range(NUM_ITEMS) if i // SHARD_ITEMS not in kept]


def test_a_complete_cache_is_not_computed_again_and_damaged_shards_are(cache_dir):
    write(cache_dir)
    before = contents(cache_dir)
    write(cache_dir, never, shard_items=None)
    flip_byte(cache_dir / SHARDS[1], -1)
    computed = []
    write(cache_dir, lambda a, b: computed.extend(range(a, b)) or items(a, b))
    assert computed == [4, 5, 6, 7] and contents(cache_dir) == before


def write_logged(cache_dir, log_path, barrier, rank, num_replicas):
    together = []

    def logged(start, stop):
        if not together:  # the first call of each process waits for the others, so that all of them start on an empty directory
            barrier.wait()
            together.append(True)
        with log_path.open('a') as f:
            f.write(f'{start}\n')
        return items(start, stop)

    write(cache_dir, logged, num_items=40, rank=rank, num_replicas=num_replicas)


@pytest.mark.parametrize('ranks', [[(0, 1), (0, 1)], [(0, 2), (1, 2)], [(0, 2), (1, 2), (0, 1)]], ids=str)
def test_processes_filling_one_directory_share_the_work(tmp_path, cache_dir, ranks):
    log_path, barrier = tmp_path / 'log', fork.Barrier(len(ranks))
    processes = [fork.Process(target=write_logged, args=(cache_dir, log_path, barrier, *r)) for r in ranks]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * len(ranks)
    write(tmp_path / 'alone', num_items=40)
    assert contents(cache_dir) == contents(tmp_path / 'alone')
    # 40 items in shards of 4 and batches of 3: two calls per shard, each once, after one look at the first batch per process.
    starts = sorted(int(line) for line in log_path.read_text().split())
    assert starts == [0] * len(ranks) + [s for k in range(10) for s in (4 * k, 4 * k + 3)]


def test_a_rank_begins_with_its_own_shards_and_finishes_what_a_lost_rank_left(cache_dir):
    starts = []
    write(cache_dir, lambda a, b: starts.append(a) or items(a, b), num_items=24, batch_size=4, rank=1, num_replicas=3)
    assert starts[1:] == [4, 16, 20, 12, 8, 0]
    assert len(features.open(cache_dir, FINGERPRINT)) == 24


def hold_lock(path, pipe):
    with locks.exclusive(path, byte=5):
        pipe.send('locked')
        pipe.recv()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_ends_with_its_holder(tmp_path):
    here, there = fork.Pipe()
    process = fork.Process(target=hold_lock, args=(tmp_path / 'lock', there))
    process.start()
    assert here.recv() == 'locked'
    with locks.exclusive(tmp_path / 'lock', byte=4):
        pass
    waiter = fork.Process(target=lock_and_tell, args=(tmp_path / 'lock', there))
    waiter.start()
    assert not here.poll(0.2)
    here.send('die')
    assert here.recv() == 'mine' and here.recv() == 'end'
    process.join()
    waiter.join()


def lock_and_tell(path, pipe):
    with locks.exclusive(path, byte=5):
        pipe.send('mine')
    pipe.send('end')


def test_a_lock_that_cannot_be_made_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r'cannot lock .*No such file'), locks.exclusive(tmp_path / 'no' / 'lock'):
        pass


# Stale, foreign, damaged


def test_stale_cache_lists_every_difference(cache_dir):
    write(cache_dir)
    wanted = {'pickle_sha256': 'ab' * 32, 'slice': 32, 'mirror': True, 'dataset': None, 'seed': 7}
    for reader in (lambda: features.open(cache_dir, wanted), lambda: write(cache_dir, never, wanted)):
        with pytest.raises(UserError) as err:
            reader()
        text = str(err.value)
        assert 'slice: 16 in the cache, 32 wanted' in text and 'mirror: false in the cache, true wanted' in text
        assert 'seed: absent in the cache, 7 wanted' in text and 'truncation: 0.5 in the cache, absent wanted' in text
        assert 'pickle_sha256' not in text and 'dataset' not in text
        assert 'Delete the directory' in text and '--cache-dir' in text


def test_write_refuses_to_overwrite_a_cache_of_another_size_or_fingerprint(cache_dir):
    write(cache_dir)
    before = contents(cache_dir)
    with pytest.raises(UserError, match='num_items: 11 in the cache, 12 wanted'):
        write(cache_dir, num_items=12)
    with pytest.raises(UserError, match='shard_items: 4 in the cache, 5 wanted'):
        write(cache_dir, shard_items=5)
    (cache_dir / 'cache.json').unlink()  # unfinished
    with pytest.raises(UserError, match='slice: 16 in the cache, 8 wanted'):
        write(cache_dir, fingerprint={**FINGERPRINT, 'slice': 8})
    with pytest.raises(UserError, match='num_items: 11 in the cache, 4 wanted'):
        write(cache_dir, num_items=4)
    before.pop('cache.json')
    assert contents(cache_dir) == before


def test_write_compares_the_manifest_even_without_shards(cache_dir):
    write(cache_dir)
    for name in SHARDS:
        (cache_dir / name).unlink()
    with pytest.raises(UserError, match='slice: 16 in the cache, 8 wanted'):
        write(cache_dir, never, fingerprint={**FINGERPRINT, 'slice': 8})


def test_a_fingerprint_key_cannot_hide_a_layout_difference(cache_dir):
    fingerprint = {'num_items': 5}
    write(cache_dir, fingerprint=fingerprint)
    with pytest.raises(UserError, match='num_items: 11 in the cache, 12 wanted'):
        write(cache_dir, fingerprint=fingerprint, num_items=12)


@pytest.mark.parametrize('name', ['holiday.jpg', 'features-00003.safetensors', 'sub'])
def test_foreign_files_are_refused_before_any_work(cache_dir, name):
    cache_dir.mkdir()
    (cache_dir / name).mkdir() if name == 'sub' else (cache_dir / name).write_bytes(b'mine')
    with pytest.raises(UserError, match=rf'not part of this feature cache:\n  {name}\n.*--cache-dir'):
        write(cache_dir)
    assert [p.name for p in cache_dir.iterdir()] == [name]


def test_foreign_file_in_a_finished_cache(cache_dir):
    write(cache_dir)
    (cache_dir / '.DS_Store').write_bytes(b'')
    features.open(cache_dir, FINGERPRINT)
    (cache_dir / 'notes.txt').write_text('')
    with pytest.raises(UserError, match=r'notes\.txt'):
        features.open(cache_dir, FINGERPRINT)


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def damage_missing(path):
    path.unlink()


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def damage_empty(path):
    path.write_bytes(b'')


def damage_flipped(path):
    flip_byte(path, -1)


def damage_directory(path):
    path.unlink()
    path.mkdir()


def damage_no_metadata(path):
    save_file(load_file(path), path)


def rewrite(path, change):
    with feature_files.safe_open(path, 'pt') as f:
        metadata = f.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def damage_lost_tensor(path):
    rewrite(path, lambda t: t.pop('ws'))


def damage_wrong_shape(path):
    rewrite(path, lambda t: t.update(ws=torch.zeros(4, 2)))


def damage_lost_items(path):
    rewrite(path, lambda t: t.update({name: x[:3].clone() for name, x in t.items()}))


def damage_hostile_name(path):
    rewrite(path, lambda t: t.update({'../../ws': t.pop('ws')}))


DAMAGE = [fn for name, fn in globals().items() if name.startswith('damage_')]


@pytest.mark.parametrize('damage', DAMAGE, ids=lambda fn: fn.__name__)
def test_a_damaged_shard_is_refused_by_name(cache_dir, damage):
    write(cache_dir)
    damage(cache_dir / SHARDS[1])
    with pytest.raises(UserError, match=rf'(?s)is damaged:\n  {SHARDS[1]} .*--cache-dir') as err:
        features.open(cache_dir, FINGERPRINT)
    assert SHARDS[0] not in str(err.value)
    if damage not in (damage_flipped,):
        with pytest.raises(UserError, match=SHARDS[1]):
            features.open(cache_dir, FINGERPRINT, verify=False)


def test_all_damaged_shards_are_listed(cache_dir):
    write(cache_dir)
    damage_missing(cache_dir / SHARDS[0])
    damage_flipped(cache_dir / SHARDS[2])
    with pytest.raises(UserError, match=f'(?s){SHARDS[0]} is missing.*{SHARDS[2]} does not match its checksum'):
        features.open(cache_dir, FINGERPRINT)


def test_swapped_shards_are_refused(cache_dir):
    write(cache_dir)
    data = (cache_dir / SHARDS[0]).read_bytes()
    (cache_dir / SHARDS[1]).write_bytes(data)
    with pytest.raises(UserError, match='shard: 0 in the cache, 1 wanted'):
        features.open(cache_dir, FINGERPRINT)


def test_flipped_bytes_are_refused(cache_dir):
    write(cache_dir, num_items=4)
    path = cache_dir / SHARDS[0]
    for position in range(0, path.stat().st_size, 3):
        flip_byte(path, position)
        with pytest.raises(UserError):
            features.open(cache_dir, FINGERPRINT)
        flip_byte(path, position)
    features.open(cache_dir, FINGERPRINT)


GARBAGE = {
    'empty': b'',
    'binary': bytes(range(256)),
    'half': b'{"format_version": 1, ',
    'list': b'[]',
    'deep': b'[' * 100_000,
    'null': b'null',
    'other': b'{"cache": "of another program"}',
}


@pytest.mark.parametrize('garbage', GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_manifest(cache_dir, garbage):
    write(cache_dir)
    (cache_dir / 'cache.json').write_bytes(garbage)
    for reader in (lambda: features.open(cache_dir, FINGERPRINT), lambda: write(cache_dir, never)):
        with pytest.raises(UserError, match=r'cache\.json is damaged, or no feature cache .*--cache-dir'):
            reader()


@pytest.mark.parametrize(
    'change',
    [
        {'format_version': 99},
        {'num_items': 10**30, 'shard_items': 1},
        {'num_items': -1},
        {'shard_items': 0},
        {'num_items': True},
        {'shards': []},
        {'shards': [{'num_items': 4, 'sha256': '0'}] * 3},
        {'tensors': {}},
        {'tensors': {'../x': {'shape': [2, 3], 'dtype': 'float16'}}},
        {'tensors': {'__metadata__': {'shape': [2, 3], 'dtype': 'float16'}}},
        {'tensors': {'x': {'shape': [2, -3], 'dtype': 'float16'}}},
        {'tensors': {'x': {'shape': [2, 3], 'dtype': 'complex64'}}},
        {'fingerprint': {'slice': [16]}},
        {'fingerprint': 'slice 16'},
    ],
    ids=str,
)
def test_hostile_manifest(cache_dir, change):
    write(cache_dir)
    path = cache_dir / 'cache.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r'cache\.json is damaged'):
        features.open(cache_dir, FINGERPRINT)


def test_checksum_in_the_manifest_counts_too(cache_dir):
    write(cache_dir)
    path = cache_dir / 'cache.json'
    manifest = json.loads(path.read_text())
    manifest['shards'][1]['sha256'] = '0' * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f'{SHARDS[1]} has the checksum'):
        features.open(cache_dir, FINGERPRINT)


# Wrong use


@pytest.mark.parametrize(
    'batch',
    [
        {},
        {'__metadata__': torch.zeros(3)},
        {'../x': torch.zeros(3)},
        {'x': torch.zeros(2)},
        {'x': torch.tensor(1.0)},
        {'x': torch.zeros(3, dtype=torch.complex64)},
    ],
    ids=str,
)
def test_unusable_batches(cache_dir, batch):
    with pytest.raises(ValueError, match=r'expected tensors with names|expected \[3, \.\.\.\]'):
        write(cache_dir, lambda a, b: batch)
    assert list(cache_dir.iterdir()) == []


def test_batches_must_agree(cache_dir):
    with pytest.raises(ValueError, match=r'make_batch\(3, 4\) returned'):
        write(cache_dir, lambda a, b: items(a, b, torch.float16 if a == 0 else torch.float32))


@pytest.mark.parametrize('value', [float('nan'), [1], torch.tensor(1), b'x'], ids=str)
def test_unusable_fingerprint(cache_dir, value):
    with pytest.raises(ValueError, match="found 'slice'"):
        write(cache_dir, fingerprint={'slice': value})


def test_overflow_is_not_cached(cache_dir):
    with pytest.raises(UserError, match=r'x has infinite or NaN values among the items 4 to 7.*float16; try float32'):
        write(cache_dir, lambda a, b: {'x': torch.arange(a, b).mul(10_000).half()})
    assert SHARDS[1] not in contents(cache_dir)


def test_no_items(cache_dir):
    with pytest.raises(UserError, match='at least 1 item to cache, found 0'):
        write(cache_dir, num_items=0)


# Disk


def write_with_file_limit(cache_dir, pipe):
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))  # the kernel refuses to let a file grow further
    try:
        write(cache_dir, lambda a, b: {'x': torch.zeros(b - a, 300)})
    except UserError as err:
        pipe.send(str(err))


def test_a_write_refused_by_the_system_leaves_nothing_half_written(cache_dir):
    here, there = fork.Pipe()
    process = fork.Process(target=write_with_file_limit, args=(cache_dir, there))
    process.start()
    process.join()
    assert here.poll(0) and f'cannot write {cache_dir / SHARDS[0]}: File too large' in here.recv()
    assert list(contents(cache_dir)) == ['.lock']


def test_too_small_a_disk_is_found_before_the_work(cache_dir, monkeypatch):
    usage = feature_files.shutil.disk_usage(cache_dir.parent)
    monkeypatch.setattr(feature_files.shutil, 'disk_usage', lambda path: usage._replace(free=NUM_ITEMS * 24 - 1))
    calls = []
    with pytest.raises(UserError, match=r'are free there\. Make room'):
        write(cache_dir, lambda a, b: calls.append(a) or items(a, b))
    assert calls == [0]


def test_cache_dir_that_is_a_file(tmp_path):
    (tmp_path / 'cache').write_text('')
    with pytest.raises(UserError, match=r'cannot write .*cache: File exists'):
        write(tmp_path / 'cache')
