"""The feature caches: encoding the target images against the bare forward pass, and cached features against computing them anew.

    python benchmarks/cache.py --network=demo --slice=16
"""

import tempfile
from pathlib import Path

import click
import torch

from m2m_stylegan import autoencoder, bank, features, ops, preparation, step_costs, transfer
from m2m_stylegan.ops.selfcheck import seconds
from m2m_stylegan.transfer_options import TransferOptions

NUM = 16  # images per batch of training


@click.command(context_settings={'show_default': True})
@click.option('--network', default='demo')
@click.option('--data', help='Folder or zip of images  [default: the bundled demo set]')
@click.option('--slice', 'res', type=int, default=16)
@torch.no_grad()
def main(network, data, res):
    """Print items per second of each way, and ratios."""
    job = transfer.plan(TransferOptions(network=network, data=data, outdir='', train='low-res', slice=str(res)))
    device, dataset = job.device, job.dataset
    dataset.in_memory()
    ops.prepare(device.type)
    G, D = (net.to(device).eval().requires_grad_(False) for net in (job.snapshot.G_ema, job.snapshot.D))
    encoder = autoencoder.new_encoder(G, D, res, lambda num: torch.zeros([num, G.c_dim], device=device)).requires_grad_(False)
    batch = autoencoder.items_per_pass(dataset.resolution)
    images = preparation.images_of(dataset, torch.arange(batch), device)

    def line(what: str, rate: float, note: str = '') -> None:
        click.echo(f'{what:<58}{rate:>12,.0f} {note}')

    click.echo(f'torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads; {job.network_path.name}, slice {res}; items per second')
    forward = batch / seconds(lambda: encoder(*autoencoder.inputs_of(D, images, res)))
    line('images through D\'s high-res part and the encoder', forward)
    with tempfile.TemporaryDirectory() as folder:
        def encode() -> features.FeatureCache:
            return preparation.encode(encoder, D, dataset, res, device, Path(tempfile.mkdtemp(dir=folder)), {'kind': 'benchmark'})

        rate = len(dataset) / seconds(encode)
        line('images encoded into the cache: read, written, checksummed', rate, f'{rate / forward:.2f} of the line above')
        codes = encode()
        index = torch.randint(len(codes), [NUM])
        line('codes gathered from disk', NUM / seconds(lambda: codes.gather(index)))
        resident, there = codes.resident(device), index.to(device)
        line('codes gathered from memory', NUM / seconds(lambda: resident.gather(there)))

    def labels(chunk: int, num: int) -> torch.Tensor:
        return torch.zeros([num, G.c_dim], device=device)

    the_bank, _ = step_costs.small_bank(G, res, job.loop, labels)
    computed = bank.CHUNK_ITEMS / seconds(lambda: the_bank.make(0))
    line('latents through G\'s low-res part', computed)
    rate = NUM / seconds(lambda: the_bank.sample(NUM))
    line('latents drawn from the bank', rate, f'{rate / computed:.0f} times the line above')


if __name__ == '__main__':
    main()
