import os

import pytest
import torch

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))  # Tiny networks: threads cost more than they give.


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
