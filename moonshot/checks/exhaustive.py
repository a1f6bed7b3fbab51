"""The best there is on a layer of a few weights, by trying everything."""

import numpy as np

from moonshot.layer.patterns import Pattern, PatternMismatchError
from moonshot.layer.problem import Problem


def all_masks(pattern: Pattern, shape: tuple[int, int]) -> np.ndarray:
    """Every mask (masks, m, d) of this shape that the pattern accepts; 2^(m d) are tried, so m d <= 12 or so."""
    m, d = shape
    bits = np.arange(2 ** (m * d))[:, None] >> np.arange(m * d) & 1
    candidates = bits.astype(bool).reshape(-1, m, d)
    return np.array([mask for mask in candidates if accepts(pattern, mask)], bool).reshape(-1, m, d)


def accepts(pattern: Pattern, mask: np.ndarray) -> bool:
    try:
        pattern.check(mask)
    except PatternMismatchError:
        return False
    return True


def optimum(problem: Problem, pattern: Pattern) -> float:
    """The least F(V) over V with the pattern.

    Row i on the support S costs `c_P' ((H_i^-1)_PP)^-1 c_P` at least, P the rest.
    """
    m, d = problem.shape
    losses = np.zeros((m, 2**d))
    for i in range(m):
        inverse = np.linalg.inv(problem.hessian.row(i))
        for support in range(2**d):
            pruned = [j for j in range(d) if not support >> j & 1]
            c = np.asarray(problem.centre[i], np.float64)[pruned]
            losses[i, support] = c @ np.linalg.solve(inverse[np.ix_(pruned, pruned)], c) if pruned else 0
    supports = all_masks(pattern, (m, d)) @ (1 << np.arange(d))
    return problem.constant + float(losses[np.arange(m), supports].sum(axis=1).min())
