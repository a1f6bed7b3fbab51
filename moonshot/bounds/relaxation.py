"""The perspective relaxation: what it proves that no weight with a pattern can be below, at any size."""

from collections.abc import Callable
from functools import partial

from moonshot.bounds.minorant import first_minorant, proven_minorant, raised_minorant
from moonshot.layer.problem import Problem
from moonshot.linalg.backend import Array, as_dtype, contiguous, namespace, native, smallest
from moonshot.linalg.factor import capacitance, inverses
from moonshot.linalg.hessian import RowHessian
from moonshot.linalg.lowrank import apply, correct
from moonshot.linalg.products import half_product_by_factor

_EVERY = 3  # steps in p before each step in D
_RELAXATION = 1.5
_BARRIER, _LAST_BARRIER = 0.75, 1e-2  # how it shrinks with each step in D, and where that ends
_AFFORDABLE = 2**27  # m d^3 up to which every row has a D of its own
_RESERVE = 1e-7  # the share of D that pays for rounding in the gradient


def relaxation_bound(problem: Problem, size: int, zeros: int, iterations: int) -> float:
    """A lower bound of F(V) over every V with `zeros` zeros in every `size` consecutive weights.

    iterations: steps in p; every third is followed by one in D.

    For D diagonal with H_i - D positive semidefinite, any p and `a_i = (H_i - D) p_i`,

        F(V) >= constant - sum_i p_i'a_i - sum_ij a_ij^2 / D_j + the least sum of g_ij over the pattern's zeros,
        g_ij = (D_j c_ij - a_ij)^2 / D_j.

    The maximum over p is the perspective relaxation, that over p and D a semidefinite one. Both rise in turn: p by
    Douglas-Rachford steps, D by Newton steps on a log-det barrier. In a small layer every row has its own D, in
    a large one they share it. That H_i - D is positive semidefinite is proven in spite of rounding, and what the
    rest of the arithmetic may have added is subtracted.

    Raises NotPositiveDefiniteError.

    Source: Dong, Chen, Linderoth, Regularization vs. relaxation (arXiv 1510.06083), for the two relaxations; the
    method is ours, see docs/certificate.md.
    """
    p, d = _ascend(problem, size, zeros, iterations)
    xp, rows, rank = namespace(d), d.shape[0], problem.hessian.rank
    d = xp.stack([proven_minorant(_matrix(problem, rows, i), d[i], rank) for i in range(rows)])
    if not bool(xp.all(d > 0)):
        return problem.constant
    nothing = -as_dtype(problem.centre, "float64")  # p of the zero weight, best where little is kept
    values = [_certified(problem, size, zeros, point, d) for point in (p, nothing)]
    return problem.constant + max(0.0, *values)


def row_by_row(shape: tuple[int, int]) -> bool:
    """Whether every row of a layer (m, d) has a D of its own."""
    return shape[0] * shape[1] ** 3 <= _AFFORDABLE


def _matrix(problem: Problem, rows: int, i: int) -> Array:
    """What row i of D is held against: H_i, or A where fewer rows of D than of weights share it."""
    hessian = problem.hessian
    return native(hessian.row(i)) if rows == problem.shape[0] else hessian.A


def _ascend(problem: Problem, size: int, zeros: int, iterations: int) -> tuple[Array, Array]:
    """The best p (m, d) found, and its D, (m, d) or (1, d), in float64.

    Douglas-Rachford in the metric of D on the two parts of the perspective relaxation,

        min over v and z of  sum_i (v_i - c_i)'(H_i - D)(v_i - c_i)  +  sum_ij D_j (v_ij^2 / z_ij - 2 c_ij v_ij),

    z the share of each weight that is kept. The first part's proximal map is `c + H^-1 D (q - c)`, whatever D is.
    """
    m, columns = problem.shape
    rows, dtype = (m, "float64") if row_by_row(problem.shape) else (1, problem.dtype)
    c, solve = as_dtype(problem.centre, dtype), _solver(problem.hessian, dtype)
    xp = namespace(c)
    matrix = partial(_matrix, problem, rows)
    minorant = xp.stack([first_minorant(matrix(i)) for i in range(rows)])
    d, q, level = as_dtype(minorant, dtype), c, None
    best, best_value = (0 * c, minorant), -float("inf")
    for k in range(1, iterations + 1):
        p = solve(d * (q - c))
        a = d * (q - c - p)
        value = _value(c, d, p, a, size, zeros)
        if value > best_value:
            best, best_value = (p, minorant), value
        pull = 2 * (c + p) - q + c
        z, level = _shares((xp.sqrt(d) * abs(pull)).reshape(-1, size).T, size - zeros, level)
        z = z.T.reshape(m, columns)
        q = q + _RELAXATION * (pull * z / (1 + z) - c - p)
        if k % _EVERY == 0:
            slope = as_dtype(pull**2 * z * (1 - z) / (1 + z) ** 2, "float64")
            slope = slope if rows == m else xp.sum(slope, axis=0)[None]
            barrier = max(_BARRIER ** (k // _EVERY - 1), _LAST_BARRIER)
            steps = (raised_minorant(matrix(i), minorant[i], slope[i], barrier) for i in range(rows))
            minorant = xp.stack(list(steps))
            d = as_dtype(minorant, dtype)
    return as_dtype(best[0], "float64"), best[1]


def _solver(hessian: RowHessian, dtype: str) -> Callable[[Array], Array]:
    """The map B -> H^-1 B, by Woodbury."""
    r = hessian.inverse_factor
    if hessian.factors is None:
        inverse = as_dtype(r.T @ r, dtype)
        return lambda b: b @ inverse
    r = as_dtype(r, dtype)
    factors = half_product_by_factor(as_dtype(hessian.factors, dtype), r)
    capacitance_inverses = inverses(capacitance(factors))
    return lambda b: correct(b @ r.T, factors, capacitance_inverses) @ r


def _value(c: Array, d: Array, p: Array, a: Array, size: int, zeros: int) -> float:
    """The bound at p without its constant, as it is computed."""
    pruned = _cheapest((d * c - a) ** 2 / d, size, zeros)
    terms = namespace(c).where(pruned, c * (d * c - 2 * a), -(a**2) / d) - p * a
    return float(namespace(c).sum(terms))


def _cheapest(costs: Array, size: int, zeros: int) -> Array:
    """The pattern's zeros (m, d) whose costs have the smallest sum."""
    return smallest(costs.reshape(-1, size), zeros).reshape(costs.shape)


def _shares(w: Array, kept: int, level: Array | None) -> tuple[Array, Array]:
    """z that minimises `-sum w^2 z / (1 + z)` where each column sums to `kept`: `clip(w level - 1, 0, 1)`.

    w: (size, groups), not negative; level: (groups,), that of a similar w, or None. A few Newton steps within a
    bracket find it; nothing depends on its last digits.
    """
    xp, w = namespace(w), contiguous(w)
    tiny, steps = float(xp.finfo(w.dtype).tiny) ** 0.5, 3
    if level is None:
        level, steps = 1 / xp.clip(xp.mean(w, axis=0), tiny, None), 20
    low, high = xp.zeros_like(level), xp.ones_like(level) / tiny
    for _ in range(steps):
        z = w * level - 1
        slope = xp.sum(xp.where((z > 0) & (z < 1), w, xp.zeros_like(w)), axis=0)
        missing = kept - xp.sum(xp.clip(z, 0, 1), axis=0)
        low, high = xp.where(missing > 0, level, low), xp.where(missing < 0, level, high)
        step = xp.where(slope > 0, missing / xp.clip(slope, tiny, None), missing * level)
        newton = xp.clip(xp.clip(level + step, level / 3, level * 3), tiny, 1 / tiny)
        bracketed = (low > 0) & (high < 1 / tiny)
        outside = (newton <= low) | (newton >= high)
        level = xp.where(bracketed & outside, xp.sqrt(low) * xp.sqrt(high), newton)
    return xp.clip(w * level - 1, 0, 1), level


def _certified(problem: Problem, size: int, zeros: int, p: Array, d: Array) -> float:
    """The bound at p without its constant, lowered by all that rounding can have added.

    H_i - (1 + r) D is positive semidefinite, and a is `(H_i - (1 + r) D) p_i` but for an error of at most e. Then the
    bound with a and D holds less `sum_ij e_ij |p_ij| + e_ij^2 / (r D_j)`: the share r D of the curvature pays for e.
    """
    hessian = problem.hessian
    c, d = as_dtype(problem.centre, "float64"), d / (1 + 2 * _RESERVE)
    xp = namespace(c)
    a, size_of_a = p @ hessian.A - (1 + _RESERVE) * d * p, abs(p) @ abs(hessian.A) + d * abs(p)
    if hessian.factors is not None:
        a = a + apply(hessian.factors, p)
        for u in hessian.factors:
            u = abs(as_dtype(u, "float64"))
            size_of_a = size_of_a + u * xp.sum(u * abs(p), axis=1)[:, None]
    eps = float(xp.finfo(c.dtype).eps)
    error = 2 * (2 * c.shape[1] + hessian.rank + 20) * eps * size_of_a
    lost = xp.sum(error * abs(p) + error**2 / (_RESERVE * d))
    summands = xp.sum(abs(p * a) + 2 * d * c**2 + 2 * a**2 / d)
    return _value(c, d, p, a, size, zeros) - float(lost) - 200 * eps * float(summands)
