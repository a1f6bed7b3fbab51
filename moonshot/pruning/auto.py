"""`objective="auto"`: which objective, tried on samples set aside."""

from torch import Tensor

from moonshot.layer.objectives import Fisher, Objective, Reconstruction, TokenFisher
from moonshot.models.calibration import Batch, set_aside
from moonshot.models.offload import Offload, Offloaded
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from moonshot.pruning.report import Trial
from moonshot.pruning.run import PruningRun
from moonshot.pruning.selection import best_on_held_out

_BOTH_SHARED = 0.75 * Reconstruction() + 0.25 * TokenFisher()
# The default first. Two weighting sweeps, each on one factorisation.
CANDIDATES = (
    DEFAULT_OBJECTIVE,
    0.5 * _BOTH_SHARED + 0.5 * Fisher(),
    _BOTH_SHARED,
    Reconstruction(),
    0.8 * Reconstruction() + 0.2 * Fisher(),
    0.5 * Reconstruction() + 0.5 * Fisher(),
)


def best_objective(run: PruningRun, batches: list[Batch]) -> tuple[Objective, list[Trial]]:
    """The one of CANDIDATES whose answers do best on a quarter of the samples (`best_on_held_out`), and all trials.

    Every layer is solved by all of them in one pass with the others, so that what it reads comes from the model with
    its earlier layers pruned by the default, whichever is on trial. The model is left pruned by the last.
    """
    fitted, held_out = set_aside(batches, run.recipe.seed)
    answers: dict[str, list[Offloaded]] = {}
    offload = Offload(run.recipe.scratch, to_host=run.recipe.device is not None)

    def store(name: str, weights: list[Tensor]) -> None:
        answers[name] = [offload.store(weight) for weight in weights]

    def held_out_losses(candidate: int) -> Tensor:
        run.assign(((name, stored[candidate].read()) for name, stored in answers.items()), fitted)
        return run.losses(held_out)

    run.prune(CANDIDATES, fitted, on_answers=store)
    numbers = {candidate.name: k for k, candidate in enumerate(CANDIDATES)}
    best, trials = best_on_held_out(numbers, held_out_losses)
    return CANDIDATES[numbers[best]], trials
