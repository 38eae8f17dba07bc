"""Find a picture in a network: `python tools/project.py --network=ffhq256 --target=me.jpg --outdir=out`."""

import click

from m2m_stylegan.errors import UserError


@click.command(context_settings={'show_default': True})
@click.option('--network', metavar='PKL', required=True, help='Network pickle: path, URL, short name (ffhq256 ...) or demo')
@click.option('--target', metavar='FILE', required=True, help='Image of any kind and size; its central square is used')
@click.option('--features', type=click.Choice(['vgg16', 'discriminator']), default='vgg16',
              help="What compares pictures: the official network, or the pickle's own D, which needs no download")
@click.option('--detector', metavar='FILE', help='The official vgg16.pt  [default: from a cache, else downloaded]')
@click.option('--trust-detector', is_flag=True, help='Open the --detector whatever its checksum: it can run code')
@click.option('--num-steps', type=click.IntRange(min=1), metavar='N', default=1000, help='Optimisation steps')
@click.option('--seed', type=click.IntRange(0, 2 ** 63 - 1), metavar='INT', default=303, help='Random seed')
@click.option('--save-video', type=bool, metavar='BOOL', default=True, help='Write proj.mp4, where ffmpeg is at hand')
@click.option('--outdir', metavar='DIR', required=True, help='Where target.png, proj.png, projected_w.npz and proj.mp4 go')
@click.option('--class', 'class_idx', type=int, metavar='INT', help='Class label; conditional networks need one')
@click.option('--device', metavar='NAME', default='auto', help='auto, cpu, cuda or cuda:N')
def main(**options):
    """Find the w whose picture is nearest to an image, by the protocol of the official projector.py."""
    from m2m_stylegan import project  # here, so that --help does not wait for PyTorch

    try:
        project.run(**options, echo=click.echo)
    except (UserError, OSError) as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
