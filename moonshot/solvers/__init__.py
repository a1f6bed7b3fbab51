"""Solvers: each takes a problem and a pattern, none knows another or grades itself."""

from moonshot.solvers.admm import ADMM
from moonshot.solvers.base import Answer, NotSupportedError, Solver, SolverError, solve
from moonshot.solvers.diagonal import Magnitude, Wanda
from moonshot.solvers.exact import Exact
from moonshot.solvers.iht import IHT
from moonshot.solvers.obs import OBS
from moonshot.solvers.sparsegpt import SparseGPT
from moonshot.solvers.swaps import Swaps

__all__ = [
    "ADMM",
    "IHT",
    "OBS",
    "Answer",
    "Exact",
    "Magnitude",
    "NotSupportedError",
    "Solver",
    "SolverError",
    "SparseGPT",
    "Swaps",
    "Wanda",
    "solve",
]
