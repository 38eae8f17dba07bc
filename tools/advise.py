"""Which training, at which slice? Measured on this machine: `python tools/advise.py --network=ffhq256 --data=my256.zip`."""

import click

from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', default='demo', help='Source: path, URL, official short name, or demo')
@click.option('--data', metavar='PATH', help='Official folder or zip of images  [default: the bundled demo set]')
@click.option('--slices', metavar='LIST', help='Such as w,8,16  [default: all]')
@click.option('--prepare-kimg', type=float, metavar='N', default=2, help='Thousand images for the encoder of each slice')
@click.option('--num', type=int, metavar='N', default=500, help='Images behind each Frechet distance')
@click.option('--cond', type=bool, metavar='BOOL', default=False, help='Use the labels of dataset.json')
@click.option('--seed', type=int, metavar='N', default=0, help='Random seed')
@click.option('--cache-dir', metavar='DIR', help='Keeps encoders and codes  [default: $M2M_CACHE_DIR or ~/.cache/m2m_stylegan]')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
@click.option('--json', 'json_path', metavar='FILE', help='Write everything that was measured here, too')
@click.option('-n', '--dry-run', is_flag=True, help='Check everything, say what would be measured and stop')
def main(slices, json_path, dry_run, **options):
    """Print for every slice the floor of low-res training, what steps cost compared with full training, and a recommendation.

    Floor: how near to the images low-res training can be expected to get at best, after an encoder as short as --prepare-kimg says.
    """
    from m2m_stylegan import advise  # here, so that --help does not wait for PyTorch

    try:
        advise.run(slices.split(',') if slices is not None else None, json_path, dry_run, click.echo, options)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
