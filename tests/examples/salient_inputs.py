from dataclasses import dataclass

import moonshot as ms
from moonshot.linalg import namespace


@dataclass(frozen=True)
class SalientInputs(ms.Objective):
    """Reconstruction with each input weighted by the size of its weights' gradients, to a power."""

    power: float = 0.5

    needs = frozenset({"inputs", "gradients"})

    def accumulate(self, statistic, observation):
        gram, squares = statistic or (0, 0)
        if observation.inputs is not None:
            x = observation.require("inputs", 2, self)
            gram = gram + x.T @ x
        if observation.gradients is not None:
            gradients = observation.require("gradients", 3, self)
            squares = squares + namespace(gradients).sum(gradients**2, axis=(0, 1))
        return gram, squares

    def quadratic(self, statistic, weight):
        gram, squares = statistic
        mean = namespace(squares).mean(squares)
        saliency = (squares / mean) ** (self.power / 2) if mean > 0 else 1 + squares
        return ms.Quadratic(shared=saliency[:, None] * gram * saliency)
