"""The report: what it says follows from the numbers, it needs nothing but itself, and it survives folders that are odd, unfinished or hostile."""

import html.parser
import json
import re

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from m2m_stylegan import report, report_data, report_figures, scores
from m2m_stylegan.errors import UserError
from m2m_stylegan.report_data import Point
from m2m_stylegan.scores import Score
from tools.report import main

pytest.importorskip('jinja2')
pytest.importorskip('matplotlib')

SETTINGS = {'network_sha256': 'ab' * 32, 'data_fingerprint': 'cd' * 32, 'minutes': 4, 'evals': 4, 'metrics': ['fd_effnetlite0'], 'num': 100,
            'cache': 'own', 'training': {}, 'versions': {'torch': '2.13.0'}, 'machine': {'cpu': 'Abacus', 'threads': 1}}
ABOUT = {'commands': ['python tools/compare.py --outdir=x'], 'methods': ['full', 'high-res'], 'seeds': [0, 1, 2], 'network': '/pkl/source.pkl',
         'data': '/data/<b>set</b>.zip', 'num_images': 20, 'resolution': 16, 'slice': 4, 'floor': {'fd_effnetlite0': 5.0}}
FULL = {1: (80, 82, 90), 2: (60, 61, 70), 3: (50, 52, 53), 4: (51, 54, 55)}  # least, median, largest at minutes 1 to 4
HIGH_RES = {1: (50, 51, 60), 2: (40, 41, 45), 3: (30, 31, 33), 4: (20, 21, 26)}


def score(method, seed, slot, value, **changes):
    fields = {'cur_nimg': 1000 * (slot or 0), 'elapsed_s': 60.0 * slot + (seed or 0) if slot else 0.0, 'img_per_s': 17.0, 'peak_cpu_gb': 1.5,
              'peak_gpu_gb': 0.0, 'preparation_s': 3.0, 'disk_bytes': 2 ** 20}
    return Score(method, seed, slot, f'cells/{method}-seed{seed}/network-snapshot-{slot}.pkl', {'fd_effnetlite0': value}, **{**fields, **changes})


def write(folder, methods=None, about=None, settings=None, source=120.0):
    """A finished comparison with the given values {method: {slot: values by seed}}."""
    folder.mkdir(exist_ok=True)
    (folder / 'compare.json').write_text(json.dumps({'settings': {**SETTINGS, **(settings or {})}, 'about': {**ABOUT, **(about or {})}}))
    made = [score('source', None, 0, source)]
    for method, slots in (methods or {'full': FULL, 'high-res': HIGH_RES}).items():
        made += [score(method, seed, slot, value) for slot, values in slots.items() for seed, value in enumerate(values)]
        for seed in range(len(next(iter(slots.values())))):
            blocks = [{'block': 'G.b8', 'resolution': 8, 'parameters': 10, 'changed': 0 if method == 'high-res' else 10},
                      {'block': 'G.b16', 'resolution': 16, 'parameters': 30, 'changed': 15}]
            cell(folder, method, seed, {'disk_bytes': 2 ** 20, 'blocks': blocks})
    for entry in made:
        scores.add(folder, entry)
        picture(folder, entry.picture)
    picture(folder, 'reals.png')
    return folder


def cell(folder, method, seed, outcome, sessions=1):
    path = folder / 'cells' / f'{method}-seed{seed}'
    path.mkdir(parents=True, exist_ok=True)
    record = {'request': {}, 'sessions': [{'command': f'python -m transfer --train={method} --seed={seed}', 'started': ''}] * sessions}
    (path / 'cell.json').write_text(json.dumps(record | ({'outcome': outcome} if outcome else {})))


def picture(folder, name, size=(48, 32)):
    (folder / 'pictures').mkdir(exist_ok=True)
    PIL.Image.fromarray(np.random.RandomState(len(name)).randint(0, 256, [size[1], size[0], 3], dtype=np.uint8)).save(folder / 'pictures' / name)


def page(folder):
    return report.build(folder).read_text(encoding='utf-8')


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and the text; unbalanced ones are an error."""

    VOID = frozenset({'meta', 'img', 'input'})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ''
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_complete_and_needs_nothing_else(tmp_path):
    text = page(write(tmp_path / 'x'))
    parsed = Tags(text)
    assert not re.search(r'https?://|@import|url\((?!#)', text)
    for tag, attributes in parsed.tags:
        assert tag not in ('link', 'iframe', 'object', 'base', 'form')
        for name in ('src', 'href', 'xlink:href', 'srcset', 'action'):
            assert attributes.get(name, '#').startswith(('#', 'data:image/webp;base64,')), (tag, attributes)
    policy = next(a['content'] for tag, a in parsed.tags if a.get('http-equiv') == 'Content-Security-Policy')
    assert policy.startswith("default-src 'none';")
    assert sum(tag == 'svg' for tag, _ in parsed.tags) == 2
    assert sum(tag == 'img' for tag, _ in parsed.tags) == 2 + 2 * 4
    ids = [a['id'] for _, a in parsed.tags if 'id' in a]
    assert len(ids) == len(set(ids)) and all(a[name][1:] in ids for _, a in parsed.tags for name in ('href', 'xlink:href') if name in a)
    for heading in ['Quality', 'Time to quality', 'Samples at equal times', 'What was trained', 'Speed, memory, disk', 'Commands and versions']:
        assert f'<h2>{heading}</h2>' in text
    assert 'real vs. real' in parsed.text and 'wall clock, minutes' in parsed.text and 'thousand images seen' in parsed.text  # text is text
    assert 'python -m transfer --train=high-res --seed=2' in parsed.text and 'python tools/compare.py --outdir=x' in parsed.text
    assert '#f000' not in text and 'var(--series-1)' in text and 'currentColor' in text


def test_a_floor_far_below_does_not_squeeze_the_curves(tmp_path):
    near, far = (page(write(tmp_path / name, about={'floor': {'fd_effnetlite0': floor}})) for name, floor in [('near', 5.0), ('far', 0.01)])
    assert 'real vs. real: 0.01, below' in Tags(far).text and 'real vs. real: ' not in Tags(near).text


def test_names_are_escaped(tmp_path):
    text = page(write(tmp_path / 'x', about={'commands': ['</pre><script>alert(1)</script>'], 'network': '/a/"><img src=x onerror=alert(1)>.pkl'}))
    parsed = Tags(text)
    assert sum(tag == 'script' for tag, _ in parsed.tags) == 1 and not any('onerror' in a for _, a in parsed.tags)
    assert '/data/&lt;b&gt;set&lt;/b&gt;.zip' in text and '<b>set</b>' in parsed.text


def test_summary_in_words(tmp_path):
    first, ranking, times = report_data.summary(report_data.read(write(tmp_path / 'x')))
    assert first == 'source.pkl (16 px) was adapted to 20 images in 4m 00s of wall clock per run, with 3 seeds, on one machine (Abacus, no GPU).'
    assert ranking == ('FD at the end, best first (lower is better): high-res 21 (20 to 26), full 54 (51 to 55). '
                       'Two halves of the real images are 5 apart. The source had 120. Every seed of high-res is better than every seed of full.')
    assert times == ('Full training was at its best after 3m 01s (median FD 52, 59% of the way from the source to the real images). '
                     'Time to that quality: high-res 1m 01s, 2.97 times sooner. '
                     'Times are known to within the 1m 00s between evaluations.')


@pytest.mark.parametrize('methods, source, expected', [
    ({'full': FULL, 'high-res': {4: (53, 56, 57)}}, 120,
     ['The seeds of full and high-res overlap: neither is shown to be better.', 'Time to that quality: high-res not reached.']),
    ({'full': {4: (50,)}, 'high-res': {4: (40,)}}, 120,
     ['With one seed, the lead of high-res over full may be chance.', 'high-res 4m 00s, at the same time']),
    ({'full': {1: (40,), 4: (50,)}, 'high-res': {1: (60,), 4: (40,)}}, 120, ['high-res 4m 00s, 4 times later']),
    ({'full': FULL, 'high-res': HIGH_RES}, 30,
     ['The source had 30; full ended worse than that.', 'Full training did not get better than the source']),
    ({'full': {4: (119,)}, 'high-res': {4: (118,)}}, 120, ['(median FD 119, 1% of the way from the source to the real images, so little that']),
    ({'high-res': HIGH_RES}, 120,
     ['There is no result of full training here', 'Not finished, so not in the figures: full, seed 0; full, seed 1; full, seed 2.']),
])
def test_summary_of_other_outcomes(tmp_path, methods, source, expected):
    text = ' '.join(report_data.summary(report_data.read(write(tmp_path / 'x', methods, source=source))))
    for part in expected:
        assert part in text


def test_caveats(tmp_path):
    folder = write(tmp_path / 'x', settings={'cache': 'shared'})
    cell(folder, 'full', 1, {'disk_bytes': 1, 'blocks': []}, sessions=3)
    cell(folder, 'high-res', 2, None)
    scores.add(folder, score('extra', None, None, None, error='NaN features'))
    text = ' '.join(report_data.summary(report_data.read(folder)))
    for part in ['Interrupted and resumed: full, seed 1;', 'Not finished, so not in the figures: high-res, seed 2.',
                 'Could not be evaluated: extra (', 'The feature cache was shared']:
        assert part in text
    assert 'extra' in page(folder)


def test_higher_is_better_for_some_metrics():
    found = {'source': [Point(0, 0, 0, 1, 1, 1, 1)], 'full': [Point(1, 60, 1, 3, 3, 3, 1), Point(2, 120, 2, 5, 5, 5, 1)],
             'both': [Point(1, 30, 1, 6, 6, 6, 1)], 'other': [Point(None, None, 9, 6, 6, 6, 1)]}
    target, arrivals = report_data.time_to_quality(found, 'is1k_mean')
    assert target.median == 5 and {a.method: a.ratio for a in arrivals} == {'full': 1, 'both': 4, 'other': None}
    assert not report_data.lower_is_better('pr_effnetlite0_recall') and report_data.lower_is_better('fid1k_full')


def test_table_of_blocks(tmp_path):
    rows = re.findall(r'<tr><td>(G\.b8|G\.b16|parameters changed)</td>(.*?)</tr>', page(write(tmp_path / 'x')))
    assert [(name, re.findall(r'>([^<]+)</td>', cells)) for name, cells in rows] == [
        ('G.b8', ['trained', 'frozen']), ('G.b16', ['50%', '50%']), ('parameters changed', ['62%', '38%'])]


def test_unfinished_folders(tmp_path):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x/compare.json').write_text(json.dumps({'settings': SETTINGS, 'about': {**ABOUT, 'floor': {}}}))
    assert 'Nothing has been evaluated yet.' in page(tmp_path / 'x') and 'No run has been finished yet.' in page(tmp_path / 'x')
    scores.add(tmp_path / 'x', score('source', None, 0, 120.0))
    cell(tmp_path / 'x', 'full', 0, None)
    assert 'full, seed 0' in page(tmp_path / 'x')
    scores.add(tmp_path / 'x', score('full', 0, 1, None, error='bad'))
    Tags(page(tmp_path / 'x'))


@pytest.mark.parametrize('file, content, expected', [
    ('compare.json', '{', 'compare.json is damaged'),
    ('compare.json', '[]', 'compare.json is damaged'),
    ('compare.json', '{"settings": {}, "about": {}}', 'minutes is None'),
    ('results.jsonl', '{"method": "full"}\n', 'results.jsonl, line 1 is not a result'),
    ('results.jsonl', '{"method": "../x", "seed": 0, "slot": 1, "pkl": "x", "metrics": {}}\n', "method '../x'"),
    ('results.jsonl', '{"method": "x", "seed": "0", "slot": 1, "pkl": "x", "metrics": {"<b>": 1}}\n', "a metric is named '<b>', seed is '0'"),
    ('results.jsonl', '{"method": "x", "seed": 0, "slot": 1, "pkl": "x", "metrics": {"fd": "low"}}\n', "metrics.fd is 'low'"),
    ('results.jsonl', '{"method": "x", "seed": 0, "slot": 1, "pkl": "x", "metrics": {"fd": 1}, "elapsed_s": 1e999}\n', 'elapsed_s is inf'),
    ('cells/full-seed0/cell.json', '{"request": 1}', 'cell.json is damaged'),
    ('cells/full-seed0/cell.json', '{"request": {}, "sessions": [], "outcome": {}}', 'disk_bytes is None'),
    ('cells/nonsense/cell.json', '{"request": {}, "sessions": []}', 'nonsense is not the folder of a run'),
    ('pictures/source-network-snapshot-0.png', 'text', 'cannot be read as a picture'),
])
def test_hostile_folders(tmp_path, file, content, expected):
    folder = write(tmp_path / 'x', {'full': {1: (50,)}})
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    result = CliRunner().invoke(main, [str(folder)])
    assert result.exit_code == 1 and expected in result.output and 'Traceback' not in result.output


def test_not_a_comparison(tmp_path):
    with pytest.raises(UserError, match=r'has no compare\.json'):
        report.build(tmp_path)


def test_pictures_fit_their_budget(tmp_path):
    for i in range(4):
        picture(tmp_path, f'{i}.png', size=(300, 200))
    paths = {str(i): tmp_path / 'pictures' / f'{i}.png' for i in range(4)}
    best = report_figures.data_urls(paths, 10 ** 9)
    assert all((width, height) == (300, 200) for _, width, height in best.values())
    size = sum(len(url) for url, _, _ in best.values())
    for share in (0.6, 0.2):
        small = report_figures.data_urls(paths, int(size * share))
        assert sum(len(url) for url, _, _ in small.values()) <= size * share


def test_many_times_and_pictures_stay_under_two_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'PICTURE_BYTES', 30_000)
    text = page(write(tmp_path / 'x', {'full': {slot: (100 - slot,) for slot in range(1, 31)}}, settings={'evals': 30}))
    assert text.count('<section class="time"') == 8 and 'data-time="4m 00s"' in text
    assert sum(len(url) for url in re.findall(r'src="(data:[^"]*)"', text)) <= 30_000


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"needs jinja2 and matplotlib: pip install 'm2m-stylegan\[report\]'"):
        report.build(tmp_path)
