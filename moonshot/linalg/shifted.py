"""Solutions of `(A + rho I + U_i U_i') x_i = b_i` for every row, again and again with another rho and b."""

from moonshot.linalg.backend import Array, namespace, zeros_like_shape
from moonshot.linalg.factor import capacitance_inverse
from moonshot.linalg.lowrank import correct, refresh

_FEW = 8  # columns for each factor from which the factors' part may lag


class ShiftedInverse:
    """Solve for right-hand sides that change less and less from one call to the next.

    With `A = Q L Q'`, `B = (A + rho I)^-1` and the capacitance matrices `C_i = I + U_i' B U_i`, x_i is

        B (b_i - U_i c_i)      c_i = C_i^-1 U_i' B b_i = U_i' x_i

    (Woodbury). The first c_i takes a product with B of its own; every later one is carried over from the call before,
    and then corrected by `c_i + C_i^-1 (U_i' x_i - c_i)`, what it should have been. So a call takes one product
    m x d x d, with factors as without, and is exact as soon as b rests: ADMM has no other fixed points by it. Where
    factors are so many that they cost as much as B does, every x_i is exact, in the coordinates of Q.
    """

    def __init__(self, eigenvalues: Array, basis: Array, rotated: Array | None, factors: Array | None):
        """eigenvalues L: (d,); basis Q: (d, d); factors U_i': (n, m, d), stacked by factor; rotated: Q'U_i likewise."""
        self._eigenvalues, self._basis = eigenvalues, basis
        self._rotated, self._factors = rotated, factors
        self._exact = rotated is not None and rotated.shape[0] * _FEW > rotated.shape[2]
        self._pull: Array | None = None  # U_i c_i, (m, d)

    def shift(self, rho: float) -> None:
        """The rho of the calls that follow."""
        xp = namespace(self._basis)
        self._shrink = 1 / (self._eigenvalues + rho)
        if not self._exact:
            root = self._basis * xp.sqrt(self._shrink)
            self._dense = root @ root.T
        if self._rotated is not None:
            self._inverses = capacitance_inverse(self._rotated, self._shrink)

    def solve(self, b: Array) -> Array:
        """x (m, d) for b (m, d), which may be overwritten."""
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
