"""Exchanges on the support of a row for NumPy arrays, compiled by numba, rows in parallel.

A row minimises `(v - c)' H (v - c)` over its support S; N is the rest. Its tableau T (d, d) is H swept on S,

    T_SS = -G      T_SN = G H_SN      T_NN = H_NN - H_NS G H_SN      G = (H_SS)^-1

and u (d,) holds the best weights `u_S = c_S + T_SN c_N` and the pull on the others, `u_N = T_NN c_N`, which is
`H (c - v)` there. To take a column k in or out is one sweep on it. With t the row k of T and the pivot p = t_k,
positive for a column that comes in and negative for one that goes out,

    T_ab <- T_ab - t_a t_b / p      T_ak <- +-t_a / p      T_kk <- -1 / p
    u_a <- u_a - t_a u_k / p        u_k <- +-u_k / p

with + for in, - for out. The loss rises by `-u_k^2 / p`, exactly: by v_k^2 / G_kk, or it falls by u_k^2 over the
Schur complement of k.

Sweeps are logged by their t, and carried out on T several at a time, one row of T after another. Until then a row
of T is brought up to date when it is read.
"""

from typing import NamedTuple

import numpy as np
from numba import get_num_threads, njit, prange

from moonshot.linalg.kernels_cpu import FAST, kernel

_DEPTH = 2  # columns that the longest chain takes out, and brings in
_LOG = 16  # sweeps logged at most; offers may be no more
_SINGULAR = 1e-13  # a Schur complement this small against H_kk is rounding


class _Row(NamedTuple):
    tableau: np.ndarray  # (d, d), behind by the sweeps in the log
    u: np.ndarray  # (d,), up to date, as are the next two
    diagonal: np.ndarray  # (d,), of T
    inside: np.ndarray  # (d,), whether a column is in S
    centre: np.ndarray  # (d,)
    least: np.ndarray  # (d,), the smallest Schur complement to trust
    groups: np.ndarray  # (d,), each column's group: columns go out and come in within one
    wanted: np.ndarray  # (groups,), scratch: the columns that a group has to take back
    log: np.ndarray  # (_LOG, d), the t of each sweep
    columns: np.ndarray  # (_LOG,), its k
    pivots: np.ndarray  # (_LOG,), its p


@njit(fastmath=FAST)
def _bring_up_to_date(line, a, row, count):
    """Carry out the first `count` logged sweeps on row a of T."""
    for q in range(count):
        k, t, pivot = row.columns[q], row.log[q], row.pivots[q]
        sign = np.sign(pivot)
        if k == a:
            factor = sign / pivot
            for b in range(len(line)):
                line[b] = factor * t[b]
            line[k] = -1 / pivot
        else:
            factor = t[a] / pivot
            for b in range(len(line)):
                line[b] -= factor * t[b]
            line[k] = sign * factor


@njit(fastmath=FAST)
def _sweep(k, row, count):
    """Take column k in or out, as entry `count` of the log."""
    t, u, diagonal = row.log[count], row.u, row.diagonal
    t[:] = row.tableau[k]
    _bring_up_to_date(t, k, row, count)
    pivot = t[k]
    step = u[k] / pivot
    for b in range(len(u)):
        u[b] -= t[b] * step
        diagonal[b] -= t[b] * t[b] / pivot
    u[k], diagonal[k] = np.sign(pivot) * step, -1 / pivot
    row.inside[k] = not row.inside[k]
    row.columns[count], row.pivots[count] = k, pivot


@njit(fastmath=FAST)
def _carry_out(row, count):
    """Carry out the log on T, and find u and the diagonal anew from it."""
    for a in range(len(row.u)):
        line = row.tableau[a]
        _bring_up_to_date(line, a, row, count)
        total = 0.0
        for b in range(len(line)):
            total += 0.0 if row.inside[b] else line[b] * row.centre[b]
        row.u[a] = total + row.centre[a] if row.inside[a] else total
        row.diagonal[a] = line[a]


@njit(fastmath=FAST)
def _best(coming, anywhere, barred, row):
    """The column that comes in for the largest fall of the loss, or goes out for the smallest rise; and the rise.

    From the groups that want one, unless `anywhere`. Column -1 and infinity if there is none.
    """
    best, rise = -1, np.inf
    for b in range(len(row.u)):
        if row.inside[b] == coming or b == barred or (coming and row.diagonal[b] <= row.least[b]):
            continue
        change = -row.u[b] * row.u[b] / row.diagonal[b]
        if change < rise and (anywhere or row.wanted[row.groups[b]] > 0):
            best, rise = b, change
    return best, rise


@njit(fastmath=FAST)
def _chain(k, depth, tolerance, row, count):
    """Take k in or out, the best others the same way up to `depth`, and as many back the other way.

    Returns whether the loss fell by more than the tolerance; if not, u, diagonal and inside are spoiled.
    """
    coming, column, change = not row.inside[k], k, -row.u[k] * row.u[k] / row.diagonal[k]
    if coming and row.diagonal[k] <= row.least[k]:
        return False
    row.wanted[:] = 0
    for step in range(2 * depth):
        back = step >= depth
        if step > 0:
            column, rise = _best(coming != back, not back, k, row)
            change += rise
        if column < 0 or (step == 2 * depth - 1 and change >= -tolerance):
            return False
        row.wanted[row.groups[column]] += -1 if back else 1
        _sweep(column, row, count + step)
    return True


@njit(fastmath=FAST)
def _restore(row, u, diagonal, inside):
    row.u[:], row.diagonal[:], row.inside[:] = u, diagonal, inside


@njit(fastmath=FAST)
def _descend(row, tolerance, limit):
    """Chains from every column in turn until none lowers the loss: the number of columns brought in.

    Returns that number, and whether it ended for want of a better chain.
    """
    d = len(row.u)
    u, diagonal, inside = row.u.copy(), row.diagonal.copy(), row.inside.copy()
    k = idle = moved = count = 0
    while idle < d and moved < limit:
        idle += 1
        for depth in range(1, _DEPTH + 1):
            if depth == 1 and not row.inside[k]:
                continue  # the same exchanges as those that begin by taking out
            if _chain(k, depth, tolerance, row, count):
                count, moved, idle = count + 2 * depth, moved + depth, 0
                if count + 2 * _DEPTH > _LOG:
                    _carry_out(row, count)
                    count = 0
                u[:], diagonal[:], inside[:] = row.u, row.diagonal, row.inside
                break
            _restore(row, u, diagonal, inside)
        k = (k + 1) % d
    _carry_out(row, count)
    return moved, idle >= d


@njit(fastmath=FAST)
def _offer(coming, row, columns, rises):
    """The best columns to take in, or out, one after the other, and how far the loss rises with each."""
    u, diagonal, inside = row.u.copy(), row.diagonal.copy(), row.inside.copy()
    for step in range(len(columns)):
        column, rise = _best(coming, True, -1, row)
        columns[step], rises[step] = column, rise
        if column < 0:
            break
        _sweep(column, row, step)
    _restore(row, u, diagonal, inside)


def rows_at_once():
    """How many rows keep every thread busy."""
    return get_num_threads()


@kernel
def gather(shared, factors, rows, orders):
    """H_i of some rows, (rows, d, d), its columns in the order given for each; factors: (n, m, d)."""
    n, _, d = factors.shape
    out = np.empty((len(rows), d, d))
    for r in prange(len(rows)):
        order, u = orders[r], np.empty(d)
        for a in range(d):
            source = shared[order[a]]
            for b in range(d):
                out[r, a, b] = source[order[b]]
        for k in range(n):
            for a in range(d):
                u[a] = factors[k, rows[r], order[a]]
            for a in range(d):
                for b in range(d):
                    out[r, a, b] += u[a] * u[b]
    return out


@kernel
def exchange(tableaus, inside, centres, diagonals, groups, tolerances, limits, offers):
    """Better the supports of some rows until no chain does.

    tableaus: (rows, d, d) and inside: (rows, d) booleans, both changed in place. centres: (rows, d). diagonals:
    (rows, d), of H. groups: (rows, d), integers. tolerances, limits: (rows,), the fall of the loss that counts and
    how many columns may be brought in. offers: how many columns each row is asked to offer.

    Returns u (rows, d); the number of columns brought in and whether no chain is left, (rows,); and the offers:
    columns to take out (0) or in (1) one after the other and the rise of the loss with each, (2, rows, offers).
    """
    count, d = inside.shape
    weights, moved, settled = np.empty((count, d)), np.zeros(count, np.int64), np.zeros(count, np.bool_)
    columns, rises = np.full((2, count, offers), -1), np.full((2, count, offers), np.inf)
    for r in prange(count):
        row = _Row(
            tableaus[r],
            np.empty(d),
            np.empty(d),
            inside[r],
            centres[r],
            _SINGULAR * diagonals[r],
            groups[r],
            np.zeros(groups[r].max() + 1, np.int64),
            np.empty((_LOG, d)),
            np.zeros(_LOG, np.int64),
            np.ones(_LOG),
        )
        _carry_out(row, 0)
        moved[r], settled[r] = _descend(row, tolerances[r], limits[r])
        weights[r] = row.u
        for way in range(2):
            _offer(way == 1, row, columns[way, r], rises[way, r])
    return weights, moved, settled, columns, rises
