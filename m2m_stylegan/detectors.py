"""Feature networks ("detectors") of the metrics: where their files are found, and when one may be opened.

The official ones are TorchScript: opening such a file can execute what is in it. So a file is opened only if its SHA-256 is the one of
the official file, or if the caller vouches for it.
"""

import dataclasses
import functools
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from m2m_stylegan import downloads, efficientnet_lite
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import sha256_of

INCEPTION, VGG16, OFFLINE = 'inception-2015-12-05', 'vgg16', 'efficientnet-lite0'
_OFFICIAL = 'https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/'
SHA256 = {
    INCEPTION: 'f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4',
    VGG16: 'b437eb095feaeb0b83eb3fa11200ebca4548ee39a07fb944a417ddc516cc07c3',
}


@dataclasses.dataclass(frozen=True)
class Detector:
    """A feature network on its device.

    identity       what the features depend on, for caches: name, checksum of the weights, preprocessing.
    features       uint8 images [N, 1 or 3, H, W] -> [N, F] float32.
    probabilities  the same images -> [N, classes], rows sum to 1 (Inception only).
    lpips          float32 images [N, 1 or 3, H, W] in [0, 255] -> [N, F] float32, whose squared distance is LPIPS (VGG16 only).
    """

    identity: str
    features: Callable[[torch.Tensor], torch.Tensor]
    probabilities: Callable[[torch.Tensor], torch.Tensor] | None = None
    lpips: Callable[[torch.Tensor], torch.Tensor] | None = None


def load(
    name: str,
    *,
    path: str | os.PathLike | None = None,
    trust: bool = False,
    device: str | torch.device = 'cpu',
    cache_dir: str | os.PathLike | None = None,
) -> Detector:
    """Open the detector INCEPTION, VGG16 or OFFLINE.

    path: the file of an official one; default: the caches of this package and of the official code, else it is downloaded. trust: open
    the file whatever its checksum. Raises UserError for a file that is not the official one, and for one that does not work as a detector.
    """
    if name == OFFLINE:
        return Detector(f'{OFFLINE} {efficientnet_lite.SHA256} bicubic {efficientnet_lite.RESOLUTION}', efficientnet_lite.EfficientNetLite0(device))
    path = find(name, cache_dir) if path is None else Path(path)
    net, sha256 = _open(name, path, trust, torch.device(device))

    def call(images: torch.Tensor, **options) -> torch.Tensor:
        with torch.inference_mode(not images.requires_grad):  # the projector differentiates
            try:
                out = net(images.to(device).expand(-1, 3, -1, -1), **options)
            except (RuntimeError, TypeError) as err:  # TorchScript reports everything as one of these
                raise UserError(f'{path} does not work as {name}: {str(err).strip().splitlines()[-1]}') from err
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(images):
            raise UserError(f'{path} does not work as {name}: expected a matrix with a row for each of {len(images)} images, '
                            f'found {list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__}')
        return out.to(torch.float32)

    features = functools.partial(call, return_features=True)
    if name == VGG16:
        return Detector(f'{name} {sha256}', features, lpips=functools.partial(call, resize_images=False, return_lpips=True))
    return Detector(f'{name} {sha256}', features, probabilities=functools.partial(call, no_output_bias=True))


def find(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """The official file of INCEPTION or VGG16: in a cache, else downloaded. Raises UserError, saying how to get it by other means."""
    dnnlib = Path(os.environ.get('DNNLIB_CACHE_DIR') or Path.home() / '.cache' / 'dnnlib')
    for known in sorted(dnnlib.glob(f'downloads/*_{name}.pt')):
        if sha256_of(known) == SHA256[name]:
            return known
    try:
        return downloads.fetch(f'{_OFFICIAL}{name}.pt', cache_dir, sha256=SHA256[name])
    except UserError as err:
        raise UserError(f'{err}\nThe official metrics need {name}.pt: pass its path with --detector, or use the metrics that need no '
                        'download: fd_effnetlite0, kd_effnetlite0, pr_effnetlite0.') from err


def _open(name: str, path: Path, trust: bool, device: torch.device) -> tuple[torch.jit.ScriptModule, str]:
    try:
        data = path.read_bytes()
    except OSError as err:
        raise UserError(f'cannot read the detector {path}: {err.strerror}') from err
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[name] and not trust:
        raise UserError(f'{path} is not the official {name}.pt: SHA-256 {found}, expected {SHA256[name]}. Opening a TorchScript file can run '
                        'code that is in it; if you know where this one comes from, pass --trust-detector.')
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated for new code; this is the format that the official files have.
            warnings.simplefilter('ignore', DeprecationWarning)
            # The bytes that were hashed, not the file once more: it could be another one by now.
            return torch.jit.load(io.BytesIO(data), map_location=device).eval(), found
    except (RuntimeError, ValueError) as err:
        raise UserError(f'{path} is not a TorchScript file ({str(err).strip().splitlines()[0]}); expected the official {name}.pt') from err
