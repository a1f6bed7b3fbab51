"""Grade an answer from W, A and U alone, in float64 with plain NumPy: no solver's own word counts, nor moonshot's."""

import itertools
from dataclasses import dataclass

import numpy as np
from moonshot import NM, Pattern


@dataclass(frozen=True, eq=False)
class Layer:
    """weight W: (m, d); A: (d, d); U: (m, d, n), or None for no factors. `H_i = A + U_i U_i'`."""

    weight: np.ndarray
    A: np.ndarray
    U: np.ndarray | None = None


def row_values(layer: Layer, V: np.ndarray) -> np.ndarray:
    """`(v_i - w_i)' H_i (v_i - w_i)` of every row of V (m, d), shape (m,)."""
    x = V.astype("d") - layer.weight.astype("d")
    values = np.sum((x @ layer.A.astype("d")) * x, axis=1)
    if layer.U is not None:
        values += np.sum(np.einsum("mdn,md->mn", layer.U.astype("d"), x) ** 2, axis=1)
    return values


def budget(pattern: Pattern, shape: tuple[int, int]) -> tuple[int, int]:
    """(size, zeros): every `size` consecutive weights of a layer (m, d) have at least `zeros` zeros."""
    if isinstance(pattern, NM):
        return pattern.m, pattern.m - pattern.n
    size = shape[1] if pattern.scope == "row" else shape[0] * shape[1]
    return size, round(pattern.sparsity * size)


def check(layer: Layer, V: np.ndarray, pattern: Pattern) -> None:
    """Raise ValueError unless V (m, d) is finite and has the pattern. More zeros than it asks for are allowed."""
    if V.shape != layer.weight.shape:
        raise ValueError(f"the answer is {V.shape}, the layer {layer.weight.shape}")
    if not np.isfinite(V).all():
        raise ValueError("the answer holds NaN or infinity")
    size, zeros = budget(pattern, V.shape)
    fewest = np.sum(V.reshape(-1, size) == 0, axis=1).min()
    if fewest < zeros:
        raise ValueError(f"{pattern} asks for {zeros} zeros in every {size} weights, the answer has {fewest}")


def row_optima(layer: Layer, pattern: Pattern) -> np.ndarray:
    """The least value of every row (m,), by enumeration, for a pattern whose groups are within rows.

    Pruning the set P of a row costs `w_P' ((H^-1)_PP)^-1 w_P`.
    """
    m, d = layer.weight.shape
    size, zeros = budget(pattern, (m, d))
    within = list(itertools.combinations(range(size), zeros))
    choices = itertools.product(*[np.add(within, start) for start in range(0, d, size)])
    pruned = np.stack([np.concatenate(choice) for choice in choices])
    optima = np.empty(m)
    for i, w in enumerate(layer.weight.astype("d")):
        h = layer.A if layer.U is None else layer.A + layer.U[i] @ layer.U[i].T
        blocks = np.linalg.inv(h)[pruned[:, :, None], pruned[:, None, :]]
        optima[i] = np.min(np.sum(w[pruned] * np.linalg.solve(blocks, w[pruned][..., None])[..., 0], axis=1))
    return optima
