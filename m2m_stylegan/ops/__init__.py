"""The operators that StyleGAN2 networks are made of. Importing this package builds nothing and touches no GPU."""

from m2m_stylegan.ops.reference import (
    ACTIVATIONS,
    activation_gain,
    bias_act,
    conv2d_resample,
    downsample2d,
    filter2d,
    setup_filter,
    upfirdn2d,
    upsample2d,
)

__all__ = [
    'ACTIVATIONS', 'activation_gain', 'bias_act', 'conv2d_resample', 'downsample2d', 'filter2d', 'setup_filter', 'upfirdn2d',
    'upsample2d',
]
