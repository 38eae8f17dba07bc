"""The encoder of Mind2Mind: images -> what G's high-res part takes, at one slice.

An official G is no autoencoder, so E is made to invert its frozen high-res part g1: g1(E(image)) resembles the image. First E learns to find
the true (x_r, img_r, w) of images of the source G, once per source network and slice, then for a short time to reconstruct the target
images through g1. Source: Mind2Mind (arXiv 1906.11613), whose c1 and g1 form an autoencoder; here E = head(c1), with D's own c1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from m2m_stylegan import slicing

Batch = dict[str, torch.Tensor]

SENSITIVITY_ITEMS = 128
STATISTICS_ITEMS = 64
PRIOR_WEIGHT = 0.001


class _Residual(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv0 = torch.nn.Conv2d(width, width, 3, padding=1)
        self.conv1 = torch.nn.Conv2d(width, width, 3, padding=1)
        torch.nn.init.zeros_(self.conv1.weight)

    def forward(self, x):
        return x + self.conv1(F.leaky_relu(self.conv0(F.leaky_relu(x, 0.2)), 0.2))


class WHead(torch.nn.Module):
    """p [N, P] => w [N, w_dim], predicted in units of its mean and standard deviation over latents of the source G."""

    def __init__(self, p_dim: int, w_dim: int):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.LeakyReLU(0.2), torch.nn.Linear(p_dim, 2 * w_dim), torch.nn.LeakyReLU(0.2),
                                          torch.nn.Linear(2 * w_dim, w_dim))
        self.register_buffer('mean', torch.zeros(w_dim))
        self.register_buffer('std', torch.ones(w_dim))

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return self.layers(p) * self.std + self.mean

    def normalize(self, w: torch.Tensor) -> torch.Tensor:
        """w in these units."""
        return (w - self.mean) / self.std


class Encoder(torch.nn.Module):
    """(h, y) => (x, img, w): head of the encoder. What is not there at a slice is None.

    h [N, h_channels, r', r'] is c1(image) and y [N, img_channels, r', r'] the image averaged over squares; r' is the slice resolution, 4 for slice
    w. Outputs: x [N, x_channels, r, r] and img [N, img_channels, r, r] (if G has one), as of slicing.g_low, and w [N, w_dim]. All float32.
    Everything is predicted in units of its mean and standard deviation over images of the source G.
    """

    def __init__(self, h_channels: int, img_channels: int, x_channels: int, has_img: bool, w_dim: int, width: int):
        super().__init__()
        self.x_channels, self.out_channels = x_channels, x_channels + (img_channels if has_img else 0)
        self.stem = torch.nn.Conv2d(h_channels + img_channels, width, 3, padding=1)
        self.trunk = torch.nn.Sequential(_Residual(width), _Residual(width))
        self.to_w = WHead(2 * width, w_dim)
        if x_channels:
            self.register_buffer('x_mean', torch.zeros(self.out_channels))
            self.register_buffer('x_std', torch.ones(self.out_channels))
            self.to_x = torch.nn.Conv2d(width, self.out_channels, 3, padding=1)

    def forward(self, h: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        t = self.trunk(self.stem(torch.cat([h, y], dim=1)))
        w = self.to_w(torch.cat([t.mean(dim=(2, 3)), t.amax(dim=(2, 3))], dim=1))
        if not self.x_channels:
            return None, None, w
        xi = self.to_x(F.leaky_relu(t, 0.2)) * _channels(self.x_std) + _channels(self.x_mean)
        x, img = xi[:, :self.x_channels], xi[:, self.x_channels:]
        return x, img if img.shape[1] else None, w


def _channels(values: torch.Tensor) -> torch.Tensor:
    return values[None, :, None, None]


def encoder_resolution(res: int) -> int:
    """Resolution at which the encoder works at slice `res`: D's features end at 4 x 4."""
    return max(res, 4)


@torch.no_grad()
def inputs_of(D, img: torch.Tensor, res: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoder takes of images [N, C, R, R] in [-1, 1]: (h, y), float32. One pass through D's high-res part."""
    res = encoder_resolution(res)
    h, _ = slicing.d_high(D, img, res, force_fp32=True)
    return h, F.avg_pool2d(img, img.shape[-1] // res)


def decode(G, code: tuple, res: int, noise_mode: str = 'const') -> torch.Tensor:
    """Images [N, C, R, R] of codes (x, img, w) through G's high-res part."""
    x, img, w = code
    return slicing.g_high(G, x, img, w.unsqueeze(1).expand(-1, G.num_ws, -1), res, noise_mode=noise_mode, force_fp32=True)


def items_per_pass(resolution: int) -> int:
    """Images that go through high-res blocks at once, in float32: as many pixels as 8 images of 256 x 256 have."""
    return max(1, min(32, 8 * 256 ** 2 // resolution ** 2))


@torch.no_grad()
def source_codes(G, num: int, c: torch.Tensor, res: int) -> tuple:
    """Codes (x, img, w) of random latents with labels c [N, c_dim]."""
    ws = G.mapping(torch.randn([num, G.z_dim], device=c.device), c)
    return *slicing.g_low(G, ws, res, force_fp32=True), ws[:, 0]


@torch.no_grad()
def source_samples(G, num: int, c: torch.Tensor, res: int) -> tuple[tuple, torch.Tensor]:
    """Codes (x, img, w) and images [N, C, R, R] of random latents with labels c [N, c_dim]."""
    code = source_codes(G, num, c, res)
    return code, decode(G, code, res, noise_mode='random')


def new_encoder(G, D, res: int, labels: Callable[[int], torch.Tensor]) -> Encoder:
    """An untrained encoder for slice `res` of these networks, with their statistics. Draws from the global RNG."""
    x, img, w = source_codes(G, STATISTICS_ITEMS, labels(STATISTICS_ITEMS), res)
    h, _ = inputs_of(D, torch.zeros([1, G.img_channels, G.img_resolution, G.img_resolution], device=w.device), res)
    encoder = Encoder(h.shape[1], D.img_channels, 0 if x is None else x.shape[1], img is not None, G.w_dim, max(h.shape[1], 32)).to(w.device)
    encoder.to_w.mean.copy_(w.mean(dim=0))
    encoder.to_w.std.copy_(w.std(dim=0) + 1e-8)
    if x is not None:
        xi = x if img is None else torch.cat([x, img], dim=1)
        encoder.x_mean.copy_(xi.mean(dim=(0, 2, 3)))
        encoder.x_std.copy_(xi.std(dim=(0, 2, 3)) + 1e-8)
    return encoder


def source_loss(encoder: Encoder, code: tuple, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the code that G made the image from, in standard deviations: scalar."""
    found = encoder(h, y)
    terms = [((found[2] - code[2]) / encoder.to_w.std).square().mean()]
    if code[0] is not None:
        pairs = [(a, b) for a, b in zip(found[:2], code[:2], strict=True) if b is not None]
        error = torch.cat([a for a, _ in pairs], dim=1) - torch.cat([b for _, b in pairs], dim=1)
        terms.append((error / _channels(encoder.x_std)).square().mean())
    return sum(terms)


def target_loss(encoder: Encoder, G, D, h: torch.Tensor, y: torch.Tensor, img: torch.Tensor, res: int) -> torch.Tensor:
    """4 |g1(E(img)) - img|_1 + relative squared distance of D's high-res features, the perceptual loss that costs no further network
    + PRIOR_WEIGHT (w in standard deviations of the source's)^2, without which w goes where no latent leads: scalar."""
    code = encoder(h, y)
    found = decode(G, code, res, noise_mode='random')
    features, _ = slicing.d_high(D, found, encoder_resolution(res), force_fp32=True)
    scale = h.square().mean(dim=(0, 2, 3), keepdim=True) + 1e-8
    prior = encoder.to_w.normalize(code[2]).square().mean()
    return 4 * (found - img).abs().mean() + ((features - h).square() / scale).mean() + PRIOR_WEIGHT * prior


@torch.no_grad()
def sensitivity(G, codes: Batch, res: int, device: torch.device | None = None) -> torch.Tensor:
    """Matrix S [K, K] that measures differences of (x, img) by what g1 shows of them at the target images. Draws from the global RNG.

    codes: x [M, C, r, r], img [M, img_channels, r, r] (absent where G has none), w [M, w_dim], float32. device: that of G, if codes are elsewhere.
    S is the symmetric root of the mean of J^T v (J^T v)^T over images, positions and random v, J the Jacobian of g1 (Hutchinson): to first order
    |S e|^2, summed over positions, is the squared difference of pixels, but for what neighbouring positions do together. It is scaled so that S
    applied to centred codes has variance 1. What one number per channel instead loses: docs/method.md.
    """
    names, few = [name for name in ('x', 'img') if name in codes], min(4, items_per_pass(G.img_resolution))
    device = device or codes['w'].device
    total = torch.zeros([], dtype=torch.float64, device=device)
    for index in torch.randint(len(codes['w']), [SENSITIVITY_ITEMS]).split(few):
        parts = {name: codes[name][index].to(device).requires_grad_(True) for name in names}
        with torch.enable_grad():
            images = decode(G, (parts['x'], parts.get('img'), codes['w'][index].to(device)), res)
            grads = torch.autograd.grad((images * torch.randn_like(images)).sum(), list(parts.values()))
        grads = torch.cat(grads, dim=1).transpose(0, 1).flatten(1)  # [K, N * r * r]
        total = total + (grads @ grads.T).double()
    values, vectors = torch.linalg.eigh(total)
    root = ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).float()
    means, squares, num = [codes[name].mean(dim=(0, 2, 3), keepdim=True) for name in names], [], 0
    for parts in zip(*[codes[name].split(few) for name in names], strict=True):  # not at once: at 1024 px that would take 30 GiB
        seen = apply(root, torch.cat([part - mean for part, mean in zip(parts, means, strict=True)], dim=1).to(device))
        squares.append(seen.square().sum(dtype=torch.float64))
        num += seen.numel()
    return root / (sum(squares) / num).sqrt().float().clamp_min(1e-8)


def apply(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """matrix [K, K] times the channels of values [N, K, r, r], at every position."""
    return F.conv2d(values, matrix[:, :, None, None])
