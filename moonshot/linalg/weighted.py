"""Hessians that differ in the weights of their two parts only, on one set of factorisations."""

from functools import cache, cached_property
from math import inf, sqrt

from moonshot.errors import ArgumentError
from moonshot.linalg.backend import Array
from moonshot.linalg.cache import FirstFewCache
from moonshot.linalg.hessian import RowHessian


class WeightedHessians:
    """`a A + b U_i U_i'` for any a > 0 and b >= 0, of the A and U of one Hessian.

    With `A^-1 = R'R`, S = diag(saliency_scale) and `B = (S^-1 A S^-1 + sigma I)^-1`, they have

        R / sqrt(a)      sqrt(b / a) R U_i      B      (b / a) U_i' S^-1 B S^-1 U_i

    in place of those of A and U_i, which are found when the first of them needs them and kept as long as this object or
    any of them lives. Memory: what a solver derives from the factors, once more.
    """

    def __init__(self, hessian: RowHessian):
        self.hessian = hessian
        self.half_product = cache(hessian.half_product)
        self.shifted_inverse = FirstFewCache(hessian.shifted_inverse)
        self.of_rows = cache(self._of_rows)

    def _of_rows(self, first: int, stop: int) -> "WeightedHessians":
        """Those of some rows of the Hessian, found once."""
        return WeightedHessians(self.hessian.of_rows(first, stop))

    def weighted(self, shared: float, factors: float) -> RowHessian:
        """`shared A + factors U_i U_i'`. ValueError for weights that are not finite, or give no definite Hessian."""
        if not 0 < shared < inf:
            raise ArgumentError(f"the weight of the shared matrix must be positive, got {shared!r}")
        if not 0 <= factors < inf:
            raise ArgumentError(f"the weight of the factors must be 0 or more, got {factors!r}")
        return _Weighted(self, shared, factors)


class _Weighted(RowHessian):
    """A Hessian that takes its factorisations from those of its kind."""

    def __init__(self, common: WeightedHessians, shared: float, factors: float):
        hessian = common.hessian  # whose arrays have been checked
        self.A, self._kind = hessian.A * shared, hessian._kind
        self._common, self._shared, self._weight, self._root = common, shared, factors, sqrt(factors)
        self._ratio = self._root / sqrt(shared)

    @cached_property
    def factors(self) -> Array | None:
        factors = self._common.hessian.factors
        return None if factors is None or not self._root else factors * self._root

    def of_rows(self, first: int, stop: int) -> RowHessian:
        return self._common.of_rows(first, stop).weighted(self._shared, self._weight)

    @property
    def rows(self) -> int | None:
        return self._common.hessian.rows if self._root else None

    @property
    def rank(self) -> int:
        return self._common.hessian.rank if self._root else 0

    @cached_property
    def inverse_factor(self) -> Array:
        return self._common.hessian.inverse_factor / sqrt(self._shared)

    def half_product(self, dtype: str, lanes: int) -> tuple[Array, float]:
        product, share = self._common.half_product(dtype, lanes)
        return product, share * self._ratio**2

    def shifted_inverse(self, shift: float, dtype: str, grams: bool) -> tuple[Array, Array | None]:
        inverse, found = self._common.shifted_inverse(shift, dtype, grams)
        return inverse, None if found is None else found * self._ratio**2
