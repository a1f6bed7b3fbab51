"""Which weights an objective should have, from held-out losses: objective="auto"."""

from collections.abc import Callable, Sequence

from torch import Tensor

from moonshot.objectives import Objective
from moonshot.report import Trial


def choose(
    candidates: Sequence[Objective], held_out_losses: Callable[[Objective], Tensor]
) -> tuple[Objective, list[Trial]]:
    """The candidate with the lowest held-out loss, if it beats the first by more than noise, and all trials.

    held_out_losses: the losses (samples,) of a model pruned by an objective, on the same samples each time. They are
    compared sample by sample, which takes out how hard a sample is. A candidate replaces the first only where its
    mean gain over it exceeds the standard error of that gain.
    """
    losses = [held_out_losses(candidate).double() for candidate in candidates]
    trials: list[Trial] = []
    best = 0
    for k, (candidate, loss) in enumerate(zip(candidates, losses, strict=True)):
        gains = losses[0] - loss
        error = float(gains.std() / len(gains) ** 0.5)
        trials.append(Trial(candidate.name, float(loss.mean()), float(gains.mean()), error))
        if trials[k].gain > max(error, trials[best].gain):
            best = k
    return candidates[best], trials
