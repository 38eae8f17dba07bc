"""tools/advise.py and tools/prepare.py: tables, the rule, what later runs find again, mistakes."""

import dataclasses
import json
import re

import pytest
import tiny
import torch
from click.testing import CliRunner

from m2m_stylegan import advise, autoencoder, detectors, efficientnet_lite, phases, prepare_codes, slicing, step_costs, transfer
from m2m_stylegan.advise import Row
from m2m_stylegan.errors import UserError
from m2m_stylegan.evaluate import Evaluator
from m2m_stylegan.step_costs import Cost
from m2m_stylegan.transfer_options import TransferOptions
from tools.advise import main as advise_tool
from tools.prepare import main as prepare_tool
from tools.transfer import main as transfer_tool

CPU = torch.device('cpu')
KIMG, NUM = 0.032, 12


@pytest.fixture
def stub_detector(monkeypatch):
    """Mean colours of four quarters of an image as its features."""
    def features(images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, [2, 2]).flatten(1)

    monkeypatch.setattr(detectors, 'load', lambda name, **options: detectors.Detector('stub 1', features))


@pytest.fixture
def files(tmp_path):
    return tiny.files(tmp_path)


def run(tool, *args, **options):
    return CliRunner().invoke(tool, [*(f'--{name.replace("_", "-")}={value}' for name, value in options.items()), *args], catch_exceptions=False)


def test_table_is_complete(tmp_path, files, stub_detector):
    result = run(advise_tool, **files, num=NUM, prepare_kimg=KIMG, device='cpu', cache_dir=tmp_path / 'cache', json=tmp_path / 'a.json')
    assert result.exit_code == 0, result.output
    found = advise.from_json((tmp_path / 'a.json').read_text())
    assert advise.from_json(advise.to_json(found)) == found
    assert advise.format_advice(found) in result.output
    assert [row.slice for row in found.rows] == ['w', '4', '8']
    assert (found.num_images, found.num, found.prepare_kimg) == (20, NUM, KIMG)
    for row in found.rows:
        assert re.search(rf'^{row.slice} +{row.psnr:.1f} +{row.fd:.1f} ', result.output, re.MULTILINE)
        assert row.low.seconds > 0 and row.low.memory_bytes > 0
        assert (row.high is None) == (row.bank_item_bytes is None) == (row.slice == 'w')
        if row.high:
            assert 0 < row.high.macs < found.full.macs and 0 < row.high.memory_bytes < found.full.memory_bytes and row.high.seconds > 0
    assert 0 < found.rows[0].low.macs < found.rows[1].low.macs < found.rows[2].low.macs
    assert found.rows[1].high.macs > found.rows[2].high.macs
    w = 20 * 8 * 4  # 20 codes of float32: w_dim 8; at slice r also x and img
    assert [row.code_bytes for row in found.rows] == [w, w + 20 * 4 * 4 * 4 * (8 + 3), w + 20 * 4 * 8 * 8 * (8 + 3)]
    assert [row.bank_item_bytes for row in found.rows[1:]] == [2 * 4 * 4 * (8 + 3) + 4 * 8 * 6, 2 * 8 * 8 * (8 + 3) + 4 * 8 * 6]
    assert f'--train={found.train}' in result.output and found.reason in result.output


def test_distances_are_those_of_calc_metrics(tmp_path, files, stub_detector):
    found = advise.advise(**files, slices=['w'], num=NUM, prepare_kimg=KIMG, device='cpu', cache_dir=str(tmp_path), seed=3, echo=lambda text: None)
    evaluator = Evaluator(files['data'], ['fd_effnetlite0'], NUM, cache_dir=tmp_path, seed=3)
    assert found.source_fd == pytest.approx(evaluator.run(files['network'])['fd_effnetlite0'], rel=1e-9)
    assert found.real_fd == pytest.approx(evaluator.floor()['fd_effnetlite0'], rel=1e-9)
    assert len(list((tmp_path / 'metrics').iterdir())) == 1  # of one and the same key


def test_floor_of_perfect_codes_is_zero(tmp_path, files, stub_detector, monkeypatch):
    job = prepare_codes.open_job(TransferOptions(outdir='', **files, train='low-res', slice='8', prepare_kimg=KIMG, device='cpu',
                                                 cache_dir=str(tmp_path / 'cache')))
    prepared, judge = prepare_codes.codes_of(job, None, lambda text: None), prepare_codes.Judge(job, 20)
    assert judge.decoded(prepared) > 0.01
    by_code = {tuple(w.tolist()): i for i, w in enumerate(prepared.codes.gather(torch.arange(20))['w'])}
    images = torch.stack([torch.from_numpy(job.dataset[i][0]) for i in range(20)]).float() / 127.5 - 1
    monkeypatch.setattr(autoencoder, 'decode', lambda G, code, res: images[[by_code[tuple(w.tolist())] for w in code[2]]])
    assert judge.decoded(prepared) < 1e-9


def test_without_the_detector(tmp_path, files, monkeypatch):
    monkeypatch.setattr(efficientnet_lite, 'PACKAGE', 'no_such_package')
    options = {**files, 'prepare_kimg': KIMG, 'device': 'cpu', 'cache_dir': tmp_path / 'cache'}
    result = run(advise_tool, **options, num=NUM, slices='8,w', json=tmp_path / 'a.json')
    assert result.exit_code == 0 and 'No Frechet distances: the detector' in result.output and 'pip install' in result.output, result.output
    found = advise.from_json((tmp_path / 'a.json').read_text())
    assert [row.slice for row in found.rows] == ['w', '8'] and found.source_fd is found.real_fd is found.rows[0].fd is None
    assert found.train == 'low-res' or 'No low-res step' in found.reason
    result = run(prepare_tool, **options, slice=8)
    assert result.exit_code == 0 and 'No Frechet distances' in result.output and 'dB PSNR' in result.output and 'Floor:' not in result.output


def test_steps_measured_are_steps_of_training(tmp_path, files, stub_detector, monkeypatch):
    """tools/transfer.py and the measurements run the same phases on equally many parameters and images."""
    seen, original = [], phases.run_phase

    def run_phase(phase, latents, real, batch_gpu):
        seen.append((phase.name, phase.interval, phase.gain, sum(p.numel() for p in phase.params), len(real['c']), batch_gpu))
        original(phase, latents, real, batch_gpu)

    monkeypatch.setattr(phases, 'run_phase', run_phase)
    options = {**files, 'device': 'cpu', 'cache_dir': str(tmp_path / 'cache')}
    advise.advise(**options, slices=['8'], num=NUM, prepare_kimg=KIMG, echo=lambda text: None)
    measured = set(seen)
    seen.clear()
    for more in [{'train': 'full'}, {'train': 'high-res', 'slice': 8, 'bank': 16}, {'train': 'low-res', 'slice': 8, 'prepare_kimg': KIMG}]:
        assert run(transfer_tool, **options, **more, outdir=tmp_path / 'runs', kimg=0.008).exit_code == 0
    assert set(seen) == measured and len(measured) == 4 + 4 + 3


def test_costs_by_hand():
    G, D = tiny.generator(), tiny.discriminator()
    rows = slicing.block_table(G, D, set(), lambda name, res: False)
    macs = {key: sum(row.macs for row in rows if row.name.startswith(key)) for key in 'GD'}
    img, z = torch.zeros([4, 3, 16, 16]), torch.zeros([4, 6])
    with torch.no_grad():
        found = step_costs.measure([(1, lambda: D(img, None)), (3, lambda: D(img, None))], 4, 0, CPU)
        assert found.macs == pytest.approx(macs['D'] * 4 / 3) and found.memory_bytes == 0
        # Demodulation is a matrix product, too, which the table leaves out.
        assert macs['G'] < step_costs.measure([(1, lambda: G(z, None))], 4, 0, CPU).macs < 1.01 * macs['G']
    a, b = (torch.randn([100, 100], requires_grad=True) for _ in 'ab')
    inner = []

    def twice():
        for _ in range(2):
            (a @ b).square().sum().backward()
        inner.append(1)

    found = step_costs.measure([(2, twice)], 10, 1000, CPU, progress=inner.append)
    assert found.macs == 2 * 3 * 100 ** 3 / 2 / 10  # forward, and the gradients of a and of b
    assert found.memory_bytes == 3 * 40_000 + 1000  # a, b and their product: those of one backward pass at a time
    assert found.seconds > 0 and len(inner) == 1 + step_costs.REPEATS + 1


def test_memory_of_weights_and_optimisers():
    G, D = tiny.generator(), tiny.discriminator()
    state = transfer.State(G, D, tiny.generator(), None)
    trained = [*G.mapping.parameters()]
    phase_list = [phases.Phase(name, trained, None, 1, None) for name in ('Gmain', 'Greg')]
    numbers = [sum(p.numel() for p in params) for params in (G.parameters(), D.parameters(), trained)]
    assert step_costs.state_nbytes(state, phase_list) == 4 * (2 * numbers[0] + numbers[1] + 3 * numbers[2])


@pytest.mark.parametrize('slice_at', ['w', '8'])
def test_transfer_finds_what_prepare_made(tmp_path, files, stub_detector, monkeypatch, slice_at):
    options = {**files, 'slice': slice_at, 'prepare_kimg': KIMG, 'cache_dir': tmp_path / 'cache', 'seed': 5, 'mirror': 1, 'subset': 12,
               'device': 'cpu'}
    result = run(prepare_tool, **options, outdir=tmp_path / 'out')
    assert result.exit_code == 0, result.output
    assert 'dB PSNR' in result.output and 'prepared in' in result.output and f'Picture:  {tmp_path / "out" / "encoded.png"}' in result.output
    assert re.search(r'Floor: fd_effnetlite0 [\d.]+ of 24 decoded codes; two halves of the images have [\d.]+', result.output)
    assert (tmp_path / 'out' / 'encoded.png').is_file()
    folder = re.search(r'Codes: +(\S+) \(24 images', result.output).group(1)
    made = inodes(tmp_path / 'cache')
    assert any(str(path).startswith(folder) for path in made)

    def not_again(*args):
        raise AssertionError('an encoder is trained again')

    monkeypatch.setattr(autoencoder, 'source_loss', not_again)
    monkeypatch.setattr(autoencoder, 'target_loss', not_again)
    result = run(transfer_tool, **options, train='low-res', outdir=tmp_path / 'runs', kimg=0.032)
    assert result.exit_code == 0, result.output
    assert inodes(tmp_path / 'cache') == made
    with pytest.raises(AssertionError, match='trained again'):
        run(transfer_tool, **{**options, 'seed': 6}, train='low-res', outdir=tmp_path / 'runs', kimg=0.032)


def inodes(folder):
    """What a rewritten file would change; cache.json, which is written anew each time, is left out."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob('*.safetensors')}


def test_prepare_twice_says_the_same(tmp_path, files, stub_detector):
    options = {**files, 'slice': 4, 'prepare_kimg': KIMG, 'cache_dir': tmp_path / 'cache', 'device': 'cpu'}
    outputs = [re.findall(r'decoded target images have.*;|Floor: .*|Encoders: .*|Codes: .*|Picture: .*', run(prepare_tool, **options).output)
               for _ in range(2)]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 4


def test_conditional_networks(tmp_path, stub_detector):
    pickle = tmp_path / 'cond.pkl'
    tiny.save_pickle(pickle, c_dim=3)
    options = {'network': str(pickle), 'data': str(tiny.dataset_zip(tmp_path / 'data.zip', num_classes=3)), 'num': NUM, 'prepare_kimg': KIMG,
               'slices': '4', 'cache_dir': tmp_path / 'cache', 'device': 'cpu'}
    result = run(advise_tool, **options)
    assert result.exit_code == 1 and 'pass --cond=1' in result.output
    assert run(advise_tool, **options, cond=1).exit_code == 0


def row(name, fd, seconds, psnr=20.0):
    cost = Cost(seconds, 1e6, 1000)
    return Row(name, psnr, 0.1, fd, 1.0, 1000, cost, None if name == 'w' else cost, None)


@pytest.mark.parametrize('rows, source_fd, expected, text', [
    ([row('w', 30, 0.01), row('8', 20, 0.1), row('16', 10, 0.14)], 100, ('both', '8'), 'floor of 20.0 is clearly below the 100.0'),  # 16: 7.1 x
    ([row('w', 20, 0.01), row('8', 30, 0.1)], 100, ('low-res', 'w'), '100 times cheaper'),  # the lowest floor, not the largest slice
    ([row('8', 90, 0.125)], 100, ('both', '8'), '8 times cheaper'),  # both limits are included
    ([row('w', 91, 0.01), row('8', 10, 0.5)], 100, ('full', None), 'at slice 8, a step is 2.0 times cheaper'),
    ([row('w', 95, 0.01), row('8', 91, 0.1)], 100, ('full', None), '91.0 at slice 8, is not clearly below'),
    ([row('w', 60, 0.01), row('8', 54, 0.1)], 59, ('high-res', None), 'near to the images already'),
    ([row('w', None, 0.01, 9.0), row('8', None, 0.1, 12.0), row('16', None, 0.3, 20.0)], None, ('both', '8'), '12.0 dB'),
    ([row('16', None, 0.3)], None, ('full', None), 'No low-res step is 8 times cheaper'),
])
def test_recommendation(rows, source_fd, expected, text):
    train, at, reason = advise.recommend(rows, Cost(1.0, 1e9, 10 ** 6), source_fd, None if source_fd is None else 20)
    assert (train, at) == expected and text in reason


@pytest.mark.filterwarnings('ignore:cannot keep the statistics')
@pytest.mark.parametrize('tool, name', [(advise_tool, 'json'), (advise_tool, 'cache_dir'), (prepare_tool, 'outdir'), (prepare_tool, 'cache_dir')])
def test_a_place_that_cannot_be_written_is_refused_in_words(tmp_path, files, monkeypatch, tool, name):
    """And before anything is trained."""
    monkeypatch.setattr(autoencoder, 'source_samples', lambda *args: pytest.fail('too late'))
    (tmp_path / 'a file').touch()
    options = {'cache_dir': tmp_path / 'cache', name: tmp_path / 'a file' / 'x'}
    result = run(tool, **files, **options, prepare_kimg=KIMG, device='cpu')
    assert result.exit_code == 1 and 'a file' in result.output and 'Traceback' not in result.output


def test_json_of_something_else():
    for text in ['', '[]', '{}', '{"rows": [{}], "full": {}}', '{"rows": 3}', 'null']:
        with pytest.raises(UserError, match='not what tools/advise.py --json writes'):
            advise.from_json(text)


def test_json_has_no_surprises():
    rows = (row('w', None, 1.0), row('4', 2.0, 1.0))
    found = advise.Advice('n', 'd', 1, 2, 0.5, 0, 'm', 'b', Cost(1.0, 2.0, 3), None, None, rows, 'full', None, 'r')
    assert advise.from_json(advise.to_json(found)) == found
    assert json.loads(advise.to_json(found))['rows'][0]['high'] is None
    with pytest.raises(ValueError, match='not JSON compliant'):
        advise.to_json(dataclasses.replace(found, source_fd=float('nan')))


@pytest.mark.parametrize('options, message', [
    ({'slices': '12'}, '--slice=12: expected one of w, 4, 8, 16'),
    ({'slices': '16'}, 'leaves no high-res block to train'),
    ({'slices': 'w,x,8.5', 'num': 3}, r'--num=3: expected at least 4 images\s+--slices: x is no slice.*\s+--slices: 8.5 is no slice'),
    ({'slices': ''}, '--slices:  is no slice'),
    ({'prepare_kimg': -1}, '--prepare-kimg=-1.0 must be positive'),
    ({'data': 'small'}, 'the network makes 16 x 16 images, the dataset has 8 x 8: run python tools/dataset.py'),
    ({'data': 'missing.zip'}, 'missing.zip'),
    ({'device': 'tpu'}, '--device=tpu: expected auto'),
])
def test_refused_before_any_work(tmp_path, files, options, message):
    if options.get('data') == 'small':
        options = {'data': tiny.dataset_zip(tmp_path / 'small.zip', resolution=8)}
    for more in ([], ['-n']):
        result = run(advise_tool, *more, **{**files, 'cache_dir': tmp_path / 'cache', 'device': 'cpu', **options})
        assert result.exit_code == 1 and re.search(message, result.output), result.output
        assert 'Traceback' not in result.output and not (tmp_path / 'cache').exists()


def test_prepare_refuses(tmp_path, files):
    result = run(prepare_tool, **files, slice=16, cache_dir=tmp_path / 'cache', device='cpu')
    assert result.exit_code == 1 and 'leaves no high-res block' in result.output and not (tmp_path / 'cache').exists()


def test_dry_run_writes_nothing(tmp_path, files):
    result = run(advise_tool, '-n', **files, cache_dir=tmp_path / 'cache', device='cpu', json=tmp_path / 'a.json')
    assert result.exit_code == 0 and 'Slices: w, 4, 8\n' in result.output and 'nothing was written' in result.output
    assert not (tmp_path / 'cache').exists() and not (tmp_path / 'a.json').exists()


@pytest.mark.parametrize('tool', [advise_tool, prepare_tool])
def test_help(tool):
    result = run(tool, '--help')
    assert result.exit_code == 0 and '--prepare-kimg' in result.output
