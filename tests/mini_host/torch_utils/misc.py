"""Sampling and copying."""

import numpy as np
import torch


class InfiniteSampler(torch.utils.data.Sampler):
    """Breaks with torch 2.10, whose Sampler takes no argument."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.dataset = dataset

    def __iter__(self):
        while True:
            yield np.random.randint(len(self.dataset))


def copy_params_and_buffers(source, target):
    tensors = source.state_dict()
    for name, tensor in target.state_dict().items():
        if name in tensors:
            tensor.copy_(tensors[name])


def print_module_summary(module, inputs):
    module(*inputs)
