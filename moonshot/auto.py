"""`objective="auto"`: which objective, tried on samples set aside."""

from torch import Tensor

from moonshot.choosing import choose
from moonshot.models.calibration import Batch, set_aside
from moonshot.models.scratch import Kept, Scratch
from moonshot.objectives import Fisher, Objective, Reconstruction, TokenFisher
from moonshot.report import Trial
from moonshot.walk import Walk

DEFAULT_OBJECTIVE = 0.6 * Reconstruction() + 0.2 * TokenFisher() + 0.2 * Fisher()
_BOTH_SHARED = 0.75 * Reconstruction() + 0.25 * TokenFisher()
# The default first. Two fronts (front.fronts), each on one factorisation.
CANDIDATES = (
    DEFAULT_OBJECTIVE,
    0.5 * _BOTH_SHARED + 0.5 * Fisher(),
    _BOTH_SHARED,
    Reconstruction(),
    0.8 * Reconstruction() + 0.2 * Fisher(),
    0.5 * Reconstruction() + 0.5 * Fisher(),
)


def best_objective(walk: Walk, batches: list[Batch]) -> tuple[Objective, list[Trial]]:
    """The one of CANDIDATES whose answers do best (choosing.choose) on a quarter of the samples, and all trials.

    Every layer is solved by all of them on one walk with the others, so that what it reads comes from the model with
    its earlier layers pruned by the default, whichever is on trial. The model is left pruned by the last.
    """
    fitted, held_out = set_aside(batches, walk.recipe.seed)
    answers: dict[str, list[Kept]] = {}
    scratch = Scratch(walk.recipe.scratch)

    def keep(name: str, weights: list[Tensor]) -> None:
        answers[name] = [scratch.keep(weight) for weight in weights]

    def held_out_losses(candidate: int) -> Tensor:
        walk.put(((name, kept[candidate].read()) for name, kept in answers.items()), fitted)
        return walk.losses(held_out)

    walk.prune(CANDIDATES, fitted, keep=keep)
    numbers = {candidate.name: k for k, candidate in enumerate(CANDIDATES)}
    best, trials = choose(numbers, held_out_losses)
    return CANDIDATES[numbers[best]], trials
