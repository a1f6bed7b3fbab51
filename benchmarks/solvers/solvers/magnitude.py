"""Magnitude: keep the largest weights."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "Magnitude"
    solver = ms.Magnitude()
