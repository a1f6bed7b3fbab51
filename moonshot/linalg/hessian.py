"""RowHessian: one symmetric positive definite matrix per row of a layer, shared plus low rank."""

from copy import copy
from functools import cached_property

from moonshot.errors import ArgumentError, ArgumentTypeError
from moonshot.linalg.backend import (
    Array,
    all_finite,
    as_dtype,
    computing_on,
    contiguous,
    dtype_name,
    is_numpy,
    like,
    namespace,
    native,
    triangular_solve,
)
from moonshot.linalg.factor import (
    NotPositiveDefiniteError,
    capacitance,
    capacitance_solve,
    cholesky,
    inverse_factor,
    rescaled,
)
from moonshot.linalg.lowrank import apply, by_factor, project
from moonshot.linalg.products import half_product, half_product_by_factor, half_product_grams, square

_SYMMETRY = {"float32": 1e-4, "float64": 1e-9}  # largest |A - A'| accepted, relative to max |A|
_REFINEMENTS = 10
_LOST = 1e-12  # the backward error at which a row is solved densely
_ALONE = 0.01  # the least share of A_jj in the squared saliency scale


class RowHessian:
    """`H_i = A + U_i U_i'` for the rows i of a layer, as given: nothing is added to it.

    A: (d, d), symmetric, shared by all rows; kept in float64.
    U: (m, d, n), the factors of each row, or None for none. A view of memory laid out (n, m, d) is kept
    without a copy.

    Arrays are NumPy, CuPy or torch; what a method returns is the same kind on the same device.
    No m x d x d array is ever formed.

    Raises TypeError for what is no real array, ValueError for wrong shapes, NaN, infinity or an asymmetric
    A. A that is not positive definite raises NotPositiveDefiniteError when a factorisation is first needed.
    """

    def __init__(self, A: Array, U: Array | None = None):
        with computing_on(A):
            self._take(A, U)

    def _take(self, A: Array, U: Array | None) -> None:
        shared = native(A, "A")
        if shared.ndim != 2 or shared.shape[0] != shared.shape[1] or shared.shape[0] == 0:
            raise ArgumentError(f"A must be a square matrix (d, d), got shape {tuple(shared.shape)}")
        if not all_finite(shared):
            raise ArgumentError("A holds NaN or infinity: look at the calibration data it came from")
        xp = namespace(shared)
        tolerance = _SYMMETRY[dtype_name(shared)] * float(xp.max(xp.abs(shared)))
        difference = asymmetry(shared)
        if difference > tolerance:
            raise ArgumentError(
                f"A is not symmetric (max |A - A'| = {difference:.3g}): pass (A + A.T) / 2 if that is meant"
            )
        shared = as_dtype(shared, "float64")
        self.A = (shared + shared.T) / 2 if difference else shared
        self._factors: Array | None = None
        if U is not None:
            factors = native(U, "U")
            if factors.ndim != 3 or factors.shape[1] != self.columns:
                raise ArgumentError(
                    f"U must be (m, d, n) with d = {self.columns}, got shape {tuple(factors.shape)}"
                )
            stored = by_factor(factors)
            if not all_finite(stored):
                raise ArgumentError("U holds NaN or infinity: look at the gradients it came from")
            if factors.shape[0] == 0:
                raise ArgumentError("U has no rows: pass U=None for a Hessian without factors")
            if factors.shape[2] > 0:
                if type(factors) is not type(self.A):
                    raise ArgumentTypeError("A and U must be on the same device")
                self._factors = stored
        self._kind = A[:0]

    @property
    def factors(self) -> Array | None:
        """The U_i' stacked by factor, (n, m, d)."""
        return self._factors

    @property
    def columns(self) -> int:
        """d"""
        return self.A.shape[0]

    @property
    def rows(self) -> int | None:
        """m, or None when all rows share A and there may be any number."""
        return None if self.factors is None else self.factors.shape[1]

    @property
    def rank(self) -> int:
        """n, the number of factors of a row."""
        return 0 if self.factors is None else self.factors.shape[0]

    def of_rows(self, first: int, stop: int) -> "RowHessian":
        """The Hessians of the rows from `first` to before `stop`, with what has been derived from A."""
        piece = copy(self)
        if self._factors is not None:
            piece._factors = contiguous(self._factors[:, first:stop])
        return piece

    @cached_property
    def inverse_factor(self) -> Array:
        """R (d, d), upper triangular, `A^-1 = R'R`, float64."""
        return inverse_factor(self.A)

    @property
    def saliency_scale(self) -> Array:
        """`s_j = (A^-1)_jj^-1/2`, (d,), float64: pruning v_j alone, the rest compensating, costs `(s_j v_j)^2` by A.

        At least `sqrt(0.01 A_jj)`. Where inputs repeat one another each is free to prune by s_j, since the others make
        up for it, but all of them are not.

        Source: Hassibi and Stork, Second order derivatives for network pruning (1992), for s_j.
        """
        xp = namespace(self.A)
        squares = 1 / xp.sum(self.inverse_factor**2, axis=0)
        return xp.sqrt(xp.maximum(squares, _ALONE * xp.linalg.diagonal(self.A)))

    def half_product(self, dtype: str, lanes: int) -> tuple[Array, float]:
        """P and a share s with `R U_i = sqrt(s) P_i`, in tiles of `lanes` rows: (d, tiles, n, lanes). Needs factors.

        s is 1 but for Hessians that have P in common. See products.half_product.
        """
        factors, r = as_dtype(self.factors, dtype), as_dtype(self.inverse_factor, dtype)
        return half_product(factors, r, lanes), 1.0

    def shifted_inverse(self, shift: float, dtype: str, grams: bool) -> tuple[Array, Array | None]:
        """`B = (S^-1 A S^-1 + shift I)^-1`, (d, d), S = diag(saliency_scale), and `U_i' S^-1 B S^-1 U_i`, (m, n, n).

        The latter is None unless grams are asked for, which needs factors. The harmonic mean of the eigenvalues of
        `S^-1 A S^-1` is 1, or less where inputs nearly repeat one another.
        """
        scale = self.saliency_scale
        a = rescaled(self.A, scale)
        a.reshape(-1)[:: self.columns + 1] += shift
        r = inverse_factor(a)
        found = half_product_grams(self.factors, as_dtype(r / scale, dtype)) if grams else None
        return square(as_dtype(r, dtype)), found

    def matvec(self, V: Array) -> Array:
        """`H_i v_i` for every row of V (m, d)."""
        with computing_on(self._kind):
            return like(self._matvec(self._checked(V)), V)

    def quadratic(self, V: Array) -> Array:
        """`v_i' H_i v_i` for every row of V (m, d), shape (m,); never negative."""
        with computing_on(self._kind):
            v = self._checked(V)
            xp = namespace(v)
            value = xp.sum((v @ self.A) * v, axis=1)
            if self.factors is not None:
                value = value + xp.sum(project(self.factors, v) ** 2, axis=0)
            return like(xp.maximum(value, xp.zeros_like(value)), V)

    def diagonal(self) -> Array:
        """Diagonals of the H_i: (m, d), or (1, d) where all rows share them."""
        with computing_on(self._kind):
            xp = namespace(self.A)
            diagonal = xp.linalg.diagonal(self.A)[None, :]
            if self.factors is not None:
                diagonal = diagonal + xp.sum(as_dtype(self.factors, "float64") ** 2, axis=0)
            return like(diagonal, self._kind)

    def solve(self, B: Array) -> Array:
        """X (m, d) with `H_i x_i = b_i` for every row of B (m, d).

        Woodbury on the factors of A, then iterative refinement on H itself until the residual no longer
        shrinks, which makes the backward error small for ill-conditioned A too.
        """
        with computing_on(self._kind):
            return like(self._solve(self._checked(B)), B)

    def _solve(self, b: Array) -> Array:
        xp = namespace(b)
        apply_inverse = self._woodbury()
        best = apply_inverse(b)
        residual = b - self._matvec(best)
        error = xp.max(xp.abs(residual), axis=1)
        for _ in range(_REFINEMENTS):
            candidate = best + apply_inverse(residual)
            candidate_residual = b - self._matvec(candidate)
            candidate_error = xp.max(xp.abs(candidate_residual), axis=1)
            better = candidate_error < error
            if not bool(xp.any(better)):
                break
            best = xp.where(better[:, None], candidate, best)
            residual = xp.where(better[:, None], candidate_residual, residual)
            error = xp.where(better, candidate_error, error)
        reach = self._trace() * xp.max(xp.abs(best), axis=1) + xp.max(xp.abs(b), axis=1)
        for i in xp.nonzero(error > _LOST * reach)[0].tolist():  # Woodbury lost its digits in these rows
            best[i] = self._dense_solve(i, b[i])
        return best

    def _trace(self) -> Array:
        """Traces of the H_i, (m,) or a scalar: bounds of their norms."""
        xp = namespace(self.A)
        trace = xp.sum(xp.linalg.diagonal(self.A))
        if self.factors is not None:
            trace = trace + xp.sum(as_dtype(self.factors, "float64") ** 2, axis=(0, 2))
        return trace

    def _dense_solve(self, i: int, b: Array) -> Array:
        """H_i^-1 b for one row by the Cholesky factor of H_i itself, scaled to a unit diagonal."""
        h = native(self.row(i))
        xp = namespace(h)
        scale = 1 / xp.sqrt(xp.linalg.diagonal(h))
        lower = cholesky(h * scale[:, None] * scale, f"the Hessian of row {i}")
        half = triangular_solve(lower, (b * scale)[:, None], lower=True)
        return triangular_solve(lower.T, half, lower=False)[:, 0] * scale

    def inverse_update(self) -> Array | None:
        """Z (n, m, d), float64, with `H_i^-1 = A^-1 - Z_i Z_i'` for every row (Woodbury); None without factors."""
        if self.factors is None:
            return None
        r = self.inverse_factor
        p, lower = self._half_product()
        for k in range(p.shape[0]):  # rows of L^-1 P', one k at a time: (m, d) each
            column = p[k] - sum(lower[:, k, j, None] * p[j] for j in range(k)) if k else p[0]
            p[k] = column / lower[:, k, k, None]
        for k in range(p.shape[0]):
            p[k] = p[k] @ r
        return p

    def inverse_diagonal(self) -> Array:
        """Diagonals of the H_i^-1: (m, d), or (1, d) where all rows share them."""
        with computing_on(self._kind):
            xp = namespace(self.A)
            diagonal = xp.sum(self.inverse_factor**2, axis=0)[None, :]
            if (update := self.inverse_update()) is not None:
                diagonal = diagonal - xp.sum(update**2, axis=0)
                if (smallest := float(xp.min(diagonal))) <= 0:
                    raise NotPositiveDefiniteError("a row's Hessian, to working precision,", smallest)
            return like(diagonal, self._kind)

    def row(self, i: int) -> Array:
        """H_i as a dense (d, d) matrix: the twin that tests compare with."""
        with computing_on(self._kind):
            dense = self.A
            if self.factors is not None:
                u = as_dtype(self.factors[:, i, :], "float64")
                dense = dense + u.T @ u
            return like(dense, self._kind)

    def _checked(self, V: Array) -> Array:
        v = native(V, "V")
        expected = (self.rows if self.rows is not None else "m", self.columns)
        if v.ndim != 2 or v.shape[1] != self.columns or self.rows not in (None, v.shape[0]):
            raise ArgumentError(f"expected an array of shape {expected}, got {tuple(v.shape)}")
        return as_dtype(v, "float64")

    def _matvec(self, v: Array) -> Array:
        product = v @ self.A
        if self.factors is not None:
            factors = self.factors
            product = product + apply(factors, v)
        return product

    def _half_product(self) -> tuple[Array, Array]:
        """P (n, m, d), P_i = R U_i, and the Cholesky factors (m, n, n) of the capacitances I + P_i'P_i."""
        p = half_product_by_factor(as_dtype(self.factors, "float64"), self.inverse_factor)
        return p, cholesky(capacitance(p), "a capacitance matrix")

    def _woodbury(self):
        """The map B -> H^-1 B as one application of the Woodbury identity."""
        r = self.inverse_factor
        if self.factors is None:
            return lambda b: (b @ r.T) @ r
        xp = namespace(r)
        p, lower = self._half_product()

        def apply(b: Array) -> Array:
            y = b @ r.T
            coefficients = capacitance_solve(lower, xp.sum(p * y[None], axis=2))
            return (y - xp.sum(p * coefficients[:, :, None], axis=0)) @ r

        return apply


def asymmetry(a: Array) -> float:
    """The largest `|a_ij - a_ji|`."""
    if is_numpy(a):
        from moonshot.linalg import kernels

        return float(kernels.asymmetry(a))
    xp = namespace(a)
    return float(xp.max(xp.abs(a - a.T)))
