"""Swaps: exchange kept and pruned weights of another solver's answer until no exchange lowers the objective."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from moonshot.linalg.backend import Array, as_dtype, is_numpy
from moonshot.linalg.factor import cholesky
from moonshot.patterns import NM, Pattern, Unstructured
from moonshot.problem import Problem, Status
from moonshot.solvers.base import Answer, Solver

_OFFERS = 8  # columns a row offers to other rows between two looks at its tableau
_TOLERANCE = 1e-11  # a fall of the loss that counts, relative to an empty row


@dataclass(frozen=True)
class _State:
    inner: Any
    problem: Problem


@dataclass(frozen=True)
class Swaps:
    inner: Solver
    moves: float = 1.0

    @property
    def name(self) -> str:
        return f"Swaps({self.inner.name})"

    def __post_init__(self) -> None:
        if isinstance(self.inner, type) or not isinstance(self.inner, Solver):
            raise TypeError(f"inner must be a solver instance such as moonshot.ADMM(), got {self.inner!r}")
        if not self.moves > 0:
            raise ValueError(f"moves must be positive, got {self.moves!r}")

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        if reason := self.inner.unsupported(problem, pattern):
            return reason
        if not isinstance(pattern, Unstructured | NM):
            return f"swaps need an Unstructured or NM pattern, got {type(pattern).__name__}"
        if not is_numpy(problem.centre):
            return "missing swaps on a device: move the layer to the CPU"
        return None

    def init(self, problem: Problem) -> _State:
        return _State(self.inner.init(problem), problem)

    def compute(self, state: _State, pattern: Pattern) -> Answer:
        answer = self.inner.compute(state.inner, pattern)
        problem = state.problem
        limit = int(np.ceil(self.moves * problem.shape[1]))
        layer = _Layer(problem, pattern, answer.mask, limit)
        active = np.arange(len(layer.mask))
        while len(active):
            layer.polish(active)
            active = np.flatnonzero(~layer.settled & (layer.moved < limit))
            if len(active) == 0 and isinstance(pattern, Unstructured) and pattern.scope == "layer":
                active = layer.trade()
        weight = as_dtype(np.where(layer.mask, layer.weight, 0), problem.dtype)
        return Answer(weight, layer.mask, start=answer.weight)
class _Layer:
    def __init__(self, problem, pattern, mask, limit):
        hessian = problem.hessian
        m, d = problem.shape
        self.limit = limit
        self.shared = hessian.A
        self.factors = np.zeros((0, m, d)) if hessian.factors is None else hessian.factors
        self.centre = as_dtype(problem.centre, "float64")
        self.scale = np.broadcast_to(hessian.diagonal(), (m, d))
        self.tolerance = _TOLERANCE * hessian.quadratic(self.centre)
        self.group = np.arange(d) // (pattern.m if isinstance(pattern, NM) else d)
        self.mask = mask.copy()
        self.weight = np.zeros((m, d))
        self.moved = np.zeros(m, np.int64)
        self.settled = np.zeros(m, bool)
        self.columns = np.full((2, m, _OFFERS), -1)
        self.rises = np.full((2, m, _OFFERS), np.inf)

    def polish(self, rows):
        from moonshot.linalg import kernels_swaps as K
        import numba
        step = numba.get_num_threads()
        for first in range(0, len(rows), step):
            part = rows[first:first + step]
            orders = np.argsort(~self.mask[part], axis=1, kind="stable")
            take = lambda x: np.take_along_axis(x, orders, 1)
            T = K.gather(self.shared, self.factors, part, orders)
            for t, keep in zip(T, self.mask[part].sum(1)):
                _sweep(t, keep)
            inside = take(self.mask[part])
            u, moved, settled, columns, rises = K.exchange(T, inside, take(self.centre[part]), take(self.scale[part]),
                self.group[orders], self.tolerance[part], self.limit - self.moved[part], _OFFERS)
            rr = part[:, None]
            self.mask[rr, orders] = inside
            self.weight[rr, orders] = np.where(inside, u, 0)
            self.moved[part] += moved
            self.settled[part] = settled
            for way in range(2):
                self.columns[way, part] = np.where(columns[way] >= 0, np.take_along_axis(orders, columns[way], 1), -1)
                self.rises[way, part] = rises[way]

    def trade(self):
        (cost, fall) = self.rises
        out, come = self.columns
        m = len(cost)
        nxt_cost = cost[:, 0].copy(); nxt_gain = -fall[:, 0]
        taken = np.zeros((2, m), int)
        while True:
            i, j = int(np.argmin(nxt_cost)), int(np.argmax(nxt_gain))
            if i == j:
                c = nxt_cost.copy(); c[i] = np.inf; i2 = int(np.argmin(c))
                g = nxt_gain.copy(); g[j] = -np.inf; j2 = int(np.argmax(g))
                if nxt_gain[j2] - nxt_cost[i] > nxt_gain[j] - nxt_cost[i2]:
                    j = j2
                else:
                    i = i2
            if i == j or not nxt_gain[j] - nxt_cost[i] > self.tolerance[i] + self.tolerance[j]:
                break
            self.mask[i, out[i, taken[0, i]]] = False
            self.mask[j, come[j, taken[1, j]]] = True
            taken[0, i] += 1; taken[1, j] += 1
            nxt_gain[i] = -np.inf; nxt_cost[j] = np.inf
            nxt_cost[i] = cost[i, taken[0, i]] if taken[0, i] < _OFFERS else np.inf
            nxt_gain[j] = -fall[j, taken[1, j]] if taken[1, j] < _OFFERS else -np.inf
        self.moved += taken.sum(0)
        changed = np.flatnonzero(taken.sum(0))
        self.settled[changed] = False
        return changed

def _sweep(t, k):
    lower = cholesky(t[:k, :k], "the Hessian of a row")
    half = scipy.linalg.solve_triangular(lower, t[:k, k:], lower=True, check_finite=False)
    t[k:, k:] -= half.T @ half
    z = scipy.linalg.solve_triangular(lower, half, lower=True, trans=1, check_finite=False)
    t[:k, k:] = z
    t[k:, :k] = z.T
    inv = scipy.linalg.solve_triangular(lower, np.eye(k), lower=True, check_finite=False)
    t[:k, :k] = -(inv.T @ inv)
