"""IHT with its default limits."""

from benchmark_utils.runs import MoonshotSolver

import moonshot as ms


class Solver(MoonshotSolver):
    name = "IHT"
    solver = ms.IHT()
