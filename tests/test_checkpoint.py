"""Checkpoints: only an intact one is used, an earlier one is at hand, and what strangers write into one ends in a clean message."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tiny_run
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import options_for, train

from m2m_stylegan import checkpoint
from m2m_stylegan.errors import UserError
from m2m_stylegan.feature_files import digest_of

PREVIOUS = 'm2m-checkpoint.1.safetensors'
OPTIONS = options_for('full', total_kimg=0.020)  # two ticks, so two checkpoints


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoint')
    dataset = tiny_run.dataset(folder / 'data.zip')
    train(folder / 'run', dataset, OPTIONS)
    return dataset, folder / 'run'


@pytest.fixture
def dataset(source):
    return source[0]


@pytest.fixture
def run(source, tmp_path):
    return Path(shutil.copytree(source[1], tmp_path / 'run'))


def nimg(path):
    return int(checkpoint.read(path)['counters']['cur_nimg'])


def torn(data):
    return data[:-1000]


def flipped(data):
    return data[:-500] + bytes([data[-500] ^ 1]) + data[-499:]


def foreign(data):
    return b'PK\x03\x04' + data


def test_the_last_two_are_kept(run):
    assert [(path.name, nimg(path)) for path in checkpoint.files(run)] == [(checkpoint.FILE_NAME, 20), (PREVIOUS, 4)]


@pytest.mark.parametrize('keep', [1, 3])
def test_as_many_are_kept_as_asked_for(tmp_path, dataset, keep):
    train(tmp_path / 'run', dataset, options_for('full', total_kimg=0.016, kimg_per_tick=0.004, keep_checkpoints=keep))
    assert [nimg(path) for path in checkpoint.files(tmp_path / 'run')] == [16, 12, 8][:keep]


def test_without_hard_links(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(os, 'link', lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, 'no links')))
    train(tmp_path / 'run', dataset, OPTIONS)
    assert [nimg(path) for path in checkpoint.files(tmp_path / 'run')] == [20, 4]


@pytest.mark.parametrize('damage', [torn, flipped, foreign, lambda data: b''], ids=['torn', 'flipped', 'foreign', 'empty'])
def test_a_damaged_one_is_detected_and_the_previous_one_used_loudly(run, dataset, source, damage):
    path = run / checkpoint.FILE_NAME
    path.write_bytes(damage(path.read_bytes()))
    told = []
    state, _ = train(run, dataset, OPTIONS, resume=True, echo=told.append)
    assert told[0].startswith(f'WARNING: {checkpoint.FILE_NAME} ') and f'Going on from the checkpoint before it, {PREVIOUS}' in told[0]
    assert state.cur_nimg == 20
    tiny_run.assert_same_run(source[1], run)
    assert [nimg(path) for path in checkpoint.files(run)] == [20, 4]  # the damaged one has not pushed out the good one


def test_the_newest_may_be_missing(run, dataset):
    (run / checkpoint.FILE_NAME).unlink()
    state, _ = train(run, dataset, options_for('full', total_kimg=0.008), resume=True)
    assert state.cur_nimg == 8


def test_all_damaged(run, dataset):
    for path in checkpoint.files(run):
        path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(UserError, match='every checkpoint is damaged(.|\n)*does not match its checksum(.|\n)*m2m-checkpoint.1'):
        train(run, dataset, OPTIONS, resume=True)


def test_none_there(tmp_path, dataset):
    with pytest.raises(UserError, match='there is no m2m-checkpoint'):
        train(tmp_path / 'run', dataset, OPTIONS, resume=True)


def test_one_of_another_run_is_refused_with_all_differences(run, dataset):
    with pytest.raises(UserError, match='feature bank(.|\n)*the optimiser of G holds'):
        train(run, dataset, options_for('high-res'), resume=True)


def test_other_formats_are_named(run, dataset):
    path = run / checkpoint.FILE_NAME
    safetensors.torch.save_file({'x': torch.zeros(1)}, path, {'m2m_stylegan': json.dumps({'format': 99, 'sha256': ''})})
    with pytest.raises(UserError, match='has format 99, this version reads format 3'):
        train(run, dataset, OPTIONS, resume=True)


def test_a_full_disk_costs_the_earlier_ones_first(run, dataset, monkeypatch):
    original, full = Path.write_bytes, []

    def write_bytes(path, data):
        if path.name.startswith('.m2m-checkpoint') and (run / PREVIOUS).exists():
            full.append(path)
            original(path, data[:100])
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        return original(path, data)

    monkeypatch.setattr(Path, 'write_bytes', write_bytes)
    state, _ = train(run, dataset, options_for('full', total_kimg=0.024), resume=True)
    assert full and nimg(run / checkpoint.FILE_NAME) == 24 == state.cur_nimg
    assert not list(run.glob('.*.tmp*'))


# Checkpoints of strangers: whoever wrote them can compute the checksum, too.


def rewrite(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {'m2m_stylegan': json.dumps({'format': checkpoint.FORMAT, 'sha256': digest_of(tensors)})})


def missing_part(t):
    for name in [name for name in t if name.startswith('ranks|')]:
        del t[name]


def part_that_is_a_tensor(t):
    t['modules|G|'] = torch.zeros(1)


def leaf_under_a_leaf(t):
    t['counters|cur_nimg|x'] = torch.zeros(1)


def moment_without_number(t):
    t['optimizers|G|state|../x|exp_avg'] = torch.zeros(1)


def moment_of_another_shape(t):
    name = next(name for name in t if name.endswith('exp_avg'))
    t[name] = torch.zeros(3, 3)


def moment_of_no_parameter(t):
    for kind in ('exp_avg', 'exp_avg_sq'):
        t[f'optimizers|G|state|99999|{kind}'] = torch.zeros(1)


def counter_that_is_a_vector(t):
    t['counters|batch_idx'] = torch.zeros(4, dtype=torch.int64)


def mean_of_another_shape(t):
    t['ranks|0|pl_mean'] = torch.zeros(7)


def negative_counter(t):
    t['counters|cur_nimg'] = torch.tensor(-4)


HOSTILE = [missing_part, part_that_is_a_tensor, leaf_under_a_leaf, moment_without_number, moment_of_another_shape, moment_of_no_parameter,
           counter_that_is_a_vector, mean_of_another_shape, negative_counter]


@pytest.mark.parametrize('change', HOSTILE, ids=lambda change: change.__name__)
def test_well_formed_but_hostile(run, dataset, change):
    for path in checkpoint.files(run):
        rewrite(path, change)
    with pytest.raises(UserError):
        train(run, dataset, OPTIONS, resume=True)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A file that `read` accepts, and its bytes."""
    path = tmp_path_factory.mktemp('fuzz') / checkpoint.FILE_NAME
    tensors = {'modules|G|w': torch.arange(6.0).reshape(2, 3), 'counters|cur_nimg': torch.tensor(5), 'ranks|0|pl_mean': torch.tensor(0.5)}
    safetensors.torch.save_file(tensors, path, {'m2m_stylegan': json.dumps({'format': checkpoint.FORMAT, 'sha256': digest_of(tensors)})})
    checkpoint.read(path)
    return path, path.read_bytes()


def read_damaged(path, data):
    path.write_bytes(data)
    try:
        return tiny_run.checkpoint._flatten(checkpoint.read(path))
    except (checkpoint.Damaged, UserError):
        return None


@settings(max_examples=int(os.environ.get('M2M_FUZZ_EXAMPLES', '100')), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
          derandomize='M2M_FUZZ_EXAMPLES' not in os.environ, database=None)
@given(edits=st.lists(st.tuples(st.sampled_from(['set', 'cut', 'insert', 'drop']), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
                      min_size=1, max_size=4))
def test_fuzzed_bytes_are_refused_or_read_the_same(small, edits):
    """Whatever happened to the bytes: a clean refusal, or the very tensors that were written."""
    path, original = small
    data = original
    for kind, where, new in edits:
        i = int(where * len(data))
        data = {'set': data[:i] + new + data[i + len(new):], 'cut': data[:i], 'insert': data[:i] + new + data[i:],
                'drop': data[:i] + data[i + len(new):]}[kind]
    found = read_damaged(path, data)
    if found is not None:
        wanted = safetensors.torch.load(original)
        assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in found.items())


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)
entries = st.fixed_dictionaries({}, optional={'dtype': st.sampled_from(['F32', 'I64', 'F64', 'BOOL', 'X']) | json_values,
                                              'shape': st.lists(st.integers(-1, 2**63), max_size=4) | json_values,
                                              'data_offsets': st.lists(st.integers(-1, 2**63), max_size=3) | json_values})


@settings(max_examples=int(os.environ.get('M2M_FUZZ_EXAMPLES', '100')), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
          derandomize='M2M_FUZZ_EXAMPLES' not in os.environ, database=None)
@given(header=st.dictionaries(st.sampled_from(['modules|G|w', 'counters|cur_nimg', '__metadata__', '|', '']) | st.text(max_size=8),
                              entries | st.dictionaries(st.just('m2m_stylegan'), st.text(max_size=40)) | json_values, max_size=4),
       claimed=st.none() | st.integers(0, 2**64 - 1), body=st.binary(max_size=64))
def test_fuzzed_headers_are_refused(small, header, claimed, body):
    """Headers that lie about shapes, sizes and offsets: never more than the file holds is read."""
    text = json.dumps(header).encode()
    assert read_damaged(small[0], (len(text) if claimed is None else claimed).to_bytes(8, 'little') + text + body) is None
