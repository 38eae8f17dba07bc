"""Reading the recorded values of the official code (tests/golden; keys and shapes in tests/golden/INDEX.tsv)."""

import functools
import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / 'golden'


class Vectors:
    """One golden file: arrays as tensors of a chosen dtype, JSON entries parsed."""

    def __init__(self, name: str):
        self.arrays = dict(np.load(GOLDEN / f'{name}.npz', allow_pickle=False))

    def tensor(self, key: str, dtype=torch.float64) -> torch.Tensor:
        value = torch.from_numpy(np.ascontiguousarray(self.arrays[key]).reshape(self.arrays[key].shape))
        return value.to(dtype) if value.is_floating_point() else value

    def json(self, key: str):
        return json.loads(str(self.arrays[key]))

    def under(self, prefix: str, dtype=torch.float64) -> dict[str, torch.Tensor]:
        """All tensors whose key starts with `prefix`, by the rest of their key."""
        return {key[len(prefix):]: self.tensor(key, dtype) for key in self.arrays if key.startswith(prefix)}

    def __contains__(self, key: str) -> bool:
        return key in self.arrays


@functools.cache
def load(name: str) -> Vectors:
    return Vectors(name)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, f'shape {list(actual.shape)}, expected {list(expected.shape)}'
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((actual.detach().double() - expected.double()).abs().max() / scale)
