"""Magnitude: keep the largest weights."""

from benchmark_utils.runs import MoonshotSolver

import moonshot as ms


class Solver(MoonshotSolver):
    name = "Magnitude"
    solver = ms.Magnitude()
