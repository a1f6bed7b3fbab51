"""A model from dense to pruned: `prune`, `allocate` and the report they give, and `compare`."""

from moonshot.pruning.allocate import allocate
from moonshot.pruning.allocation import Allocation
from moonshot.pruning.compare import compare
from moonshot.pruning.prune import prune

__all__ = ["Allocation", "allocate", "compare", "prune"]
