"""One-shot pruning of trained networks on one combinatorial quadratic made of several objectives.

objective = 0.7 * ms.Reconstruction() + 0.3 * ms.Fisher()
report = ms.prune(model, calibration, "2:4", objective=objective)
"""

from typing import TYPE_CHECKING, Any

from moonshot import threads  # noqa: F401 - before what loads NumPy
from moonshot.certificate import lower_bound
from moonshot.front import front
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.objectives import Fisher, Objective, Observation, Quadratic, Reconstruction, TokenFisher
from moonshot.patterns import NM, Pattern, Unstructured, as_pattern
from moonshot.problem import Problem, Result, Status
from moonshot.solvers import ADMM, IHT, OBS, Answer, Exact, Magnitude, Solver, SparseGPT, Swaps, Wanda, solve

if TYPE_CHECKING:
    from moonshot.allocation import Allocation, allocate
    from moonshot.pruning import prune

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "IHT",
    "NM",
    "OBS",
    "Allocation",
    "Answer",
    "Exact",
    "Fisher",
    "Magnitude",
    "NotPositiveDefiniteError",
    "Objective",
    "Observation",
    "Pattern",
    "Problem",
    "Quadratic",
    "Reconstruction",
    "Result",
    "RowHessian",
    "Solver",
    "SparseGPT",
    "Status",
    "Swaps",
    "TokenFisher",
    "Unstructured",
    "Wanda",
    "allocate",
    "as_pattern",
    "front",
    "lower_bound",
    "prune",
    "solve",
]


def __getattr__(name: str) -> Any:
    """`prune` and `allocate` need torch, which is imported only for those who use it."""
    if name == "prune":
        from moonshot.pruning import prune

        return prune
    if name in ("Allocation", "allocate"):
        from moonshot import allocation

        return getattr(allocation, name)
    raise AttributeError(f"module 'moonshot' has no attribute {name!r}")
