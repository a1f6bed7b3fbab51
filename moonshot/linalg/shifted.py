"""Solutions of `(A + rho I + U_i U_i') x_i = b_i` for every row, again and again, rho and b changing slowly."""

import math

from moonshot.linalg.backend import Array, namespace, zeros_like_shape
from moonshot.linalg.factor import capacitance_inverse
from moonshot.linalg.lowrank import correct, refresh
from moonshot.linalg.splitting import add_multiple

_FEW = 8  # columns for each factor from which the factors' part may lag
_SPAN = math.sqrt(2)  # how far rho may be from the one that the inverse is of, either way


class ShiftedInverse:
    """Solve for right-hand sides and a rho that change less and less from one call to the next.

    An inverse `B = (A + sigma I)^-1 = Q (L + sigma I)^-1 Q'` serves every rho near sigma: x is where
    `x = B (b + (sigma - rho) x)` comes to rest, and each call makes one step of that from the x of the call before.
    Each brings x nearer by `|sigma - rho| / (sigma + least of L)`, some 0.4 at most. With factors and the capacitance
    matrices `C_i = I + U_i' B U_i`, and b for what stands in the brackets above, x_i is

        B (b_i - U_i c_i)      c_i = C_i^-1 U_i' B b_i = U_i' x_i

    (Woodbury). The first c_i takes a product with B of its own; every later one is carried over from the call before,
    and then corrected by `c_i + C_i^-1 (U_i' x_i - c_i)`, what it should have been. So a call takes one product
    m x d x d, with factors as without. The first solution is exact, and they are again as soon as b and rho rest: ADMM
    has no other fixed points by it. Where factors are so many that they cost as much as B does, their part does not
    lag, in the coordinates of Q.
    """

    def __init__(self, eigenvalues: Array, basis: Array, rotated: Array | None, factors: Array | None):
        """eigenvalues L: (d,); basis Q: (d, d); factors U_i': (n, m, d), stacked by factor; rotated: Q'U_i likewise."""
        self._eigenvalues, self._basis = eigenvalues, basis
        self._rotated, self._factors = rotated, factors
        self._exact = rotated is not None and rotated.shape[0] * _FEW > rotated.shape[2]
        self._sigma = 0.0
        self._x: Array | None = None  # (m, d), of the call before
        self._pull: Array | None = None  # U_i c_i, (m, d)

    def solve(self, b: Array, rho: float) -> Array:
        """x (m, d) for b (m, d), which may be overwritten; x may not be while another call is to come."""
        if not self._sigma / _SPAN <= rho <= self._sigma * _SPAN:
            self._invert(rho if self._x is None else rho * _SPAN)
        if self._x is not None:
            add_multiple(b, self._x, self._sigma - rho)
            self._x = None  # its memory serves the next
        self._x = self._solve(b)
        return self._x

    def _invert(self, sigma: float) -> None:
        xp = namespace(self._basis)
        self._sigma, self._shrink = sigma, 1 / (self._eigenvalues + sigma)
        if not self._exact:
            root = self._basis * xp.sqrt(self._shrink)
            self._dense = root @ root.T
        if self._rotated is not None:
            self._inverses = capacitance_inverse(self._rotated, self._shrink)

    def _solve(self, b: Array) -> Array:
        if self._exact:
            shrunk = (b @ self._basis) * self._shrink
            return correct(shrunk, self._rotated, self._shrink, self._inverses) @ self._basis.T
        if self._factors is None:
            return b @ self._dense
        if self._pull is None:
            n, m, _ = self._factors.shape
            self._coefficients = zeros_like_shape(b, (m, n))
            self._pull = refresh(self._factors, b @ self._dense, self._inverses, self._coefficients)
        b -= self._pull
        x = b @ self._dense
        self._pull = refresh(self._factors, x, self._inverses, self._coefficients)
        return x
