"""The slow way."""

import torch

calls = []


def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, impl='cuda'):
    calls.append(impl)
    if b is not None:
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    if act == 'lrelu':
        x = torch.nn.functional.leaky_relu(x, 0.2 if alpha is None else alpha) * (2 ** 0.5 if gain is None else gain)
    return x if clamp is None else x.clamp(-clamp, clamp)
