"""The elementwise steps of ADMM for CuPy arrays, one launch each; admm_steps says what they compute."""

from moonshot.linalg.elementwise_cuda import kernel


def reflected(point, mask, target, inside, outside):
    operation = "out = (mask ? inside * point : -outside * point) - inside * target"
    run = kernel("T point, bool mask, T target, T inside, T outside", "T out", operation, "reflected")
    return run(point, mask, target, inside, outside)


def move(point, mask, target, step, outside):
    operation = "const T x = target + step; point = mask ? x : x + outside * point"
    run = kernel("bool mask, T target, T step, T outside", "T point", operation, "move")
    run(mask, target, step, outside, point)
