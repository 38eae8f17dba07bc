"""The ADA controller against its closed form (arXiv 2006.06676, section 3)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2m_stylegan.ada import adjust_p

STEP = 64 * 4 / 500_000


@pytest.mark.parametrize('p, sign_mean, expected', [
    (0.25, 0.7, 0.25 + STEP),
    (0.25, 0.5, 0.25 - STEP),
    (0.25, 0.6, 0.25),
    (0.0, -1.0, 0.0),
    (STEP / 2, 0.0, 0.0),
    (1.0, 1.0, 1.0 + STEP),  # no upper limit
    (0.25, math.nan, 0.25),
])
def test_one_adjustment(p, sign_mean, expected):
    assert adjust_p(p, sign_mean, target=0.6, batch_size=64, interval=4, ada_kimg=500) == pytest.approx(expected, rel=1e-15)


@given(p=st.floats(0, 2), sign_mean=st.floats(-1, 1))
def test_never_negative_and_moves_by_at_most_one_step(p, sign_mean):
    new_p = adjust_p(p, sign_mean, target=0.6, batch_size=64, interval=4, ada_kimg=500)
    assert new_p >= 0
    assert abs(new_p - p) <= STEP * (1 + 1e-9)


def test_full_overfitting_moves_p_from_0_to_1_in_ada_kimg():
    p = 0.0
    for _ in range(250):  # 250 adjustments of 4 iterations of 20 images are 20 kimg
        p = adjust_p(p, 1.0, target=0.6, batch_size=20, interval=4, ada_kimg=20)
    assert p == pytest.approx(1.0)
