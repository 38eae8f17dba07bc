"""What would fail, or wait, on a GPU, on machines without one: the tools run on a stand-in for a device (other_device.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(not hasattr(backend_registration, '_setup_privateuseone_for_python_backend'),
                                reason='this PyTorch has no devices made in Python')


@pytest.fixture(scope='module')
def results():
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    run = subprocess.run([sys.executable, str(TESTS / 'other_device.py')], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {result['name']: result for result in map(json.loads, (line for line in run.stdout.splitlines() if line.startswith('{"name"')))}


@pytest.mark.parametrize('name', [
    'the device itself', 'full', 'full ada', 'full ada resumed', 'high-res', 'low-res', 'w', 'no-bypass', 'both', 'both resumed', 'generate',
    'interpolate', 'project', 'projected', 'calc_metrics', 'prepare'])
def test_no_tool_mixes_devices_and_no_training_step_waits(results, name):
    assert results[name]['error'] is None
    waits = results[name]['waits']
    if name in ('full ada', 'both'):  # The controller asks once in four batches how D judges: with both only in the second stage.
        (line, per_step), = waits.items()
        assert line.startswith('training_loop.py: sign_mean = ') and per_step < 0.3 and (per_step > 0.2 or name == 'both')
    else:
        assert waits == ({'elsewhere': 5} if name == 'the device itself' else {})
