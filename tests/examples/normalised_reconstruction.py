from dataclasses import dataclass

import moonshot as ms
from moonshot.linalg.backend import namespace


@dataclass(frozen=True)
class NormalisedReconstruction(ms.Objective):
    """Reconstruction with every token's input scaled to length one."""

    needs = frozenset({"inputs"})
    additive = True

    def accumulate(self, statistic, observation):
        x = observation.require("inputs", 2, self)
        xp = namespace(x)
        x = x / xp.sqrt(xp.sum(x**2, axis=1) + 1e-12)[:, None]
        return x.T @ x if statistic is None else statistic + x.T @ x

    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic)
