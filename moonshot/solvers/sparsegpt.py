"""SparseGPT: one sweep over the columns, each row on its own Hessian, exactly."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from moonshot.layer.patterns import NM, Pattern, Unstructured
from moonshot.layer.problem import Problem
from moonshot.linalg.backend import (
    Array,
    as_dtype,
    contiguous,
    dtype_name,
    is_cupy,
    is_numpy,
    namespace,
    smallest,
    transposed,
    zeros_like_shape,
)
from moonshot.solvers.base import Answer


@dataclass(frozen=True)
class _State:
    """Arrays of the layer with its columns first, as the sweep reads them."""

    kernels: ModuleType
    weight: Array  # (d, m)
    r: Array  # (d, d), A^-1 = R'R
    p: Array  # (d, tiles, n, lanes), R U_i up to a scale; see sparsegpt_batched for these three
    t: Array  # (d, tiles, n, lanes)
    phi: Array  # (d, tiles, lanes)


@dataclass(frozen=True)
class SparseGPT:
    """Fix the columns from left to right, each pruned weight compensated by those to its right.

    block: columns a mask is chosen for at once in unstructured patterns, and that are swept one by one, those before
    and after them in matrix products; rounded up to whole N:M groups.

    Unstructured budgets are met exactly, spread evenly over the blocks. With factors in the Hessian the sweep is
    that of SparseGPT on each row's explicit Hessian, for n d / 2 + 2 n^2
    multiply-adds a weight more; without, it is SparseGPT.

    Source: Frantar and Alistarh, SparseGPT (arXiv 2301.00774), algorithm 1; the recursion for the low-rank part is
    ours, see docs/solvers/sparsegpt.md.
    """

    block: int = 128

    name = "SparseGPT"

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block must be a positive integer, got {self.block!r}")

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        if not isinstance(pattern, Unstructured | NM):
            return f"a sweep needs an Unstructured or NM pattern, got {type(pattern).__name__}"
        return None

    def init(self, problem: Problem) -> _State:
        hessian = problem.hessian
        weight = transposed(problem.centre)
        kernels = _kernels(weight, hessian.rank)
        r = contiguous(as_dtype(hessian.inverse_factor, problem.dtype))
        d, m = weight.shape
        lanes = kernels.lanes(m)
        if hessian.rank == 0:
            none = zeros_like_shape(weight, (d, -(-m // lanes), 0, lanes))
            return _State(kernels, weight, r, none, *kernels.gains(none, 1.0))
        p, share = hessian.half_product(problem.dtype, lanes)
        return _State(kernels, weight, r, p, *kernels.gains(p, share))

    def compute(self, state: _State, pattern: Pattern) -> Answer:
        xp = namespace(state.weight)
        a = xp.asarray(state.weight, copy=True)
        keep, z = xp.ones_like(a, dtype=xp.bool), xp.zeros_like(a)
        d, tiles, n, lanes = state.p.shape
        residual = zeros_like_shape(a, (tiles, n, lanes))
        group = pattern.m if isinstance(pattern, NM) else 1
        width = -(-self.block // group) * group
        _sweep(state, pattern, a, residual, keep, z, 0, d, width)
        return Answer(transposed(a), transposed(keep))


def _kernels(weight: Array, rank: int) -> ModuleType:
    """The sweep's inner loops for arrays of this kind."""
    if is_numpy(weight):
        from moonshot.solvers import sparsegpt_kernels

        return sparsegpt_kernels
    from moonshot.solvers import sparsegpt_batched, sparsegpt_cuda

    return (
        sparsegpt_cuda
        if is_cupy(weight) and sparsegpt_cuda.fits(rank, dtype_name(weight))
        else sparsegpt_batched
    )


def _sweep(
    state: _State,
    pattern: Any,
    a: Array,
    residual: Array,
    keep: Array,
    z: Array,
    start: int,
    stop: int,
    width: int,
) -> None:
    """Fix columns start..stop, which those before them have been compensated by, in blocks of `width`."""
    if stop - start <= width:
        _sweep_block(state, pattern, a, residual, keep, z, start, stop)
        return
    middle = start + -(-(stop - start) // (2 * width)) * width
    _sweep(state, pattern, a, residual, keep, z, start, middle, width)
    a[middle:stop] += state.r[start:middle, middle:stop].T @ z[start:middle]
    _sweep(state, pattern, a, residual, keep, z, middle, stop, width)


def _sweep_block(
    state: _State, pattern: Any, a: Array, residual: Array, keep: Array, z: Array, start: int, stop: int
) -> None:
    kernels, r, p, t, phi = state.kernels, state.r, state.p, state.t, state.phi
    if isinstance(pattern, NM):
        kernels.sweep_groups(a, r, p, t, phi, residual, keep, z, start, stop, pattern.n, pattern.m)
        return
    cost = kernels.scores(a, r, p, t, phi, residual, start, stop)
    keep[start:stop] = _block_mask(pattern, len(a), start, stop, cost)
    kernels.sweep(a, r, p, t, residual, keep, z, start, stop)


def _block_mask(pattern: Unstructured, d: int, start: int, stop: int, cost: Array) -> Array:
    """The mask of columns start..stop of d, as `cost`: their share of the budget, so that the shares add up exactly."""
    if pattern.scope == "row":
        zeros = pattern.zeros_through(stop, d) - pattern.zeros_through(start, d)
        return ~smallest(cost.T, zeros).T
    m = cost.shape[1]
    zeros = pattern.zeros_through(m * stop, m * d) - pattern.zeros_through(m * start, m * d)
    return ~smallest(cost.reshape(1, -1), zeros).reshape(cost.shape)
