"""The elementwise steps of ADMM for NumPy arrays, compiled by numba; admm_steps says what they compute."""

import numpy as np
from numba import prange

from moonshot.linalg.kernels import kernel


@kernel
def reflected(point, mask, target, inside, outside):
    m, d = point.shape
    out = np.empty_like(point)
    for i in prange(m):
        for j in range(d):
            out[i, j] = (inside if mask[i, j] else -outside) * point[i, j] - inside * target[i, j]
    return out


@kernel
def move(point, mask, target, step, outside):
    m, d = point.shape
    zero = point.dtype.type(0)
    for i in prange(m):
        for j in range(d):
            point[i, j] = target[i, j] + step[i, j] + (zero if mask[i, j] else outside * point[i, j])
