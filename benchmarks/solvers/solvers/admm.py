"""ADMM with its default penalties."""

from benchmark_utils.runs import MoonshotSolver

import moonshot as ms


class Solver(MoonshotSolver):
    name = "ADMM"
    solver = ms.ADMM()
