"""ADMM with its default penalties."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "ADMM"
    solver = ms.ADMM()
