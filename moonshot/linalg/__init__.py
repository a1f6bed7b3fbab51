"""Arrays and linear algebra: row Hessians, factorisations, kernels. Knows nothing of pruning."""

from moonshot.linalg.factor import NotPositiveDefiniteError
from moonshot.linalg.hessian import RowHessian

__all__ = ["NotPositiveDefiniteError", "RowHessian"]
