"""TorchScript files that stand in for the official detectors, which cannot be had without network access."""

import warnings
from pathlib import Path

import torch


class Inception(torch.nn.Module):
    """12 colour statistics as features; softmax of them as probabilities."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(img.to(torch.float32) / 128 - 1, [2, 2]).flatten(1)
        return x if return_features else (x * 20).softmax(dim=1)


class NaN(Inception):
    """NaN for images darker than the middle."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        return (img.to(torch.float32).mean(dim=[2, 3]) - 127.5).sqrt()


class VGG16(torch.nn.Module):
    """Pixels as LPIPS features."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        return img.flatten(1)


class NoDetector(torch.nn.Module):
    """TorchScript, but something else."""

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return img


def save(net: torch.nn.Module, path: Path) -> Path:
    """Write it as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # The official files are TorchScript, deprecated or not.
        torch.jit.save(torch.jit.script(net), path)
    return path
