"""Score a network, or a folder of images: `python tools/calc_metrics.py --network=run/network-snapshot-000200.pkl --metrics=fid50k_full`."""

import click

from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', required=True, help='Network pickle (path, URL, short name), or a folder or zip of images')
@click.option('--metrics', metavar='NAMES', help='Comma-separated: fid50k_full, kid50k_full, pr50k3_full, is50k, fid50k, kid50k, pr50k3, fid5k_full, '
              'kid5k_full, pr5k3_full, ppl2_wend, ppl_zfull, ppl_wfull, ppl_zend, ppl_wend, fd_effnetlite0, kd_effnetlite0, pr_effnetlite0  '
              '[default: fid50k_full, with --detector=efficientnet-lite0 fd_effnetlite0,kd_effnetlite0]')
@click.option('--data', '--real', metavar='PATH', help='Real images: official folder or zip  [default: what the pickle was trained on]')
@click.option('--mirror', type=bool, metavar='BOOL', help='Were mirrored images used? Only for fid50k, kid50k, pr50k3  [default: as in training]')
@click.option('--gpus', type=int, metavar='N', default=1, help='Processes; the same as starting this with torchrun')
@click.option('--verbose', type=bool, metavar='BOOL', default=True, help='Progress bars and remarks, on stderr')
@click.option('--detector', metavar='NAME', help='efficientnet-lite0 (needs no download), or the path of inception-2015-12-05.pt or vgg16.pt  '
              '[default: from the caches, or downloaded]')
@click.option('--trust-detector', is_flag=True, help='Open the detector file although its checksum is not the official one; it may run code')
@click.option('--num', type=int, metavar='N', help='Generated images; names then change, as in fid2k_full  [default: what the name says; '
              'efficientnet-lite0: 5000]')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
@click.option('--batch', type=int, metavar='N', default=64, help='Images per pass through the detector; changes no score')
@click.option('--cache-dir', metavar='DIR', help='Detectors and statistics of real images  [default: $M2M_CACHE_DIR or ~/.cache/m2m_stylegan]')
@click.option('--seed', type=click.IntRange(0, 2 ** 32 - 1), metavar='N', default=0, help='Random seed')
def main(**options):
    """Quality metrics by the official protocol of StyleGAN2-ADA, one JSON line each; also into metric-*.jsonl beside the pickle of a run.

    Two folders: `--network=generated/ --real=photos/`. Without network access: `--detector=efficientnet-lite0`, whose scores are no FID.
    """
    from m2m_stylegan import calc_metrics  # here, so that --help does not wait for PyTorch

    try:
        calc_metrics.run(calc_metrics.MetricOptions(**options), click.echo, lambda text: click.echo(text, err=True))
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
