"""Exact, at most ten seconds a layer; skipped where rows are too long."""

from benchmark_utils.runs import MoonshotSolver

import moonshot as ms


class Solver(MoonshotSolver):
    name = "Exact"
    solver = ms.Exact(seconds=10.0)
