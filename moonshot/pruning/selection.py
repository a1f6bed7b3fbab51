"""Which of several ways to prune a model is best, from held-out losses: objectives by "auto", budgets by `allocate`."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import scipy  # whose stats are imported where they are first used
from torch import Tensor

from moonshot.models.modules import ModelError
from moonshot.pruning.report import Trial

Candidate = TypeVar("Candidate")

LEVEL = 0.05  # how often chance alone may replace the first, at most


def best_on_held_out(
    candidates: Mapping[str, Candidate], held_out_losses: Callable[[Candidate], Tensor]
) -> tuple[str, list[Trial]]:
    """The name of the candidate with the lowest held-out loss, if it beats the first beyond noise, and all trials.

    held_out_losses: the losses (samples,) of a model pruned by a candidate, on the same samples each time. They are
    compared sample by sample, which takes out how hard a sample is. Where none is better than the first, one replaces
    it by chance in 5 % of all cases at most, however many there are: a one-sided paired t-test of each, corrected by
    Holm's method.

    Raises ModelError where the loss of every sample alone is zero, as that of contrastive models is.
    """
    names = list(candidates)
    losses: list[Tensor] = []
    for candidate in candidates.values():
        losses.append(held_out_losses(candidate).double())
        if not losses[0].any():
            raise ModelError(
                "the loss of every held-out sample by itself is 0, as where a loss compares the samples of a batch: "
                "candidates cannot be told apart by it; choose the objective or budgets yourself"
            )
    trials: list[Trial] = []
    for name, loss in zip(names, losses, strict=True):
        gains = losses[0] - loss
        error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        trials.append(Trial(name, float(loss.mean()), float(gains.mean()), error))
    better = _beyond_chance(trials[1:], samples=len(losses[0]))
    return max(better, key=lambda trial: trial.gain, default=trials[0]).name, trials


def _beyond_chance(rivals: list[Trial], samples: int) -> list[Trial]:
    """Those that gain more than chance explains, by Holm: the k-th surest of n at a level of LEVEL / (n + 1 - k)."""
    chances = sorted(((_chance(trial, samples), k) for k, trial in enumerate(rivals)))
    found = []
    for place, (chance, k) in enumerate(chances):
        if not chance <= LEVEL / (len(rivals) - place):
            break
        found.append(rivals[k])
    return found


def _chance(trial: Trial, samples: int) -> float:
    """How probable a gain like this is for a rival that is no better."""
    if not trial.gain > 0 or samples < 2:
        return 1.0
    return float(scipy.stats.t.sf(trial.gain / trial.error, samples - 1)) if trial.error > 0 else 0.0
