"""docs/colab.ipynb on a CPU: on the bundled demo through nbclient where that is installed, else its cells as one script on a tiny network."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny

from m2m_stylegan import snapshots

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'docs' / 'colab.ipynb'


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    assert notebook['nbformat'] == 4
    assert all(cell['outputs'] == [] for cell in notebook['cells'] if cell['cell_type'] == 'code'), 'clear all outputs before committing'
    return [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']


@pytest.fixture
def environment(tmp_path):
    (tmp_path / 'photos').mkdir()
    for i in range(4):
        PIL.Image.fromarray(np.full([70, 90, 3], 50 * i, np.uint8)).save(tmp_path / 'photos' / f'{i}.png')
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'M2M_OPS': 'ref', 'M2M_CACHE_DIR': str(tmp_path / 'cache'), 'PHOTOS': str(tmp_path / 'photos'),
            'MINUTES': '0.02', 'OUTDIR': str(tmp_path / 'runs')}


def test_notebook(environment, tmp_path):
    code = cells()
    if importlib.util.find_spec('nbclient') and importlib.util.find_spec('ipykernel'):
        script = ('import nbclient, nbformat\n'
                  f'nbclient.NotebookClient(nbformat.read({str(NOTEBOOK)!r}, 4), resources={{"metadata": {{"path": {str(ROOT)!r}}}}}).execute()')
    else:
        script = '\n\n'.join(code)
        snapshots.save(tmp_path / 'net.pkl', G=tiny.generator(), D=tiny.discriminator(), G_ema=tiny.generator())
        environment['NETWORK'] = str(tmp_path / 'net.pkl')
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = sorted(path.name for path in (tmp_path / 'runs' / 'pictures').iterdir())
    assert pictures == ['seed0000.png', 'seed0001.png', 'seed0002.png', 'seed0003.png']
