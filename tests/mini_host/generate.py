"""Pictures."""

import os

import click
import dnnlib
import legacy
import numpy as np
import PIL.Image
import torch


@click.command()
@click.option('--network', required=True)
@click.option('--outdir', required=True)
def generate_images(network, outdir):
    device = torch.device('cuda')
    with dnnlib.util.open_url(network) as f:
        G = legacy.load_network_pkl(f)['G_ema'].to(device)
    z = torch.from_numpy(np.random.RandomState(0).randn(1, G.z_dim)).to(device)
    img = G(z.float(), torch.zeros([1, G.c_dim], device=device), noise_mode='const')
    img = (img.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    os.makedirs(outdir, exist_ok=True)
    PIL.Image.fromarray(img[0].cpu().numpy(), 'RGB').save(f'{outdir}/seed0000.png')


if __name__ == '__main__':
    generate_images()
