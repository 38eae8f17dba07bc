"""The ADA controller against its closed form (arXiv 2006.06676, section 3)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2m_stylegan.ada import AdaController, adjust_p

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
    controller = AdaController(target=0.6, batch_size=20, ada_kimg=1)
    num_adjustments = 0
    for num_iterations in range(1, 1000 // 20 + 1):
        if controller.is_due(num_iterations):
            controller.adjust(1.0)
            num_adjustments += 1
    assert num_adjustments == 12  # iterations 4, 8, ..., 48 of 50
    assert controller.p == pytest.approx(12 * 4 * 20 / 1000)
