"""OBS on each row's own Hessian."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "OBS"
    solver = ms.OBS()
