"""Does a network repeat its training images? Distances to the nearest of them: `python benchmarks/nearest.py PKL --dest=nearest.png`."""

import click
import torch

from m2m_stylegan import detectors, feature_stats, snapshots
from m2m_stylegan.datasets import ImageDataset
from m2m_stylegan.image_sources import dataset_images, generated_images
from m2m_stylegan.images import save_image_grid
from m2m_stylegan.transfer import DEMO_DATA

COLUMNS = 12


def nearest(points: torch.Tensor, among: torch.Tensor, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to, and number of, the nearest row after leaving out the `skip` very nearest."""
    found = torch.cdist(points, among).topk(skip + 1, largest=False)
    return found.values[:, skip], found.indices[:, skip]


@click.command(context_settings={'show_default': True})
@click.argument('networks', nargs=-1, required=True)
@click.option('--data', help='The images that were trained on  [default: the bundled demo set]')
@click.option('--num', type=int, default=500, help='Samples of each network')
@click.option('--seed', type=int, default=0)
@click.option('--dest', metavar='PNG', help='Samples of the last network over their nearest training images')
@torch.no_grad()
def main(networks, data, num, seed, dest):
    """Print the median distance of samples to their nearest training image, in features of EfficientNet-Lite0, and that between training images."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    detector, dataset = detectors.load(detectors.OFFLINE, device=device), ImageDataset(data or DEMO_DATA)

    def features(images, count: int) -> torch.Tensor:
        return feature_stats.collect('images', count, lambda start, stop: detector.features(images(start, stop).to(device)), keep=True).features

    images = dataset_images(dataset)
    real = features(images, len(dataset))
    own, _ = nearest(real, real, skip=1)
    click.echo(f'{"":<50}{"median":>8}{"5 %":>8}{"nearer than half of the training images are to each other":>60}')
    click.echo(f'{"training images, to the nearest other one":<50}{own.median():>8.2f}{own.quantile(0.05):>8.2f}{0.5:>60.0%}')
    for path in networks:
        G = snapshots.load_G_ema(path).to(device)
        fakes = generated_images(G, ImageDataset(data or DEMO_DATA, use_labels=True) if G.c_dim else None, seed, device)
        distance, index = nearest(features(fakes, num), real)
        click.echo(f'{path[-48:]:<50}{distance.median():>8.2f}{distance.quantile(0.05):>8.2f}{(distance < own.median()).float().mean():>60.1%}')
    if dest is not None:
        shown = distance.argsort()[torch.linspace(0, num - 1, COLUMNS).long()]  # from the nearest to the farthest
        pairs = [torch.cat([fakes(int(i), int(i) + 1).cpu() for i in shown]), torch.cat([images(int(i), int(i) + 1) for i in index[shown]])]
        save_image_grid(torch.cat(pairs), dest, (0, 255), (COLUMNS, 2))


if __name__ == '__main__':
    main()
