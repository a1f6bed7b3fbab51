"""Arrays and linear algebra: row Hessians, factorisations, kernels. Knows nothing of pruning.

What a solver, pattern or objective of your own may use of it is here; it works alike on NumPy, CuPy and torch arrays.
"""

from moonshot.linalg.backend import Array, as_dtype, is_numpy, namespace, native, smallest
from moonshot.linalg.factor import NotPositiveDefiniteError
from moonshot.linalg.hessian import RowHessian

__all__ = [
    "Array",
    "NotPositiveDefiniteError",
    "RowHessian",
    "as_dtype",
    "is_numpy",
    "namespace",
    "native",
    "smallest",
]
