"""IHT with its default limits."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "IHT"
    solver = ms.IHT()
