"""OBS on each row's own Hessian."""

from benchmark_utils.runs import MoonshotSolver

import moonshot as ms


class Solver(MoonshotSolver):
    name = "OBS"
    solver = ms.OBS()
