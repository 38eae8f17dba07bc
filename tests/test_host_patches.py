"""Patch files: additions without a line of the host, byte-exact to take back, refused by anything but the files they were made for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import test_host
import tiny
from click.testing import CliRunner

from m2m_stylegan import host_patch_files, host_revisions, snapshots
from m2m_stylegan.errors import UserError
from tools import apply_patches

PATCHES = Path(__file__).parents[1] / 'patches'
CALL = 'import m2m_stylegan.host; m2m_stylegan.host.patch(__file__)'
SCRIPTS = ('generate.py', 'legacy.py', 'train.py')
ENDS = {'unix': b'\n', 'windows': b'\r\n'}


def section(path, data, line=CALL):
    """What `git diff -U0 --full-index` prints once `line` is the second line of a file with the content `data`."""
    first, rest = data.split(b'\n', 1)
    ids = [host_revisions.git_id(content) for content in (data, first + b'\n' + line.encode() + b'\n' + rest)]
    return f'diff --git a/{path} b/{path}\nindex {ids[0]}..{ids[1]} 100755\n--- a/{path}\n+++ b/{path}\n@@ -1,0 +2 @@\n+{line}\n'


@pytest.fixture(params=ENDS)
def checkout(request, tmp_path):
    """The mini host with byte order marks, in Windows or Unix line ends, and patches for it, made for Unix ones."""
    shutil.copytree(PATCHES.parent / 'tests' / 'mini_host', tmp_path / 'host', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'patches').mkdir()
    sections = []
    for name in SCRIPTS:
        path = tmp_path / 'host' / name
        data = b'\xef\xbb\xbf# A licence.\n' + path.read_bytes()
        sections.append(section(name, data))
        path.write_bytes(data.replace(b'\n', ENDS[request.param]))
        path.chmod(0o755)
    (tmp_path / 'patches' / 'series').write_text('other.patch\nmini.patch\n')
    (tmp_path / 'patches' / 'mini.patch').write_text('What it is for.\n\n' + ''.join(sections))
    (tmp_path / 'patches' / 'other.patch').write_text(section('elsewhere.py', b'# x\n'))
    return tmp_path


def apply(checkout, *options):
    return CliRunner().invoke(apply_patches.main, [f'--host={checkout}/host', f'--patches={checkout}/patches', *options])


def contents(checkout):
    return {path: (path.read_bytes(), path.stat().st_mode) for path in (checkout / 'host').rglob('*.py')}


def test_there_and_back(checkout):
    before = contents(checkout)
    assert 'generate.py: absent' in apply(checkout, '--check').output and contents(checkout) == before
    for _ in range(2):  # The second time there is nothing to do.
        assert apply(checkout).exit_code == 0
        for name in SCRIPTS:
            lines, (old, _mode) = (checkout / 'host' / name).read_bytes().splitlines(keepends=True), before[checkout / 'host' / name]
            assert lines[1].rstrip() == CALL.encode()
            assert [lines[0], *lines[2:]] == old.splitlines(keepends=True)
            assert len({line.endswith(b'\r\n') for line in lines}) == 1
    assert 'generate.py: present' in apply(checkout, '--check').output
    for _ in range(2):
        assert apply(checkout, '--revert').exit_code == 0
        assert contents(checkout) == before


def test_half_applied_is_completed(checkout):
    before = contents(checkout)
    apply(checkout)
    path = checkout / 'host' / 'legacy.py'
    path.write_bytes(before[path][0])
    assert apply(checkout).exit_code == 0
    assert all(CALL.encode() in (checkout / 'host' / name).read_bytes() for name in SCRIPTS)


def test_a_changed_file_is_refused_and_nothing_is_touched(checkout):
    with open(checkout / 'host' / 'train.py', 'ab') as file:
        file.write(b'x = 1\n')
    (checkout / 'host' / 'legacy.py').unlink()
    before = contents(checkout)
    for options in ([], ['--check'], ['--revert']):
        result = apply(checkout, *options)
        assert result.exit_code == 1
        assert 'mini.patch' in result.output and 'train.py has blob' in result.output and 'legacy.py is missing' in result.output
        assert contents(checkout) == before


@pytest.mark.parametrize('text', ['', 'x', section('a.py', b'# x\n').replace('@@ -1,0 +2 @@', '@@ -1,2 +1,3 @@\n # x'), section('../a.py', b'# x\n'),
                                  section('/a.py', b'# x\n'), section('a.py', b'# x\n') + '-# x\n', section('a.py', b'# x\n') + 'more\n'])
def test_other_patches_are_refused(tmp_path, text):
    (tmp_path / 'x.patch').write_text(text)
    with pytest.raises(UserError, match='additions alone|outside'):
        host_patch_files.read(tmp_path / 'x.patch')


def test_patches_of_this_repository():
    """Every line that is added is the call, behind the first line, where a byte order mark would be."""
    names = (PATCHES / 'series').read_text().split()
    assert sorted(names) == sorted(path.name for path in PATCHES.glob('*.patch'))
    for name in names:
        insertions = host_patch_files.read(PATCHES / name)
        assert {(insertion.line, insertion.added) for insertion in insertions} == {(1, (CALL.encode(),))}
        assert 'legacy.py' in {insertion.path for insertion in insertions}
        known, = (files for revision, files in host_revisions.REVISIONS.items() if revision.startswith(f'{name.removesuffix(".patch")} '))
        assert known['legacy.py'] == next(insertion.old for insertion in insertions if insertion.path == 'legacy.py')


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
@pytest.mark.parametrize('checkout', ['unix'], indirect=True)
def test_git_applies_them(checkout):
    before = contents(checkout)
    for options in ([], ['-R']):
        subprocess.run(['git', 'apply', '--unidiff-zero', *options, '../patches/mini.patch'], cwd=checkout / 'host', check=True,
                       env={**os.environ, 'GIT_CEILING_DIRECTORIES': str(checkout)})
        assert (contents(checkout) == before) == (options == ['-R'])


@pytest.mark.parametrize('checkout', ['windows'], indirect=True)
def test_patched_scripts_run_by_themselves(checkout):
    """As `python generate.py`; also legacy.py, which is both a script and a module, and processes that train.py spawns."""
    apply(checkout)
    G = tiny.generator(use_noise=False)
    snapshots.save(checkout / 'net.pkl', G=G, D=tiny.discriminator(), G_ema=G)
    environment = {'M2M_HOST_FORCE': '1'}
    done = test_host.start(checkout / 'host' / 'generate.py', f'--network={checkout}/net.pkl', f'--outdir={checkout}/out', env=environment)
    assert test_host.succeed(done).stderr.count('under m2m_stylegan') == 1
    test_host.assert_right_picture(checkout / 'out' / 'seed0000.png', checkout / 'net.pkl')
    words = ['legacy.py', f'--source={checkout}/net.pkl', f'--dest={checkout}/new.pkl']
    assert 'Done.' in test_host.succeed(test_host.start(*words, env=environment, cwd=checkout / 'host')).stdout
    assert test_host.same_tensors(snapshots.load(checkout / 'new.pkl').G, G)
    words = ['train.py', f'--outdir={checkout}/runs', '--data=x', f'--resume={checkout}/net.pkl', '--gpus=2']
    done = test_host.succeed(test_host.start(*words, env=environment, cwd=checkout / 'host'))
    assert done.stdout.count('2 steps') == 2 and done.stderr.count('under m2m_stylegan') == 1
    done = test_host.start(*words, cwd=checkout / 'host')  # an unknown revision
    assert done.returncode == 1 and 'M2M_HOST_FORCE=1' in done.stderr and 'Traceback' not in done.stderr
