"""Tiny random networks, datasets and pickles for the tests."""

import io
import json
import zipfile

import numpy as np
import PIL.Image
import torch

from m2m_stylegan import networks, snapshots

SIZE = {'channel_base': 64, 'channel_max': 8}


def generator(resolution=16, *, c_dim=0, img_channels=3, seed=0, **synthesis_kwargs) -> networks.Generator:
    """A generator whose biases, noise strengths and w_avg are not at their initial zeros."""
    torch.manual_seed(seed)
    G = networks.Generator(6, c_dim, 8, resolution, img_channels, mapping_kwargs={'num_layers': 2}, synthesis_kwargs={**SIZE, **synthesis_kwargs})
    return perturbed(G).eval().requires_grad_(False)


def discriminator(resolution=16, *, c_dim=0, img_channels=3, seed=1, **kwargs) -> networks.Discriminator:
    torch.manual_seed(seed)
    mapping = {'mapping_kwargs': {'num_layers': 2}} if c_dim else {}
    return perturbed(networks.Discriminator(c_dim, resolution, img_channels, **SIZE, **mapping, **kwargs)).eval().requires_grad_(False)


@torch.no_grad()
def perturbed(net):
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if name.split('.')[-1] in ('bias', 'noise_strength', 'w_avg'):
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return net


def save_pickle(path, *, c_dim=0, **synthesis_kwargs):
    """G and G_ema differ, as in a real pickle."""
    G, G_ema = (generator(c_dim=c_dim, seed=seed, **synthesis_kwargs) for seed in (1, 2))
    snapshots.save(path, G=G, D=discriminator(c_dim=c_dim), G_ema=G_ema)
    return path


def files(folder):
    """An unconditional 16 x 16 pickle and a matching dataset, as options of the tools."""
    return {'network': str(save_pickle(folder / 'source.pkl')), 'data': str(dataset_zip(folder / 'data.zip'))}


def dataset_zip(path, num=20, resolution=16, *, channels=3, num_classes=0, seed=0):
    """An official dataset zip of coloured noise, class by class of another brightness."""
    rnd = np.random.RandomState(seed)
    labels = []
    with zipfile.ZipFile(path, 'w') as archive:
        for i in range(num):
            pixels = rnd.randint(0, 256, [resolution, resolution, channels], dtype=np.uint8)
            data = io.BytesIO()
            PIL.Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(data, 'PNG')
            name = f'00000/img{i:08d}.png'
            archive.writestr(name, data.getvalue())
            labels.append([name, i % num_classes if num_classes else 0])
        archive.writestr('dataset.json', json.dumps({'labels': labels if num_classes else None}))
    return path
