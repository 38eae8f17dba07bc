"""Convolutions that complain."""

import warnings

import torch


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    warnings.warn('conv2d_gradfix not supported', stacklevel=2)
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    warnings.warn('conv2d_gradfix not supported', stacklevel=2)
    return torch.nn.functional.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
