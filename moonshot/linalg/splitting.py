"""The elementwise steps between two solves of ADMM. With `z = P y` the weights of y that a mask keeps:"""

from moonshot.linalg.backend import Array, is_numpy, namespace


def reflected(point: Array, mask: Array, pull: Array, rho: float) -> Array:
    """`pull + rho (2 P y - y)`; point y, mask and pull: (m, d)."""
    if is_numpy(point):
        from moonshot.linalg import kernels_cpu

        return kernels_cpu.reflected(point, mask, pull, point.dtype.type(rho))
    return pull + rho * namespace(point).where(mask, point, -point)


def add_outside(x: Array, point: Array, mask: Array) -> None:
    """Add `y - P y` to x, in place; all (m, d)."""
    if is_numpy(x):
        from moonshot.linalg import kernels_cpu

        kernels_cpu.add_outside(x, point, mask)
    else:
        x += point * ~mask
