"""Run through official_runner.py: makes tiny networks with the official classes and writes them, and what they compute, into a folder.

`official_networks.py ada|sg3 DEST` => DEST/{uncond,cond}.pkl, as the official training writes them, and DEST/{uncond,cond}.npz.
Keeps to Python 3.7 and torch 1.7.
"""

import copy
import importlib
import pickle
import sys

import numpy as np
import torch
from dnnlib import EasyDict

SIZE = {'channel_base': 128, 'channel_max': 16, 'num_fp16_res': 0}  # Old versions of torch lack half precision on the CPU.


def networks(flavour: str, c_dim: int):
    module = importlib.import_module('training.networks' if flavour == 'ada' else 'training.networks_stylegan2')
    synthesis = EasyDict(synthesis_kwargs=EasyDict(SIZE)) if flavour == 'ada' else EasyDict(SIZE)
    common = EasyDict(c_dim=c_dim, img_resolution=16, img_channels=3)
    G = module.Generator(z_dim=16, w_dim=16, mapping_kwargs=EasyDict(num_layers=2), **synthesis, **common)
    D = module.Discriminator(**SIZE, **common, block_kwargs=EasyDict(freeze_layers=0), mapping_kwargs=EasyDict(),
                             epilogue_kwargs=EasyDict(mbstd_group_size=4))
    for net in (G, D):
        with torch.no_grad():  # Biases and strengths start at 0, where mistakes do not show.
            for tensor in net.parameters():
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    G.mapping.w_avg.copy_(torch.randn(16))
    return G, D


def main(flavour: str, dest: str) -> None:
    torch.manual_seed(0)
    pipe = importlib.import_module('training.augment').AugmentPipe(xflip=1, scale=1)
    for name, c_dim in [('uncond', 0), ('cond', 3)]:
        G, D = networks(flavour, c_dim)
        data = {'G': G, 'D': D, 'G_ema': copy.deepcopy(G), 'augment_pipe': pipe}
        for net in data.values():
            net.eval().requires_grad_(False)
        with open(f'{dest}/{name}.pkl', 'wb') as file:
            pickle.dump({'training_set_kwargs': {'resolution': 16}, **data}, file)
        z, c, img = torch.randn(4, 16), torch.eye(3)[[0, 1, 2, 0], :c_dim], torch.randn(4, 3, 16, 16)
        np.savez(f'{dest}/{name}.npz', z=z, c=c, img=img, logits=D(img, c, force_fp32=True),
                 images=G(z, c, truncation_psi=0.7, noise_mode='const', force_fp32=True))


if __name__ == '__main__':
    main(*sys.argv[1:])
