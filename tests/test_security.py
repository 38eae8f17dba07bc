"""Files from strangers, beyond what the tests of the readers do (docs/security.md lists them): fuzzed caches, images that are programs."""

import ast
import json
import os
import zipfile
from pathlib import Path

import pytest
import test_features
import test_house
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2m_stylegan import features
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.errors import UserError

ROOT = Path(__file__).parents[1]
FUZZ = settings(max_examples=int(os.environ.get('M2M_FUZZ_EXAMPLES', '60')), derandomize='M2M_FUZZ_EXAMPLES' not in os.environ, deadline=None,
                database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
edits = st.lists(st.tuples(st.sampled_from(['set', 'cut', 'insert', 'drop']), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
                 min_size=1, max_size=4)


def edited(data, edits):
    for kind, where, new in edits:
        i = int(where * len(data))
        data = {'set': data[:i] + new + data[i + len(new):], 'cut': data[:i], 'insert': data[:i] + new + data[i:],
                'drop': data[:i] + data[i + len(new):]}[kind]
    return data


# Feature caches


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    """A complete cache and the bytes of its files."""
    cache_dir = tmp_path_factory.mktemp('fuzz') / 'cache'
    test_features.write(cache_dir)
    return cache_dir, test_features.contents(cache_dir)


def open_damaged(cache, name, data):
    """None if the cache is refused; else all its items."""
    cache_dir, original = cache
    (cache_dir / name).write_bytes(data)
    try:
        return features.open(cache_dir, test_features.FINGERPRINT).gather(torch.arange(test_features.NUM_ITEMS))
    except UserError:
        return None
    finally:
        (cache_dir / name).write_bytes(original[name])


@pytest.mark.parametrize('name', ['cache.json', test_features.SHARDS[1]])
def test_fuzzed_cache_is_refused_or_reads_the_same(cache, name):
    wanted = test_features.items(0, test_features.NUM_ITEMS)

    @FUZZ
    @given(edits=edits)
    def fuzz(edits):
        found = open_damaged(cache, name, edited(cache[1][name], edits))
        if found is not None:
            assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[key]) for key, x in found.items())

    fuzz()


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)


def test_fuzzed_manifests_are_refused_or_read_the_same(cache):
    """Well-formed JSON with any values in the places where the reader looks."""
    manifest = json.loads(cache[1]['cache.json'])
    wanted = test_features.items(0, test_features.NUM_ITEMS)

    @FUZZ
    @given(changes=st.dictionaries(st.sampled_from([*manifest]), json_values, min_size=1, max_size=2))
    def fuzz(changes):
        found = open_damaged(cache, 'cache.json', json.dumps({**manifest, **changes}).encode())
        if found is not None:
            assert all(torch.equal(x, wanted[key]) for key, x in found.items())

    fuzz()


# Images


EPS = b'''%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
(canary) (w) file closefile
showpage
%%EOF
'''


@pytest.mark.parametrize('name', ['a.eps', 'a.png'])
def test_postscript_never_reaches_an_interpreter(tmp_path, monkeypatch, name):
    """Pillow takes the format from the content, whatever the name, and hands PostScript to `gs` if there is one."""
    gs = tmp_path / 'bin' / 'gs'
    gs.parent.mkdir()
    gs.write_text(f'#!/bin/sh\ntouch {tmp_path}/canary\n')
    gs.chmod(0o755)
    monkeypatch.setenv('PATH', f'{gs.parent}:{os.environ["PATH"]}')
    data = tiny.dataset_zip(tmp_path / 'data.zip')
    with zipfile.ZipFile(data, 'a') as archive:
        archive.writestr(name, EPS)
    with pytest.raises(UserError, match=rf'{name} \(not an image that Pillow can read\)'):
        ImageDataset(data)
    assert not (tmp_path / 'canary').exists()


def test_links_in_a_zip_are_not_followed(tmp_path):
    """An entry that an unpacker would make a link is, for us, a file of a few bytes that is no image."""
    data = tiny.dataset_zip(tmp_path / 'data.zip')
    link = zipfile.ZipInfo('00000/link.png')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(data, 'a') as archive:
        archive.writestr(link, '/etc/passwd')
    with pytest.raises(UserError, match=r'link\.png \(not an image'):
        ImageDataset(data)


def test_entries_that_overlap_are_bounded_one_by_one(tmp_path):
    """Many names for the same packed bytes (Fifield's bomb): nothing is unpacked to disk, and images are read one at a time."""
    data = tmp_path / 'data.zip'
    with zipfile.ZipFile(data, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a0.png', bytes(10_000_000))
        for i in range(1, 200):
            info = zipfile.ZipInfo(f'a{i}.png')
            for field in ('header_offset', 'compress_size', 'file_size', 'CRC', 'compress_type'):
                setattr(info, field, getattr(archive.filelist[0], field))
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    assert data.stat().st_size < 50_000
    with pytest.raises(UserError, match='200 of 200 cannot be read as images'):
        ImageDataset(data)
    assert os.listdir(tmp_path) == ['data.zip']


# Ourselves


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks').glob('*.py')), ids=lambda path: path.name)
def test_scripts_keep_the_rule_of_the_package(path):
    test_house.test_nothing_executes_the_content_of_a_file(path)


def test_pickles_are_exchanged_with_our_own_processes_only():
    """The one place where objects are unpickled: torch.distributed's exchange of objects, between processes of one run."""
    users = {path.name for path in test_house.SOURCES for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
             if isinstance(node, ast.Attribute) and node.attr in ('broadcast_object_list', 'all_gather_object', 'scatter_object_list')}
    assert users == {'distributed.py'}
