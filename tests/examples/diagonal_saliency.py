from dataclasses import dataclass

import moonshot as ms
from moonshot.linalg import namespace, native


@dataclass(frozen=True)
class DiagonalSaliency:
    """Optimal Brain Damage: keep the largest `w^2 H_jj`, to a power."""

    power: float = 1.0

    name = "diagonal saliency"

    def unsupported(self, problem, pattern):
        return None

    def init(self, problem):
        return problem.centre, problem.centre**2 * native(problem.hessian.diagonal()) ** self.power

    def compute(self, state, pattern):
        weight, saliency = state
        mask = pattern.keep(saliency)
        return ms.Answer(namespace(weight).where(mask, weight, 0 * weight), mask)
