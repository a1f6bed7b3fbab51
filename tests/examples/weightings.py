import numpy as np

import moonshot as ms


def trade_off(weight, inputs, gradients, pattern):
    """Both terms' relative losses at the answers to ten weightings, (10, 2)."""
    objectives = [(1 - b) * ms.Reconstruction() + b * ms.Fisher() for b in np.linspace(0, 0.9, 10)]
    points = []
    for problem in ms.weighting_sweep(objectives, weight, inputs=inputs, gradients=gradients):
        result = ms.solve(problem, pattern, ms.ADMM())
        points.append([result.terms["Reconstruction"], result.terms["Fisher"]])
    return np.array(points)
