"""The elementwise steps between two solves of ADMM. With `z = P y` the weights of y that a mask keeps:"""

from types import ModuleType

from moonshot.linalg.backend import Array, is_cupy, is_numpy, namespace


def reflected(point: Array, mask: Array, target: Array, inside: float, outside: float) -> Array:
    """`inside (P y - t) - outside (y - P y)`; point y, mask and target t: (m, d)."""
    if kernels := _kernels(point):
        number = point.dtype.type
        return kernels.reflected(point, mask, target, number(inside), number(outside))
    return namespace(point).where(mask, inside * point, -outside * point) - inside * target


def move(point: Array, mask: Array, target: Array, step: Array, outside: float) -> None:
    """`t + step + outside (y - P y)` in the place of y; point y, mask, target t and step: (m, d)."""
    if kernels := _kernels(point):
        kernels.move(point, mask, target, step, point.dtype.type(outside))
    else:
        x = target + step
        point[...] = namespace(point).where(mask, x, x + outside * point)


def _kernels(array: Array) -> ModuleType | None:
    """Those compiled for arrays of this kind, if there are any."""
    if is_numpy(array):
        from moonshot.solvers import admm_kernels

        return admm_kernels
    if is_cupy(array):
        from moonshot.solvers import admm_cuda

        return admm_cuda
    return None
