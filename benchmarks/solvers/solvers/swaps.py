"""Swaps, from the answer of ADMM or of OBS."""

import moonshot as ms
from benchmark_utils.runs import MoonshotSolver


class Solver(MoonshotSolver):
    name = "Swaps"
    parameters = {"inner": ["ADMM", "OBS"]}
    parameter_template = "{inner}"

    @property
    def solver(self) -> ms.Swaps:
        return ms.Swaps({"ADMM": ms.ADMM(), "OBS": ms.OBS()}[self.inner])
