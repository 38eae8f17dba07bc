"""Memory of a training step, full against low-res: `python benchmarks/memory.py` (1024 px, config-f, slice 16; 25 GB and minutes on a CPU)."""

import functools

import click
import torch
from steps import codes

from m2m_stylegan import code_game, networks, phases, step_costs
from m2m_stylegan.training_loop import State
from m2m_stylegan.transfer_options import CODE_BATCH


@click.command(context_settings={'show_default': True})
@click.option('--resolution', type=int, default=1024)
@click.option('--cbase', type=int, default=32768)
@click.option('--cmax', type=int, default=512)
@click.option('--dim', type=int, default=512, help='z_dim and w_dim')
@click.option('--slice', 'res', type=int, default=16)
@click.option('--batch', type=int, default=2, help='Images per pass in full training; low-res training has 16')
@click.option('--fp16-res', type=int, default=4, help='Highest resolutions in half precision; on a CPU all are float32')
def main(resolution, cbase, cmax, dim, res, batch, fp16_res):
    """Print the memory of one step of full and of low-res training, and their ratio."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    size = {'channel_base': cbase, 'channel_max': cmax, 'num_fp16_res': fp16_res if device.type == 'cuda' else 0, 'conv_clamp': 256}
    G = networks.Generator(dim, 0, dim, resolution, 3, mapping_kwargs={'num_layers': 8}, synthesis_kwargs=size).to(device).requires_grad_(False)
    D = networks.Discriminator(0, resolution, 3, **size).to(device).requires_grad_(False)
    state = State(G, D, G, None)
    code, codes_of_images = codes(G, D, res, CODE_BATCH)
    images = {'img': torch.randn([batch, 3, resolution, resolution], device=device), 'c': torch.zeros([batch, 0], device=device)}
    game = phases.Game(phases.LatentSource(G, 0.9, {}), D, lambda img: img, phases.LossOptions(), lambda name, value: None, device)
    found = {}
    for name, source, phase_list, real, num in [
            ('low-res', code, code_game.make_phases(code), codes_of_images, CODE_BATCH),
            ('full', game.source, phases.make_phases(game, [*G.parameters()], [*D.parameters()], 0.0025, 0.0025), images, batch)]:
        tasks = [(phase.interval, functools.partial(run, phase, source, real, num)) for phase in phase_list]
        found[name] = step_costs.measure(tasks, num, step_costs.state_nbytes(state, phase_list), device)
        click.echo(f'{name:<8} batch {num:>2}: {found[name].memory_bytes / 2 ** 20:>9.0f} MiB {found[name].seconds:>9.3f} s per image')
    ratio, kind = found['full'].memory_bytes / found['low-res'].memory_bytes, step_costs.MEMORY_KINDS[device.type]
    click.echo(f'{resolution} px, slice {res}: full training takes {ratio:.1f} times the memory\n({device.type}: {kind})')


def run(phase: phases.Phase, source, real: phases.Batch, batch: int) -> None:
    """One step of a phase."""
    phases.run_phase(phase, source.draw(real['c']), real, batch)


if __name__ == '__main__':
    main()
