"""Distances between sets of image features, by the official formulas. Pure maths: features in, numbers out.

Features are [N, F] of any float dtype; `real` and `fake` are always in this order. Which network made them decides what a number may
be called: FID, KID and IS are these formulas on the features of the 2015 Inception only.
"""

import numpy as np
import torch

from m2m_stylegan.errors import UserError

_PAIRS_AT_ONCE = 1 << 25  # distances in memory at a time in precision and recall: 128 MiB


def check_features(what: str, features: torch.Tensor, at_least: int = 2, first: int = 0) -> None:
    """Raise UserError unless `features` is a matrix of at least `at_least` rows, all finite.

    `what` names the images in the message, `first` is the number of the image in the first row.
    """
    if features.ndim != 2:
        raise UserError(f'{what}: expected features of shape [images, values], found {list(features.shape)}')
    if len(features) < at_least:
        raise UserError(f'{what}: found {len(features)}, this metric needs at least {at_least}')
    bad = (~torch.isfinite(features).all(dim=1)).nonzero().squeeze(1).tolist()
    if bad:
        more = f' and {len(bad) - 1} more' if len(bad) > 1 else ''
        raise UserError(f'{what}: the features of number {first + bad[0]}{more} are NaN or infinite. The network that made the images is broken '
                        '(look at its samples), or the detector is.')


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [F] and covariance [F, F] in float64; the covariance is E[x x^T] - mean mean^T, divided by N and not by N - 1."""
    check_features('features', features, at_least=1)
    x = features.double()
    mean = x.mean(dim=0)
    return mean, x.T @ x / len(x) - mean.outer(mean)


def frechet_distance(mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) in float64 (Heusel et al., arXiv 1706.08500, equation 6); never negative.

    With factors cov = B B^T the trace of the square root is the sum of the singular values of B1^T B2. Unlike the square root of the
    product this needs no general matrix square root and stays accurate for singular covariances: fewer images than features.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mean1, cov1, mean2, cov2))
    if not mean1.shape == mean2.shape or not cov1.shape == cov2.shape == (len(mean1), len(mean1)):
        raise UserError(f'features of different width cannot be compared: means {list(mean1.shape)} and {list(mean2.shape)}, '
                        f'covariances {list(cov1.shape)} and {list(cov2.shape)}')
    for i, x in enumerate((mean1, cov1, mean2, cov2)):
        if not torch.isfinite(x).all():
            raise UserError(f'the {"covariance" if i % 2 else "mean"} of set {i // 2 + 1} holds NaN or infinite values')
    cross = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _factor(cov: torch.Tensor) -> torch.Tensor:
    """B [F, rank] with cov = B B^T."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    # Directions that are zero up to rounding: their square roots, 1e-8 of the largest, would add up over thousands of them.
    keep = values > values.max().clamp(min=0) * len(cov) * torch.finfo(torch.float64).eps
    return vectors[:, keep] * values[keep].sqrt()


def kernel_distance(real: torch.Tensor, fake: torch.Tensor, *, num_subsets: int = 100, max_subset_size: int = 1000, seed: int = 0) -> float:
    """Squared maximum mean discrepancy, kernel (x.y / F + 1)^3, averaged over random subsets (KID, Binkowski et al., arXiv 1801.01401).

    Unbiased: the expectation is 0 for equal distributions and single values can be negative. Products are float32 as officially, sums are
    float64. Subsets of m = min(sizes, max_subset_size) are drawn without replacement, fake before real, from RandomState(seed).
    """
    _check_pair(real, fake, at_least=2)
    rnd = np.random.RandomState(seed)
    m = min(len(real), len(fake), max_subset_size)
    total = 0.0
    for _ in range(num_subsets):
        x = _rows(fake, rnd.choice(len(fake), m, replace=False))
        y = _rows(real, rnd.choice(len(real), m, replace=False))
        within = sum(float(k.sum(dtype=torch.float64) - k.diagonal().sum(dtype=torch.float64)) for k in (_kernel(x, x), _kernel(y, y)))
        between = float(_kernel(x, y).sum(dtype=torch.float64))
        total += within / (m - 1) - between * 2 / m
    return total / num_subsets / m


def _rows(features: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    return features[torch.from_numpy(indices).to(features.device)].float()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real: torch.Tensor, fake: torch.Tensor, *, k: int = 3, dtype: torch.dtype = torch.float16) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991): fidelity and coverage, both in [0, 1].

    Precision is the share of fake items no further from some real item than that one's k-th real neighbour; recall has the roles
    exchanged. Features and distances are rounded to `dtype`: half precision officially. Needs more than k items on each side.
    """
    _check_pair(real, fake, at_least=k + 1)
    real, fake = real.to(dtype), fake.to(dtype)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    return _share_inside(fake, real, real_radii), _share_inside(real, fake, fake_radii)


def _radii(points: torch.Tensor, k: int) -> torch.Tensor:
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(points, points)])  # k + 1: the nearest is the point itself


def _share_inside(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    return float(torch.cat([(d <= radii).any(dim=1) for d in _distances(points, centres)]).double().mean())


def _distances(rows: torch.Tensor, columns: torch.Tensor):
    """Blocks of the distance matrix, some rows at a time; computed in float32 or wider, rounded to the dtype of the points, then widened."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    columns_wide = columns.to(wide)
    for block in rows.split(max(_PAIRS_AT_ONCE // len(columns), 1)):
        yield torch.cdist(block.to(wide), columns_wide).to(rows.dtype).to(wide)


def inception_score(probabilities: torch.Tensor, num_splits: int = 10) -> tuple[float, float]:
    """exp(mean KL(p || mean p)) over consecutive splits: (mean, population standard deviation) (Salimans et al., arXiv 1606.03498).

    probabilities: [N, classes], rows sum to 1. Needs at least one image for every split.
    """
    check_features('generated images', probabilities, at_least=num_splits)
    n, scores = len(probabilities), []
    for i in range(num_splits):
        p = probabilities[i * n // num_splits: (i + 1) * n // num_splits].double()
        # xlogy is 0 where p is 0; log p alone would make such classes NaN.
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0, keepdim=True))).sum(dim=1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Point at fraction t [N, 1] of the great circle from a to b [N, d]: unit vectors [N, d] (Karras et al., arXiv 1812.04948, 4.1)."""
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    cosine = (a * b).sum(dim=-1, keepdim=True)
    across = torch.nn.functional.normalize(b - cosine * a, dim=-1)
    angle = t * cosine.clamp(-1, 1).acos()
    return torch.nn.functional.normalize(a * angle.cos() + across * angle.sin(), dim=-1)


def mean_path_length(distances: torch.Tensor) -> float:
    """Mean of the distances [N] from their 1st percentile (rounded down to an item) to their 99th (rounded up), both included."""
    check_features('path lengths', distances.reshape(-1, 1), at_least=1)
    d = distances.double().cpu().numpy().ravel()
    low, high = np.percentile(d, 1, method='lower'), np.percentile(d, 99, method='higher')
    return float(d[(low <= d) & (d <= high)].mean())


def _check_pair(real: torch.Tensor, fake: torch.Tensor, at_least: int) -> None:
    check_features('real images', real, at_least)
    check_features('generated images', fake, at_least)
    if real.shape[1] != fake.shape[1]:
        raise UserError(f'features of different width cannot be compared: {real.shape[1]} values for real, {fake.shape[1]} for generated images')
