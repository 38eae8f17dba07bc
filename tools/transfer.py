"""Adapt an official StyleGAN2 pickle to your images: `python tools/transfer.py --network=ffhq256 --data=my256.zip --outdir=runs`."""

import sys

import click

from m2m_stylegan.augment import AUGPIPE_SPECS
from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
# What goes in and out.
@click.option('--network', metavar='PKL', default='demo', help='Path, URL, short name (ffhq256, ffhq512, ffhq1024, celebahq256, lsundog256), demo, '
              'or none to train from scratch')
@click.option('--data', metavar='PATH', help='Official folder or zip of images  [default: the bundled demo set]')
@click.option('--outdir', metavar='DIR', help='Run directories are made in here  [required, but for --resume=RUN]')
@click.option('--cache-dir', metavar='DIR', help='Downloads and cached features  [default: $M2M_CACHE_DIR or ~/.cache/m2m_stylegan]')
@click.option('--resume', metavar='RUN', help='Run directory or "latest": go on exactly where it stopped, with '
              'its own options but for limits and machine; a pickle: start from its weights')
# What is trained.
@click.option('--train', type=click.Choice(['both', 'low-res', 'high-res', 'full']), default='both', help='both: first the '
              'blocks up to the slice, then those above it; low-res: the first alone; high-res: the second alone; full: everything')
@click.option('--slice', metavar='R', help='Blocks up to R x R pixels are the low-res part; w: the mapping network alone  [default: resolution / 4, '
              'with high-res and --no-bypass / 8]')
@click.option('--no-bypass', is_flag=True, help='Low-res training: run the frozen high-res blocks')
@click.option('--critic', type=click.Choice(['wgan-gp', 'logistic']), help='Loss of the game for w in low-res training  [default: logistic]')
@click.option('--prepare-kimg', type=float, metavar='N', help='Thousand images for the encoder of low-res training  [default: 6]')
@click.option('--prepare-minutes', type=float, metavar='N', help='Wall clock for the encoder, if it is not in the cache')
@click.option('--d-trains', type=click.Choice(['all', 'high-res']), help='Trained part of D in high-res training  [default: high-res]')
@click.option('--split', type=float, metavar='F', help='Share of the budget for low-res training, with --train=both  [default: 0.4]')
@click.option('--bank', type=int, metavar='N', help='Latents in the feature cache  [default: what fits 1 GiB, at most 4096]')
@click.option('--freezed', type=int, metavar='N', default=0, help='FreezeD: freeze the first N layers of D')
# The dataset.
@click.option('--cond', type=bool, metavar='BOOL', default=False, help='Use the labels of dataset.json')
@click.option('--subset', type=int, metavar='N', help='Train on N random images  [default: all]')
@click.option('--mirror', type=bool, metavar='BOOL', default=False, help='Add mirrored images')
@click.option('--workers', type=int, metavar='N', default=3, help='Loader processes, for sets of over 1 GiB')
# How long, how fast, how strong.
@click.option('--kimg', type=float, metavar='N', help='Stop after N thousand images  [default: 1000]')
@click.option('--minutes', type=float, metavar='N', help='Stop after N minutes of wall clock, preparation and resumed sessions included')
@click.option('--batch', type=int, metavar='N', help='Images per step  [default: by resolution; at most 16 on a CPU; low-res training: 16]')
@click.option('--batch-gpu', type=int, metavar='N', help='Images per forward pass, to save memory  [default: --batch]')
@click.option('--lr', type=float, metavar='F', help='Learning rate of G and D  [default: 0.0025, from 1024 pixels on 0.002; '
              'low-res training: 0.01, of the synthesis blocks]')
@click.option('--gamma', type=float, metavar='F', help='R1 weight  [default: by resolution and batch; low-res training: 1, of the critic on w]')
@click.option('--pl-weight', type=float, metavar='F', help='Path length weight  [default: 2]')
@click.option('--train-noise', type=bool, metavar='BOOL', help="Train G's noise strengths; false if results are covered with grain  [default: true, "
              'with both false]')
@click.option('--ema-rampup', type=float, metavar='F', help='Half-life of the moving average, as a fraction of the run so far; 0: full from the '
              'start  [default: 0.05; both 0.3 at the end; fine-tuning with --train=full 0]')
@click.option('--seed', type=int, metavar='N', default=0, help='Random seed')
# Augmentation.
@click.option('--aug', type=click.Choice(['noaug', 'ada', 'fixed']), default='ada', help='Augmentation mode')
@click.option('--p', type=float, metavar='F', help='Augmentation probability for --aug=fixed')
@click.option('--target', type=float, metavar='F', help='Target of --aug=ada  [default: 0.6]')
@click.option('--augpipe', type=click.Choice(list(AUGPIPE_SPECS)), help='Augmentation pipeline  [default: bgc]')
# Output.
@click.option('--tick', type=float, metavar='KIMG', help='Thousand images between status lines  [default: 4, on a CPU 1]')
@click.option('--snap', type=int, metavar='TICKS', default=50, help='Ticks between snapshots')
@click.option('--snap-minutes', type=float, metavar='N', help='Also a snapshot every N minutes of wall clock; its name then has three more digits')
@click.option('--metrics', metavar='NAMES', default='none', help='Of every snapshot, in metric-*.jsonl: fid50k_full, fd_effnetlite0 ...; none')
# The machine.
@click.option('--gpus', type=int, metavar='N', default=1, help='Processes on this machine, one per GPU; with torchrun leave it out')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
@click.option('--fp32', type=bool, metavar='BOOL', default=False, help='No half precision')
@click.option('--nhwc', type=bool, metavar='BOOL', default=False, help='Channels-last half-precision blocks in new networks')
@click.option('--allow-tf32', type=bool, metavar='BOOL', default=False, help='TensorFloat-32 on a GPU')
@click.option('--nobench', type=bool, metavar='BOOL', default=False, help='No cuDNN benchmarking')
# The shape of a new network, with --network=none.
@click.option('--cbase', type=int, metavar='N', help='Channels times resolution  [default: 16384, from 512 pixels on 32768]')
@click.option('--cmax', type=int, metavar='N', help='Largest number of channels  [default: 512]')
@click.option('--map-depth', type=int, metavar='N', help='Layers of the mapping network  [default: 2]')
@click.option('--latent-dim', type=int, metavar='N', help='z_dim and w_dim  [default: 512]')
@click.option('-n', '--dry-run', is_flag=True, help='Print the resolved options and stop')
def main(**options):
    """Adapt an official StyleGAN2 network to a few hundred to a few thousand images, and write an official network pickle.

    Without --network and --data the bundled demo runs: `python tools/transfer.py --outdir=runs --minutes=5`. With --train=both the options
    --batch, --batch-gpu, --lr, --gamma and --train-noise are those of the second half.
    """
    from m2m_stylegan import transfer  # here, so that --help does not wait for PyTorch

    try:
        transfer.run(transfer.TransferOptions(**options), click.echo, [sys.executable, *sys.orig_argv[1:]])
    except UserError as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
