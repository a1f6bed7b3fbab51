"""OBS by columns: whole columns of a layer go, the cheapest first, in every row at once.

On the columns S that are left every row's Hessian is `A_SS + U_i U_i'`, so one inverse `G = A_SS^-1` and n vectors a
row serve all of them: `H_i^-1 = G - Z_i Z_i'`. A group g of columns costs

    sum_i w_ig' [(H_i^-1)_gg]^-1 w_ig

With g = G e_j, gamma = G_jj, z_i the row j of Z_i and `h_i = H_i^-1 e_j = g - Z_i z_i`, column j goes by

    w_i <- w_i - h_i w_ij / h_ij
    Z_i <- Z_i + (Z_i z_i / (1 + r_i) - g / r_i) z_i' / h_ij      r_i = sqrt(gamma / h_ij)
    G   <- G - g g' / gamma

A diagonal entry of an inverse tells, by what is left of it, how many of its digits are gone: below `LOST` of its start
everything is computed afresh from the Hessians on S.
"""

import numpy as np

from moonshot.linalg.backend import (
    Array,
    as_dtype,
    asarray_like,
    eye_like,
    namespace,
    triangular_solve,
    zeros_like_shape,
)
from moonshot.linalg.factor import cholesky
from moonshot.linalg.hessian import RowHessian
from moonshot.linalg.lowrank import by_row
from moonshot.solvers.obs_batched import LOST


def without_columns(hessian: RowHessian, centre: Array, size: int, count: int) -> tuple[Array, Array]:
    """Remove groups of columns one by one, the cheapest first, and compensate with all that are left.

    centre: (m, d), float64. size: the columns of a group, which divides d. count: how many groups go.

    Returns the weights (m, d), the minimiser with these columns zero, and the mask (m, d).
    """
    xp = namespace(centre)
    left, pull = np.arange(centre.shape[1]), as_dtype(hessian.matvec(centre), "float64")
    rest = _Rest(hessian, pull, left)
    for _ in range(count):
        costs = rest.costs(size)
        first = int(xp.argmin(costs)) * size
        exact = rest.remove(first, size)
        left = np.delete(left, slice(first, first + size))
        if not exact and len(left):
            rest = _Rest(hessian, pull, left)
    columns = asarray_like(left, centre)
    weight, mask = xp.zeros_like(centre), xp.zeros_like(centre, dtype=xp.bool)
    if len(left):
        weight[:, columns] = _restricted(hessian, columns).solve(pull[:, columns])
        mask[:, columns] = True
    return weight, mask


class _Rest:
    """The inverses and weights on the columns that are left: G (d, d), Z (n, m, d), w (m, d)."""

    def __init__(self, hessian: RowHessian, pull: Array, left: np.ndarray):
        columns = asarray_like(left, pull)
        xp, here = namespace(pull), _restricted(hessian, columns)
        r, z = here.inverse_factor, here.inverse_update()
        self.inverse = r.T @ r
        self.factors = zeros_like_shape(r, (0, *pull[:, columns].shape)) if z is None else z
        self.weight = as_dtype(here.solve(pull[:, columns]), "float64")
        self.start = xp.linalg.diagonal(self.inverse)

    def costs(self, size: int) -> Array:
        """What each group of columns costs, (d / size,)."""
        xp = namespace(self.weight)
        if size == 1:
            return xp.sum(self.weight**2 / self._diagonals(), axis=0)
        groups = range(0, self.weight.shape[1], size)
        return xp.stack([self._cost(slice(first, first + size)) for first in groups])

    def _cost(self, group: slice) -> Array:
        """With `G_gg = L L'` and `F_i = L^-1 Z_ig`: of the inverse of `L (I - F_i F_i') L'`, by Woodbury."""
        xp, (n, m, _) = namespace(self.weight), self.factors.shape
        lower = cholesky(self.inverse[group, group], "the inverse on a group of columns")
        half = triangular_solve(lower, self.weight[:, group].T, lower=True)
        cost = xp.sum(half**2)
        if n:
            flat = self.factors[:, :, group].reshape(n * m, -1)
            f = xp.permute_dims(triangular_solve(lower, flat.T, lower=True).reshape(-1, n, m), (2, 1, 0))
            grams = eye_like(f, n) - f @ xp.permute_dims(f, (0, 2, 1))
            shares = triangular_solve(
                cholesky(grams, "a row's inverse on a group of columns"), f @ half.T[:, :, None], lower=True
            )
            cost = cost + xp.sum(shares**2)
        return cost

    def remove(self, first: int, size: int) -> bool:
        """Take a group of columns out; False where digits were lost and all is to be computed afresh."""
        xp = namespace(self.weight)
        for j in range(first, first + size):
            g, z = self.inverse[:, j], self.factors[:, :, j]
            gamma, product = g[j], xp.sum(self.factors * z[:, :, None], axis=0)
            h = g - product
            pivots = h[:, j]
            if not bool(xp.all(pivots >= LOST * self.start[j])):
                return False
            roots = xp.sqrt(gamma / pivots)
            self.weight = self.weight - h * (self.weight[:, j] / pivots)[:, None]
            if len(z):
                step = (product / (1 + roots)[:, None] - g / roots[:, None]) / pivots[:, None]
                self.factors = self.factors + step * z[:, :, None]
            self.inverse = self.inverse - g[:, None] * (g / gamma)
        index = np.delete(np.arange(len(self.start)), slice(first, first + size))
        rest = asarray_like(index, self.weight)
        self.inverse = self.inverse[rest][:, rest]
        self.factors, self.weight, self.start = self.factors[:, :, rest], self.weight[:, rest], self.start[rest]
        return bool(xp.all(self._diagonals() >= LOST * self.start))

    def _diagonals(self) -> Array:
        """Of the rows' inverses, (m, d)."""
        xp = namespace(self.weight)
        return xp.linalg.diagonal(self.inverse) - xp.sum(self.factors**2, axis=0)


def _restricted(hessian: RowHessian, columns: Array) -> RowHessian:
    """The Hessians on some of the columns."""
    factors = hessian.factors
    rows = None if factors is None else by_row(factors[:, :, columns])
    return RowHessian(hessian.A[columns][:, columns], rows)
