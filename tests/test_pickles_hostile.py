"""Thousands of hostile and damaged pickles: each ends in one UserError, and nothing in them runs. The corpus is in hostile.py."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

from m2m_stylegan import pickles
from m2m_stylegan.errors import UserError
from m2m_stylegan.pickles_reader import Budget, Machine, Stream

HERE = Path(__file__).parent


def test_hostile_corpus(tmp_path):
    """Read in a process whose memory is limited, with an audit hook that sees imports, files, code, processes and sockets."""
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join((str(HERE.parent), str(HERE))), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(HERE / 'hostile_reader.py'), str(tmp_path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout)
    assert not report['problems'], '\n'.join(report['problems'][:20])
    assert report['counts']['refused'] > 5000 and set(report['counts']) == {'refused', 'loaded'}
    assert report['growth'] < 2**30
    assert not list(tmp_path.iterdir())


def test_claimed_lengths_are_not_even_asked_for():
    """A buffered file sets aside what it is asked for before it looks whether there is that much."""

    class Jealous(io.BytesIO):
        def read(self, size=-1):
            assert 0 <= size <= 100
            return super().read(size)

    for claim in (b'B' + struct.pack('<I', 2**32 - 1), b'X' + struct.pack('<I', 2**31), b'\x95' + struct.pack('<Q', 2**40)):
        data = hostile.program(claim)
        with pytest.raises(UserError, match='truncated'):
            Machine(Stream(Jealous(data), len(data)), Budget(100, 100), {}).run()


def test_corpus_bites(tmp_path):
    """Python's own unpickler runs what the corpus contains: a reader that let it through would be seen."""
    names = {f'posix.system {way}' for way in ('REDUCE', 'STACK_GLOBAL REDUCE', 'INST', 'OBJ')}
    shells = [case for case in hostile.executing(str(tmp_path)) if case.name in names]
    assert len(shells) == len(names)
    for case in shells:
        script = 'import pickle, sys; pickle.loads(sys.stdin.buffer.read())'
        subprocess.run([sys.executable, '-c', script], input=case.data, check=True)
        canary = tmp_path / hostile.CANARY
        assert canary.exists(), case.name
        canary.unlink()


def test_injections_by_fickling(tmp_path):
    """The attack tool that others use, on every good file, in every way it offers."""
    fickle = pytest.importorskip('fickling.fickle')
    canary = tmp_path / hostile.CANARY
    code = f'open({str(canary)!r}, "w").close()'
    made = []
    for _, whole in hostile.good_pickles():
        for run_first in (True, False):
            for use_output in (True, False):
                for inject in ('insert_python_exec', 'insert_python_eval', 'insert_python'):
                    pickled = fickle.Pickled.load(whole)
                    getattr(pickled, inject)(code, run_first=run_first, use_output_as_unpickle_result=use_output)
                    made.append(pickled.dumps())
        pickled = fickle.Pickled.load(whole)
        pickled.insert_function_call_on_unpickled_object(f'def f(x):\n    {code}\n    return x')
        made.append(pickled.dumps())
    for data in made:
        with pytest.raises(UserError, match=r'not on the list|instruction'):
            pickles.load(data)
    assert len(made) == 39 and not canary.exists()
