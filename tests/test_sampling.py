import itertools
import re

import numpy as np
import pytest
from golden import load

from m2m_stylegan.datasets import InfiniteSampler, snapshot_grid

GOLDEN = load('data_and_schedules').arrays


@pytest.mark.parametrize('case', [key for key in GOLDEN if key.startswith('sampler/')])
@pytest.mark.parametrize('start', [0, 1, 17, 31])
def test_sampler_order_is_official_from_any_start(case, start):
    n, seed, rank, replicas = map(int, re.findall(r'\d+', case))
    sampler = InfiniteSampler(n, seed=seed, rank=rank, num_replicas=replicas, start_idx=start)
    skipped = len(range(rank, start, replicas))
    expected = GOLDEN[case][skipped:]
    assert list(itertools.islice(sampler, len(expected))) == expected.tolist()


def test_sampler_fast_forward_over_several_chunks_of_draws():
    plain = itertools.islice(InfiniteSampler(50, seed=2), 40_000, 40_100)
    assert list(plain) == list(itertools.islice(InfiniteSampler(50, seed=2, start_idx=40_000), 100))


@pytest.mark.parametrize('n, window', [(3, 2), (4, 2), (5, 2), (9, 4)])  # rint(n / 2), halves to even
def test_sampler_draws_one_number_per_step(n, window):
    rnd, order = np.random.RandomState(5), np.arange(n)
    rnd.shuffle(order)
    expected = []
    for idx in range(100):
        i = idx % n
        expected.append(int(order[i]))
        j = (i - rnd.randint(window)) % n
        order[i], order[j] = order[j], order[i]
    assert list(itertools.islice(InfiniteSampler(n, seed=5), 100)) == expected


def test_sampler_without_shuffle_and_ranks_share_one_order():
    assert list(itertools.islice(InfiniteSampler(3, shuffle=False), 7)) == [0, 1, 2, 0, 1, 2, 0]
    whole = list(itertools.islice(InfiniteSampler(10), 60))
    for rank in range(3):
        assert list(itertools.islice(InfiniteSampler(10, rank=rank, num_replicas=3), 20)) == whole[rank::3]


@pytest.mark.parametrize('options', [{'n': 0}, {'n': 4, 'rank': 1}, {'n': 4, 'window_size': 2}, {'n': 4, 'start_idx': -1}])
def test_sampler_arguments(options):
    with pytest.raises(ValueError, match='expected n >= 1'):
        InfiniteSampler(**options)


def labelled_set(classes, resolution):
    """All that snapshot_grid asks of a dataset."""
    dataset = type('Stub', (), {'__len__': lambda self: len(classes)})()
    dataset.has_labels, dataset.image_shape = True, [3, resolution, resolution]
    dataset.get_label = lambda idx: np.eye(3, dtype=np.float32)[classes[idx]]
    return dataset


@pytest.mark.parametrize('case', [key.rpartition('/')[0] for key in GOLDEN if key.startswith('grid/') and key.endswith('indices')])
def test_snapshot_grid_is_official(case):
    n, resolution = map(int, re.findall(r'\d+', case))
    dataset = labelled_set(np.arange(n) % 3, resolution)
    dataset.has_labels = '/label' in case
    grid_size, indices = snapshot_grid(dataset)
    assert grid_size == tuple(GOLDEN[f'{case}/gw_gh'])
    assert indices == GOLDEN[f'{case}/indices'].tolist()


def test_snapshot_grid_shows_further_items_of_a_class_in_its_next_row():
    (columns, rows), grid = snapshot_grid(labelled_set(GOLDEN['dataset/class_ids'], 4))
    classes = GOLDEN['dataset/class_ids'][np.array(grid).reshape(rows, columns)]
    assert (columns, rows) == (32, 32)
    assert np.array_equal(classes, np.repeat(np.arange(rows) % 3, columns).reshape(rows, columns))
    first_class = np.array(grid).reshape(rows, columns)[::3].ravel()
    assert len(set(first_class[:5])) == 5 and np.array_equal(first_class[5:], first_class[:-5])
