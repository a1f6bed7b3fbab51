"""Solutions of `(A + rho I + U_i U_i') x_i = b_i` for every row, again and again, rho and b changing slowly."""

from collections.abc import Callable

from moonshot.linalg.backend import Array, add_multiple, dtype_name, eye_like, zeros_like_shape
from moonshot.linalg.factor import inverses
from moonshot.linalg.lowrank import refresh
from moonshot.linalg.products import Times

_LAG = 0.3  # of what is missing to x, what at most is missing a call later
_FACTORS_LAG = 0.5  # of what is missing to the c_i
_FEW = 8  # columns for each factor from which the c_i may lag


class ShiftedInverse:
    """Solve for right-hand sides and a rho that change less and less from one call to the next.

    An inverse `B = (A + sigma I)^-1` serves every rho near sigma: x is where `x = B (b + (sigma - rho) x)` comes to
    rest, and each call makes one step of that from the x of the call before, from 0 the first one. Each leaves at most
    `|sigma - rho| / sigma` of the distance to x. With factors and the capacitance matrices `C_i = I + U_i' B U_i`,
    and b for what stands in the brackets above, x_i is

        B (b_i - U_i c_i)      c_i = C_i^-1 U_i' B b_i = U_i' x_i

    (Woodbury). Instead of making a product with B for c_i too, c_i is carried over from the call before, from 0 the
    first one, and then corrected by `c_i + C_i^-1 (U_i' x_i - c_i)`, what it should have been. So a call takes one
    product m x d x d, with factors as without. Grams `G_i = U_i' B U_i` of an earlier sigma serve as well: with
    `k = earlier / sigma` those of this one are between k G_i and G_i, and with (1 + k) / 2 G_i in C_i, a correction
    leaves at most `(1 - k) / (1 + k)` of what c_i is off by.

    Solutions are exact as soon as b and rho rest: ADMM has no other fixed points by it. Where factors are so many that
    they cost as much as B does, nothing of the c_i is left to a later call.
    """

    def __init__(
        self,
        inverse: Callable[[float, str, bool], tuple[Array, Array | None]],
        factors: Array | None,
        units: Array,
    ):
        """inverse: as RowHessian.shifted_inverse; the U_i are diag(units), (d,), times factors, (n, m, d)."""
        self._inverse, self._factors, self._units = inverse, factors, units
        self._sigma = self._earlier = 0.0
        self._x: Array | None = None  # (m, d), of the call before
        self._pull: Array | None = None  # U_i c_i, (m, d)
        if factors is not None:
            n, m, d = factors.shape
            self._many = n * _FEW > d
            self._coefficients = zeros_like_shape(factors, (m, n))

    def solve(self, b: Array, rho: float) -> Array:
        """x (m, d) for b (m, d), which may be overwritten; x may not be while another call is to come."""
        if not abs(self._sigma - rho) <= _LAG * self._sigma:
            self._renew(rho / (1 - _LAG), dtype_name(b))  # as far above as may be: rho grows
        if self._x is not None:
            add_multiple(b, self._x, self._sigma - rho)
            self._x = None  # its memory serves the next
        self._x = self._solve(b)
        return self._x

    def _renew(self, sigma: float, dtype: str) -> None:
        k = self._earlier / sigma
        lost = self._factors is not None and (self._many or not 0 <= (1 - k) / (1 + k) <= _FACTORS_LAG)
        self._sigma, (inverse, grams) = sigma, self._inverse(sigma, dtype, lost)
        self._times = Times(inverse)
        if grams is not None:
            k, self._earlier, self._grams = 1.0, sigma, grams
        if self._factors is not None:
            capacitances = (1 + k) / 2 * self._grams + eye_like(self._grams, self._grams.shape[1])
            self._capacitance_inverses = inverses(capacitances)

    def _solve(self, b: Array) -> Array:
        if self._factors is None:
            return self._times(b)
        if self._many:
            self._coefficients[...] = 0
            self._pull = self._refreshed(self._times(b))
        if self._pull is not None:
            b -= self._pull
        x = self._times(b)
        if not self._many:
            self._pull = self._refreshed(x)
        return x

    def _refreshed(self, x: Array) -> Array:
        return refresh(self._factors, x, self._units, self._capacitance_inverses, self._coefficients)
