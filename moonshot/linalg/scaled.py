"""A layer's quadratic in scaled coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from moonshot.linalg.backend import Array, as_dtype, contiguous, dtype_name, is_cupy, namespace, unit
from moonshot.linalg.factor import rescaled
from moonshot.linalg.hessian import RowHessian
from moonshot.linalg.lowrank import add_applied, diagonals
from moonshot.linalg.products import Times

_HARDLY = 3e-5  # of the loss; the steps after it are several times as many, for some 1e-4 of the loss


@dataclass(frozen=True)
class ScaledQuadratic:
    """`sum_i (x_i - t_i)' H_i (x_i - t_i)` with `x_j = v_j r_j / s` and `H_i = A + U_i U_i'` scaled likewise.

    r is what the coordinates are chosen by. s is the power of two that brings the largest t_ij between a half and one:
    squares stay in the range of float32 whatever the units of the weights and of the objective, and no digit changes.
    """

    scale: Array  # (d,), r / s
    target: Array  # (m, d), the minimiser t
    pull: Array  # (m, d), H t
    shared: Array  # (d, d)
    factors: Array | None  # (n, m, d), as the Hessian has them
    units: Array  # (d,), 1 / r, which scales them

    @classmethod
    def of(cls, hessian: RowHessian, centre: Array, roots: Array) -> "ScaledQuadratic":
        """The quadratic of a Hessian about a centre (m, d), computed on in the dtype of the centre; roots r: (d,)."""
        shared = as_dtype(rescaled(hessian.A, roots), dtype_name(centre))
        roots = as_dtype(roots, dtype_name(centre))
        scale = roots / unit(centre * roots)
        target = contiguous(centre * scale)
        pull, units = target @ shared, 1 / roots
        factors = None
        if hessian.factors is not None:
            factors = as_dtype(hessian.factors, dtype_name(centre))
            pull = add_applied(pull, factors, target, units)
        return cls(scale, target, pull, shared, factors, units)

    def rows(self, rows: Array) -> "ScaledQuadratic":
        """The quadratic of some rows; rows: their indices."""
        factors = None if self.factors is None else contiguous(self.factors[:, rows])
        found = ScaledQuadratic(
            self.scale, self.target[rows], self.pull[rows], self.shared, factors, self.units
        )
        if self.factors is not None:
            found.__dict__["diagonal"] = self.diagonal[rows]
        found.__dict__["_times_shared"] = self._times_shared
        return found

    def matvec(self, x: Array) -> Array:
        """`H_i x_i` for every row, (m, d)."""
        product = self._times_shared(x)
        return product if self.factors is None else add_applied(product, self.factors, x, self.units)

    @cached_property
    def _times_shared(self) -> Times:
        return Times(self.shared)

    @cached_property
    def diagonal(self) -> Array:
        """Diagonals of the H_i: (m, d), or (1, d) where all rows share them."""
        shared = namespace(self.shared).linalg.diagonal(self.shared)
        return shared[None, :] if self.factors is None else diagonals(shared, self.factors, self.units)

    def loss(self, x: Array) -> float:
        """The quadratic at x (m, d)."""
        difference = x - self.target
        return float(namespace(x).sum(difference * self.matvec(difference)))

    def is_below(self, x: Array, others: list[Array], total: Callable[[float], float]) -> bool:
        """Whether the quadratic at x (m, d) is below that at each of the others by more than it may be off by.

        total: what adds up a number over all pieces of a layer, of which these rows are one (Problem.total).
        """
        least, most = zip(*(self._bounds(each, total) for each in (x, *others)), strict=True)
        return most[0] < min(least[1:])

    def _bounds(self, x: Array, total: Callable[[float], float]) -> tuple[float, float]:
        """What the quadratic at x may be once rounding is allowed for: `|H_i|` is at most the trace of H_i."""
        xp, value = namespace(x), total(self.loss(x))
        size = float(xp.sum(xp.sum((x - self.target) ** 2, axis=1) * xp.sum(self.diagonal, axis=1)))
        rounding = xp.finfo(x.dtype).eps * total(size)
        return value - rounding, value + rounding

    def refit(self, x: Array, mask: Array, steps: int) -> Array:
        """Minimise over the support of each row, by conjugate gradients from x, which is zero outside the mask.

        A row ends when its residual is small against its first, or is rounding; in float32 also when a step gains
        hardly more of its loss than the numbers can tell.
        """
        hardly = _HARDLY if dtype_name(x) == "float32" else 0.0
        if is_cupy(x):
            from moonshot.linalg import conjugate_cuda

            return conjugate_cuda.refit(
                self.matvec, self.pull, self.target, self.diagonal, x, mask, steps, hardly
            )
        xp = namespace(x)
        keep = xp.astype(mask, x.dtype)
        precondition = keep / self.diagonal
        residual = (self.pull - self.matvec(x)) * keep
        direction = residual * precondition
        rho = xp.sum(residual * direction, axis=1)
        eps = xp.finfo(x.dtype).eps
        tiny = eps**1.5 * rho + eps**2 * xp.sum(self.pull**2 * precondition, axis=1)
        loss = xp.sum((self.target - x) * self.pull - x * residual, axis=1)
        for _ in range(steps):
            if not bool(xp.any(rho > tiny)):
                break
            product = self.matvec(direction) * keep
            curvature = xp.sum(direction * product, axis=1)
            active = (rho > tiny) & (curvature > 0)
            step = xp.where(active, rho / xp.where(active, curvature, xp.ones_like(rho)), 0 * rho)
            x = x + step[:, None] * direction
            residual = residual - step[:, None] * product
            conditioned = residual * precondition
            following = xp.sum(residual * conditioned, axis=1)
            ratio = xp.where(active, following / xp.where(active, rho, xp.ones_like(rho)), 0 * rho)
            direction = conditioned + ratio[:, None] * direction
            gain = step * rho
            loss = loss - gain
            rho = xp.where(active & (gain > hardly * loss), following, 0 * rho)
        return x
