"""Branch and bound on single rows, compiled by numba, searches in parallel.

A search looks for the best zeros of one row, `group` columns after the other each having a given number of zeros.
With `H^-1 = L L'` and l_j the rows of L, pruning column j costs `s_j = w_j^2 / |l_j|^2` and leaves

    l_k <- l_k - l_j (l_k . l_j) / |l_j|^2      w_k <- w_k - w_j (l_k . l_j) / |l_j|^2

which is a step of modified Gram-Schmidt; keeping column j deletes l_j and w_j. So a node of the tree is the l_j and w_j
of its undecided columns. Each is made from its parent's, so that rounding errors are those of d steps at most.
docs/solvers/exact.md proves the bounds. A search holds d^3 numbers while it runs, one search in each thread.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from moonshot.linalg.kernels import FAST, kernel

_SQUARINGS = 3  # of a correlation matrix, for its largest eigenvalue
_STEPS = 6  # of the relaxation's ascent
_RELATIVE, _ABSOLUTE = 1e-9, 1e-15  # what is not worth a search: of the best value, of the empty row's
_ROUNDING = 2.3e-16
_SWAP = 1e-12  # the least gain of a swap, relative to the value
_OPEN, _KEEPING, _PRUNING = 0, 1, 2  # a node not looked at yet, and its two branches in their order

_compiled = njit(fastmath=FAST, error_model="numpy", cache=True)


class _Tree(NamedTuple):
    """The nodes from the root to where the search is, by depth t (first index)."""

    rows: Any  # (d + 1, d, d), the l_j of the node's undecided columns
    w: Any  # (d + 1, d), their weights when the pruned columns are zero and all others free
    q: Any  # (d + 1, d), where the relaxation's ascent starts
    index: Any  # (d + 1, d), which columns they are
    size: Any  # (d + 1,), how many
    left: Any  # (d + 1, groups), zeros still to be placed in each group
    cost: Any  # (d + 1,), of the zeros placed
    groups: Any  # (d,), each column's group


@_compiled
def _row(A, factors, centre, i):
    """H_i scaled to a unit diagonal, and the centre in the same coordinates."""
    d = A.shape[0]
    h, c = np.empty((d, d)), np.empty(d)
    for j in range(d):
        for k in range(j + 1):
            total = A[j, k]
            for f in range(factors.shape[0]):
                total += factors[f, i, j] * factors[f, i, k]
            h[j, k] = total
    for j in range(d):
        c[j] = centre[i, j] * np.sqrt(h[j, j])
        for k in range(j):
            h[j, k] /= np.sqrt(h[j, j] * h[k, k])
            h[k, j] = h[j, k]
    for j in range(d):
        h[j, j] = 1
    return h, c


@_compiled
def _inverse_rows(h):
    """L with `h^-1 = L L'`: the transposed inverse of the Cholesky factor."""
    d = h.shape[0]
    lower, rows = np.zeros((d, d)), np.zeros((d, d))
    for i in range(d):
        for j in range(i + 1):
            rest = h[i, j]
            for k in range(j):
                rest -= lower[i, k] * lower[j, k]
            lower[i, j] = rest / lower[j, j] if j < i else np.sqrt(rest)
    for j in range(d):
        rows[j, j] = 1 / lower[j, j]
        for i in range(j + 1, d):
            rest = 0.0
            for k in range(j, i):
                rest -= lower[i, k] * rows[j, k]
            rows[j, i] = rest / lower[i, i]
    return rows


@_compiled
def _gram(rows, n):
    """The inner products (n, n) of the first n rows."""
    out = np.empty((n, n))
    for j in range(n):
        for k in range(j + 1):
            total = 0.0
            for i in range(rows.shape[1]):
                total += rows[j, i] * rows[k, i]
            out[j, k] = total
            out[k, j] = total
    return out


@_compiled
def _fit(h, c, pruned, x, gradient, kept):
    """The best weights that are zero where pruned: (their value, how many are kept, the inverse V of h_KK).

    Fills x (d,) with `v - c`, gradient (d,) with h x and the start of kept (d,) with the columns kept.
    """
    d, n = c.shape[0], 0
    for j in range(d):
        x[j] = -c[j] if pruned[j] else 0.0
        if not pruned[j]:
            kept[n] = j
            n += 1
    block = np.empty((n, n))
    for j in range(n):
        for k in range(n):
            block[j, k] = h[kept[j], kept[k]]
    inverse = _gram(_inverse_rows(block), n)
    value = 0.0
    for step in range(3):  # the solution, a correction, and the gradient of the result
        value = 0.0
        for j in range(d):
            gradient[j] = 0
            for k in range(d):
                gradient[j] += h[j, k] * x[k]
            value += x[j] * gradient[j]
        if step < 2:
            for j in range(n):
                for k in range(n):
                    x[kept[j]] -= inverse[j, k] * gradient[kept[k]]
    return max(value, 0.0), n, inverse


@_compiled
def _swap(h, c, pruned, group):
    """Exchange a zero for a kept weight of its group, the best pair each time, until none improves: the value.

    With `z = V h_Kj` and `b = h_jj - h_jK z`, letting column j back in gains g_j^2 / b, makes it `t = -g_j / b` and
    changes v_K by -z t. Pruning k then costs v_k^2 / (V_kk + z_k^2 / b).
    """
    d = c.shape[0]
    x, gradient, z, kept = np.empty(d), np.empty(d), np.empty(d), np.empty(d, np.int64)
    value, n, inverse = _fit(h, c, pruned, x, gradient, kept)
    while True:
        best, enter, leave = -_SWAP * value, -1, -1
        for j in range(d):
            if not pruned[j]:
                continue
            b = h[j, j]
            for k in range(n):
                z[k] = 0
                for i in range(n):
                    z[k] += inverse[k, i] * h[kept[i], j]
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
        following, n, inverse = _fit(h, c, pruned, x, gradient, kept)
        if following >= value:  # rounding promised more than there is
            pruned[enter], pruned[leave] = True, False
            return value
        value = following


@_compiled
def _cheapest(scores, groups, left, chosen):
    """Mark each group's cheapest columns, as many as it has zeros left; return the dearest of them."""
    n = scores.shape[0]
    order, taken = np.empty(n, np.int64), np.zeros(left.shape[0], np.int64)
    for j in range(n):
        chosen[j] = False
        k = j
        while k > 0 and scores[order[k - 1]] > scores[j]:
            order[k] = order[k - 1]
            k -= 1
        order[k] = j
    dearest = 0.0
    for j in order:
        if taken[groups[j]] < left[groups[j]]:
            taken[groups[j]] += 1
            chosen[j] = True
            dearest = scores[j]
    return dearest


@_compiled
def _largest_eigenvalue(correlation):
    """An upper bound of it, `|C^p|_F^(1/p)`, for C symmetric and positive semidefinite."""
    n = correlation.shape[0]
    power, p, logarithm, squares = correlation, 1.0, 0.0, 0.0
    for _ in range(_SQUARINGS):
        largest = 0.0
        for j in range(n):
            largest = max(largest, power[j, j])
        power = _gram(power, n)
        for j in range(n):
            for k in range(n):
                power[j, k] /= largest * largest
        logarithm += np.log(largest) / p
        p *= 2
    for j in range(n):
        for k in range(n):
            squares += power[j, k] * power[j, k]
    return np.exp(logarithm + np.log(squares) / (2 * p)) * (1 + 1e-12)


@_compiled
def _relaxed(rows, w, groups, left, q, enough):
    """The bound `sum of the cheapest (w_j + (N q)_j)^2 / E_j, less q' N q` with `N = E - L L'`, E diagonal.

    It holds for every q. q climbs from where it is and is left at the best place met, or where the bound is `enough`.
    """
    n = w.shape[0]
    excess, diagonal = _gram(rows, n), np.empty(n)
    correlation = np.empty((n, n))
    for j in range(n):
        for k in range(n):
            correlation[j, k] = excess[j, k] / np.sqrt(excess[j, j] * excess[k, k])
    largest = _largest_eigenvalue(correlation)
    for j in range(n):
        diagonal[j] = largest * excess[j, j]
        for k in range(n):
            excess[j, k] = -excess[j, k]
        excess[j, j] += diagonal[j]
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
            for j in range(n):
                q[j] = here[j]
        if best >= enough:
            break
        for j in range(n):
            target = moved[j] / diagonal[j] if chosen[j] else 0.0
            here[j] += 2 / (step + 3) * (target - here[j])
    return best


@_compiled
def _score(tree, t, j):
    """What pruning the j-th undecided column of node t costs."""
    norm = 0.0
    for k in range(tree.w.shape[1]):
        norm += tree.rows[t, j, k] * tree.rows[t, j, k]
    return tree.w[t, j] * tree.w[t, j] / norm


@_compiled
def _descend(tree, t, column, keeping):
    """Make the child of node t that keeps or prunes a column, as node t + 1."""
    n, d, at, norm = tree.size[t], tree.w.shape[1], 0, 0.0
    for j in range(n):
        if tree.index[t, j] == column:
            at = j
    for g in range(tree.left.shape[1]):
        tree.left[t + 1, g] = tree.left[t, g]
    tree.cost[t + 1] = tree.cost[t]
    tree.size[t + 1] = n - 1
    if not keeping:
        tree.left[t + 1, tree.groups[column]] -= 1
        tree.cost[t + 1] += _score(tree, t, at)
        for k in range(d):
            norm += tree.rows[t, at, k] * tree.rows[t, at, k]
    u = 0
    for j in range(n):
        if j == at:
            continue
        inner = 0.0
        if not keeping:
            for k in range(d):
                inner += tree.rows[t, j, k] * tree.rows[t, at, k]
            inner /= norm
        for k in range(d):
            tree.rows[t + 1, u, k] = tree.rows[t, j, k] - inner * tree.rows[t, at, k]
        tree.w[t + 1, u] = tree.w[t, j] - inner * tree.w[t, at]
        tree.q[t + 1, u] = tree.q[t, j]
        tree.index[t + 1, u] = tree.index[t, j]
        u += 1


@_compiled
def _greedy(tree, pruned):
    """OBS: prune the cheapest column of a group with zeros left, compensate, and again. Overwrites the tree."""
    for t in range(np.sum(tree.left[0])):
        best, cheapest = -1, 0.0
        for j in range(tree.size[t]):
            column = tree.index[t, j]
            if tree.left[t, tree.groups[column]] > 0:
                score = _score(tree, t, j)
                if best < 0 or score < cheapest:
                    best, cheapest = column, score
        pruned[best] = True
        _descend(tree, t, best, False)


@_compiled
def _look(tree, t, cutoff):
    """The column of node t to branch on, the node's bound, and what pruning that column costs.

    The column is -1 where nothing below the cutoff is to be found. Columns too dear to prune leave the node. With one
    zero left the column is the best to prune and the bound its value; without any the bound is the value.
    """
    left, groups = tree.left[t], tree.groups
    zeros, n = np.sum(left), 0
    if zeros == 0:
        return 0, tree.cost[t], 0.0
    scores, own = np.empty(tree.size[t]), np.empty(tree.size[t], np.int64)
    available = np.zeros(left.shape[0], np.int64)
    for j in range(tree.size[t]):
        column = tree.index[t, j]
        score = _score(tree, t, j)
        if left[groups[column]] == 0 or tree.cost[t] + score >= cutoff:
            continue
        for k in range(tree.w.shape[1]):
            tree.rows[t, n, k] = tree.rows[t, j, k]
        tree.w[t, n], tree.q[t, n], tree.index[t, n] = tree.w[t, j], tree.q[t, j], column
        scores[n], own[n] = score, groups[column]
        available[own[n]] += 1
        n += 1
    tree.size[t] = n
    for g in range(left.shape[0]):
        if available[g] < left[g]:
            return -1, cutoff, 0.0
    scores, own, chosen = scores[:n], own[:n], np.empty(n, np.bool_)
    bound = tree.cost[t] + _cheapest(scores, own, left, chosen)
    best = np.argmax(chosen) if zeros == 1 else np.argmax(scores)
    if zeros > 1 and bound < cutoff:
        rows, enough = tree.rows[t, :n], cutoff - tree.cost[t]
        bound = max(bound, tree.cost[t] + _relaxed(rows, tree.w[t, :n], own, left, tree.q[t, :n], enough))
    return tree.index[t, best], bound, scores[best]


@_compiled
def _cutoff(upper, empty, condition):
    """Values from here on are as good as `upper`: rounding moves any by `_ROUNDING * condition` of itself."""
    return max(upper - max(_RELATIVE * upper, _ROUNDING * condition * upper, _ABSOLUTE * empty), 0.0)


@_compiled
def _search(h, c, zeros, group, nodes, pruned, figures, column, branch, floor):
    """Go on with one search for at most `nodes` nodes; see `search`."""
    d = c.shape[0]
    tree = _Tree(
        np.empty((d + 1, d, d)),
        np.empty((d + 1, d)),
        np.zeros((d + 1, d)),
        np.empty((d + 1, d), np.int64),
        np.empty(d + 1, np.int64),
        np.empty((d + 1, d // group), np.int64),
        np.zeros(d + 1),
        np.arange(d) // group,
    )
    first, empty, condition = _inverse_rows(h), 0.0, 0.0  # the last: tr h tr h^-1
    tree.size[0] = d
    for j in range(d):
        tree.w[0, j], tree.index[0, j] = c[j], j
        tree.left[0, j // group] = zeros
        for k in range(d):
            tree.rows[0, j, k] = first[j, k]
            empty += c[j] * h[j, k] * c[k]
            condition += d * first[j, k] * first[j, k]
    t, upper, done = int(figures[0]), figures[1], 0
    if upper == np.inf:
        _greedy(tree, pruned)
        upper = _swap(h, c, pruned, group)
    for s in range(t):  # back to where the search stopped
        _descend(tree, s, column[s], branch[s] == _KEEPING)
    cutoff = _cutoff(upper, empty, condition)
    while t >= 0:
        if branch[t] == _OPEN:
            if done == nodes:
                break
            done += 1
            best, bound, score = _look(tree, t, cutoff)
            left = np.sum(tree.left[t])
            if best >= 0 and left <= 1:
                trial = np.zeros(d, np.bool_)
                for s in range(t):
                    trial[column[s]] = branch[s] == _PRUNING
                trial[best] |= left == 1
                value = _swap(h, c, trial, group)
                if value < upper:
                    upper, cutoff = value, _cutoff(value, empty, condition)
                    for j in range(d):
                        pruned[j] = trial[j]
            floor[t] = max(floor[t], bound)
            if best < 0 or left <= 1 or floor[t] >= cutoff:
                t -= 1
                continue
            column[t], branch[t] = best, _KEEPING
            floor[t + 1] = floor[t]
            floor[t] = max(floor[t], tree.cost[t] + score)  # of the other branch
        elif branch[t] == _KEEPING:
            branch[t] = _PRUNING
            floor[t + 1] = floor[t]
            if floor[t] >= cutoff:
                continue
        else:
            t -= 1
            continue
        _descend(tree, t, column[t], branch[t] == _KEEPING)
        t += 1
        branch[t] = _OPEN
    lower = cutoff
    for s in range(t + 1):
        if branch[s] != _PRUNING:
            lower = min(lower, floor[s])
    figures[0], figures[1], figures[2] = t, upper, lower
    figures[3] += done


@kernel
def search(A, factors, centre, which, zeros, group, nodes, pruned, figures, column, branch, floor):
    """Go on with searches, each for at most `nodes` nodes, and leave them where they stopped.

    A: (d, d); factors: (n, m, d); centre: (m, d); all float64.
    which, zeros: (s,), each search's row, and its zeros in every group.
    pruned: (s, d) booleans, the best zeros so far.
    figures: (s, 4): the depth of the next node (-1 when the search is over), the value of the best zeros (infinity
    before the first call), a lower bound, the number of nodes so far.
    column, branch, floor: (s, d + 1), the path to the next node: at each depth the column decided, how, and a
    bound of what is not searched yet there.
    """
    for s in prange(which.shape[0]):
        h, c = _row(A, factors, centre, which[s])
        _search(h, c, zeros[s], group, nodes, pruned[s], figures[s], column[s], branch[s], floor[s])
