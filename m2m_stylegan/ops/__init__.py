"""The operators that StyleGAN2 networks are made of. Importing this package builds nothing and touches no GPU."""

from m2m_stylegan.ops.build import prepare, status
from m2m_stylegan.ops.dispatch import bias_act, epilogue, upfirdn2d
from m2m_stylegan.ops.reference import ACTIVATIONS, activation_gain, setup_filter
from m2m_stylegan.ops.resample import conv2d_resample, downsample2d, filter2d, upsample2d

__all__ = [
    'ACTIVATIONS', 'activation_gain', 'bias_act', 'conv2d_resample', 'downsample2d', 'epilogue', 'filter2d', 'prepare', 'setup_filter', 'status',
    'upfirdn2d', 'upsample2d',
]
