"""Which of several ways to prune a model is best, from held-out losses: objectives by "auto", budgets by `allocate`."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from moonshot.pruning.report import Trial

Candidate = TypeVar("Candidate")


def best_on_held_out(
    candidates: Mapping[str, Candidate], held_out_losses: Callable[[Candidate], Tensor]
) -> tuple[str, list[Trial]]:
    """The name of the candidate with the lowest held-out loss, if it beats the first beyond noise, and all trials.

    held_out_losses: the losses (samples,) of a model pruned by a candidate, on the same samples each time. They are
    compared sample by sample, which takes out how hard a sample is. A candidate replaces the first only where its
    mean gain over it exceeds the standard error of that gain.
    """
    names = list(candidates)
    losses = [held_out_losses(candidate).double() for candidate in candidates.values()]
    trials: list[Trial] = []
    best = 0
    for k, (name, loss) in enumerate(zip(names, losses, strict=True)):
        gains = losses[0] - loss
        error = float(gains.std() / len(gains) ** 0.5)
        trials.append(Trial(name, float(loss.mean()), float(gains.mean()), error))
        if trials[k].gain > max(error, trials[best].gain):
            best = k
    return names[best], trials
