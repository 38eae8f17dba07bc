"""Low-res training in feature space: no high-res block of either network runs here, forward or backward.

The cached codes of the target images, (x, img, w) of autoencoder.Encoder, split the job of G's low-res part in two:
  mapping network    against a small critic on w, with the encoder's w as reals: the high-quality experiment of Mind2Mind (arXiv 1906.11613)
  synthesis blocks   regression on pairs: run on the w of an image they are to make its (x, img), in the metric of what g1 shows of it
The w of each image moves along with the synthesis blocks, so that images get those w from which they can be made, as in Generative Latent
Optimization (arXiv 1707.05776). At slice w there are no synthesis blocks to train, and w stays. What else was tried, and why this was kept:
docs/method.md.
"""

import dataclasses
import itertools

import torch

from m2m_stylegan import autoencoder, distributed, losses, slicing
from m2m_stylegan.losses import Report
from m2m_stylegan.phases import Batch, Phase

CRITIC_WIDTH, CRITIC_LAYERS = 256, 3
REAL_MEMORY = 100  # batches
MAPPING_LR_MULTIPLIER = 0.01  # of the official mapping network, whose fully connected layers keep their weights divided by it


@dataclasses.dataclass(frozen=True)
class CodeOptions:
    """Weights and rates of low-res training in feature space."""

    critic: str = 'logistic'    # with R1, or 'wgan-gp'
    n_critic: int = 5           # steps of the critic for one of the mapping network, for 'wgan-gp'
    gp_weight: float = 10.0
    drift_weight: float = 1e-2
    r1_gamma: float = 1.0       # with respect to w in its standard deviations
    moment_weight: float = 1.0  # of matching mean and covariance, which brings the mapping network near at once (docs/method.md)
    moment_items: int = 256     # latents per step for that
    map_lr: float = 1e-3        # of critic and mapping network
    pair_lr: float = 1e-2       # of the synthesis blocks
    w_lr: float = 1e-2          # of the w of the images, in standard deviations of the source's w
    w_jitter: float = 0.1       # noise on w, in standard deviations of the source's w: what lies between the images is trained, too
    w_anchor: float = 0.001     # weight of keeping w where the encoder found it, without which g1 would show something else


class Critic(torch.nn.Module):
    """w [N, w_dim] and c [N, c_dim] => scores [N, 1]. An MLP on w in standard deviations of the source's w."""

    def __init__(self, w_dim: int, c_dim: int):
        super().__init__()
        sizes = [w_dim + c_dim, *[CRITIC_WIDTH] * CRITIC_LAYERS]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (torch.nn.Linear(a, b), torch.nn.LeakyReLU(0.2))]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(CRITIC_WIDTH, 1))
        self.register_buffer('mean', torch.zeros(w_dim))
        self.register_buffer('std', torch.ones(w_dim))
        # Running first and second moments of the real w, normalised, and the weight that they have gathered.
        self.register_buffer('real_mean', torch.zeros(w_dim))
        self.register_buffer('real_square', torch.zeros(w_dim, w_dim))
        self.register_buffer('real_weight', torch.zeros([]))

    @torch.no_grad()
    def see(self, normalized: torch.Tensor) -> None:
        """Take a batch of real w [N, w_dim], of all processes, into the running moments, whose memory is REAL_MEMORY batches."""
        mean, square = normalized.mean(dim=0), normalized.T @ normalized / len(normalized)
        distributed.average_([mean, square])
        for buffer, value in [(self.real_mean, mean), (self.real_square, square), (self.real_weight, torch.ones_like(self.real_weight))]:
            buffer.lerp_(value, 1 / REAL_MEMORY)

    def moment_distance(self, normalized: torch.Tensor) -> torch.Tensor:
        """|difference of means|^2 + |difference of covariances|_F of generated w [N, w_dim] and the reals seen so far, differentiable: scalar.

        Zero as long as none has been seen; asking whether would wait for the device.
        """
        weight = self.real_weight.clamp_min(1e-8)
        mean, square = self.real_mean / weight, self.real_square / weight
        fake_mean = normalized.mean(dim=0)
        centred = normalized - fake_mean
        cov = centred.T @ centred / len(normalized)  # torch.cov would wait for the device, to look at weights that there are not
        distance = (fake_mean - mean).square().sum() + (cov - square + mean.outer(mean)).norm()
        return distance * (self.real_weight > 0)

    def normalize(self, w: torch.Tensor) -> torch.Tensor:
        """w in the units in which the gradient penalties are taken."""
        return (w - self.mean) / self.std

    def forward(self, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.score(self.normalize(w), c)

    def score(self, normalized: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Like forward, for normalised w."""
        return self.layers(torch.cat([normalized, c], dim=1))


class ImageLatents(torch.nn.Module):
    """How far the w of each target image has moved from where the encoder found it: [num_items, w_dim], in standard deviations of the source's w."""

    def __init__(self, num_items: int, w_dim: int):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.zeros(num_items, w_dim))


class CodeGame:
    """The objectives of low-res training in feature space; `real` holds index, w, c and, at spatial slices, x and img (if G has one)."""

    def __init__(self, G, image_latents: ImageLatents, critic: Critic, metric: torch.Tensor | None, res: int, options: CodeOptions, report: Report,
                 block_kwargs: dict):
        """metric: [K, K] for the channels of (x, img), of autoencoder.sensitivity; None at slice w."""
        self.G, self.image_latents, self.critic, self.metric, self.res, self.options = G, image_latents, critic, metric, res, options
        self.report, self.block_kwargs = report, block_kwargs
        self.pl_mean = torch.zeros([], device=critic.mean.device)  # of no use here; every game has one, and checkpoints store it

    def draw(self, c: torch.Tensor) -> Batch:
        """Fresh latents for the labels c [N, c_dim] (on the training device)."""
        return {'z': torch.randn([c.shape[0], self.G.z_dim], device=c.device), 'c': c}

    def g_main(self, latents: Batch, real: Batch, gain: float) -> None:
        """Mapping network against the critic."""
        options, critic, c = self.options, self.critic, latents['c']
        score = critic(self.G.mapping(latents['z'], c)[:, 0], c)
        loss = -score if options.critic == 'wgan-gp' else losses.generator_loss(score)
        self._report_scores(score, 'fake')
        self.report('Loss/G/loss', loss.detach())
        total = loss.mean()
        if options.moment_weight:
            c = c.repeat([-(-options.moment_items // len(c)), 1])
            z = torch.randn([len(c), self.G.z_dim], device=c.device)
            distance = critic.moment_distance(critic.normalize(self.G.mapping(z, c, skip_w_avg_update=True)[:, 0]))
            self.report('Loss/G/moments', distance.detach())
            total = total + options.moment_weight * distance
        (total * gain).backward()

    def d_main(self, latents: Batch, real: Batch, gain: float) -> None:
        """Critic, with its gradient penalty in every step: it is an MLP."""
        options, critic, c = self.options, self.critic, real['c']
        with torch.no_grad():
            fake = critic.normalize(self.G.mapping(latents['z'], latents['c'], skip_w_avg_update=True)[:, 0])
            found = self._w_of(real)
        critic.see(found)
        found.requires_grad_(options.critic == 'logistic')
        score_fake, score_real = critic.score(fake, latents['c']), critic.score(found, c)
        if options.critic == 'wgan-gp':
            penalty = losses.gradient_penalty(lambda w: critic.score(w, c), found, fake)
            loss = score_fake - score_real + options.drift_weight * score_real.square() + options.gp_weight * penalty.unsqueeze(1)
        else:
            penalty = losses.r1_penalty(score_real, found)
            loss = losses.discriminator_fake_loss(score_fake) + losses.discriminator_real_loss(score_real)
            loss = loss + options.r1_gamma / 2 * penalty.unsqueeze(1)
        self._report_scores(score_real, 'real')
        self.report('Loss/D/loss', loss.detach())
        self.report('Loss/r1_penalty', penalty.detach())
        (loss.mean() * gain).backward()

    def g_pairs(self, latents: Batch, real: Batch, gain: float) -> None:
        """Synthesis blocks and w of the images: the code of an image from its w."""
        critic = self.critic
        ws = (self._w_of(real) * critic.std + critic.mean).unsqueeze(1).expand(-1, self.G.num_ws, -1)
        x, img = slicing.g_low(self.G, ws, self.res, **self.block_kwargs)
        pairs = [(found, real[name]) for name, found in [('x', x), ('img', img)] if found is not None]
        error = autoencoder.apply(self.metric, torch.cat([found.float() - wanted for found, wanted in pairs], dim=1))
        anchor = self.image_latents.offset[real['index']].square().mean(dim=1)
        loss = error.square().mean(dim=(1, 2, 3))
        self.report('Loss/G/pairs', loss.detach())
        ((loss + self.options.w_anchor * anchor).mean() * gain).backward()

    def _w_of(self, real: Batch) -> torch.Tensor:
        """Jittered w of the images, normalised."""
        w = self.critic.normalize(real['w']) + self.image_latents.offset[real['index']]
        return w + self.options.w_jitter * torch.randn_like(w)

    def _report_scores(self, score: torch.Tensor, kind: str) -> None:
        self.report(f'Loss/scores/{kind}', score.detach())
        self.report(f'Loss/signs/{kind}', score.detach().sign())

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """What is trained besides G: goes into checkpoints."""
        return {'critic': self.critic, 'image_latents': self.image_latents}


def make_game(G, prepared, options: CodeOptions, report: Report, block_kwargs: dict) -> CodeGame:
    """The game on prepared codes (preparation.Prepared), with a new critic. Draws from the global RNG."""
    statistics = prepared.encoder.to_w
    critic = Critic(G.w_dim, G.c_dim).to(statistics.std.device).requires_grad_(False)
    critic.mean.copy_(statistics.mean)
    critic.std.copy_(statistics.std)
    image_latents = ImageLatents(len(prepared.codes), G.w_dim).to(statistics.std.device).requires_grad_(False)
    return CodeGame(G, image_latents, critic, prepared.metric, prepared.res, options, report, block_kwargs)


def make_phases(game: CodeGame) -> list[Phase]:
    """Gmain (mapping network), Gpairs (synthesis blocks and w of the images; not at slice w), Dmain (critic)."""
    options, G = game.options, game.G
    betas = (0.0, 0.5) if options.critic == 'wgan-gp' else (0.0, 0.99)
    scaled = [p for name, p in G.mapping.named_parameters() if not name.startswith('embed.')]
    groups = [{'params': scaled, 'lr': options.map_lr / MAPPING_LR_MULTIPLIER}]
    embed = [p for name, p in G.mapping.named_parameters() if name.startswith('embed.')]
    if embed:
        groups.append({'params': embed, 'lr': options.map_lr})

    def phase(name: str, groups: list[dict], betas: tuple[float, float], interval: int, accumulate) -> Phase:
        optimizer = torch.optim.Adam(groups, betas=betas, fused=True)
        return Phase(name, [p for group in optimizer.param_groups for p in group['params']], optimizer, interval, accumulate, gain=1.0)

    found = [phase('Gmain', groups, betas, options.n_critic if options.critic == 'wgan-gp' else 1, game.g_main)]
    if game.metric is not None:
        synthesis = [p for name, p in G.synthesis.named_parameters() if slicing.is_low_res(name, game.res)]
        # Without momentum: an image that is not in the batch has no gradient, and is to stay where it is.
        moved = {'params': [game.image_latents.offset], 'lr': options.w_lr, 'betas': (0.0, 0.99)}
        found.append(phase('Gpairs', [{'params': synthesis, 'lr': options.pair_lr}, moved], (0.9, 0.99), 1, game.g_pairs))
    return [*found, phase('Dmain', [{'params': list(game.critic.parameters()), 'lr': options.map_lr}], betas, 1, game.d_main)]
