"""The slow way, for up = down = 1."""

import torch

tries = []


def _init():
    tries.append('init')
    return False


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl='cuda'):
    _init()
    f = (f if f.ndim == 2 else f.ger(f)) * gain
    f = f if flip_filter else f.flip([0, 1])
    x = torch.nn.functional.pad(x, [padding] * 4)
    return torch.nn.functional.conv2d(x, f[None, None].repeat(x.shape[1], 1, 1, 1), groups=x.shape[1])
