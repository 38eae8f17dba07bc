"""Cost of a training step: full training with the compiled and with the plain operators, high-res and low-res against full, in one run.

    python benchmarks/steps.py --resolution=64 --cbase=2048 --cmax=64
"""

import time

import click
import torch

from m2m_stylegan import autoencoder, code_game, networks, ops, phases, preparation, slicing, step_costs
from m2m_stylegan.ops import build
from m2m_stylegan.training_loop import LoopOptions
from m2m_stylegan.transfer_options import CODE_BATCH


def seconds_per_image(source, phase_list: list[phases.Phase], batch: int, real: phases.Batch, repeats: int) -> float:
    """Best of `repeats` for each phase, weighted by how often it runs."""
    total = 0.0
    for phase in phase_list:
        best = float('inf')
        for _ in range(repeats):
            latents = source.draw(real['c'])
            start = time.perf_counter()
            phases.run_phase(phase, latents, real, batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        total += best / phase.interval
    return total / batch


def codes(G, D, res: int, batch: int) -> tuple[code_game.CodeGame, phases.Batch]:
    """Low-res training in feature space with an untrained encoder: what it is trained on makes no difference to the time."""
    device = next(G.parameters()).device
    c = torch.zeros([batch, 0], device=device)
    encoder = autoencoder.new_encoder(G, D, res, lambda num: torch.zeros([num, 0], device=device)).requires_grad_(False)
    (x, img, w), _ = autoencoder.source_samples(G, batch, c, res)
    real = {'index': torch.arange(batch, device=device), 'w': w, 'c': c}
    real |= {name: value for name, value in [('x', x), ('img', img)] if value is not None}
    metric = None if x is None else torch.eye(x.shape[1] + img.shape[1], device=device)
    prepared = preparation.Prepared(res, encoder, range(batch), metric, 0.0, 0.0, 0.0)  # Of the codes, only their number is asked for.
    return code_game.make_game(G, prepared, code_game.CodeOptions(), lambda name, value: None, {}), real


@click.command(context_settings={'show_default': True})
@click.option('--resolution', type=int, default=64)
@click.option('--cbase', type=int, default=2048)
@click.option('--cmax', type=int, default=64)
@click.option('--dim', type=int, default=128, help='z_dim and w_dim')
@click.option('--batch', type=int, default=8)
@click.option('--repeats', type=int, default=5)
@click.option('--ops-only', is_flag=True, help='Full training only')
@click.option('--low-res-only', is_flag=True, help='Full and low-res training only')
def main(resolution, cbase, cmax, dim, batch, repeats, ops_only, low_res_only):
    """Print milliseconds per image of full training, compiled and plain, and of high-res and low-res training at every slice, and their ratio.

    Low-res steps have batches of 16, their default, and are bypassed: no high-res block runs.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    size = {'channel_base': cbase, 'channel_max': cmax}
    G = networks.Generator(dim, 0, dim, resolution, 3, mapping_kwargs={'num_layers': 2}, synthesis_kwargs=size).to(device).requires_grad_(False)
    D = networks.Discriminator(0, resolution, 3, **size).to(device).requires_grad_(False)
    real = {'img': torch.randn([batch, 3, resolution, resolution], device=device), 'c': torch.zeros([batch, 0], device=device)}

    def game(source):
        return phases.Game(source, D, lambda img: img, phases.LossOptions(), lambda name, value: None, device)

    def in_pixels(source, G_params: list, D_params: list) -> float:
        return seconds_per_image(source, phases.make_phases(game(source), G_params, D_params, 0.0025, 0.0025), batch, real, repeats)

    def full_step():
        return in_pixels(phases.LatentSource(G, 0.9, {}), [*G.parameters()], [*D.parameters()])

    state = ops.prepare(device.type).state
    full = full_step()
    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    click.echo(f'torch {torch.__version__}, {name}, {resolution} px, batch {batch}, operators: {state}')
    click.echo(f'{"train":<20}{"ms/image":>10}{"full / this":>13}')
    click.echo(f'{"full":<20}{full * 1000:>10.1f}{1:>13.2f}')
    if state == 'compiled' and not low_res_only:
        build._READY[device.type] = False
        plain = full_step()
        build._READY[device.type] = True
        click.echo(f'{"full, plain ops":<20}{plain * 1000:>10.1f}{full / plain:>13.2f}')
    for res in [] if ops_only or low_res_only else slicing.slice_resolutions(resolution)[:-1]:
        the_bank, _ = step_costs.small_bank(G, res, LoopOptions(), lambda chunk, num: torch.zeros([num, 0], device=device))
        for d_trains in ('all', 'high-res'):
            params = {key: [p for name, p in net.named_parameters() if name in slicing.tensor_names(net, res, part)]
                      for key, net, part in [('G', G, 'high-res'), ('D', D, d_trains)]}
            seconds = in_pixels(phases.BankSource(G, the_bank, res, {}), params['G'], params['D'])
            label = f'high-res {res}' + (', D too' if d_trains == 'high-res' else '')
            click.echo(f'{label:<20}{seconds * 1000:>10.1f}{full / seconds:>13.2f}')
    for res in [] if ops_only else [slicing.W_SLICE, *slicing.slice_resolutions(resolution)[:-1]]:
        code, codes_of_images = codes(G, D, res, CODE_BATCH)
        seconds = seconds_per_image(code, code_game.make_phases(code), CODE_BATCH, codes_of_images, repeats)
        click.echo(f'{f"low-res {slicing.slice_name(res)}":<20}{seconds * 1000:>10.2f}{full / seconds:>13.1f}')


if __name__ == '__main__':
    main()
