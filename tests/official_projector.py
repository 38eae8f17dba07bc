"""Run through official_runner.py: `official_projector.py CHECKOUT VGG16 [OPTIONS]...` runs the official projector.py without a download.

In place of the VGG16 a small stand-in is made, written to the file VGG16, and handed out. Keeps to Python 3.7 and torch 1.7.
"""

import os
import runpy
import sys
import types

import dnnlib
import torch


class StandIn(torch.nn.Module):
    """Called as the VGG16 is; smooth, so that rounding errors do not grow over the steps."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        assert img.shape[1] == 3
        assert return_lpips and not resize_images
        return torch.nn.functional.avg_pool2d(img, 2).flatten(1) / 100


def main(checkout: str, vgg16: str, *options: str) -> None:
    torch.jit.save(torch.jit.script(StandIn()), vgg16)
    official_open = dnnlib.util.open_url

    def open_url(url, *args, **kwargs):
        return official_open(vgg16 if 'vgg16' in url else url, *args, **kwargs)

    dnnlib.util.open_url = open_url
    sys.modules.setdefault('imageio', types.ModuleType('imageio'))  # makes videos, which are not asked for
    sys.argv = ['projector.py', *options]
    runpy.run_path(os.path.join(checkout, sys.argv[0]), run_name='__main__')


if __name__ == '__main__':
    main(*sys.argv[1:])
