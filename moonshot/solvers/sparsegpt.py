"""SparseGPT: one sweep over the columns, each row on its own Hessian, exactly."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from moonshot.errors import check_count
from moonshot.layer.patterns import Pattern, lacks_groups
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
    unit,
    zeros_like_shape,
)
from moonshot.linalg.cuda import shared_memory
from moonshot.solvers.base import Answer


@dataclass(frozen=True)
class _State:
    """Arrays of the layer with its columns first, as the sweep reads them."""

    kernels: ModuleType
    weight: Array  # (d, m), in units of `unit`
    r: Array  # (d, d), a multiple of R in A^-1 = R'R: the sweep is the same in every unit
    p: Array  # (d, tiles, n, lanes), R U_i up to a scale; see sparsegpt_batched for these three
    t: Array  # (d, tiles, n, lanes)
    phi: Array  # (d, tiles, lanes)
    unit: float


@dataclass(frozen=True)
class SparseGPT:
    """Fix the columns from left to right, each pruned weight compensated by those to its right.

    block: columns a mask is chosen for at once in unstructured patterns, and that are swept one by one, those before
    and after them in matrix products; rounded up to whole N:M groups.

    Unstructured budgets are met exactly, spread evenly over the blocks. With factors in the Hessian the sweep is
    that of SparseGPT on each row's explicit Hessian, for n d / 2 + 2 n^2
    multiply-adds a weight more; without, it is SparseGPT.

    What it has pruned it never takes back: where inputs nearly repeat one another it can prune all of them, and be
    worse than Magnitude, which ADMM and IHT never are.

    Source: Frantar and Alistarh, SparseGPT (arXiv 2301.00774), algorithm 1; the recursion for the low-rank part is
    ours, see docs/solvers/sparsegpt.md.
    """

    block: int = 128

    name = "SparseGPT"

    def __post_init__(self) -> None:
        check_count("block", self.block)

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return lacks_groups(pattern, problem.shape, "a sweep")

    def row_work(self, columns: int, factors: int) -> float:
        return columns * ((1 + factors) * columns / 2 + 2 * factors**2)

    def init(self, problem: Problem) -> _State:
        hessian = problem.hessian
        size = unit(problem.centre)
        weight = transposed(problem.centre) / size
        kernels = _kernels(weight, hessian.rank)
        r = hessian.inverse_factor
        r = contiguous(as_dtype(r / unit(r), problem.dtype))
        d, m = weight.shape
        lanes = kernels.lanes(m)
        if hessian.rank == 0:
            p, share = zeros_like_shape(weight, (d, -(-m // lanes), 0, lanes)), 1.0
        else:
            p, share = hessian.half_product(problem.dtype, lanes)
        t, phi = kernels.gains(p, share)
        return _State(kernels, weight, r, p, t, phi, size)

    def compute(self, state: _State, pattern: Any) -> Answer:
        xp = namespace(state.weight)
        a = xp.asarray(state.weight, copy=True)
        keep, z = xp.ones_like(a, dtype=xp.bool), xp.zeros_like(a)
        d, tiles, n, lanes = state.p.shape
        residual = zeros_like_shape(a, (tiles, n, lanes))
        size, zeros = pattern.groups((a.shape[1], d))
        group = size if size < d else 1
        width = -(-self.block // group) * group
        _sweep(state, (size, zeros), a, residual, keep, z, 0, d, width)
        return Answer(transposed(a) * state.unit, transposed(keep))


def _kernels(weight: Array, rank: int) -> ModuleType:
    """The sweep's inner loops for arrays of this kind."""
    if is_numpy(weight):
        from moonshot.solvers import sparsegpt_kernels

        return sparsegpt_kernels
    from moonshot.solvers import sparsegpt_batched, sparsegpt_cuda

    if is_cupy(weight) and sparsegpt_cuda.fits(rank, dtype_name(weight), shared_memory(weight)):
        return sparsegpt_cuda
    return sparsegpt_batched


def _sweep(
    state: _State,
    groups: tuple[int, int],
    a: Array,
    residual: Array,
    keep: Array,
    z: Array,
    start: int,
    stop: int,
    width: int,
) -> None:
    """Fix columns start..stop, which those before them have been compensated by, in blocks of `width`.

    groups: their size, and the zeros in each.
    """
    if stop - start <= width:
        _sweep_block(state, groups, a, residual, keep, z, start, stop)
        return
    middle = start + -(-(stop - start) // (2 * width)) * width
    _sweep(state, groups, a, residual, keep, z, start, middle, width)
    a[middle:stop] += state.r[start:middle, middle:stop].T @ z[start:middle]
    _sweep(state, groups, a, residual, keep, z, middle, stop, width)


def _sweep_block(
    state: _State,
    groups: tuple[int, int],
    a: Array,
    residual: Array,
    keep: Array,
    z: Array,
    start: int,
    stop: int,
) -> None:
    kernels, r, p, t, phi = state.kernels, state.r, state.p, state.t, state.phi
    size, zeros = groups
    if size < len(a):
        kernels.sweep_groups(a, r, p, t, phi, residual, keep, z, start, stop, size - zeros, size)
        return
    cost = kernels.scores(a, r, p, t, phi, residual, start, stop)
    keep[start:stop] = _block_mask(groups, len(a), start, stop, cost)
    kernels.sweep(a, r, p, t, residual, keep, z, start, stop)


def _block_mask(groups: tuple[int, int], d: int, start: int, stop: int, cost: Array) -> Array:
    """The mask of columns start..stop of d, as `cost`: their share of the budget, so that the shares add up exactly.

    groups: whole rows, or the layer.
    """
    size, zeros = groups
    share = round(zeros * stop / d) - round(zeros * start / d)
    if size == d:
        return ~smallest(cost.T, share).T
    return ~smallest(cost.reshape(1, -1), share).reshape(cost.shape)
