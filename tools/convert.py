"""Convert a network pickle: `python tools/convert.py --network=old-tf.pkl --dest=new.pkl`."""

import click

from m2m_stylegan import downloads
from m2m_stylegan.convert import NETWORKS, check, convert
from m2m_stylegan.errors import UserError


@click.command()
@click.option('--network', metavar='PKL', required=True, help='Network pickle: path, URL or official short name')
@click.option('--dest', metavar='FILE', required=True, help='New .pkl (official format), .safetensors or .pt (plain state_dict)')
@click.option('--net', type=click.Choice([*NETWORKS, 'all']), default='all', show_default=True, help='Which network; .pkl always holds all')
def main(network, dest, net):
    """Export a network pickle, official PyTorch or legacy TensorFlow, without executing anything in it.

    A .pkl opens in all official tools. Tensors in a .safetensors are named as in the networks, behind `G_ema.`, `G.` or `D.`; its metadata
    tell class and constructor arguments.
    """
    try:
        check(dest, net)
        path = convert(downloads.resolve(network), dest, net)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err
    click.echo(f'Wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)')


if __name__ == '__main__':
    main()
