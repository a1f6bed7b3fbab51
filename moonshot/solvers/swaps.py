"""Swaps: exchange kept and pruned weights of another solver's answer until no exchange lowers the objective."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moonshot.errors import ArgumentError, ArgumentTypeError, check_number
from moonshot.layer.patterns import Pattern, lacks_groups
from moonshot.layer.problem import Problem, Status
from moonshot.linalg.backend import (
    Array,
    as_dtype,
    asarray_like,
    contiguous,
    is_numpy,
    on_host,
    triangular_solve,
)
from moonshot.linalg.factor import cholesky
from moonshot.solvers.base import Answer, Solver, row_work

_TOLERANCE = 1e-11  # the fall of a row's loss that counts, relative to the loss of an empty row
_UNLIMITED = 2**62
_FRESH = 256  # exchanges in a row after which rounding calls for a new tableau
_OFFERS = 8  # weights a row offers to the other rows, each way, between two looks at it


@dataclass(frozen=True)
class _State:
    inner: Any
    problem: Problem


@dataclass(frozen=True)
class Swaps:
    """Another solver's answer, improved by exact exchanges on the support, all weights refitted.

    An exchange takes one weight of a row out of the support and another in. All pairs are tried until none lowers the
    objective. Then chains are: a weight goes and the best one comes, the cheapest goes and the best comes, up to four
    exchanges, kept once the objective is lower; they begin with the 32 weights whose single exchanges come nearest
    to that. The method ends when no pair and none of these chains helps. In N:M patterns both weights of an exchange
    are of one group. Where the budget is the layer's, rows also trade: one gives up its cheapest weight, another gains
    its most valuable.

    inner: the solver whose answer is the start; the end is never above it.
    moves: the limit on the exchanges of a row, in multiples of its length.

    Every change of the objective is known exactly from the row's d x d tableau in float64: memory d^2 for each thread,
    or 128 MiB where that is more. The first tableau of a row costs up to d^3 multiply-adds, a round over all pairs some
    d^2.

    Raises NotPositiveDefiniteError where a row's Hessian is not. Of a layer on a device the inner solver's answer is
    found there; it is copied to the CPU and exchanged there, which the result's note says.

    Source: swaps as in Beck and Eldar (arXiv 1203.4580) and Hazimeh and Mazumder (arXiv 1803.01454); chains as in
    Kernighan and Lin (1970); the tableau is that of the sweep operator (Goodnight, 1979). See docs/solvers/swaps.md.
    """

    inner: Solver
    moves: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.inner, type) or not isinstance(self.inner, Solver):
            raise ArgumentTypeError(
                f"inner must be a solver's instance such as moonshot.ADMM(), got {self.inner!r}"
            )
        check_number("moves", self.moves)
        if not self.moves > 0:
            raise ArgumentError(f"moves must be positive, got {self.moves!r}")

    @property
    def name(self) -> str:
        return f"Swaps({self.inner.name})"

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        if reason := self.inner.unsupported(problem, pattern):
            return reason
        if reason := lacks_groups(pattern, problem.shape, "exchanging weights"):
            return reason
        return None

    def working_memory(self, shape: tuple[int, int]) -> int:
        """Bytes of the tableaus, or of what the inner solver works on where that is more."""
        from moonshot.solvers import swaps_kernels as kernels

        m, d = shape
        inner = self.inner.working_memory(shape) if hasattr(self.inner, "working_memory") else 0
        return max(8 * d**2 * min(m, kernels.rows_at_once(d)), inner)

    def row_work(self, columns: int, factors: int) -> float | None:
        """That of a tableau in float64, and of the inner solver; None where it does not treat rows by themselves."""
        inner = row_work(self.inner, columns, factors)
        return None if inner is None else inner + 2.0 * columns**3

    def init(self, problem: Problem) -> _State:
        return _State(self.inner.init(problem), problem)

    def compute(self, state: _State, pattern: Any) -> Answer:
        problem, answer = state.problem, self.inner.compute(state.inner, pattern)
        size, _ = pattern.groups(problem.shape)
        limit = math.ceil(min(self.moves * problem.shape[1], _UNLIMITED))
        here = problem.on_cpu()
        layer = _Layer(here, size, on_host(answer.mask), limit)
        rows = np.arange(problem.shape[0])
        while len(rows):
            layer.exchange(rows)
            rows = np.flatnonzero(~layer.settled & (layer.moves < layer.limit))
            if not len(rows) and size > problem.shape[1]:  # the budget is the layer's
                rows = layer.trade()
        note = "" if is_numpy(problem.centre) else "exchanged on the CPU"
        weight = as_dtype(layer.weight, problem.dtype)
        if here.total(here.value(weight)) > here.total(here.value(on_host(answer.weight))):
            return replace(answer, start=answer.weight, note=note)
        status = Status.CONVERGED if layer.settled.all() else Status.ITERATION_LIMIT
        weight, mask = (asarray_like(array, problem.centre) for array in (weight, layer.mask))
        return Answer(weight, mask, status, int(layer.moves.sum()), start=answer.weight, note=note)


class _Layer:
    """The supports of a layer on their way, and what each row offers to the others.

    mask, weight: (m, d). moves: (m,), exchanges so far. settled: (m,), whether no exchange within the row is left.
    columns, rises: (2, m, offers), weights to take out (0) or in (1), one after the other, and what each adds to the
    objective.
    """

    def __init__(self, problem: Problem, size: int, mask: Array, limit: int):
        """size: weights of a group, which exchange among one another; limit: of the exchanges of a row."""
        hessian, (m, d) = problem.hessian, problem.shape
        self.limit = limit
        self.shared = contiguous(hessian.A)
        self.factors = np.zeros((0, m, d)) if hessian.factors is None else hessian.factors
        self.centre = as_dtype(problem.centre, "float64")
        self.diagonal = np.broadcast_to(hessian.diagonal(), (m, d))
        self.tolerance = _TOLERANCE * hessian.quadratic(self.centre)
        self.groups = np.arange(d) // min(size, d)
        self.mask, self.weight = mask.copy(), np.zeros((m, d))
        self.moves, self.settled = np.zeros(m, np.int64), np.zeros(m, bool)
        self.columns, self.rises = np.zeros((2, m, _OFFERS), np.int64), np.zeros((2, m, _OFFERS))

    def exchange(self, rows: Array) -> None:
        """Exchange within some rows, and refit them: a few at once, for each has a tableau (d, d)."""
        from moonshot.solvers import swaps_kernels as kernels

        together = kernels.rows_at_once(len(self.groups))
        for part in (rows[first : first + together] for first in range(0, len(rows), together)):
            order = np.argsort(~self.mask[part], axis=1, kind="stable")  # the support first
            here = part[:, None], order
            tableaus = kernels.gather(self.shared, self.factors, part, order)
            for tableau, kept in zip(tableaus, self.mask[part].sum(axis=1), strict=True):
                sweep_leading(tableau, kept)
            inside = self.mask[here]
            u, moves, self.settled[part], columns, self.rises[:, part] = kernels.exchange(
                tableaus,
                inside,
                self.centre[here],
                self.diagonal[here],
                self.groups[order],
                self.tolerance[part],
                np.minimum(self.limit - self.moves[part], _FRESH),
                _OFFERS,
            )
            self.mask[here] = inside
            self.weight[here] = np.where(inside, u, 0)
            self.moves[part] += moves
            self.columns[:, part] = np.take_along_axis(order[None], columns, axis=2)
            del tableaus, tableau  # before there are others

    def trade(self) -> Array:
        """Take weights out of some rows and as many in others, while that lowers the objective: the rows changed.

        A row either gives or takes, in the order of its offers, so every trade changes the objective by exactly the
        rises offered. If none is found, none between any two rows is better.
        """
        taken = np.zeros(self.rises.shape[:2], np.int64)
        rises = np.pad(self.rises, ((0, 0), (0, 0), (0, 1)), constant_values=np.inf)
        rises[:, self.moves >= self.limit] = np.inf
        following = rises[:, :, 0].copy()
        while True:
            pairs = ((following[0, i] + following[1, j], i, j) for i, j in _candidates(following))
            rise, i, j = min(pairs, default=(np.inf, 0, 0))
            if not rise < -(self.tolerance[i] + self.tolerance[j]):
                return np.flatnonzero(taken.any(axis=0))
            for way, row in enumerate((i, j)):
                self.mask[row, self.columns[way, row, taken[way, row]]] = way == 1
                self.moves[row] += 1
                taken[way, row] += 1
                following[way, row], following[1 - way, row] = rises[way, row, taken[way, row]], np.inf


def _candidates(following: Array) -> list[tuple[int, int]]:
    """Two rows that differ, among the two cheapest to give and the two most glad to take: the best pair is there."""
    give, take = (np.argpartition(rises, min(1, len(rises) - 1))[:2].tolist() for rises in following)
    return [(i, j) for i in give for j in take if i != j]


def sweep_leading(h: Array, k: int) -> None:
    """Sweep a symmetric positive definite h (d, d) on its first k columns, in place.

    With `H_SS = L L'` and `W = L^-1 [I, H_SN]`, everything in the tableau is a block of `W'W` or of it taken from h:

        -G = -W_S' W_S      G H_SN = W_S' W_N      H_NN - H_NS G H_SN = H_NN - W_N' W_N

    Raises NotPositiveDefiniteError.
    """
    if k == 0:
        return
    lower = cholesky(h[:k, :k], "the Hessian of a row")
    h[:k, :k] = np.eye(k)
    half = triangular_solve(lower, h[:k], lower=True)
    product = half.T @ half
    h[:k, :k] = -product[:k, :k]
    h[:k, k:], h[k:, :k] = product[:k, k:], product[k:, :k]
    h[k:, k:] -= product[k:, k:]
