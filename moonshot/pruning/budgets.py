"""How zeros are shared among layers that each have a few choices: arithmetic on plain numbers.

A layer's choices go from the densest to the sparsest: `zeros[layer][choice]` increases strictly. An answer is the index
of one choice for each layer.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite
from statistics import median

from moonshot.errors import MoonshotError

Curves = Sequence[Sequence[float]]  # by layer and choice
Counts = Sequence[Sequence[int]]
Groups = Sequence[Sequence[int]]  # of layers

_FACTOR = 8.0  # between a layer's weight and the median at most: measured losses are noisy, and may gain


class BudgetError(MoonshotError):
    """A budget that the layers' choices cannot meet."""


def zeros_of(choices: Sequence[int], zeros: Counts) -> int:
    """How many zeros the layers have together."""
    return sum(counts[choice] for counts, choice in zip(zeros, choices, strict=True))


def hand_out(zeros: Counts, costs: Curves, total: int) -> list[int]:
    """Choices with `total` zeros or more together, at little cost.

    Every layer begins at its cheapest choice, and the cheapest step in cost for a zero is taken along the lower convex
    hulls of the curves, until there are enough. So nothing with as many zeros as the answer has costs less (Everett,
    1963); what the last step has too many is given back where a layer's denser choice costs less and still leaves
    enough.

    Raises BudgetError where the sparsest choices have too few zeros.
    """
    check_total(zeros, total)
    hulls = [_lower_hull(z, c) for z, c in zip(zeros, costs, strict=True)]
    choices = [hull[0] for hull in hulls]
    steps = sorted(
        ((c[k] - c[j]) / (z[k] - z[j]), layer, k)
        for layer, (z, c, hull) in enumerate(zip(zeros, costs, hulls, strict=True))
        for j, k in pairwise(hull)
    )
    spare = zeros_of(choices, zeros) - total
    for _, layer, k in steps:
        if spare >= 0:
            break
        spare += zeros[layer][k] - zeros[layer][choices[layer]]
        choices[layer] = k
    for _, layer, _ in reversed(steps):
        z, c, k = zeros[layer], costs[layer], choices[layer]
        if k and z[k] - z[k - 1] <= spare and c[k - 1] < c[k]:
            spare -= z[k] - z[k - 1]
            choices[layer] = k - 1
    return choices


def _lower_hull(zeros: Sequence[int], cost: Sequence[float]) -> list[int]:
    """The vertices of a curve's lower convex hull, from its cheapest point on."""
    hull: list[int] = []
    for k in range(min(range(len(cost)), key=cost.__getitem__), len(cost)):
        while len(hull) > 1:
            i, j = hull[-2:]
            if (cost[j] - cost[i]) * (zeros[k] - zeros[i]) < (cost[k] - cost[i]) * (zeros[j] - zeros[i]):
                break
            hull.pop()
        hull.append(k)
    return hull


def even(zeros: Counts, sizes: Sequence[int], total: int) -> list[int]:
    """The same sparsity in every layer, or the next one that a layer has: the least with `total` zeros together.

    Raises BudgetError where there is none.
    """
    check_total(zeros, total)
    sparsities = sorted({z / size for counts, size in zip(zeros, sizes, strict=True) for z in counts})
    for sparsity in sparsities:
        choices = [
            next((k for k, z in enumerate(counts) if z >= sparsity * size), len(counts) - 1)
            for counts, size in zip(zeros, sizes, strict=True)
        ]
        if zeros_of(choices, zeros) >= total:
            return choices
    raise AssertionError("the sparsest choices have enough zeros")  # as check_total made sure


def check_total(zeros: Counts, total: int) -> None:
    most = sum(counts[-1] for counts in zeros)
    if most < total:
        raise BudgetError(
            f"{total} zeros are asked for and the layers can have {most} together: "
            "ask for a lower sparsity, or add a sparser pattern to choose from"
        )


def check_densest(zeros: Counts, total: int) -> None:
    """Raises BudgetError where even the densest choices have more than 1 % too many zeros, rounding apart."""
    least = sum(counts[0] for counts in zeros)
    if least > 1.01 * total + len(zeros):
        raise BudgetError(
            f"{total} zeros are asked for and the layers' densest choices have {least} together: "
            "ask for a higher sparsity, or add a denser pattern to choose from, such as 0"
        )


def measured(
    lowest: float,
    start: Sequence[int],
    zeros: Counts,
    curves: Sequence[Curves],
    total: int,
    loss: Callable[[list[int]], float],
    rounds: int,
    groupings: Sequence[Groups] | None = None,
) -> list[int]:
    """Better choices than `start` by the true loss, or `start` itself.

    A curve is right about its own layer and says little of how much the layer matters. That is measured: with every
    layer in turn one choice denser and one sparser, the difference of the loss over what the curve says is the layer's
    weight. The curves times their weights, taken in full or damped, are handed out anew, and the best of these is
    where the next round begins; it ends where nothing is better.

    lowest: the loss of `start`. curves: the layers' costs, in several units.
    loss: of any choices; it is asked (2 groups + 3 units) times in a round.
    groupings: ways to divide the layers into groups that are measured together, such as by block and by role; a layer's
    weight is the product of those of its groups. Each layer alone unless given.
    """
    best = list(start)
    groupings = [[[layer] for layer in range(len(best))]] if groupings is None else groupings
    for _ in range(rounds):
        responses = [[_response(best, group, zeros, loss) for group in groups] for groups in groupings]
        found = []
        for costs in curves:
            weights = [1.0] * len(best)
            for groups, measured_there in zip(groupings, responses, strict=True):
                for group, weight in zip(groups, _weights(best, costs, groups, measured_there), strict=True):
                    for layer in group:
                        weights[layer] *= weight
            for power in (1.0, 0.5, 0.25):
                weighted = [[w**power * c for c in cost] for w, cost in zip(weights, costs, strict=True)]
                choices = hand_out(zeros, weighted, total)
                found.append((loss(choices), choices))
        value, choices = min(found)
        if not value < lowest:
            break
        best, lowest = choices, value
    return best


def _beside(choice: int, choices: int) -> tuple[int, int]:
    return max(choice - 1, 0), min(choice + 1, choices - 1)


def _response(
    choices: list[int], group: Sequence[int], zeros: Counts, loss: Callable[[list[int]], float]
) -> float:
    """By how much the loss grows from the next denser choices of a group of layers to their next sparser ones."""
    denser, sparser = list(choices), list(choices)
    for layer in group:
        denser[layer], sparser[layer] = _beside(choices[layer], len(zeros[layer]))
    below = loss(denser)
    return loss(sparser) - below


def _weights(choices: list[int], costs: Curves, groups: Groups, responses: list[float]) -> list[float]:
    """By how much more the loss moves with each group than its layers' curves say, relative to their median."""
    ratios: list[float | None] = []
    for group, response in zip(groups, responses, strict=True):
        said = 0.0
        for layer in group:
            denser, sparser = _beside(choices[layer], len(costs[layer]))
            said += costs[layer][sparser] - costs[layer][denser]
        ratios.append(response / said if said > 0 and isfinite(response) else None)
    known = [ratio for ratio in ratios if ratio is not None and ratio > 0]
    middle = median(known) if known else 1.0
    return [1.0 if r is None else min(max(r / middle, 1 / _FACTOR), _FACTOR) for r in ratios]


def exact(zeros: Sequence[int], sizes: Sequence[int], total: int) -> list[int]:
    """Zeros of every layer, `total` together: what is kept grows by one factor, up to the layer's size.

    zeros: `total` or more together.
    """
    kept = [max(size - z, 1e-6) for size, z in zip(sizes, zeros, strict=True)]  # so that nothing can grow too
    wanted = sum(sizes) - total

    def grown(factor: float) -> list[float]:
        return [min(factor * k, size) for k, size in zip(kept, sizes, strict=True)]

    low, high = 1.0, max(size / k for k, size in zip(kept, sizes, strict=True))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(grown(middle)) < wanted else (low, middle)
    real = grown(high)
    now = [int(k) for k in real]
    by_remainder = sorted(range(len(sizes)), key=lambda layer: now[layer] - real[layer])
    for layer in by_remainder[: max(wanted - sum(now), 0)]:
        now[layer] += 1
    return [size - k for size, k in zip(sizes, now, strict=True)]
