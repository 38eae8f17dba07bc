"""Encoder and codes for `tools/transfer.py --train=low-res`: `python tools/prepare.py --network=ffhq256 --data=my256.zip --slice=32`."""

from pathlib import Path

import click

from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', default='demo', help='Source: path, URL, official short name, or demo')
@click.option('--data', metavar='PATH', help='Official folder or zip of images  [default: the bundled demo set]')
@click.option('--slice', metavar='R', help='Blocks up to R x R pixels are the low-res part; w: the mapping network alone  [default: resolution / 4]')
@click.option('--cache-dir', metavar='DIR', help='Where they go  [default: $M2M_CACHE_DIR or ~/.cache/m2m_stylegan]')
@click.option('--prepare-kimg', type=float, metavar='N', help='Thousand images for the encoder  [default: 6]')
@click.option('--prepare-minutes', type=float, metavar='N', help='Wall clock for the encoder, if it is not in the cache')
@click.option('--seed', type=int, metavar='N', default=0, help='Random seed')
@click.option('--mirror', type=bool, metavar='BOOL', default=False, help='Add mirrored images')
@click.option('--cond', type=bool, metavar='BOOL', default=False, help='Use the labels of dataset.json')
@click.option('--subset', type=int, metavar='N', help='N random images  [default: all]')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
@click.option('--outdir', metavar='DIR', help='Write encoded.png here: images over what their codes decode to')
def main(outdir, **options):
    """Make what low-res training needs before it starts, and print what it is worth.

    tools/transfer.py --train=low-res with the same options finds all of it in the cache.
    """
    from m2m_stylegan import prepare_codes  # here, so that --help does not wait for PyTorch
    from m2m_stylegan.transfer_options import TransferOptions

    try:
        prepare_codes.run(TransferOptions(outdir=outdir or '', train='low-res', **options), Path(outdir) if outdir else None, click.echo)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
