"""Training."""

import os

import click
import dnnlib
import torch
from training import training_loop


def subprocess_fn(rank, args):
    training_loop.training_loop(rank=rank, **args)


@click.command()
@click.pass_context
@click.option('--outdir', required=True)
@click.option('--gpus', type=int)
@click.option('--cfg', type=click.Choice(['auto', 'paper256']))
@click.option('--data', required=True)
@click.option('--batch', type=int)
@click.option('--kimg', type=int)
@click.option('--gamma', type=float)
@click.option('--snap', type=int)
@click.option('--aug', type=click.Choice(['noaug', 'ada', 'fixed']))
@click.option('--metrics', type=lambda text: [] if text == 'none' else text.split(','))
@click.option('--resume')
@click.option('--seed', type=int, default=0)
@click.option('--desc')
@click.option('--mirror', type=dnnlib.util.as_bool)
def main(ctx, outdir, gpus, batch, resume, **options):
    run_dir = os.path.join(outdir, '00000-mini')
    os.makedirs(run_dir)
    args = {'run_dir': run_dir, 'images': torch.rand(8, 3, 16, 16), 'batch': batch or 2, 'steps': 2, 'resume': resume}
    if (gpus or 1) > 1:
        torch.multiprocessing.spawn(subprocess_fn, args=(args,), nprocs=gpus)
    else:
        subprocess_fn(0, args)


if __name__ == '__main__':
    main()
