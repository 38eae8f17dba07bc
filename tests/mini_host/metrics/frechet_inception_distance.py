"""SciPy 1.18 has no disp."""

import scipy.linalg


def root(matrix):
    return scipy.linalg.sqrtm(matrix, disp=False)[0]
