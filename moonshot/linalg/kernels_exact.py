"""Branch and bound on one row, compiled by numba, searches in parallel.

A search looks for the best set of zeros of one row, `group` columns at a time each having their own number of
zeros. With `H^-1 = L L'` and l_j the rows of L, pruning column j of a row w costs `s_j = w_j^2 / |l_j|^2` and leaves

    l_k <- l_k - l_j (l_k . l_j) / |l_j|^2      w_k <- w_k - w_j (l_k . l_j) / |l_j|^2

which is one step of modified Gram-Schmidt; keeping column j deletes l_j and w_j. So a node of the tree is the rows
and weights of its undecided columns, each node is made from its parent's copy, and rounding does not build up.
docs/solvers/exact.md proves the bounds. A search holds d^3 numbers in its thread while it runs.
"""

import numpy as np
from numba import njit, prange

from moonshot.linalg.kernels_cpu import _FAST, _kernel

_SQUARINGS = 3  # of the correlation matrix, for its largest eigenvalue
_STEPS = 6  # of the relaxation's ascent
_RELATIVE, _ABSOLUTE = 1e-9, 1e-15  # what is not worth searching for: of the best value, of the empty row's
_SWAP = 1e-12  # a swap's least gain, relative to the value

OPEN, KEEPING, PRUNING = 0, 1, 2  # a node not looked at yet; its branches, in this order


@njit(fastmath=_FAST, cache=True)
def _row(A, factors, centre, i):
    """H_i scaled to a unit diagonal, the centre in the same coordinates, and the scale."""
    d = A.shape[0]
    h = A.copy()
    for k in range(factors.shape[0]):
        for j in range(d):
            for q in range(d):
                h[j, q] += np.float64(factors[k, i, j]) * np.float64(factors[k, i, q])
    scale = np.sqrt(np.diag(h))
    for j in range(d):
        for q in range(d):
            h[j, q] /= scale[j] * scale[q]
    return h, centre[i] * scale, scale


@njit(fastmath=_FAST, cache=True)
def _inverse_rows(h):
    """L (d, d) with `h^-1 = L L'`, and the smallest pivot of h; L is worthless if that is not positive."""
    d = h.shape[0]
    lower, rows = np.zeros((d, d)), np.zeros((d, d))
    smallest = np.inf
    for i in range(d):
        for j in range(i + 1):
            rest = h[i, j]
            for k in range(j):
                rest -= lower[i, k] * lower[j, k]
            lower[i, j] = rest / lower[j, j] if j < i else np.sqrt(max(rest, 1e-300))
        smallest = min(smallest, rest)
    for j in range(d):
        rows[j, j] = 1 / lower[j, j]
        for i in range(j + 1, d):
            rest = 0.0
            for k in range(j, i):
                rest -= lower[i, k] * rows[j, k]
            rows[j, i] = rest / lower[i, i]
    return rows, smallest


@_kernel
def smallest_pivots(A, factors, centre):
    m = centre.shape[0]
    out = np.empty(m)
    for i in prange(m):
        out[i] = _inverse_rows(_row(A, factors, centre, i)[0])[1]
    return out


@njit(fastmath=_FAST, cache=True)
def _gram(rows, n):
    """The inner products of the first n rows."""
    out = np.empty((n, n))
    for j in range(n):
        for k in range(j + 1):
            total = 0.0
            for q in range(rows.shape[1]):
                total += rows[j, q] * rows[k, q]
            out[j, k] = total
            out[k, j] = total
    return out


@njit(fastmath=_FAST, cache=True)
def _fit(h, c, pruned):
    """`x = v - c` for the best v that is zero where pruned, the gradient h x, and the inverse of h_KK."""
    d = c.shape[0]
    kept = np.flatnonzero(~pruned)
    n = kept.shape[0]
    block = np.empty((n, n))
    for j in range(n):
        for k in range(n):
            block[j, k] = h[kept[j], kept[k]]
    inverse = _gram(_inverse_rows(block)[0], n)
    x, gradient = np.where(pruned, -c, 0.0), np.empty(d)
    for _ in range(3):  # the solution, and two corrections by what is left of the gradient
        for j in range(d):
            gradient[j] = 0
            for k in range(d):
                gradient[j] += h[j, k] * x[k]
        for j in range(n):
            for k in range(n):
                x[kept[j]] -= inverse[j, k] * gradient[kept[k]]
    value = 0.0
    for j in range(d):
        for k in range(d):
            value += x[j] * h[j, k] * x[k]
    return x, gradient, kept, inverse, max(value, 0.0)


@njit(fastmath=_FAST, cache=True)
def _swap(h, c, pruned, group):
    """Exchange a zero for a kept weight of its group, the best such pair each time, until none improves.

    Returns the value. With V the inverse of h_KK, `z = V h_Kj` and `b = h_jj - h_jK z`, letting column j back in
    gains g_j^2 / b, moves it by `t = -g_j / b` and v_K by -z t; then pruning k costs v_k^2 / (V_kk + z_k^2 / b).
    """
    while True:
        x, gradient, kept, inverse, value = _fit(h, c, pruned)
        n = kept.shape[0]
        z = np.empty(n)
        best, enter, leave = -_SWAP * value, -1, -1
        for j in np.flatnonzero(pruned):
            b = h[j, j]
            for k in range(n):
                z[k] = 0
                for q in range(n):
                    z[k] += inverse[k, q] * h[kept[q], j]
                b -= h[j, kept[k]] * z[k]
            t = -gradient[j] / b
            for k in range(n):
                if kept[k] // group == j // group:
                    v = c[kept[k]] + x[kept[k]] - z[k] * t
                    change = v * v / (inverse[k, k] + z[k] * z[k] / b) + gradient[j] * t
                    if change < best:
                        best, enter, leave = change, j, kept[k]
        if enter < 0:
            return value
        pruned[enter], pruned[leave] = False, True
        if _fit(h, c, pruned)[4] >= value:  # rounding promised more than there is
            pruned[enter], pruned[leave] = True, False
            return value


@njit(fastmath=_FAST, cache=True)
def _cheapest(scores, groups, left, chosen):
    """Mark each group's cheapest columns, as many as it has zeros left; returns the dearest of them."""
    taken = np.zeros_like(left)
    dearest = 0.0
    chosen[:] = False
    for j in np.argsort(scores):
        if taken[groups[j]] < left[groups[j]]:
            taken[groups[j]] += 1
            chosen[j] = True
            dearest = scores[j]
    return dearest


@njit(fastmath=_FAST, cache=True)
def _largest_eigenvalue(correlation):
    """An upper bound of it: `|C^p|_F^(1/p)` with p = 2^squarings, C symmetric and positive semidefinite."""
    power = correlation
    exponent, logarithm = 1.0, 0.0
    for _ in range(_SQUARINGS):
        size = np.max(np.diag(power))  # the largest entry, C being positive semidefinite
        logarithm += np.log(size) / exponent
        power = _gram(power / size, power.shape[0])
        exponent *= 2
    return np.exp(logarithm + np.log(np.sum(power * power)) / (2 * exponent)) * (1 + 1e-12)


@njit(fastmath=_FAST, cache=True)
def _relaxed(rows, w, groups, left, q, enough):
    """The bound `sum of the cheapest (w_j + (N q)_j)^2 / E_j, less q' N q` with `N = E - L L'`, E diagonal.

    It holds for every q; q is moved uphill from where it starts, and left at the best place. Ends early
    at `enough`.
    """
    n = w.shape[0]
    excess = _gram(rows, n)
    diagonal = np.diag(excess).copy()
    root = np.sqrt(diagonal)
    diagonal *= _largest_eigenvalue(excess / (root.reshape(-1, 1) * root))
    for j in range(n):
        for k in range(n):
            excess[j, k] = diagonal[j] - excess[j, k] if j == k else -excess[j, k]
    here, moved, scores = q.copy(), np.empty(n), np.empty(n)
    chosen = np.empty(n, np.bool_)
    best = 0.0
    for step in range(_STEPS):
        bound = 0.0
        for j in range(n):
            total = 0.0
            for k in range(n):
                total += excess[j, k] * here[k]
            bound -= here[j] * total
            moved[j] = w[j] + total
            scores[j] = moved[j] * moved[j] / diagonal[j]
        _cheapest(scores, groups, left, chosen)
        for j in range(n):
            if chosen[j]:
                bound += scores[j]
        if bound > best:
            best = bound
            q[:] = here
        if best >= enough:
            break
        for j in range(n):
            target = moved[j] / diagonal[j] if chosen[j] else 0.0
            here[j] += 2 / (step + 3) * (target - here[j])
    return best


@njit(fastmath=_FAST, cache=True)
def _greedy(rows, w, groups, left, pruned):
    """Prune the cheapest column of any group with zeros left, compensate, and so on: OBS. Changes all but groups."""
    d = w.shape[0]
    while np.sum(left) > 0:
        best, cost = -1, np.inf
        for j in range(d):
            if not pruned[j] and left[groups[j]] > 0:
                s = w[j] * w[j] / np.sum(rows[j] * rows[j])
                if best < 0 or s < cost:
                    best, cost = j, s
        pruned[best] = True
        left[groups[best]] -= 1
        out, value = rows[best] / np.sum(rows[best] * rows[best]), w[best]
        base = rows[best].copy()
        for k in range(d):
            if not pruned[k]:
                inner = np.sum(rows[k] * out)
                w[k] -= inner * value
                rows[k] -= inner * base


@njit(fastmath=_FAST, cache=True)
def _cutoff(upper, empty):
    """Values from here on are as good as `upper`."""
    return max(upper - max(_RELATIVE * upper, _ABSOLUTE * empty), 0.0)


@njit(cache=True)
def _search(h, c, zeros, group, nodes, pruned, figures, column, branch, floor):
    """Go on with one search for at most `nodes` nodes; see `search`."""
    d = c.shape[0]
    groups = np.arange(d) // group
    rows, w, q = np.empty((d + 1, d, d)), np.empty((d + 1, d)), np.zeros((d + 1, d))
    index, size = np.empty((d + 1, d), np.int64), np.empty(d + 1, np.int64)
    left, cost = np.empty((d + 1, d // group), np.int64), np.zeros(d + 1)
    rows[0] = _inverse_rows(h)[0]
    w[0], index[0], size[0], left[0] = c, np.arange(d), d, zeros
    depth, upper, empty = int(figures[0]), figures[1], c @ (h @ c)
    if upper == np.inf:
        _greedy(rows[0].copy(), c.copy(), groups, left[0].copy(), pruned)
        upper = _swap(h, c, pruned, group)
    for t in range(depth):  # back to where the search stopped
        _descend(t, column[t], branch[t] == KEEPING, rows, w, q, index, size, left, cost, groups)
    cutoff, done, t = _cutoff(upper, empty), 0, depth
    while t >= 0:
        if branch[t] == OPEN:
            if done == nodes:
                break
            done += 1
            best, bound, score = _look(t, cutoff, rows, w, q, index, size, left, cost, groups)
            total = np.sum(left[t])
            if best >= 0 and total <= 1:
                trial = np.zeros(d, np.bool_)
                for s in range(t):
                    trial[column[s]] = branch[s] == PRUNING
                if total:
                    trial[best] = True
                value = _swap(h, c, trial, group)
                if value < upper:
                    upper, cutoff = value, _cutoff(value, empty)
                    pruned[:] = trial
            floor[t] = max(floor[t], bound)
            if best < 0 or total <= 1 or floor[t] >= cutoff:
                t -= 1
                continue
            column[t], branch[t] = best, KEEPING
            floor[t + 1] = floor[t]
            floor[t] = max(floor[t], cost[t] + score)  # what is then left open here
        elif branch[t] == KEEPING:
            branch[t] = PRUNING
            floor[t + 1] = floor[t]
        else:
            t -= 1
            continue
        if floor[t + 1] < cutoff and _descend(
            t, column[t], branch[t] == KEEPING, rows, w, q, index, size, left, cost, groups
        ):
            t += 1
            branch[t] = OPEN
    lower = cutoff
    for s in range(t + 1):
        if branch[s] != PRUNING:
            lower = min(lower, floor[s])
    figures[0], figures[1], figures[2], figures[3] = t, upper, lower, figures[3] + done


@njit(fastmath=_FAST, cache=True)
def _look(t, cutoff, rows, w, q, index, size, left, cost, groups):
    """The column to branch on, the node's bound, and what pruning the column costs; the column is -1 to stop here.

    Columns that cannot be pruned any more are taken out of the node. With one zero left the column is the best one
    to prune, and the bound exact.
    """
    n, d, zeros = size[t], w.shape[1], np.sum(left[t])
    if zeros == 0:
        return 0, cost[t], 0.0
    scores, keep = np.empty(n), 0
    available = np.zeros_like(left[t])
    for j in range(n):
        norm = 0.0
        for k in range(d):
            norm += rows[t, j, k] * rows[t, j, k]
        score = w[t, j] * w[t, j] / norm
        g = groups[index[t, j]]
        if left[t, g] > 0 and cost[t] + score < cutoff:
            if keep != j:
                rows[t, keep] = rows[t, j]
                w[t, keep], q[t, keep], index[t, keep] = w[t, j], q[t, j], index[t, j]
            scores[keep] = score
            available[g] += 1
            keep += 1
    size[t] = n = keep
    if np.any(available < left[t]):
        return -1, np.inf, 0.0
    scores, own, chosen = scores[:n], groups[index[t, :n]], np.empty(n, np.bool_)
    bound = cost[t] + _cheapest(scores, own, left[t], chosen)
    if zeros == 1:
        best = np.argmax(chosen)
        return index[t, best], bound, scores[best]
    if bound < cutoff:
        enough = cutoff - cost[t]
        bound = max(bound, cost[t] + _relaxed(rows[t, :n], w[t, :n], own, left[t], q[t, :n], enough))
    best = np.argmax(scores)
    return index[t, best], bound, scores[best]


@njit(fastmath=_FAST, cache=True)
def _descend(t, column, keeping, rows, w, q, index, size, left, cost, groups):
    """Make the child of node t that keeps or prunes a column, as node t + 1; False if it cannot have its zeros."""
    n, d = size[t], w.shape[1]
    g, at, mates = groups[column], -1, 0
    for j in range(n):
        if index[t, j] == column:
            at = j
        if groups[index[t, j]] == g:
            mates += 1
    if keeping and mates - 1 < left[t, g]:
        return False
    left[t + 1] = left[t]
    cost[t + 1] = cost[t]
    size[t + 1] = n - 1
    norm = 0.0
    for k in range(d):
        norm += rows[t, at, k] * rows[t, at, k]
    if not keeping:
        left[t + 1, g] -= 1
        cost[t + 1] += w[t, at] * w[t, at] / norm
    u = 0
    for j in range(n):
        if j == at:
            continue
        inner = 0.0
        if not keeping:
            for k in range(d):
                inner += rows[t, j, k] * rows[t, at, k]
            inner /= norm
        for k in range(d):
            rows[t + 1, u, k] = rows[t, j, k] - inner * rows[t, at, k]
        w[t + 1, u] = w[t, j] - inner * w[t, at]
        q[t + 1, u], index[t + 1, u] = q[t, j], index[t, j]
        u += 1
    return True


@_kernel
def search(A, factors, centre, which, zeros, group, nodes, pruned, figures, column, branch, floor):
    """Go on with searches, each for at most `nodes` nodes, and leave them where they stopped.

    which, zeros: (s,), each search's row and its zeros in every group.
    pruned: (s, d) booleans, the best set of zeros so far.
    figures: (s, 4), the depth of the node to look at next (-1: the search is over), the value of the best set (infinity
    before the first call), a lower bound, and the number of nodes so far.
    column, branch, floor: (s, d + 1), the path to that node: the column decided at each depth, how, and a bound of
    what is not yet searched there.
    """
    for s in prange(which.shape[0]):
        if figures[s, 0] >= 0:
            h, c, _ = _row(A, factors, centre, which[s])
            _search(h, c, zeros[s], group, nodes, pruned[s], figures[s], column[s], branch[s], floor[s])


@_kernel
def refit(A, factors, centre, pruned):
    """The best weights (m, d) that are zero where pruned."""
    out = np.zeros(centre.shape)
    for i in prange(centre.shape[0]):
        h, c, scale = _row(A, factors, centre, i)
        x = _fit(h, c, pruned[i])[0]
        for j in range(c.shape[0]):
            if not pruned[i, j]:
                out[i, j] = (c[j] + x[j]) / scale[j]
    return out
