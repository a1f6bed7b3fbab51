"""SparseGPT on each row's own Hessian."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "SparseGPT"
    solver = ms.SparseGPT()
