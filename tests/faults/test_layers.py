"""Random layers, the worst that calibration may give: every answer is right, or refused in one line.

What is looked at is computed here, in long doubles, from the problem's Hessian.
"""

import warnings
from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import torch

import moonshot as ms
from moonshot.errors import MoonshotError
from moonshot.layer.patterns import as_pattern
from tests.faults.fuzz import fuzz

DTYPES = ("float16", "bfloat16", "float32", "float64")
PATTERNS = (
    *(ms.Unstructured(s, scope) for s in (0.0, 0.3, 0.5, 0.9, 1.0) for scope in ("layer", "row")),
    *map(as_pattern, ("2:4", "1:4", "0:4", "4:4", "1:2")),
    ms.Columns(0.5),
    ms.Columns(0.5, group=2),
)
SOLVERS = (
    ms.Magnitude(),
    ms.Wanda(),
    ms.SparseGPT(),
    ms.SparseGPT(block=1),
    ms.OBS(),
    ms.IHT(),
    ms.IHT(iterations=2, steps=1, refits=1),
    ms.ADMM(),
    ms.ADMM(iterations=1, refits=1),
    ms.Swaps(ms.ADMM()),
    ms.Swaps(ms.Wanda()),
    ms.Exact(nodes=1000),
)
PROMISE = (ms.ADMM, ms.IHT, ms.Magnitude)  # not to be worse than magnitude
OBJECTIVES = (
    ms.Reconstruction(),
    ms.Fisher(),
    ms.TokenFisher(),
    0.6 * ms.Reconstruction() + 0.2 * ms.TokenFisher() + 0.2 * ms.Fisher(),
    1e-9 * ms.Reconstruction() + 1 * ms.Fisher(),
)
CHANGES = ("copy", "near copy", "multiple", "sum", "constant", "zero", "huge", "tiny")


@dataclass(frozen=True)
class Case:
    seed: int
    m: int
    d: int
    tokens: int
    samples: int
    changes: tuple  # of the inputs, one column after another
    rows: str  # of the weight
    scales: tuple  # powers of ten: of the weight, the inputs and the gradients
    dtypes: tuple  # of the weight and of what is observed
    objective: ms.Objective
    damping: float
    pattern: object
    solver: object

    def problem(self):
        rng = np.random.default_rng(self.seed)
        x = rng.normal(size=(self.tokens, self.d))
        for change in self.changes:
            j, k, l = rng.integers(0, self.d, 3)
            x[:, j] = {
                "copy": x[:, k],
                "near copy": x[:, k] * (1 + 1e-7 * rng.normal(size=self.tokens)),
                "multiple": x[:, k] * 10 ** rng.uniform(-3, 3),
                "sum": x[:, k] + x[:, l],
                "constant": 0 * x[:, j] + 1,
                "zero": 0 * x[:, j],
                "huge": x[:, j] * 1e4,
                "tiny": x[:, j] * 1e-4,
            }[change]
        weight = rng.normal(size=(self.m, self.d))
        if self.rows == "equal":
            weight[:] = 1
        elif self.rows == "zero":
            weight[rng.integers(0, self.m)] = 0
        elif self.rows == "all zero":
            weight[:] = 0
        outputs = rng.normal(size=(self.tokens, self.m))
        token = rng.integers(0, self.tokens, self.samples)
        gradients = outputs[token][:, :, None] * x[token][:, None, :]
        of_weight, of_inputs, of_gradients = (10.0**scale for scale in self.scales)
        with np.errstate(over="ignore"):  # inputs of 1e308 and more are part of it
            arrays = (weight * of_weight, x * of_inputs, gradients * of_gradients, outputs * of_gradients)
        weight, x, gradients, outputs = (
            torch.tensor(array, dtype=getattr(torch, self.dtypes[index > 0]))
            for index, array in enumerate(arrays)
        )
        if "bfloat16" not in self.dtypes:
            weight, x, gradients, outputs = (each.numpy() for each in (weight, x, gradients, outputs))
        return self.objective.problem(
            weight, inputs=x, gradients=gradients, output_gradients=outputs, dampening_frac=self.damping
        )


scales = st.sampled_from((0, 0, 0, 0, 4, 4, 4, 40, 300)).flatmap(lambda most: st.integers(-most, most))
cases = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 6),
    d=st.one_of(st.integers(1, 4).map(lambda k: 4 * k), st.integers(1, 17)),
    tokens=st.integers(1, 40),
    samples=st.integers(1, 20),
    changes=st.lists(st.sampled_from(CHANGES), max_size=6).map(tuple),
    rows=st.sampled_from(("random", "equal", "zero", "all zero")),
    scales=st.tuples(scales, scales, scales),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    objective=st.sampled_from(OBJECTIVES),
    damping=st.sampled_from((0.01, 0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 0.1, 1.0, 1e6)),
    pattern=st.sampled_from(PATTERNS),
    solver=st.sampled_from(SOLVERS),
)


def long(array):
    return (array.double().numpy() if isinstance(array, torch.Tensor) else array).astype(np.longdouble)


def value_and_rounding(problem, weight):
    """F of a weight, and what its sum is made of: a figure in float64 is off by a small part of that."""
    difference = long(weight) - long(problem.centre)
    matrix = long(problem.hessian.A)
    value = ((difference @ matrix) * difference).sum()
    size = ((abs(difference) @ abs(matrix)) * abs(difference)).sum()
    if problem.hessian.factors is not None:
        for factor in long(problem.hessian.factors):
            value += ((factor * difference).sum(1) ** 2).sum()
            size += ((abs(factor) * abs(difference)).sum(1) ** 2).sum()
    return value + problem.constant, size + problem.constant


def rounded(problem, weight):
    """What F may rise by when weights are rounded to the dtype they are returned in."""
    digits = torch.finfo(getattr(torch, str(problem.weight.dtype).removeprefix("torch."))).eps
    return value_and_rounding(problem, long(problem.centre) + digits * abs(long(weight)))[1]


class Checked:
    """What is true of every answer. refused: how often each message was given instead."""

    def __init__(self):
        self.refused, self.answers = Counter(), 0

    def __call__(self, case):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                problem = case.problem()
                result = ms.solve(problem, case.pattern, case.solver)
                plain = ms.solve(problem, case.pattern, ms.Magnitude())
                bound = ms.lower_bound(problem, case.pattern) if hasattr(case.pattern, "groups") else 0.0
            except MoonshotError as error:
                said = str(error)
                assert said and "\n" not in said, said
                assert "please report" not in said and "missed its pattern" not in said, said
                assert "NaN" not in said or max(map(abs, case.scales)) > 4 or "float16" in case.dtypes, said
                self.refused[said[:40]] += 1
                return
        self.answers += 1
        case.pattern.check(long(result.mask).astype(bool))
        weight = long(result.weight)
        assert np.isfinite(weight).all() and not weight[long(result.mask) == 0].any()
        value, size = value_and_rounding(problem, weight)
        noise = 1e-9 * float(size)
        assert abs(result.value - float(value)) <= noise + 1e-9 * float(value), (result.value, value)
        assert bound <= result.value * (1 + 1e-6) + noise + 1e-9 * problem.zero_value(), (bound, result.value)
        assert result.bound is None or result.bound <= result.value * (1 + 1e-6) + noise
        if isinstance(getattr(case.solver, "inner", case.solver), PROMISE):
            slack = 1e-9 * problem.zero_value() + float(rounded(problem, weight))
            assert result.value <= plain.value * (1 + 1e-3) + slack, (result.value, plain.value)


def test_layers():
    checked = Checked()
    tried = fuzz(cases, checked)
    print(f"{tried} layers, {checked.answers} answers; refused: {dict(checked.refused.most_common())}")
