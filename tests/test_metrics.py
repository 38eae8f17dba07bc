import golden
import numpy as np
import pytest
import torch

from m2m_stylegan import metrics
from m2m_stylegan.errors import UserError


@pytest.fixture
def official():
    return golden.load('metrics_formulas')


def sets(n=300, m=400, width=16, shift=0.2):
    return torch.randn(n, width, dtype=torch.float64), torch.randn(m, width, dtype=torch.float64) * 1.1 + shift


@pytest.mark.parametrize('name', ['real', 'gen'])
def test_moments_equal_the_official_ones(official, name):
    mean, cov = metrics.moments(official.tensor(name, torch.float32))
    assert golden.relative_error(mean, official.tensor(f'{name}_mean')) < 1e-12
    assert golden.relative_error(cov, official.tensor(f'{name}_cov')) < 1e-12


def test_frechet_distance_equals_the_official_one(official):
    found = metrics.frechet_distance(*(official.tensor(key) for key in ('real_mean', 'real_cov', 'gen_mean', 'gen_cov')))
    assert found == pytest.approx(float(official.tensor('fid')), rel=1e-10)


def test_kernel_distance_equals_the_official_one(official):
    real, fake = official.tensor('kid_real', torch.float32), official.tensor('kid_gen', torch.float32)
    # Official arithmetic is float32 throughout.
    assert metrics.kernel_distance(real, fake, num_subsets=1) == pytest.approx(float(official.tensor('kid_fullsubset')), rel=1e-5)
    found = metrics.kernel_distance(real, fake, num_subsets=4, max_subset_size=50, seed=5)
    assert found == pytest.approx(float(official.tensor('kid_subsets_seed5_n4_m50')), rel=1e-5)


@pytest.mark.parametrize('k', [3, 5])
@pytest.mark.parametrize('name, dtype', [('half', torch.float16), ('float64', torch.float64)])
def test_precision_and_recall_equal_the_official_ones(official, k, name, dtype):
    found = metrics.precision_recall(official.tensor('real'), official.tensor('gen'), k=k, dtype=dtype)
    assert found == pytest.approx(official.tensor(f'pr_k{k}_{name}').tolist(), abs=1e-6)


def test_inception_score_equals_the_official_one(official):
    assert metrics.inception_score(official.tensor('is_probs')) == pytest.approx(official.tensor('is_mean_std').tolist(), rel=1e-6)


def test_path_length_and_slerp_equal_the_official_ones(official):
    assert metrics.mean_path_length(official.tensor('ppl_dist')) == pytest.approx(float(official.tensor('ppl_value')), rel=1e-6)
    found = metrics.slerp(*(official.tensor(f'slerp_{name}') for name in 'abt'))
    assert golden.relative_error(found, official.tensor('slerp_out')) < 1e-12


def test_fid_agrees_with_torchmetrics():
    fid = pytest.importorskip('torchmetrics.image.fid')
    real, fake = sets()
    judge = fid.FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    judge.update(real, real=True)
    judge.update(fake, real=False)
    (mean1, cov1), (mean2, cov2) = metrics.moments(real), metrics.moments(fake)
    unbiased = cov1 * len(real) / (len(real) - 1), cov2 * len(fake) / (len(fake) - 1)  # torchmetrics divides by n - 1
    assert metrics.frechet_distance(mean1, unbiased[0], mean2, unbiased[1]) == pytest.approx(float(judge.compute()), rel=1e-6)


def test_kid_agrees_with_torchmetrics():
    kid = pytest.importorskip('torchmetrics.image.kid')
    real, fake = sets(200, 200)
    with pytest.warns(UserWarning, match='save all extracted features'):
        judge = kid.KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=200)
    judge.update(real, real=True)
    judge.update(fake, real=False)
    assert metrics.kernel_distance(real, fake, num_subsets=1) == pytest.approx(float(judge.compute()[0]), rel=1e-4)


class Identity(torch.nn.Module):
    """Features for torchmetrics that are already features."""

    num_features = 16

    def forward(self, x):
        return x


def test_frechet_distance_of_singular_covariances_that_commute():
    """Closed form: sum of (sqrt(a_i) - sqrt(b_i))^2 over the common eigenvectors, here with most eigenvalues zero."""
    a, b = torch.zeros(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    a[:10], b[5:20] = torch.rand(10), torch.rand(15)
    q = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    mean = torch.randn(60, dtype=torch.float64)
    found = metrics.frechet_distance(mean, q @ a.diag() @ q.T, mean * 0, q @ b.diag() @ q.T)
    assert found == pytest.approx(float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)


@pytest.mark.parametrize('n', [5, 100])
def test_identical_sets_have_no_distance(n):
    real, _ = sets(n, width=32)
    shuffled = real[torch.randperm(n)]
    assert metrics.frechet_distance(*metrics.moments(real), *metrics.moments(shuffled)) == pytest.approx(0, abs=1e-10)
    assert metrics.precision_recall(real, shuffled) == (1, 1)


def test_frechet_distance_is_symmetric_and_grows_with_the_shift():
    real, fake = sets()
    a, b, c = metrics.moments(real), metrics.moments(fake), metrics.moments(fake + 0.5)
    assert metrics.frechet_distance(*a, *b) == pytest.approx(metrics.frechet_distance(*b, *a), rel=1e-12)
    assert metrics.frechet_distance(*a, *b) < metrics.frechet_distance(*a, *c)


def test_kernel_distance_is_unbiased():
    x = torch.randn(4000, 8)
    found = [metrics.kernel_distance(part[:50], part[50:], num_subsets=1) for part in x.split(100)]
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5
    assert min(found) < 0


def test_collapsed_generator_is_precise_and_covers_nothing():
    real, _ = sets(500)
    collapsed = real[:1] + torch.randn(500, 16) * 1e-3
    precision, recall = metrics.precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.02
    scattered = torch.randn(500, 16) * 4
    precision, recall = metrics.precision_recall(real, scattered)
    assert precision < 0.1 and recall > 0.9


def test_distance_blocks_do_not_change_precision_and_recall(monkeypatch):
    real, fake = sets(70, 90)
    whole = metrics.precision_recall(real, fake)
    monkeypatch.setattr(metrics, '_PAIRS_AT_ONCE', 500)
    assert metrics.precision_recall(real, fake) == whole


def test_inception_score_by_hand():
    one_hot = torch.eye(4).repeat(25, 1)
    assert metrics.inception_score(one_hot, num_splits=5) == pytest.approx((4, 0))  # 4 certain classes, zeros and all
    assert metrics.inception_score(torch.full((50, 4), 0.25)) == pytest.approx((1, 0))


def test_path_length_drops_the_extremes():
    distances = torch.ones(1000)
    distances[0], distances[1] = 0, 1e9
    assert metrics.mean_path_length(distances) == 1


def test_slerp_meets_its_ends_on_the_unit_sphere():
    a, b = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    t = torch.rand(5, 1, dtype=torch.float64)
    assert torch.allclose(metrics.slerp(a, b, t).norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(metrics.slerp(a, b, t * 0), torch.nn.functional.normalize(a))
    assert torch.allclose(metrics.slerp(a, b, t * 0 + 1), torch.nn.functional.normalize(b))


def test_bad_features_are_refused():
    real, fake = sets(30, 30)
    broken = fake.clone()
    broken[7, 3] = torch.nan
    broken[9, 0] = torch.inf
    for function in (metrics.kernel_distance, metrics.precision_recall):
        with pytest.raises(UserError, match='generated images: the features of number 7 and 1 more are NaN or infinite'):
            function(real, broken)
        with pytest.raises(UserError, match='different width.* 16 values for real, 12'):
            function(real, fake[:, :12])
    with pytest.raises(UserError, match='number 7'):
        metrics.moments(broken)
    with pytest.raises(UserError, match='generated images: found 3, this metric needs at least 4'):
        metrics.precision_recall(real, fake[:3])
    with pytest.raises(UserError, match='needs at least 10'):
        metrics.inception_score(torch.full((9, 2), 0.5))
    mean, cov = metrics.moments(real)
    with pytest.raises(UserError, match='different width'):
        metrics.frechet_distance(mean, cov, mean[:5], cov[:5, :5])
    with pytest.raises(UserError, match='covariance of set 2 holds NaN'):
        metrics.frechet_distance(mean, cov, mean, cov * torch.nan)
