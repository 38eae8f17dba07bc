"""Cost of a training step: full training with the compiled and with the plain operators, high-res against full, in one run.

    python benchmarks/steps.py --resolution=64 --cbase=2048 --cmax=64
"""

import time

import click
import torch

from m2m_stylegan import bank, networks, ops, phases, slicing
from m2m_stylegan.features import ResidentFeatures, TensorSpec
from m2m_stylegan.ops import build


def seconds_per_image(game: phases.Game, params: dict[str, list], batch: int, real: phases.Batch, repeats: int) -> float:
    """Best of `repeats` for each phase, weighted by how often it runs."""
    total = 0.0
    for phase in phases.make_phases(game, params['G'], params['D'], 0.0025, 0.0025):
        best = float('inf')
        for _ in range(repeats):
            latents = game.source.draw(real['c'])
            start = time.perf_counter()
            phases.run_phase(phase, latents, real, batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        total += best / phase.interval
    return total / batch


@click.command(context_settings={'show_default': True})
@click.option('--resolution', type=int, default=64)
@click.option('--cbase', type=int, default=2048)
@click.option('--cmax', type=int, default=64)
@click.option('--dim', type=int, default=128, help='z_dim and w_dim')
@click.option('--batch', type=int, default=8)
@click.option('--repeats', type=int, default=5)
@click.option('--ops-only', is_flag=True, help='Full training only')
def main(resolution, cbase, cmax, dim, batch, repeats, ops_only):
    """Print milliseconds per image of full training, compiled and plain, and of high-res training at every slice, and their ratio."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    size = {'channel_base': cbase, 'channel_max': cmax}
    G = networks.Generator(dim, 0, dim, resolution, 3, mapping_kwargs={'num_layers': 2}, synthesis_kwargs=size).to(device).requires_grad_(False)
    D = networks.Discriminator(0, resolution, 3, **size).to(device).requires_grad_(False)
    real = {'img': torch.randn([batch, 3, resolution, resolution], device=device), 'c': torch.zeros([batch, 0], device=device)}

    def game(source):
        return phases.Game(source, D, lambda img: img, phases.LossOptions(), lambda name, value: None, device)

    def full_step():
        return seconds_per_image(game(phases.LatentSource(G, 0.9, {})), {'G': [*G.parameters()], 'D': [*D.parameters()]}, batch, real, repeats)

    state = ops.prepare(device.type).state
    full = full_step()
    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    click.echo(f'torch {torch.__version__}, {name}, {resolution} px, batch {batch}, operators: {state}')
    click.echo(f'{"train":<20}{"ms/image":>10}{"full / this":>13}')
    click.echo(f'{"full":<20}{full * 1000:>10.1f}{1:>13.2f}')
    if state == 'compiled':
        build._READY[device.type] = False
        plain = full_step()
        build._READY[device.type] = True
        click.echo(f'{"full, plain ops":<20}{plain * 1000:>10.1f}{full / plain:>13.2f}')
    for res in [] if ops_only else slicing.slice_resolutions(resolution)[:-1]:
        chunk = bank.make_chunk(G, res, lambda chunk, num: torch.zeros([num, 0], device=device), 0, 0, 0.9, torch.float16)
        specs = {key: TensorSpec(tuple(value.shape[1:]), value.dtype) for key, value in chunk.items()}
        the_bank = bank.Bank(ResidentFeatures(specs, bank.CHUNK_ITEMS, device, chunk), None)
        for d_trains in ('all', 'high-res'):
            params = {key: [p for name, p in net.named_parameters() if name in slicing.tensor_names(net, res, part)]
                      for key, net, part in [('G', G, 'high-res'), ('D', D, d_trains)]}
            seconds = seconds_per_image(game(phases.BankSource(G, the_bank, res, {})), params, batch, real, repeats)
            label = f'high-res {res}' + (', D too' if d_trains == 'high-res' else '')
            click.echo(f'{label:<20}{seconds * 1000:>10.1f}{full / seconds:>13.2f}')


if __name__ == '__main__':
    main()
