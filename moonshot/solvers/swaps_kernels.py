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

from moonshot.linalg.kernels import FAST, kernel

_DEPTH = 4  # exchanges in the longest chain
_STARTS = 32  # chains tried where no single exchange helps
_LOG = 16  # sweeps logged at most: two chains; a row has no more offers each way
_TOGETHER = 2**24  # entries in the tableaus of rows worked on together, if one a thread leaves room for more
_SINGULAR = 1e-13  # a Schur complement this small against H_kk is rounding

_compiled = njit(fastmath=FAST, error_model="numpy")  # 0 / 0 is NaN, and loops are vector code


class _Row(NamedTuple):
    tableau: np.ndarray  # (d, d), behind by the sweeps in the log
    now: np.ndarray  # (3, d), the next three, up to date
    u: np.ndarray  # (d,)
    diagonal: np.ndarray  # (d,), of T
    rises: np.ndarray  # (d,), of the loss, were the column taken in or out
    inside: np.ndarray  # (d,), whether a column is in S
    start: np.ndarray  # (3, d), `now` at the start of the chain
    inside_at_start: np.ndarray  # (d,)
    centre: np.ndarray  # (d,)
    smallest: np.ndarray  # (d,), the smallest Schur complement to trust
    groups: np.ndarray  # (d,), each column's group: what goes out and what comes in share one
    log: np.ndarray  # (_LOG, d), the t of each sweep
    columns: np.ndarray  # (_LOG,), its k
    pivots: np.ndarray  # (_LOG,), its p


@_compiled
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


@_compiled
def _sweep(k, row, count):
    """Take column k in or out, as entry `count` of the log."""
    t, line, u, diagonal, rises = row.log[count], row.tableau[k], row.u, row.diagonal, row.rises
    for b in range(len(t)):
        t[b] = line[b]
    _bring_up_to_date(t, k, row, count)
    pivot = t[k]
    step, inverse = u[k] / pivot, 1 / pivot
    for b in range(len(u)):
        u[b] -= t[b] * step
        diagonal[b] -= t[b] * t[b] * inverse
        rises[b] = -u[b] * u[b] / diagonal[b]
    u[k], diagonal[k], rises[k] = np.sign(pivot) * step, -inverse, step * step * pivot
    row.inside[k] = not row.inside[k]
    row.columns[count], row.pivots[count] = k, pivot


@_compiled
def _carry_out(row, count):
    """Carry out the log on T, and find the rest anew from it: where the next chain begins."""
    for a in range(len(row.u)):
        line = row.tableau[a]
        _bring_up_to_date(line, a, row, count)
        total = 0.0
        for b in range(len(line)):
            total += 0.0 if row.inside[b] else line[b] * row.centre[b]
        row.u[a] = total + row.centre[a] if row.inside[a] else total
        row.diagonal[a] = line[a]
        row.rises[a] = -row.u[a] * row.u[a] / line[a]
    _begin(row)


@_compiled
def _begin(row):
    """A chain begins here."""
    for b in range(len(row.u)):
        row.inside_at_start[b] = row.inside[b]
        for q in range(3):
            row.start[q, b] = row.now[q, b]


@_compiled
def _go_back(row):
    """Undo the chain: the log's entries beyond its start are written over by the next."""
    for b in range(len(row.u)):
        row.inside[b] = row.inside_at_start[b]
        for q in range(3):
            row.now[q, b] = row.start[q, b]


@_compiled
def _best(coming, group, row):
    """The column that comes in for the largest fall of the loss, or goes out for the smallest rise; and the rise.

    From one group, or from all for -1, and none that the chain has moved already. Column -1 if there is none.
    """
    rises, diagonal, smallest, groups = row.rises, row.diagonal, row.smallest, row.groups
    inside, inside_at_start = row.inside, row.inside_at_start
    best, rise = -1, np.inf
    for b in range(len(rises)):
        if (
            rises[b] < rise
            and inside[b] != coming
            and inside_at_start[b] != coming
            and (group < 0 or groups[b] == group)
            and (not coming or diagonal[b] > smallest[b])
        ):
            best, rise = b, rises[b]
    return best, rise


@_compiled
def _chain(k, tolerance, row, count):
    """Exchanges that begin with column k, until the loss is lower: the number of sweeps, 0 if it never is.

    k goes and the best of its group comes, the cheapest of all goes and the best of its group comes, and so on; or
    the other way round, if k is outside.
    """
    coming, column, total = not row.inside[k], k, row.rises[k]
    if coming and row.diagonal[k] <= row.smallest[k]:
        return 0
    for step in range(2 * _DEPTH):
        back = step % 2 == 1
        if step > 0:
            column, rise = _best(coming != back, row.groups[column] if back else -1, row)
            total += rise
        better = back and total < -tolerance
        if column < 0 or (step == 2 * _DEPTH - 1 and not better):
            break
        _sweep(column, row, count + step)
        if better:
            return step + 1
    return 0


@_compiled
def _best_exchange(i, row, count, line, promise):
    """The column that comes in for column i at the least rise of the loss, and the rise; -1 if there is none.

    promise (d,) keeps, for i and for every column that could come in, the least rise seen.
    """
    for b in range(len(line)):
        line[b] = row.tableau[i, b]
    _bring_up_to_date(line, i, row, count)
    inverse, u, diagonal, smallest, groups = -1 / row.diagonal[i], row.u, row.diagonal, row.smallest, row.groups
    ratio = u[i] * inverse
    best, least = -1, np.inf
    for b in range(len(line)):
        schur = diagonal[b] + line[b] * line[b] * inverse
        if not row.inside[b] and groups[b] == groups[i] and schur > smallest[b]:
            pull = u[b] + line[b] * ratio
            rise = u[i] * ratio - pull * pull / schur
            promise[b] = min(promise[b], rise)
            if rise < least:
                best, least = b, rise
    promise[i] = least
    return best, least


@_compiled
def _descend(row, tolerance, limit):
    """Single exchanges until none lowers the loss, then the most promising chains, and again.

    Returns the number of exchanges, and whether it ended for want of a better chain.
    """
    d = len(row.u)
    line, promise = np.empty(d), np.full(d, np.inf)
    k = idle = moved = count = 0
    while moved < limit:
        if idle < d:
            if row.inside[k]:
                best, rise = _best_exchange(k, row, count, line, promise)
                if rise < -tolerance:
                    _sweep(k, row, count)
                    _sweep(best, row, count + 1)
                    count, moved, idle = _settle(row, count + 2), moved + 1, -1
                    promise[:] = np.inf
            k, idle = (k + 1) % d, idle + 1
            continue
        before = moved
        for start in np.argsort(promise)[:_STARTS]:
            sweeps = _chain(start, tolerance, row, count)
            if sweeps == 0:
                _go_back(row)
                continue
            count, moved = _settle(row, count + sweeps), moved + sweeps // 2
            if moved >= limit:
                break
        if moved == before:
            break
        idle = 0
        promise[:] = np.inf
    _carry_out(row, count)
    return moved, moved < limit


@_compiled
def _settle(row, count):
    """Make what was swept last the start of the next chain; the number of sweeps left in the log."""
    if count + 2 * _DEPTH > _LOG:
        _carry_out(row, count)
        return 0
    _begin(row)
    return count


@_compiled
def _offer(coming, row, columns, rises):
    """The best columns to take in, or out, one after the other, and how far the loss rises with each."""
    for step in range(len(columns)):
        columns[step], rises[step] = _best(coming, -1, row)
        if columns[step] < 0:
            break
        _sweep(columns[step], row, step)
    _go_back(row)


def rows_at_once(d):
    """How many rows to work on together: one for each thread, and more where their tableaus are small."""
    return max(get_num_threads(), _TOGETHER // d**2)


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
    """Better the supports of some rows until neither an exchange nor a chain does.

    tableaus: (rows, d, d) and inside: (rows, d) booleans, both changed in place. centres: (rows, d). diagonals:
    (rows, d), of H. groups: (rows, d), integers. tolerances, limits: (rows,), the fall of the loss that counts and
    how many exchanges are allowed. offers: how many columns each row is asked to offer.

    Returns u (rows, d); the number of exchanges and whether no chain is left, (rows,); and the offers:
    columns to take out (0) or in (1) one after the other and the rise of the loss with each, (2, rows, offers).
    """
    count, d = inside.shape
    weights, moved, settled = np.empty((count, d)), np.zeros(count, np.int64), np.zeros(count, np.bool_)
    columns, rises = np.full((2, count, offers), -1), np.full((2, count, offers), np.inf)
    for r in prange(count):
        now = np.empty((3, d))
        row = _Row(
            tableaus[r],
            now,
            now[0],
            now[1],
            now[2],
            inside[r],
            np.empty((3, d)),
            np.empty(d, np.bool_),
            centres[r],
            _SINGULAR * diagonals[r],
            groups[r],
            np.empty((_LOG, d)),
            np.zeros(_LOG, np.int64),
            np.ones(_LOG),
        )
        _carry_out(row, 0)
        moved[r], settled[r] = _descend(row, tolerances[r], limits[r])
        for b in range(d):
            weights[r, b] = row.u[b]
        for way in range(2):
            _offer(way == 1, row, columns[way, r], rises[way, r])
    return weights, moved, settled, columns, rises
