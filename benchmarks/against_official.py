"""Our full-training step against the official code's, same shapes, same machine, one run, in turns.

    PYTHONPATH=tests python benchmarks/against_official.py CHECKOUT [RESOLUTION CHANNEL_BASE CHANNEL_MAX DIM BATCH REPEATS]

CHECKOUT: an unmodified stylegan2-ada-pytorch, used as a black box: its networks, its loss class, Adam as it sets it. Each phase is
timed on its own (best of REPEATS) and weighted by how often it runs; no augmentation, data loading or moving average on either side.
"""

import importlib
import sys
import time

import official_runner
import torch

from m2m_stylegan import losses, networks, ops, phases


def best(fn, repeats: int) -> float:
    """Shortest wall-clock time of `repeats` calls after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def official_step(checkout: str, shape: dict, real: torch.Tensor, repeats: int) -> float:
    """Seconds per image of the official networks under the official loss."""
    official_runner.prepare(checkout)
    module, loss_module = importlib.import_module('training.networks'), importlib.import_module('training.loss')
    size = {'channel_base': shape['channel_base'], 'channel_max': shape['channel_max']}
    G = module.Generator(z_dim=shape['dim'], c_dim=0, w_dim=shape['dim'], img_resolution=real.shape[2], img_channels=3,
                         mapping_kwargs={'num_layers': 2}, synthesis_kwargs=size)
    D = module.Discriminator(c_dim=0, img_resolution=real.shape[2], img_channels=3, **size)
    loss = loss_module.StyleGAN2Loss(device=real.device, G_mapping=G.mapping, G_synthesis=G.synthesis, D=D, r1_gamma=10)
    n, c = len(real), torch.zeros([len(real), 0])
    total = 0.0
    for net, letter, interval in [(G, 'G', 4), (D, 'D', 16)]:
        optimizer = torch.optim.Adam(net.parameters(), **losses.lazy_adam_kwargs(0.0025, (0.0, 0.99), interval))
        for kind, every in [('main', 1), ('reg', interval)]:
            def run(phase=letter + kind, every=every, net=net, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                G.requires_grad_(net is G)
                D.requires_grad_(net is D)
                z = torch.randn([n, shape['dim']])
                loss.accumulate_gradients(phase=phase, real_img=real, real_c=c, gen_z=z, gen_c=c, sync=True, gain=every)
                optimizer.step()
            total += best(run, repeats) / every
    return total / n


def our_step(shape: dict, real: torch.Tensor, repeats: int) -> float:
    """Seconds per image of our networks and phases."""
    size = {'channel_base': shape['channel_base'], 'channel_max': shape['channel_max']}
    G = networks.Generator(shape['dim'], 0, shape['dim'], real.shape[2], 3, mapping_kwargs={'num_layers': 2}, synthesis_kwargs=size)
    D = networks.Discriminator(0, real.shape[2], 3, **size)
    G.requires_grad_(False)
    D.requires_grad_(False)
    game = phases.Game(phases.LatentSource(G, 0.9, {}), D, lambda img: img, phases.LossOptions(), lambda name, value: None, real.device)
    batch = {'img': real, 'c': torch.zeros([len(real), 0])}
    return sum(best(lambda phase=phase: phases.run_phase(phase, game.source.draw(batch['c']), batch, len(real)), repeats) / phase.interval
               for phase in phases.make_phases(game, [*G.parameters()], [*D.parameters()], 0.0025, 0.0025)) / len(real)


def main(checkout: str, resolution: int = 64, channel_base: int = 2048, channel_max: int = 64, dim: int = 128, batch: int = 8, repeats: int = 3):
    """Print milliseconds per image of both and their ratio."""
    ops.prepare('cpu')
    shape = {'channel_base': channel_base, 'channel_max': channel_max, 'dim': dim}
    real = torch.randn([batch, 3, resolution, resolution])
    ours, theirs = our_step(shape, real, repeats), official_step(checkout, shape, real, repeats)
    print(f'torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {resolution} px, {shape}, batch {batch}, '
          f'ops {ops.status()["cpu"].state}\nofficial {theirs * 1e3:.1f} ms/image, ours {ours * 1e3:.1f} ms/image, ratio {theirs / ours:.2f}')


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
