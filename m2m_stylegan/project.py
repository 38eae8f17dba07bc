"""Finding the w whose picture is nearest to a given image: the official projector, protocol and files (StyleGAN2, 1912.04958, appendix D).

`project` takes the perceptual features as a callable and knows no network file; `run` is tools/project.py.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from m2m_stylegan import detectors, downloads, snapshots
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write
from m2m_stylegan.generate import Echo, class_label, device_of, open_generator, save_png
from m2m_stylegan.image_files import open_image
from m2m_stylegan.interpolate import as_rgb
from m2m_stylegan.networks import Discriminator, Generator
from m2m_stylegan.prepare_images import PrepareOptions, SkipImage, flatten, reshape
from m2m_stylegan.video import GET_FFMPEG, find_ffmpeg, write_video

Features = Callable[[torch.Tensor], torch.Tensor]  # float images [N, C, H, W], nominal range [0, 255] => features [N, F], near if alike

W_SAMPLES, W_SEED = 10_000, 123
NOISE_WEIGHT = 1e5


@dataclasses.dataclass(frozen=True)
class Step:
    """The state after one step of the optimisation."""

    w: torch.Tensor  # [1, 1, w_dim] float32, the same for all layers
    dist: float      # squared distance of the features to those of the target, of the picture that the step started from
    loss: float      # dist and the noise regularisation


def schedule(t: float) -> tuple[float, float]:
    """Learning rate, and standard deviation of the noise on w in units of that of w itself, at time t in [0, 1)."""
    decay = 0.5 - 0.5 * math.cos(math.pi * min(1, (1 - t) / 0.25))
    return 0.1 * decay * min(1, t / 0.05), 0.05 * max(0, 1 - t / 0.75) ** 2


@torch.no_grad()
def w_statistics(G: Generator, c: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean [1, 1, w_dim] and scalar standard deviation of w over 10000 latents with label c [1, c_dim]."""
    z = torch.from_numpy(np.random.RandomState(W_SEED).randn(W_SAMPLES, G.z_dim)).to(c.device, torch.float32)
    w = G.mapping(z, c.expand(W_SAMPLES, -1))[:, :1]
    mean = w.mean(dim=0, keepdim=True)
    return mean, float(((w - mean).square().sum() / W_SAMPLES).sqrt())


def noise_regularisation(noises: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squared correlations of neighbouring pixels, over noise images [H, W] and their 2x2 means down to 8x8: no picture hides in the noise."""
    total = torch.zeros([])
    for noise in noises:
        level = noise[None, None]  # [NCHW]
        while True:
            total = sum(((level * level.roll(1, dims=dim)).mean().square() for dim in (3, 2)), total)
            if level.shape[2] <= 8:
                break
            level = torch.nn.functional.avg_pool2d(level, kernel_size=2)
    return total


def project(G: Generator, target: torch.Tensor, features: Features, c: torch.Tensor, *, num_steps: int = 1000, seed: int = 303) -> Iterator[Step]:
    """Yield the state after each of `num_steps` steps; the last one's w is the result. G is left as it is.

    target: [C, H, W] in [0, 255] of G's channels and size; c: label [1, c_dim]; all on G's device. One w for all layers and the noise
    images of all layers are optimised together with Adam; the latter keep zero mean and unit power and are dropped in the end.
    """
    device = device_of(G)
    generator = torch.Generator(device).manual_seed(seed)
    G = copy.deepcopy(G)
    w_avg, w_std = w_statistics(G, c)
    noises = [buffer for name, buffer in G.synthesis.named_buffers() if name.endswith('noise_const')]
    for noise in noises:
        noise.copy_(torch.randn(noise.shape, generator=generator, device=device)).requires_grad_(True)
    w = w_avg.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([w, *noises], betas=(0.9, 0.999))
    with torch.no_grad():
        wanted = features(target[None].to(torch.float32))
    for step in range(num_steps):
        optimizer.param_groups[0]['lr'], spread = schedule(step / num_steps)
        jitter = torch.randn(w.shape, generator=generator, device=device) * (w_std * spread)
        img = G.synthesis((w + jitter).expand(-1, G.num_ws, -1), noise_mode='const', force_fp32=device.type == 'cpu')
        dist = (features((img + 1) * 127.5) - wanted).square().sum()
        assert dist.requires_grad, 'the features must be differentiable'
        loss = dist + NOISE_WEIGHT * noise_regularisation(noises)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield Step(w.detach().clone(), dist.item(), loss.item())
        with torch.no_grad():
            for noise in noises:
                noise.sub_(noise.mean())
                noise.mul_(noise.square().mean().rsqrt())


def discriminator_features(D: Discriminator) -> Features:
    """Perceptual features without a download: D's activations after every block, of unit length per pixel, as LPIPS (1801.03924) takes those of a
    classifier, and the pixels themselves, without which colours of another domain than D's come out wrong. All levels are averages over pixels."""
    def features(img: torch.Tensor) -> torch.Tensor:
        x, img = None, img / 127.5 - 1
        levels = [img.flatten(1) / D.img_resolution]
        for res in D.block_resolutions:
            x, img = D.run(x, img, [res], force_fp32=True)
            levels.append((x / (x.norm(dim=1, keepdim=True) + 1e-8)).flatten(1) / x.shape[2])
        return torch.cat(levels, dim=1)  # [N, F]
    return features


def vgg16_features(lpips: Features) -> Features:
    """The official features: those of `Detector.lpips` of the VGG16 (detectors.py), of large images averaged down to 256 x 256 first."""
    def features(img: torch.Tensor) -> torch.Tensor:
        return lpips(torch.nn.functional.interpolate(img, size=(256, 256), mode='area') if img.shape[2] > 256 else img)
    return features


def open_features(kind: str, network: str, detector: str | os.PathLike | None, trust_detector: bool, device: torch.device, echo: Echo) -> Features:
    """kind: vgg16, from the file `detector` if given, or discriminator, that of the pickle `network`. Raises UserError."""
    if kind == 'discriminator':
        echo("Pictures are compared by this pickle's own discriminator, not by the official VGG16: the w differs from the official projector's.")
        return discriminator_features(snapshots.load(downloads.resolve(network)).D.to(device))
    try:
        return vgg16_features(detectors.load(detectors.VGG16, path=detector, trust=trust_detector, device=device).lpips)
    except UserError as err:
        raise UserError(f"{err}\nTo project without the VGG16, by the pickle's own discriminator, pass --features=discriminator.") from err


def read_target(path: str | os.PathLike, G: Generator) -> torch.Tensor:
    """An image file as G would make it: uint8 [C, H, W], its largest central square resized as by the official tool, upright and opaque.

    Raises UserError if it is not a readable image.
    """
    try:
        with open(path, 'rb') as f, open_image(f) as file:
            opaque = flatten(file, 'white', 'L' if G.img_channels == 1 else 'RGB')
        img = reshape(opaque, PrepareOptions(width=G.img_resolution, height=G.img_resolution))
    except (OSError, ValueError, SyntaxError, SkipImage, PIL.Image.DecompressionBombError) as err:
        raise UserError(f'--target={path}: expected an image file; {err}') from err
    return torch.from_numpy(np.array(img)).reshape(G.img_resolution, G.img_resolution, G.img_channels).permute(2, 0, 1)  # [HWC] => [CHW]


def run(
    network: str,
    target: str | os.PathLike,
    outdir: str | os.PathLike,
    *,
    features: str = 'vgg16',
    detector: str | os.PathLike | None = None,
    trust_detector: bool = False,
    num_steps: int = 1000,
    seed: int = 303,
    save_video: bool = True,
    class_idx: int | None = None,
    device: str = 'auto',
    echo: Echo = print,
) -> None:
    """Write target.png, proj.png, projected_w.npz (`w` [1, num_ws, w_dim] float32) and, if asked for and ffmpeg is there, proj.mp4.

    features, detector, trust_detector: as of `open_features`. Raises UserError before the optimisation if anything is wrong.
    """
    if not Path(target).is_file():
        raise UserError(f'--target={target}: no such file; expected an image')
    G = open_generator(network, device)
    c = class_label(G, class_idx, echo)
    pixels = read_target(target, G)
    function = open_features(features, network, detector, trust_detector, c.device, echo)
    if save_video and find_ffmpeg() is None:
        echo(f'No proj.mp4: that needs ffmpeg. {GET_FFMPEG}')
        save_video = False
    save_png(pixels, Path(outdir) / 'target.png')

    history = []
    with tqdm(total=num_steps, unit='step', disable=None) as bar:
        for step in project(G, pixels.to(c.device), function, c, num_steps=num_steps, seed=seed):
            history.append(step.w)
            bar.set_postfix_str(f'distance {step.dist:.4f}', refresh=False)
            bar.update()
    with atomic_write(Path(outdir) / 'projected_w.npz') as tmp:
        np.savez(tmp, w=step.w.expand(-1, G.num_ws, -1).cpu().numpy())
    save_png(next(pictures(G, history[-1:])), Path(outdir) / 'proj.png')
    if save_video:
        shown = as_rgb(pixels)
        images = tqdm(pictures(G, history), total=num_steps, unit='frame', disable=None)
        write_video(Path(outdir) / 'proj.mp4', (np.concatenate([shown, as_rgb(img)], axis=1) for img in images), fps=10)
    names = ['target.png', 'proj.png', 'projected_w.npz', *(['proj.mp4'] if save_video else [])]
    echo(f'Distance {step.dist:.4f} after {num_steps} steps. Wrote {", ".join(names)} to {outdir}')


@torch.no_grad()
def pictures(G: Generator, ws: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """uint8 images [C, H, W] on the CPU of every w [1, 1, w_dim], with the noise that G holds."""
    for w in ws:
        img = G.synthesis(w.expand(-1, G.num_ws, -1), noise_mode='const', force_fp32=w.device.type == 'cpu')
        yield to_projector_uint8(img[0]).cpu()


def to_projector_uint8(img: torch.Tensor) -> torch.Tensor:
    """Float images, nominal range [-1, 1] => uint8: trunc(clamp((x + 1) * 127.5, 0, 255)), the projector's rule, half a step darker than others'."""
    return ((img + 1) * 127.5).clamp(0, 255).to(torch.uint8)
