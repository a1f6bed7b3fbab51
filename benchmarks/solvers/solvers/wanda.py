"""Wanda, with the diagonal of the joint Hessian."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "Wanda"
    solver = ms.Wanda()
