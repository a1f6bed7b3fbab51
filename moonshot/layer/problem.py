"""Problem, Result and Status: what goes into a solver and what comes out, as plain data."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from moonshot.errors import ArgumentError, ArgumentTypeError
from moonshot.linalg.backend import (
    Array,
    all_finite,
    as_dtype,
    computing_on,
    dtype_name,
    is_numpy,
    largest,
    namespace,
    native,
    on_host,
)
from moonshot.linalg.hessian import RowHessian
from moonshot.linalg.lowrank import by_factor, by_row, project

_LARGEST = 1e100  # of a weight and of a Hessian, and one over the smallest
_FEW = 8  # times as many columns as rows, above which products are cheaper with A than with their own transpose


class Status(str, Enum):
    """How a solver ended."""

    COMPLETED = "completed"  # a method of fixed length ran to its end
    CONVERGED = "converged"  # an iteration met its tolerance
    ITERATION_LIMIT = "iteration limit"  # it did not, and stopped at its limit
    OPTIMAL = "optimal"  # a search proved that nothing is better
    NODE_LIMIT = "node limit"  # it was stopped before it could
    TIME_LIMIT = "time limit"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Term:
    """One term of the objective on one layer, without damping: `coefficient * sum_i q_i(v_i - c_i)`.

    q_i is the quadratic form of `shared` (d, d) plus `factors` (m, d, n); either may be None. The
    coefficient makes `loss(0) = 1`; at_zero is q_t(0) in the term's own units.
    """

    name: str
    weight: float
    coefficient: float
    shared: Array | None
    factors: Array | None
    centre: Array
    at_zero: float

    def loss(self, V: Array) -> float:
        """`q_t(V) / q_t(0)` in float64; V: (m, d), computed on as it is (see backend.native)."""
        return max(self.loss_of(Deviation.between(V, self.centre)), 0.0)

    def loss_of(self, deviation: "Deviation") -> float:
        """The loss of a V that is this far from the centre, below zero where rounding leaves nothing of it."""
        return self.coefficient * deviation.loss(self.shared, self.factors)


class Deviation:
    """How far a weight is from a centre, X (m, d), and what quadratic forms say to that, in float64."""

    def __init__(self, difference: Array):
        self._x = as_dtype(difference, "float64")

    @classmethod
    def between(cls, V: Array, centre: Array) -> "Deviation":
        """`V - centre`, both (m, d), without another array of that size."""
        xp = namespace(V)
        difference = xp.astype(V, xp.float64)  # a copy
        difference -= centre
        return cls(difference)

    @property
    def squared_norm(self) -> float:
        """`||X||^2`"""
        return float(namespace(self._x).tensordot(self._x, self._x, axes=2))

    @cached_property
    def _gram(self) -> Array:
        return self._x.T @ self._x

    def _shared_loss(self, shared: Array) -> float:
        """`sum_i x_i' S x_i`: the inner product of S and `X'X`.

        That is symmetric, for half the work, and serves every S. For few rows the product with S is cheaper. S in
        float32 is semidefinite up to rounding only, and so the sum is not negative up to rounding only.
        """
        xp, (rows, columns) = namespace(self._x), self._x.shape
        if rows * _FEW < columns:
            return float(xp.tensordot(self._x @ shared, self._x, axes=2))
        return float(xp.tensordot(shared, self._gram, axes=2))

    def loss(self, shared: Array | None, factors: Array | None) -> float:
        """`sum_i x_i' (S + F_i F_i') x_i`, S: (d, d), F: (m, d, n), either None for none."""
        loss = 0.0
        if shared is not None:
            loss += self._shared_loss(as_dtype(shared, "float64"))
        if factors is not None:
            loss += float(namespace(factors).sum(project(by_factor(factors), self._x) ** 2))
        return loss


class AtZero:
    """F(0), whose product with A is made when it is first asked for, and A let go of then.

    known: the rest of it. shared: A, or None for nothing more. centre: (m, d). weight: an array of the caller's, of the
    kind and on the device where this is computed.
    """

    def __init__(self, known: float, shared: Array | None, centre: Array, weight: Array):
        self._known, self._shared, self._centre = known, shared, centre
        self._kind = weight[:0] + 0  # a copy, which does not hold on to the weight

    @property
    def limit(self) -> float:
        """What F(0) is at most, without a product: the largest eigenvalue of A is below its trace."""
        if self._shared is None:
            return self._known
        trace = float(namespace(self._shared).linalg.trace(self._shared))
        return self._known + trace * math.prod(self._centre.shape) * largest(self._centre) ** 2

    @property
    def value(self) -> float:
        """F(0)"""
        if self._shared is not None:
            with computing_on(self._kind):
                self._known += max(Deviation(self._centre).loss(self._shared, None), 0.0)
            self._shared = None
        return self._known


def _alone(value: float) -> float:
    """The total of a number over the only piece of a layer."""
    return value


class Problem:
    """Minimise `F(V) = sum_i (v_i - c_i)' H_i (v_i - c_i) + constant` over V (m, d) with a pattern of zeros.

    weight: (m, d) real array, NumPy, CuPy or torch; results come back as the same kind and dtype.
    hessian: RowHessian for d columns and, if it has factors, m rows.
    centre: (m, d), the unconstrained minimiser c; the weight itself unless terms pull elsewhere.
    constant: what F is at the centre.
    terms, damping: what the objective that built the problem records for reports.
    ridge: that of an objective, for which `F(V) = sum_t weight_t loss_t(V) + ridge ||V - W||^2`; None for what was not
    built from terms.
    total: (x) -> the sum of a number x over all pieces of a layer, where this problem is one of several (`of_rows`).

    Raises TypeError or ValueError for a weight that is not a finite (m, d) array matching the Hessian, or where one of
    them is so large or so small that products of them are beyond float64.
    """

    def __init__(
        self,
        weight: Array,
        hessian: RowHessian,
        *,
        centre: Array | None = None,
        constant: float = 0.0,
        terms: tuple[Term, ...] = (),
        damping: float = 0.0,
        ridge: float | None = None,
        total: Callable[[float], float] = _alone,
    ):
        if not isinstance(hessian, RowHessian):
            raise ArgumentTypeError(
                f"hessian must be a RowHessian, got {type(hessian).__name__}: "
                "write Problem(weight, RowHessian(A, U))"
            )
        self.weight = weight
        self.hessian = hessian
        self.constant = constant
        self.terms = terms
        self.damping = damping
        self.ridge = ridge
        self.total = total
        with computing_on(weight):
            self.centre = self._matrix(weight if centre is None else centre, "weight")
            _check_size(self.centre, "the weight")
            _check_size(namespace(hessian.A).linalg.diagonal(hessian.A), "the Hessian's diagonal")

    def _matrix(self, array: Array, name: str) -> Array:
        matrix = check_weight(array, name)
        m, d = matrix.shape
        if d != self.hessian.columns or self.hessian.rows not in (None, m):
            raise ArgumentError(
                f"the {name} is {m} x {d}, the Hessian is for {self.hessian.rows or 'any'} rows of "
                f"{self.hessian.columns} columns: A must be (d, d) and U (m, d, n)"
            )
        if type(matrix) is not type(self.hessian.A):
            raise ArgumentTypeError(f"the {name} and the Hessian must be on the same device")
        return matrix

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)"""
        return tuple(self.centre.shape)  # type: ignore[return-value]

    @property
    def dtype(self) -> str:
        """ "float32" or "float64": what solvers compute in, apart from factorisations."""
        return dtype_name(self.centre)

    def value(self, V: Array) -> float:
        """F(V), in float64."""
        with computing_on(self.weight):
            moved = Deviation.between(native(V, "V"), self.centre)
            return max(moved.loss(self.hessian.A, self._factors), 0.0) + self.constant

    @property
    def _factors(self) -> Array | None:
        """The U_i, (m, d, n), without a copy."""
        return None if self.hessian.factors is None else by_row(self.hessian.factors)

    def graded(self, V: Array) -> tuple[float, list[float]]:
        """F(V) and the loss of each term, in float64, with no product more than the losses take."""
        with computing_on(self.weight):
            v = native(V, "V")
            centres = {id(term.centre): term.centre for term in self.terms}
            deviations = {key: Deviation.between(v, centre) for key, centre in centres.items()}
            losses = [term.loss_of(deviations[id(term.centre)]) for term in self.terms]
            moved = deviations.get(id(self.centre))  # that of terms which are all about the weight
            value = (
                self.value(v)
                if self.ridge is None
                else self._sum_of_terms(losses, moved or Deviation.between(v, native(self.weight, "weight")))
            )
            return value, [max(loss, 0.0) for loss in losses]

    def _sum_of_terms(self, losses: list[float], moved: Deviation) -> float:
        """F of a V with these losses, moved from the weight by so much."""
        assert self.ridge is not None
        terms = sum(term.weight * loss for term, loss in zip(self.terms, losses, strict=True))
        return terms + self.ridge * moved.squared_norm

    def on_cpu(self) -> "Problem":
        """The same problem in NumPy arrays, without its terms, to be solved on the CPU; itself if it is there."""
        if is_numpy(self.centre):
            return self
        factors = None if self.hessian.factors is None else by_row(on_host(self.hessian.factors))
        hessian = RowHessian(on_host(self.hessian.A), factors)
        return Problem(on_host(self.centre), hessian, constant=self.constant, total=self.total)

    def of_rows(self, first: int, stop: int, total: Callable[[float], float]) -> "Problem":
        """The problem of the rows from `first` to before `stop`, without terms. The F of all pieces add up to F.

        total: what adds up a number over the pieces, all of which are solved at the same time.
        """
        piece = Problem.__new__(Problem)  # whose arrays have been checked
        piece.weight, piece.centre = self.weight[first:stop], self.centre[first:stop]
        with computing_on(self.weight):
            piece.hessian = self.hessian.of_rows(first, stop)
        piece.constant = self.constant * (stop - first) / self.shape[0]
        piece.terms, piece.damping, piece.ridge, piece.total = (), self.damping, None, total
        return piece

    def zero_value(self) -> float:
        """F(0), the unit of `Result.relative`."""
        return self.at_zero.value

    @cached_property
    def at_zero(self) -> AtZero:
        """F(0) for when it is asked for."""
        with computing_on(self.weight):
            if self.ridge is None:
                known = self.constant + Deviation(self.centre).loss(None, self._factors)
                return AtZero(known, self.hessian.A, self.centre, self.weight)
            losses = [1.0 if term.at_zero > 0 else 0.0 for term in self.terms]
            known = self._sum_of_terms(losses, Deviation(-native(self.weight, "weight")))
            return AtZero(known, None, self.centre, self.weight)


def check_weight(array: Array, name: str = "weight") -> Array:
    """`array` (m, d) as it is computed on; TypeError or ValueError where it is no finite matrix."""
    matrix = native(array, name)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ArgumentError(f"{name} must be (m, d) and not empty, got shape {tuple(matrix.shape)}")
    if not all_finite(matrix):
        raise ArgumentError(f"{name} holds NaN or infinity: the model is broken before pruning")
    return matrix


def _check_size(array: Array, what: str) -> None:
    largest = float(namespace(array).max(abs(array)))
    if largest and not 1 / _LARGEST < largest < _LARGEST:
        raise ArgumentError(
            f"{what} is {largest:.3g} at most, products of it are beyond the limits of float64: scale the weight, or "
            "what the Hessian is made of, nearer to one"
        )


@dataclass(frozen=True)
class Result:
    """A pruned layer and how good it is. Every figure is recomputed by `solve` from `weight`.

    weight: (m, d), zero outside the mask, the kind, dtype and device of the problem's weight.
    mask: (m, d) booleans, False where a weight is pruned.
    value: F(weight) of the damped problem, float64.
    at_zero: what `relative` takes F(0) from.
    terms: each term's undamped `q_t(weight) / q_t(0)`.
    status, iterations: how the solver ended, and after how many iterations.
    solver, pattern: their names.
    seconds: wall-clock time of `init` (if it was not given a state) and `compute`.
    bound: a proven lower bound of F over all weights with the pattern, in units of `value`, if one was asked for or
    the solver proved one.
    note: what the solver says of how it found the answer, such as that it did so on the CPU; empty for nothing.
    """

    weight: Array
    mask: Array
    value: float
    at_zero: AtZero = field(repr=False, compare=False)
    terms: dict[str, float]
    status: Status
    seconds: float
    solver: str
    pattern: str
    iterations: int = field(default=1)
    bound: float | None = None
    note: str = ""

    @property
    def relative(self) -> float:
        """value / F(0). F(0) is found when it is first asked for; until then the Hessian stays in memory."""
        zero_value = self.at_zero.value
        return self.value / zero_value if zero_value > 0 else 0.0

    @property
    def sparsity(self) -> float:
        """The fraction of weights that the mask leaves out."""
        return 1 - float(self.mask.sum()) / (self.mask.shape[0] * self.mask.shape[1])

    @property
    def zero_survivors(self) -> int:
        """How many weights are zero although the mask would let them be something else."""
        return int((self.mask & (self.weight == 0)).sum())

    @property
    def gap(self) -> float | None:
        """How far from the optimum the value can be at most: `(value - bound) / value`; None without a bound."""
        if self.bound is None:
            return None
        return max((self.value - self.bound) / self.value, 0.0) if self.value else 0.0
