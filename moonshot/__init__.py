"""One-shot pruning of trained networks on one combinatorial quadratic made of several objectives.

objective = 0.7 * ms.Reconstruction() + 0.3 * ms.Fisher()
report = ms.prune(model, calibration, "2:4", objective=objective)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moonshot import threads  # noqa: F401 - before what loads NumPy
from moonshot.bounds.certificate import lower_bound
from moonshot.errors import MoonshotError
from moonshot.layer.columns import Columns
from moonshot.layer.objectives import Fisher, Objective, Observation, Quadratic, Reconstruction, TokenFisher
from moonshot.layer.patterns import NM, Pattern, PatternError, PatternMismatchError, Unstructured, as_pattern
from moonshot.layer.problem import Problem, Result, Status
from moonshot.layer.weighting_sweep import weighting_sweep
from moonshot.linalg import NotPositiveDefiniteError, RowHessian
from moonshot.solvers import ADMM, IHT, OBS, Answer, Exact, Magnitude, Solver, SparseGPT, Swaps, Wanda, solve

if TYPE_CHECKING:
    from moonshot.files.compact import load_compact
    from moonshot.models.adapter import Adapter
    from moonshot.models.chain import ChainAdapter
    from moonshot.models.graph import GraphAdapter
    from moonshot.models.layer_view import LayerView
    from moonshot.models.rotation import rotate
    from moonshot.models.shrink import shrink
    from moonshot.models.units import column_patterns
    from moonshot.pruning.allocate import allocate
    from moonshot.pruning.allocation import Allocation
    from moonshot.pruning.compare import compare
    from moonshot.pruning.prune import prune
    from moonshot.pruning.refit import Refit

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "IHT",
    "NM",
    "OBS",
    "Adapter",
    "Allocation",
    "Answer",
    "ChainAdapter",
    "Columns",
    "Exact",
    "Fisher",
    "GraphAdapter",
    "LayerView",
    "Magnitude",
    "MoonshotError",
    "NotPositiveDefiniteError",
    "Objective",
    "Observation",
    "Pattern",
    "PatternError",
    "PatternMismatchError",
    "Problem",
    "Quadratic",
    "Reconstruction",
    "Refit",
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
    "column_patterns",
    "compare",
    "front",
    "load_compact",
    "lower_bound",
    "prune",
    "rotate",
    "shrink",
    "solve",
    "weighting_sweep",
]


front = weighting_sweep  # its old name
_WITH_TORCH = {
    "Adapter": "models.adapter",
    "Allocation": "pruning.allocation",
    "ChainAdapter": "models.chain",
    "GraphAdapter": "models.graph",
    "LayerView": "models.layer_view",
    "Refit": "pruning.refit",
    "allocate": "pruning.allocate",
    "column_patterns": "models.units",
    "compare": "pruning.compare",
    "load_compact": "files.compact",
    "prune": "pruning.prune",
    "rotate": "models.rotation",
    "shrink": "models.shrink",
}


def __getattr__(name: str) -> Any:
    """What needs torch, which is imported only for those who use it."""
    if name in _WITH_TORCH:
        return getattr(import_module(f"moonshot.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'moonshot' has no attribute {name!r}")
