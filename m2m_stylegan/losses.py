"""The StyleGAN2 objectives as functions of logits, images and latents; they know no network.

Sources: non-saturating logistic loss (Goodfellow et al., 1406.2661), R1 (Mescheder et al., 1801.04406, eq. 9), path length regularisation
(Karras et al., 1912.04958, section 3.2 and appendix B), gradient penalty (Gulrajani et al., 1704.00028, eq. 3).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(fake)): logits [N, 1] => loss per sample [N, 1]."""
    return F.softplus(-fake_logits)


def discriminator_fake_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log(1 - sigmoid(D(fake))): logits [N, 1] => loss per sample [N, 1]."""
    return F.softplus(fake_logits)


def discriminator_real_loss(real_logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(real)): logits [N, 1] => loss per sample [N, 1]."""
    return F.softplus(-real_logits)


def r1_penalty(real_logits: torch.Tensor, real_img: torch.Tensor) -> torch.Tensor:
    """Squared norm of the gradient of each sample's logit with respect to its own image, differentiable.

    real_logits: [N, 1], computed from real_img [N, ...], which must require grad. Returns [N], not yet times gamma / 2.
    """
    grads, = torch.autograd.grad(real_logits.sum(), real_img, create_graph=True)
    return grads.square().flatten(1).sum(dim=1)


def gradient_penalty(critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(|gradient of the critic| - 1)^2 at random points between real and fake vectors [N, F], differentiable.

    critic: vectors [N, F] => scores [N, 1]. Returns [N], not yet times its weight.
    """
    t = torch.rand([real.shape[0], 1], device=real.device)
    between = (t * real + (1 - t) * fake).detach().requires_grad_(True)
    grads, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (grads.norm(dim=1) - 1).square()


def path_lengths(img: torch.Tensor, ws: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """|J^T y| for y = noise / sqrt(H W), differentiable.

    img: [N, C, H, W] made from ws [N, K, w_dim]; noise: standard normal of img's shape. Returns [N]: root mean square over the K layers
    of the norm of the gradient.
    """
    y = noise / math.sqrt(img.shape[2] * img.shape[3])
    grads, = torch.autograd.grad((img * y).sum(), ws, create_graph=True)
    return grads.square().sum(dim=2).mean(dim=1).sqrt()


def path_length_penalty(lengths: torch.Tensor, pl_mean: torch.Tensor, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared deviation of the lengths [N] from their running mean [] after it has taken this batch in (not detached).

    Returns the penalty [N] and the new running mean [], detached.
    """
    pl_mean = pl_mean.lerp(lengths.mean(), decay)
    return (lengths - pl_mean).square(), pl_mean.detach()


def ema_beta(batch_size: int, cur_nimg: int, ema_kimg: float, ema_rampup: float | None) -> float:
    """Decay of the generator's moving average for one step: half-life of ema_kimg thousand images, shorter at the start of a run."""
    ema_nimg = ema_kimg * 1000
    if ema_rampup is not None:
        ema_nimg = min(ema_nimg, cur_nimg * ema_rampup)
    return 0.5 ** (batch_size / max(ema_nimg, 1e-8))


def lazy_adam_kwargs(lr: float, betas: tuple[float, float], interval: int | None) -> dict:
    """Adam settings that make one main step per batch plus one regularising step per `interval` batches equal to joint steps.

    Source: 1912.04958, appendix B. interval None: no lazy regularisation, settings unchanged.
    """
    ratio = 1.0 if interval is None else interval / (interval + 1)
    return {'lr': lr * ratio, 'betas': tuple(float(beta) ** ratio for beta in betas), 'eps': 1e-8}


Report = Callable[[str, torch.Tensor], None]  # (official statistic name, values per sample)
