"""Building operators: caching, failing with the cause, several processes at once. A source of three lines stands in for the kernels."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from m2m_stylegan import ops
from m2m_stylegan.errors import UserError
from m2m_stylegan.ops import build

SOURCE = 'extern "C" int m2m_probe() { return 42; }\n'


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A folder of sources in place of ours, an empty cache, and no memory of what this process has loaded."""
    folder = tmp_path / 'csrc' / 'cpu'
    folder.mkdir(parents=True)
    (folder / 'probe.cpp').write_text(SOURCE)
    monkeypatch.setattr(build, 'CSRC', folder.parent)
    monkeypatch.setattr(build, '_LIBRARIES', {})
    monkeypatch.setattr(build, '_READY', {})
    monkeypatch.setenv('M2M_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('M2M_OPS', 'auto')
    monkeypatch.delenv('CXX', raising=False)
    return folder


def test_built_once_then_found(csrc, capfd):
    library = ops.prepare('cpu')
    assert library.state == 'compiled' and library.seconds > 0 and library.path.is_file()
    assert 'Compiling the cpu operators' in capfd.readouterr().err
    assert ops.status()['cpu'] is library and ops.status()['cuda'].state == 'not built yet'
    build._LIBRARIES.clear()
    assert (again := ops.prepare('cpu')).path == library.path and again.seconds == 0
    assert capfd.readouterr().err == ''
    (csrc / 'probe.cpp').write_text(SOURCE + '// changed')
    assert build.key('cpu') not in library.path.parent.name
    assert [path.name for path in library.path.parents[1].iterdir() if path.name.startswith('.')] == []  # nothing half-made is left


def test_compiler_error_is_reported_once_and_the_reference_used(csrc):
    (csrc / 'probe.cpp').write_text('#include "no_such_header.h"\nint main() {}\n')
    with pytest.warns(build.OpsWarning, match=r'could not be compiled by .*\n(.*\n)*.*no_such_header\.h: No such file') as caught:
        assert ops.bias_act(torch.ones(1, 2), act='relu', gain=2).tolist() == [[2, 2]]
    assert len(caught) == 1 and 'M2M_OPS=ref silences this' in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ops.bias_act(torch.ones(1, 2), act='lrelu')
    assert ops.status()['cpu'].state == 'reference' and 'no_such_header' in ops.status()['cpu'].reason
    log = csrc.parents[1] / 'cache' / 'ops' / 'cpu-failed.log'
    assert str(log) in str(caught[0].message) and 'no_such_header' in log.read_text()


def test_asked_for_explicitly_failing_is_an_error(csrc, monkeypatch):
    monkeypatch.setenv('M2M_OPS', 'cpu')
    monkeypatch.setenv('CXX', '/no/such/compiler')
    with pytest.raises(build.BuildError, match=r'no C\+\+ compiler: "/no/such/compiler" cannot be run. Install one'):
        ops.prepare('cpu')


def test_modes(csrc, monkeypatch):
    monkeypatch.setenv('M2M_OPS', 'ref')
    assert ops.prepare('cpu').reason == 'M2M_OPS=ref' and not build.ready('cpu')
    monkeypatch.setenv('M2M_OPS', 'fast')
    build._LIBRARIES.clear()
    with pytest.raises(UserError, match='M2M_OPS=fast: expected one of auto, cpu, cuda, ref'):
        ops.prepare('cpu')
    monkeypatch.setenv('M2M_OPS', 'auto')
    assert ops.prepare('meta').reason == 'there are no kernels for meta devices'
    if not torch.cuda.is_available():
        assert ops.prepare('cuda').reason == 'PyTorch sees no CUDA device'


def test_cache_that_cannot_be_written(csrc, monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setenv('M2M_CACHE_DIR', str(tmp_path / 'file'))
    with pytest.warns(build.OpsWarning, match='cannot be stored in .*: Not a directory. Set M2M_CACHE_DIR to a directory that can be written'):
        assert ops.prepare('cpu').state == 'reference'


def test_missing_ninja(csrc, monkeypatch):
    monkeypatch.setattr(build, 'first_line', lambda *command, line=0: '' if command[0] == 'ninja' else 'c++ 1.0')
    with pytest.warns(build.OpsWarning, match='no ninja: pip install ninja'):
        ops.prepare('cpu')


def test_several_processes_at_once(csrc, tmp_path):
    code = ('import pathlib, sys\nfrom m2m_stylegan.ops import build\nbuild.CSRC = pathlib.Path(sys.argv[1])\n'
            'library = build.prepare("cpu")\nprint(library.state, library.seconds > 0)')
    processes = [subprocess.Popen([sys.executable, '-c', code, str(csrc.parent)], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, 'M2M_CACHE_DIR': str(tmp_path / 'shared')}) for _ in range(3)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ['compiled False', 'compiled False', 'compiled True']
    assert len(list((tmp_path / 'shared' / 'ops').glob('cpu-*'))) == 1


def test_a_process_killed_while_compiling_leaves_nothing_that_hurts(csrc, tmp_path):
    """What it leaves is a hidden scratch folder; the lock goes with the process."""
    root = tmp_path / 'cache' / 'ops'
    (root / f'.cpu-{build.key("cpu")}-dead').mkdir(parents=True)
    (root / 'lock').touch()
    assert ops.prepare('cpu').state == 'compiled'


def test_first_errors():
    log = '[1/2] c++ -O3 x.cpp\nx.cpp:3:5: error: expected ;\n   3 | int\nx.cpp:9: note: here\nninja: build stopped: subcommand failed.\n'
    assert build.first_errors(log) == ['x.cpp:3:5: error: expected ;']
    assert build.first_errors('ninja: fatal\nwhatever') == ['ninja: fatal', 'whatever']


def test_features_of_the_processor_are_part_of_the_key(csrc, monkeypatch):
    before = build.key('cpu')
    monkeypatch.setattr(build, '_cpu_features', lambda: 'another processor')
    assert build.key('cpu') != before
