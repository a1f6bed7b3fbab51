"""Exact, at most ten seconds a layer; skipped where rows are too long."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "Exact"
    solver = ms.Exact(seconds=10.0)
