"""Wanda, with the diagonal of the joint Hessian."""

from benchmark_utils.runs import MoonshotSolver

import moonshot as ms


class Solver(MoonshotSolver):
    name = "Wanda"
    solver = ms.Wanda()
