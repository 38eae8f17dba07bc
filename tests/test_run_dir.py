import io
import json
import multiprocessing
import os
import sys

import click
import numpy as np
import pytest
from tqdm import tqdm

from m2m_stylegan import run_dir
from m2m_stylegan.errors import UserError
from m2m_stylegan.run_dir import Tee, describe, log_to, next_run_dir, write_json

fork = multiprocessing.get_context('fork')


# Numbers


def test_numbers_are_official(tmp_path):
    outdir = tmp_path / 'new' / 'runs'
    assert next_run_dir(outdir, 'tiny32-auto1') == outdir / '00000-tiny32-auto1'
    assert next_run_dir(outdir, 'tiny32-auto1') == outdir / '00001-tiny32-auto1'
    (outdir / '00041-other').mkdir()
    (outdir / '7').mkdir()
    (outdir / 'x00099-no-number').mkdir()
    (outdir / '00100-file').write_text('')
    assert next_run_dir(outdir, 'a').name == '00042-a'
    (outdir / '123456-long').mkdir()
    assert next_run_dir(outdir, 'a').name == '123457-a'


def test_description_cannot_leave_outdir(tmp_path):
    assert next_run_dir(tmp_path, '../../a\\b').parent == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ['00000-.._.._a_b']


def make_many(outdir, desc, barrier):
    barrier.wait()
    for _ in range(10):
        next_run_dir(outdir, desc)


@pytest.mark.parametrize('descs', [['same'] * 4, ['a', 'b', 'c', 'd']], ids=str)
def test_no_number_is_given_twice(tmp_path, descs):
    barrier = fork.Barrier(4)
    processes = [fork.Process(target=make_many, args=(tmp_path, desc, barrier)) for desc in descs]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 4
    numbers = [p.name[:5] for p in tmp_path.iterdir()]
    assert len(numbers) == len(set(numbers)) == 40


def test_the_later_of_two_gives_way(tmp_path, monkeypatch):
    # Both saw an empty outdir, and the other one was faster.
    scan, scans = run_dir._run_ids, []

    def scan_late(outdir):
        scans.append(scan(outdir))
        if len(scans) == 1:
            (outdir / '00000-other').mkdir()
        return scans[-1]

    monkeypatch.setattr(run_dir, '_run_ids', scan_late)
    assert next_run_dir(tmp_path, 'mine').name == '00001-mine'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000-other', '00001-mine']


def test_outdir_that_is_a_file(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot make a run directory in .*file.*--outdir'):
        next_run_dir(tmp_path / 'file', 'a')
    with pytest.raises(UserError, match='File name too long'):
        next_run_dir(tmp_path, 'x' * 300)


# Descriptions


@pytest.mark.parametrize(
    'options, desc',
    [
        ({}, 'tiny32-auto1'),
        ({'cfg': 'paper256', 'num_gpus': 8}, 'tiny32-paper256'),
        ({'num_gpus': 4, 'cond': True, 'mirror': True, 'subset': 200}, 'tiny32-cond-subset200-mirror-auto4'),
        ({'gamma': 10.0, 'kimg': 1000, 'batch': 32}, 'tiny32-auto1-gamma10-kimg1000-batch32'),
        ({'gamma': 0.0512, 'aug': 'fixed', 'p': 0.7}, 'tiny32-auto1-gamma0.0512-fixed-p0.7'),
        ({'aug': 'ada', 'target': 0.6, 'augpipe': 'bgcfnc'}, 'tiny32-auto1-ada-target0.6-bgcfnc'),
        ({'gamma': 0.0, 'p': 0.0, 'freezed': 0}, 'tiny32-auto1-gamma0-p0-freezed0'),
        ({'resume': 'noresume'}, 'tiny32-auto1-noresume'),
        ({'resume': 'ffhq256', 'freezed': 13}, 'tiny32-auto1-resumeffhq256-freezed13'),
        ({'resume': 'demo'}, 'tiny32-auto1-resumedemo'),
        ({'resume': '/data/ffhq256.pkl'}, 'tiny32-auto1-resumecustom'),
        ({'train': 'high-res', 'slice_at': 16, 'resume': 'ffhq256'}, 'tiny32-auto1-resumeffhq256-m2m-high-res-slice16'),
        ({'train': 'low-res', 'slice_at': 'w'}, 'tiny32-auto1-m2m-low-res-slicew'),
    ],
)
def test_describe(options, desc):
    assert describe('tiny32', **{'cfg': 'auto', 'num_gpus': 1, **options}) == desc


# Console copy


def test_log_holds_both_streams_line_by_line_and_the_console_everything(tmp_path, capsys):
    console = sys.stdout
    (tmp_path / 'log.txt').write_text('before\n')
    with log_to(tmp_path / 'log.txt'):
        print('tick 0', end=' ')
        print('oops', file=sys.stderr)
        print('kimg 4')
        click.echo('from click: ä')
        print('Windows\r\nend', end='')
        kept = sys.stdout
    assert sys.stdout is console
    print('after')
    print('kept', file=kept)
    assert (tmp_path / 'log.txt').read_text(encoding='utf-8') == 'before\noops\ntick 0 kimg 4\nfrom click: ä\nWindows\nend\n'
    out, err = capsys.readouterr()
    assert out == 'tick 0 kimg 4\nfrom click: ä\nWindows\r\nendafter\nkept\n' and err == 'oops\n'


@pytest.mark.parametrize('leave', [True, False])
def test_progress_bars_are_shown_and_not_copied(tmp_path, capsys, leave):
    with log_to(tmp_path / 'log.txt'):
        print('start')
        for i in tqdm(range(5), mininterval=0, miniters=1, leave=leave):
            if i == 2:
                print('warning in the middle', file=sys.stderr)
                tqdm.write('through tqdm')
        print('on stderr', file=sys.stderr)
        for _ in tqdm(range(2), mininterval=0, miniters=1):
            for _ in tqdm(range(2), mininterval=0, miniters=1, leave=False):
                pass
        print('end')
    assert (tmp_path / 'log.txt').read_text().split('\n') == ['start', 'warning in the middle', 'through tqdm', 'on stderr', 'end', '']
    assert '5/5' in capsys.readouterr().err


def test_an_overwritten_line_is_dropped():
    console, log = io.StringIO(), io.StringIO()
    tee = Tee(console, log)
    tee.writelines(['loading ', '10 %\rloading 20 %', '\n', 'a\n\n\u2028b\n', '\rbar\nnext\n'])
    tee.stop_copying()
    assert log.getvalue() == 'a\n\n\u2028b\nnext\n'
    assert console.getvalue() == 'loading 10 %\rloading 20 %\na\n\n\u2028b\n\rbar\nnext\n'


def test_log_is_complete_after_every_line(tmp_path):
    with log_to(tmp_path / 'log.txt'):
        print('one')
        assert (tmp_path / 'log.txt').read_text() == 'one\n'


def test_an_exception_is_logged_and_passed_on(tmp_path, capsys):
    console = sys.stderr
    with pytest.raises(ZeroDivisionError), log_to(tmp_path / 'log.txt'):
        print('before', end='')
        1 / 0  # noqa: B018
    assert sys.stderr is console
    text = (tmp_path / 'log.txt').read_text()
    assert text.startswith('before\nTraceback') and text.endswith('ZeroDivisionError: division by zero\n')


def test_tee_is_otherwise_the_console(capsys):
    tee = Tee(sys.__stdout__, io.StringIO())
    assert tee.isatty() == sys.__stdout__.isatty() and tee.encoding == sys.__stdout__.encoding
    assert tee.fileno() == sys.__stdout__.fileno()
    assert Tee(io.StringIO(), io.StringIO()).write('abc') == 3


def test_nested_logs(tmp_path):
    with log_to(tmp_path / 'a.txt'):
        with log_to(tmp_path / 'b.txt'):
            print('both')
        print('outer')
    assert (tmp_path / 'a.txt').read_text() == 'both\nouter\n' and (tmp_path / 'b.txt').read_text() == 'both\n'


# JSON


def test_write_json(tmp_path):
    write_json(tmp_path / 'training_options.json', {'b': 1, 'a': [None, 0.1]})
    text = (tmp_path / 'training_options.json').read_text()
    assert text.startswith('{\n  "b": 1,\n  "a": [\n') and json.loads(text) == {'b': 1, 'a': [None, 0.1]}
    with (tmp_path / 'training_options.json').open() as reader:
        write_json(tmp_path / 'training_options.json', {})
        assert reader.read() == text  # a reader never sees half a file: the new one took its place
    assert (tmp_path / 'training_options.json').read_text() == '{}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / 'training_options.json', {'x': np.zeros(2)})
    assert os.listdir(tmp_path) == ['training_options.json'] and (tmp_path / 'training_options.json').read_text() == '{}\n'
