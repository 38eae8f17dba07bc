"""The four phases of StyleGAN2 training, for whole networks and for slices.

A phase trains one network on one objective: Gmain, Greg (path length), Dmain, Dreg (R1), with lazy regularisation. What a generated
image is made from differs between `--train` modes and is hidden in a *source*: `LatentSource` runs the whole generator,
`BankSource` starts from cached low-res features and runs only the high-res blocks.
"""

import dataclasses
from collections.abc import Callable

import torch

from m2m_stylegan import distributed, losses, slicing
from m2m_stylegan.losses import Report

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights of the objective, with the official names and defaults."""

    r1_gamma: float = 10.0
    style_mixing_prob: float = 0.9
    pl_batch_shrink: int = 2
    pl_decay: float = 0.01
    pl_weight: float = 2.0
    G_reg_interval: int = 4
    D_reg_interval: int = 16


def mix_styles(G, ws: torch.Tensor, c: torch.Tensor, prob: float) -> torch.Tensor:
    """Style mixing regularisation (1812.04948, section 3.1): replace ws [N, num_ws, w_dim] from a random layer on by those of new latents."""
    if prob > 0:
        cutoff = int(torch.randint(1, ws.shape[1], []))
        if torch.rand([]) < prob:
            z = torch.randn([ws.shape[0], G.z_dim], device=ws.device)
            ws = torch.cat([ws[:, :cutoff], G.mapping(z, c, skip_w_avg_update=True)[:, cutoff:]], dim=1)
    return ws


class LatentSource:
    """Images from z and c through the whole generator."""

    def __init__(self, G, style_mixing_prob: float, block_kwargs: dict):
        self.G, self.style_mixing_prob, self.block_kwargs = G, style_mixing_prob, block_kwargs

    def draw(self, c: torch.Tensor) -> Batch:
        """Fresh latents for the labels c [N, c_dim] (on the training device)."""
        return {'z': torch.randn([c.shape[0], self.G.z_dim], device=c.device), 'c': c}

    def generate(self, latents: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images [N, C, R, R] and the ws [N, num_ws, w_dim] with respect to which path lengths are measured."""
        ws = mix_styles(self.G, self.G.mapping(latents['z'], latents['c']), latents['c'], self.style_mixing_prob)
        return self.G.synthesis(ws, **self.block_kwargs), ws


class BankSource:
    """Images from cached low-res features through the high-res blocks only."""

    def __init__(self, G, bank, slice_res: int, block_kwargs: dict):
        self.G, self.bank, self.slice_res, self.block_kwargs = G, bank, slice_res, block_kwargs
        self.first_w = G.synthesis.first_w(2 * slice_res)

    def draw(self, c: torch.Tensor) -> Batch:
        """Features of c.shape[0] random items of the bank; labels are the bank's own, since the features were made with them."""
        return self.bank.sample(c.shape[0])

    def generate(self, latents: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images [N, C, R, R] and the ws of the high-res blocks [N, K, w_dim], the only ones their path length depends on."""
        ws = latents['ws']
        ws_high = ws[:, self.first_w:].requires_grad_(torch.is_grad_enabled())
        ws = torch.cat([ws[:, :self.first_w], ws_high], dim=1)
        return slicing.g_high(self.G, latents['x'], latents.get('img'), ws, self.slice_res, **self.block_kwargs), ws_high


class Game:
    """Generator and discriminator with everything between them: source of latents, augmentation, loss weights, path-length mean."""

    def __init__(self, source, D: Callable, augment: Callable[[torch.Tensor], torch.Tensor], options: LossOptions, report: Report,
                 device: torch.device):
        self.source, self.D, self.augment, self.options, self.report = source, D, augment, options, report
        self.pl_mean = torch.zeros([], device=device)

    def _logits(self, img: torch.Tensor, c: torch.Tensor, kind: str) -> torch.Tensor:
        logits = self.D(self.augment(img), c)
        self.report(f'Loss/scores/{kind}', logits.detach())
        self.report(f'Loss/signs/{kind}', logits.detach().sign())
        return logits

    def g_main(self, latents: Batch, real: Batch, gain: float) -> None:
        img, _ = self.source.generate(latents)
        loss = losses.generator_loss(self._logits(img, latents['c'], 'fake'))
        self.report('Loss/G/loss', loss.detach())
        (loss.mean() * gain).backward()

    def g_reg(self, latents: Batch, real: Batch, gain: float) -> None:
        num = max(latents['c'].shape[0] // self.options.pl_batch_shrink, 1)
        img, ws = self.source.generate({name: value[:num] for name, value in latents.items()})
        lengths = losses.path_lengths(img, ws, torch.randn_like(img))
        penalty, self.pl_mean = losses.path_length_penalty(lengths, self.pl_mean, self.options.pl_decay)
        loss = penalty * self.options.pl_weight
        self.report('Loss/pl_penalty', penalty.detach())
        self.report('Loss/G/reg', loss.detach())
        (loss.mean() * gain).backward()

    def d_main(self, latents: Batch, real: Batch, gain: float) -> None:
        with torch.no_grad():
            img, _ = self.source.generate(latents)
        # Two backward calls, so that only one graph of D is alive at a time.
        fake_loss = losses.discriminator_fake_loss(self._logits(img, latents['c'], 'fake'))
        (fake_loss.mean() * gain).backward()
        real_loss = losses.discriminator_real_loss(self._logits(real['img'], real['c'], 'real'))
        self.report('Loss/D/loss', (fake_loss + real_loss).detach())
        (real_loss.mean() * gain).backward()

    def d_reg(self, latents: Batch, real: Batch, gain: float) -> None:
        img = real['img'].detach().requires_grad_(True)
        penalty = losses.r1_penalty(self._logits(img, real['c'], 'real'), img)
        loss = penalty * (self.options.r1_gamma / 2)
        self.report('Loss/r1_penalty', penalty.detach())
        self.report('Loss/D/reg', loss.detach())
        (loss.mean() * gain).backward()


@dataclasses.dataclass(frozen=True)
class Phase:
    """One kind of training step: run every `interval` batches, with its gradients multiplied by `gain`, else by `interval`."""

    name: str
    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    interval: int
    accumulate: Callable[[Batch, Batch, float], None]
    gain: float | None = None

    @property
    def optimizer_name(self) -> str:
        """What the optimiser is called in checkpoints: main and regularising phases share one."""
        return self.name.removesuffix('main').removesuffix('reg')


def make_phases(game: Game, G_params: list, D_params: list, G_lr: float, D_lr: float, betas: tuple[float, float] = (0.0, 0.99)) -> list[Phase]:
    """Gmain, Greg, Dmain, Dreg in the official order; a regulariser of weight 0 has no phase, but its Adam correction stays."""
    options, phases = game.options, []
    for params, lr, interval, main, reg, has_reg, letter in [
            (G_params, G_lr, options.G_reg_interval, game.g_main, game.g_reg, options.pl_weight != 0, 'G'),
            (D_params, D_lr, options.D_reg_interval, game.d_main, game.d_reg, options.r1_gamma != 0, 'D')]:
        optimizer = torch.optim.Adam(params, fused=True, **losses.lazy_adam_kwargs(lr, betas, interval))
        phases.append(Phase(f'{letter}main', params, optimizer, 1, main))
        if has_reg:
            phases.append(Phase(f'{letter}reg', params, optimizer, interval, reg))
    return phases


def run_phase(phase: Phase, latents: Batch, real: Batch, batch_gpu: int) -> None:
    """One optimiser step of one phase on a whole batch, accumulated over micro-batches of batch_gpu items.

    Gradients of the micro-batches are summed, those of the processes averaged, as in the official code.
    """
    gain = float(phase.interval if phase.gain is None else phase.gain)
    phase.optimizer.zero_grad(set_to_none=True)
    for param in phase.params:
        param.requires_grad_(True)
    try:
        for start in range(0, latents['c'].shape[0], batch_gpu):
            part = slice(start, start + batch_gpu)
            phase.accumulate({k: v[part] for k, v in latents.items()}, {k: v[part] for k, v in real.items()}, gain)
    finally:
        for param in phase.params:
            param.requires_grad_(False)
    for param in phase.params:
        if param.grad is None:  # Biases that a regulariser does not reach. Adam is to take a step of zero for them, as in the official code.
            param.grad = torch.zeros_like(param)
    grads = [param.grad for param in phase.params]
    distributed.average_(grads)
    for grad in grads:
        torch.nan_to_num(grad, nan=0, posinf=1e5, neginf=-1e5, out=grad)
    phase.optimizer.step()


@torch.no_grad()
def update_ema(G_ema: torch.nn.Module, G: torch.nn.Module, beta: float, names: frozenset[str]) -> None:
    """G_ema's parameters <- lerp(G, G_ema, beta), its buffers (w_avg, noise_const) <- G's; only tensors in `names` are touched."""
    pairs = [(p_ema, p) for (name, p_ema), p in zip(G_ema.named_parameters(), G.parameters(), strict=True) if name in names]
    if pairs:
        averages, params = map(list, zip(*pairs, strict=True))
        torch._foreach_copy_(averages, torch._foreach_lerp(params, averages, beta))  # two launches on a GPU, not two for each tensor
    for (name, b_ema), b in zip(G_ema.named_buffers(), G.buffers(), strict=True):
        if name in names:
            b_ema.copy_(b)
