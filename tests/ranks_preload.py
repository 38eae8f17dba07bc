"""Imported once by the server from which ranks.py forks its processes."""

import os

import torch

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))

import ranks  # noqa: E402, F401
import tiny_run  # noqa: E402, F401
