"""IHT lowers F at every step and stops where no guaranteed gradient step would change its support."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonshot.layer.patterns import NM, Unstructured
from moonshot.layer.problem import Problem, Status
from moonshot.linalg import RowHessian
from moonshot.linalg.backend import native
from moonshot.linalg.scaled import ScaledQuadratic
from moonshot.solvers import IHT, Exact, NotSupportedError, SparseGPT, solve
from moonshot.solvers.iht import _at, _thresholded
from strategies import Layer, layers, random_layer

PATTERNS = [Unstructured(0.5), Unstructured(0.8), Unstructured(0.6, "row"), NM(2, 4), NM(1, 4)]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
factor_counts = st.sampled_from([0, 3, 8, 11])
seeds = st.integers(0, 2**32 - 1)


def values_by_row(layer, weight):
    difference = weight - layer.weight
    return np.einsum("ij,ijk,ik->i", difference, layer.dense(), difference)


def half_gradient(layer, weight):
    return np.einsum("ijk,ik->ij", layer.dense(), weight - layer.weight)


def refitted(layer, mask):
    """The best weights on a mask, by dense solves."""
    weight = np.zeros_like(layer.weight)
    for row, h, w, keep in zip(weight, layer.dense(), layer.weight, mask, strict=True):
        row[keep] = np.linalg.solve(h[np.ix_(keep, keep)], (h @ w)[keep])
    return weight


def guaranteed_steps(layer):
    """1 / L_i, L_i the largest eigenvalue of H_i scaled to a unit diagonal, (m, 1)."""
    dense = layer.dense()
    scale = np.sqrt(np.einsum("ijj->ij", dense))
    return 1 / np.linalg.eigvalsh(dense / (scale[:, :, None] * scale[:, None, :]))[:, -1:]


# what it converges to


@settings(max_examples=25)
@given(seeds, factor_counts, st.floats(1, 4))
@each_pattern
def test_a_converged_answer_is_stationary(pattern, seed, n, exponent):
    layer = random_layer(seed, 4, 8, n, 10**exponent)
    result = solve(layer.problem, pattern, IHT(iterations=1000))
    assert result.status is Status.CONVERGED
    np.testing.assert_allclose(result.weight, refitted(layer, result.mask), rtol=1e-6, atol=1e-8)

    step = 0.7 * guaranteed_steps(layer)
    if str(pattern) in ("50%", "80%"):  # a budget over the layer: one step size
        step = np.min(step)
    diagonal = np.einsum("ijj->ij", layer.dense())
    moved = result.weight - step * half_gradient(layer, result.weight) / diagonal
    scores = diagonal * moved**2
    keep = pattern.keep(scores)
    lost, won = scores[result.mask & ~keep].sum(), scores[keep & ~result.mask].sum()
    assert won - lost <= 1e-6 * scores.sum()  # a change is a tie


@settings(max_examples=20)
@given(seeds, st.integers(1, 5), st.booleans())
@each_pattern
def test_the_optimum_of_a_diagonal_hessian(pattern, seed, m, joint):
    rng = np.random.default_rng(seed)
    factors = np.zeros((m, 8, 2)) if joint else None
    if joint:  # each factor on one column, so that H_i stays diagonal and differs from row to row
        factors[:, 1, 0], factors[:, 6, 1] = rng.uniform(0, 9, size=(2, m))
    layer = Layer(rng.normal(size=(m, 8)), np.diag(rng.uniform(0.01, 10, 8)), factors)
    result = solve(layer.problem, pattern, IHT())
    cost = np.einsum("ijj->ij", layer.dense()) * layer.weight**2
    np.testing.assert_array_equal(result.mask, pattern.keep(cost))
    np.testing.assert_allclose(result.weight, np.where(result.mask, layer.weight, 0), rtol=1e-10)
    assert result.status is Status.CONVERGED


def test_close_to_the_optimum_of_small_layers():
    """Against every support of six of twelve inputs; the start alone is further off."""
    found, start, best = [], [], []
    for seed in range(10):
        layer = random_layer(seed, 1, 12, 2, 1e2)
        pattern = Unstructured(0.5)
        supports = [np.array([bool(b >> j & 1) for j in range(12)]) for b in range(2**12) if b.bit_count() == 6]
        best.append(min(values_by_row(layer, refitted(layer, s[None]))[0] for s in supports))
        found.append(solve(layer.problem, pattern, IHT()).value)
        answer = IHT().compute(IHT().init(layer.problem), pattern)
        start.append(values_by_row(layer, answer.start)[0])
    ratios = np.array(found) / best
    assert (ratios > 1 - 1e-9).all()
    assert np.median(ratios) < 1.1 < np.median(np.array(start) / best)


# how it gets there


def test_a_step_minimises_its_model_over_every_support():
    """`2 (y - x)' g + (y - x)' D (y - x) / tau`, g half the gradient, on rows of very unequal diagonals."""
    rng = np.random.default_rng(0)
    supports = np.array([[bool(b >> j & 1) for j in range(8)] for b in range(2**8) if b.bit_count() == 3])
    for seed in range(20):
        layer = random_layer(seed, 1, 8, 2)
        layer = Layer(layer.weight, layer.A, layer.U * np.geomspace(0.01, 10, 8)[:, None])
        quadratic = ScaledQuadratic.of(layer.hessian, layer.weight, np.sqrt(np.diag(layer.A)))
        keep = supports[seed : seed + 1]
        point = _at(quadratic, np.where(keep, rng.normal(size=(1, 8)), 0), keep, np.array([[0.5]]))
        y, mask, _ = _thresholded(quadratic, Unstructured(5 / 8), point)

        diagonal = quadratic.diagonal

        def model(y, point=point, diagonal=diagonal):
            moved = y - point.x
            return np.sum(2 * moved * point.gradient + diagonal * moved**2 / 0.5, axis=1)

        others = np.where(supports, point.x - 0.5 * point.gradient / diagonal, 0)
        assert mask.sum() == 3 and (y[~mask] == 0).all()
        assert model(y) <= model(others).min() + 1e-12 * abs(model(others)).max()


@settings(max_examples=15)
@given(seeds, factor_counts, st.floats(1, 6))
@each_pattern
def test_the_value_never_rises(pattern, seed, n, exponent):
    """A refit of eight inputs is exact after eight steps, so stopping earlier shows the descent itself."""
    layer = random_layer(seed, 4, 8, n, 10**exponent)
    values = [solve(layer.problem, pattern, IHT(iterations=k)).value for k in range(1, 12)]
    at_zero = layer.problem.zero_value()
    assert all(after <= before + 1e-10 * at_zero for before, after in pairwise(values))


@settings(max_examples=25)
@given(layers(max_columns=12), st.floats(0, 1), st.sampled_from(["layer", "row"]))
def test_never_worse_than_the_refitted_magnitudes(layer, sparsity, scope):
    pattern = Unstructured(sparsity, scope)
    answer = IHT(iterations=20).compute(IHT().init(layer.problem), pattern)
    mask = pattern.keep(np.einsum("ijj->ij", layer.dense()) * layer.weight**2)
    assert (answer.start[~mask] == 0).all()
    value, start, best = (
        values_by_row(layer, w).sum() for w in (answer.weight, answer.start, refitted(layer, mask))
    )
    at_zero = layer.problem.zero_value()
    assert value <= start + 1e-12 * at_zero
    assert start <= best + 1e-6 * at_zero


@settings(max_examples=15)
@given(seeds, st.integers(0, 3), st.floats(1, 6))
@each_pattern
def test_the_units_of_the_inputs_do_not_matter(pattern, seed, n, exponent):
    layer = random_layer(seed, 4, 8, n, 10**exponent)
    s = 2.0 ** np.random.default_rng(seed).integers(-8, 8, 8)  # powers of two: not even rounding differs
    scaled = Layer(layer.weight / s, layer.A * s[:, None] * s, None if n == 0 else layer.U * s[:, None])
    here, there = (solve(x.problem, pattern, IHT()) for x in (layer, scaled))
    np.testing.assert_array_equal(there.weight * s, here.weight)


def test_a_limit_is_said():
    layer = random_layer(0, 16, 32, 3, 1e5)
    result = solve(layer.problem, 0.7, IHT(iterations=2))
    assert result.status is Status.ITERATION_LIMIT and result.iterations == 2


# quality


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("pattern", ["2:4", "70%", "90%"])
def test_better_than_the_sweep_on_ill_conditioned_layers(n, pattern):
    problem = random_layer(1, 48, 48, n, 1e4).problem
    assert solve(problem, pattern, IHT()).value <= solve(problem, pattern, SparseGPT()).value


# arrays and arguments


def test_backends(backend):
    layer = random_layer(3, 6, 16, 3, 1e3)
    weight, a, u = (backend.array(x) for x in (layer.weight, layer.A, layer.U))
    for pattern in PATTERNS:
        expected = solve(layer.problem, pattern, IHT())
        if backend.name == "torch-cpu":  # `native` makes NumPy of it: run the array operations on torch itself
            answer, read = in_namespace(weight, a, u, pattern), backend.numpy
        else:
            problem = Problem(weight, RowHessian(a, u))
            answer, read = IHT().compute(IHT().init(problem), pattern), backend.computed
        np.testing.assert_array_equal(read(answer.mask), np.asarray(expected.mask))
        np.testing.assert_allclose(read(answer.weight), expected.weight, rtol=1e-6, atol=1e-8)


class Bare:
    """A problem of torch arrays on the CPU, as there are on a device without CuPy."""

    def __init__(self, centre, a, factors):
        self.centre, self.hessian, self.shape = centre, self, tuple(centre.shape)
        self.A, self.factors = a, factors
        self.total = lambda value: value

    def value(self, weight):
        x = native(weight - self.centre)
        u = native(self.factors)
        return float(((x @ native(self.A)) * x).sum() + ((u * x).sum(axis=2) ** 2).sum())


def in_namespace(weight, a, u, pattern):
    return IHT().compute(IHT().init(Bare(weight, a, u.permute(2, 0, 1).contiguous())), pattern)


@pytest.mark.parametrize("field", ["iterations", "steps", "refits"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "9"])
def test_counts_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a positive integer"):
        IHT(**{field: value})


def test_the_scaled_quadratic_is_the_quadratic():
    layer = random_layer(0, 4, 8, 3)
    quadratic = ScaledQuadratic.of(layer.hessian, layer.weight, np.sqrt(np.diag(layer.A)))
    weight = np.random.default_rng(1).normal(size=(4, 8))
    roots = np.sqrt(np.diag(layer.A))
    unit = roots[0] / quadratic.scale[0]
    assert unit == 2.0 ** np.ceil(np.log2(abs(layer.weight * roots).max()))
    np.testing.assert_array_equal(quadratic.scale, roots / unit)
    x = weight * quadratic.scale
    assert quadratic.loss(x) * unit**2 == pytest.approx(layer.problem.value(weight))
    half = (quadratic.matvec(x) - quadratic.pull) * roots * unit
    np.testing.assert_allclose(half, half_gradient(layer, weight), rtol=1e-9)
    diagonal = np.einsum("ijj->ij", layer.dense())
    np.testing.assert_allclose(quadratic.diagonal * roots**2, diagonal)
    rows = np.array([2, 0])
    np.testing.assert_allclose(quadratic.rows(rows).matvec(x[rows]), quadratic.matvec(x)[rows])
    np.testing.assert_array_equal(quadratic.rows(rows).pull, quadratic.pull[rows])


# a start of its own


@settings(max_examples=25)
@given(layers(max_condition=1e4), seeds)
def test_an_answer_is_never_worse_than_the_start_it_is_given(layer, seed):
    start = np.random.default_rng(seed).normal(size=layer.weight.shape)
    pattern = Unstructured(0.5)
    result = solve(layer.problem, pattern, IHT(start=start))
    diagonal = np.einsum("ijj->ij", layer.dense())
    begin = refitted(layer, pattern.keep(diagonal * start**2))
    assert result.value <= layer.problem.value(begin) * (1 + 1e-6) + 1e-9 * layer.problem.zero_value()


@each_pattern
def test_from_the_optimum_the_answer_is_the_optimum(pattern):
    problem = random_layer(5, 5, 8, 3, 1e4).problem
    optimum = solve(problem, pattern, Exact())
    again = solve(problem, pattern, IHT(start=optimum.weight))
    np.testing.assert_array_equal(again.mask, optimum.mask)
    np.testing.assert_allclose(again.weight, optimum.weight, rtol=1e-6, atol=1e-8)


@settings(max_examples=25)
@given(seeds, factor_counts)
def test_the_centre_is_the_usual_start(seed, n):
    layer = random_layer(seed, 4, 8, n, 1e4)
    units = np.geomspace(1e-3, 1e3, 8)
    factors = None if layer.U is None else layer.U * units[:, None]
    problem = Problem(layer.weight, RowHessian(layer.A * np.outer(units, units), factors))
    for pattern in (Unstructured(0.5), NM(2, 4)):
        usual = solve(problem, pattern, IHT(iterations=1))
        np.testing.assert_array_equal(
            solve(problem, pattern, IHT(iterations=1, start=layer.weight)).weight, usual.weight
        )


def test_the_start_may_be_of_any_kind_and_dtype(backend):
    layer = random_layer(3, 5, 8, 3, 1e2)
    problem = Problem(backend.array(layer.weight), RowHessian(backend.array(layer.A), backend.array(layer.U)))
    start = backend.array(np.random.default_rng(0).normal(size=(5, 8)), "float32")
    result = solve(problem, "2:4", IHT(start=start))
    expected = solve(layer.problem, "2:4", IHT(start=backend.numpy(start)))
    np.testing.assert_array_equal(backend.numpy(result.mask), expected.mask)


def test_starts_that_cannot_be_are_refused():
    problem = random_layer(3, 5, 8, 3, 1e2).problem
    with pytest.raises(NotSupportedError, match="its start is 2 x 8, the layer 5 x 8"):
        solve(problem, "2:4", IHT(start=np.ones((2, 8))))
    with pytest.raises(ValueError, match="start holds NaN"):
        IHT(start=np.full((5, 8), np.nan))
    with pytest.raises(TypeError, match="start must be a NumPy"):
        IHT(start=[[1.0]])
