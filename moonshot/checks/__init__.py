"""Checks that a plug-in runs against itself: what breaks which promise is said in words."""

from moonshot.checks.faults import CheckError
from moonshot.checks.objective import check_objective
from moonshot.checks.pattern import check_pattern
from moonshot.checks.solver import check_solver

__all__ = ["CheckError", "check_objective", "check_pattern", "check_solver"]
