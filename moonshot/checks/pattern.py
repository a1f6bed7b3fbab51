"""check_pattern: does a pattern keep what it promises?"""

from functools import partial
from typing import Any

import numpy as np

from moonshot.checks.exhaustive import accepts, all_masks
from moonshot.checks.faults import Faults, Unchanged, is_instance
from moonshot.layer.patterns import Pattern, PatternError, as_pattern

_SHAPES = [(1, 1), (3, 4), (2, 6), (1, 8), (1, 12), (4, 16), (5, 7), (16, 64), (8, 840)]
_FEW = 12  # weights of a layer of which every mask can be tried


def check_pattern(pattern: Pattern | str | float) -> None:
    """Raise CheckError, with every fault in words, unless a pattern keeps its promises.

    On layers of many shapes: `validate` refuses with PatternError or not at all; `keep` gives a boolean mask with
    exactly `zeros` zeros that `check` accepts, for ties too, the same each time, and leaves its scores alone;
    `check` refuses a mask with one zero more or less; on small layers, no mask that `check` accepts holds a larger
    sum of scores than that of `keep`; `groups`, where there is such a method, agrees with all this.

    Raises TypeError for what is no pattern.
    """
    if isinstance(pattern, str | int | float):
        pattern = as_pattern(pattern)
    is_instance(pattern, Pattern, "moonshot.NM(2, 4)")
    faults = Faults(str(pattern))
    fitting = [shape for shape in _SHAPES if _fits(pattern, shape, faults)]
    if not fitting and not faults:
        faults.add(f"validate refuses every shape that was tried: {_SHAPES}", "validate")
    for shape in fitting:
        _check_shape(pattern, shape, faults)
    faults.raise_if_any()


def _fits(pattern: Pattern, shape: tuple[int, int], faults: Faults) -> bool:
    def validate() -> bool:
        pattern.validate(shape)
        return True

    try:
        return bool(
            faults.run("validate, which may raise PatternError only,", _named(shape), validate, PatternError)
        )
    except PatternError:
        return False


def _named(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _scores(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "random scores": rng.random(shape),
        "float32 scores": rng.random(shape).astype(np.float32),
        "equal scores": np.ones(shape),
        "scores of 0": np.zeros(shape),
        "few different scores": rng.integers(0, 3, shape).astype(np.float64),
        "scores 300 orders apart": rng.permutation(np.geomspace(1e-150, 1e150, shape[0] * shape[1])).reshape(
            shape
        ),
    }


def _check_shape(pattern: Pattern, shape: tuple[int, int], faults: Faults) -> None:
    zeros = faults.run("zeros", _named(shape), lambda: pattern.zeros(shape))
    if zeros is None:
        return
    size = shape[0] * shape[1]
    if not isinstance(zeros, int) or not 0 <= zeros <= size:
        faults.add(f"zeros must be an integer from 0 to {size}, it is {zeros!r}", _named(shape))
        return
    masks = all_masks(pattern, shape) if size <= _FEW else None
    for kind, scores in _scores(shape).items():
        _check_keep(pattern, scores, zeros, masks, faults, f"{_named(shape)}, {kind}")


def _check_keep(
    pattern: Pattern, scores: np.ndarray, zeros: int, masks: np.ndarray | None, faults: Faults, where: str
) -> None:
    before = Unchanged(scores=scores)
    mask = faults.run("keep", where, lambda: pattern.keep(scores))
    if before.changed():
        faults.add("keep changes the scores that it is given: work on a copy", where)
    if mask is None:
        return
    if not isinstance(mask, np.ndarray) or mask.dtype.kind != "b" or mask.shape != scores.shape:
        got = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        faults.add(f"keep must give booleans of the shape of the scores, it gives {got}", where)
        return
    excess = int((~mask).sum()) - zeros
    if excess:
        faults.add(
            f"the mask of keep has {abs(excess)} zeros {'more' if excess > 0 else 'fewer'} than zeros(shape)",
            where,
        )
        return
    if not np.array_equal(mask, faults.run("keep", where, lambda: pattern.keep(scores))):
        faults.add(
            "keep is not deterministic: the same scores gave another mask; break ties the same way", where
        )
    _check_check(pattern, mask, faults, where)
    if masks is not None and (masks * scores).sum(axis=(1, 2)).max(initial=0) > (mask * scores).sum() * (
        1 + 1e-6
    ):
        faults.add("keep does not keep the largest scores: check accepts a mask that holds a larger sum", where)
    if hasattr(pattern, "groups"):
        _check_groups(pattern, mask, zeros, faults, where)


def _check_check(pattern: Any, mask: np.ndarray, faults: Faults, where: str) -> None:
    what = "check, which may raise PatternMismatchError only,"
    if not faults.run(what, where, lambda: accepts(pattern, mask)):
        faults.add("check refuses the mask of keep", where)
    for value, name in ((False, "more"), (True, "less")):
        cells = np.argwhere(mask != value)
        if len(cells):
            other = mask.copy()
            other[tuple(cells[len(cells) // 2])] = value
            if faults.run(what, where, partial(accepts, pattern, other)):
                faults.add(f"check accepts a mask with one zero {name} than it promises", where)


def _check_groups(pattern: Any, mask: np.ndarray, zeros: int, faults: Faults, where: str) -> None:
    groups = faults.run("groups", where, lambda: pattern.groups(mask.shape))
    if groups is None:
        return
    size, each = groups
    if mask.size % size or mask.size // size * each != zeros:
        faults.add(
            f"groups gives {each} zeros in every {size} weights, zeros(shape) gives another total", where
        )
    elif ((~mask).reshape(-1, size).sum(axis=1) != each).any():
        faults.add(
            f"groups promises {each} zeros in every {size} consecutive weights, keep gives others", where
        )
