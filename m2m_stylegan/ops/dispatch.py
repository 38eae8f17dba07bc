"""The operators by their public names: compiled where that was possible (`ops.build`), else the plain PyTorch reference."""

import torch

from m2m_stylegan.ops import build, library, reference


def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None):
    """clamp(gain * act(x + b), -clamp, clamp); see `reference.bias_act` for arguments, shapes and dtypes."""
    _, default_alpha, default_gain = reference.ACTIVATIONS[act]
    alpha = default_alpha if alpha is None else float(alpha)
    gain = default_gain if gain is None else float(gain)
    rectifier = act in library.RECTIFIERS
    if (rectifier and (alpha < 0 or gain <= 0)) or not build.ready(x.device.type):
        return reference.bias_act(x, b, dim, act, alpha, gain, clamp)
    clamp = -1.0 if clamp is None else float(clamp)
    dim = dim % x.ndim
    if rectifier and x.ndim == 4 and dim == 1:  # The gradient of the bias then comes from the same pass as that of x.
        b = None if b is None else b.to(library.accumulator(x.dtype))
        return torch.ops.m2m_stylegan.epilogue(x, None, None, None, b, library.RECTIFIERS[act](alpha), gain, clamp)
    return torch.ops.m2m_stylegan.bias_act(x, b, dim, library.ACT_INDEX[act], alpha, gain, clamp)


def epilogue(x, scale=None, noise=None, strength=None, b=None, act='lrelu', alpha=None, gain=None, clamp=None):
    """clamp(gain * act(x * scale + noise * strength + b), -clamp, clamp) in one pass; see `reference.epilogue` for the arguments.

    Where it is compiled, the arithmetic of half-precision features runs in float32 and is rounded once.
    """
    _, default_alpha, default_gain = reference.ACTIVATIONS[act]
    alpha = default_alpha if alpha is None else float(alpha)
    gain = default_gain if gain is None else float(gain)
    if act not in library.RECTIFIERS or alpha < 0 or gain <= 0 or not build.ready(x.device.type):
        return reference.epilogue(x, scale, noise, strength, b, act, alpha, gain, clamp)
    dtype = library.accumulator(x.dtype)
    scale, noise, strength, b = (None if t is None else t.to(dtype) for t in (scale, noise, strength, b))
    if noise is not None:
        noise = noise.reshape([-1, 1, *x.shape[2:]])
    clamp = -1.0 if clamp is None else float(clamp)
    return torch.ops.m2m_stylegan.epilogue(x, scale, noise, strength, b, library.RECTIFIERS[act](alpha), gain, clamp)


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1):
    """Insert zeros, pad or crop, filter, decimate; each channel by itself. See `reference.upfirdn2d` for the arguments."""
    if not build.ready(x.device.type):
        return reference.upfirdn2d(x, f, up, down, padding, flip_filter, gain)
    up, down, padding = reference.check_upfirdn2d(x, f, up, down, padding)
    if f is None:
        f = torch.ones([1, 1], device=x.device)
    return reference.fir_passes(_fir, x, f, up, down, padding, flip_filter, gain)


def _fir(x, f, up, down, padding, flip, gain):
    return torch.ops.m2m_stylegan.upfirdn2d(x, f, *up, *down, *padding, flip, gain)
