"""Adaptive discriminator augmentation: the controller of the pipe's strength p (Karras et al., arXiv 2006.06676, section 3)."""

import math


def adjust_p(p: float, sign_mean: float, target: float, batch_size: int, interval: int, ada_kimg: float) -> float:
    """p moved by one step towards the target overfitting.

    sign_mean: mean of sign(D(real)) in [-1, 1] over the last `interval` iterations; NaN (no real image was seen) leaves p alone.
    target: the wanted sign_mean. batch_size: images per iteration. ada_kimg: thousands of images in which p can move by 1.
    Never below 0; not limited to 1, as in the official code: gates with multiplier * p > 1 are simply always open.
    """
    if math.isnan(sign_mean) or sign_mean == target:
        return p
    step_kimg = batch_size * interval / 1000
    return max(p + math.copysign(step_kimg / ada_kimg, sign_mean - target), 0.0)
