"""Objectives: their algebra, and their problems against the formulas of section 1 written out."""

from dataclasses import dataclass
from math import inf, nan
from typing import ClassVar

import numpy as np
import pytest
import torch

import moonshot as ms
from moonshot.layer.objectives import Fisher, Objective, Observation, Quadratic, Reconstruction, TokenFisher
from moonshot.layer.problem import Deviation
from moonshot.linalg import NotPositiveDefiniteError

R, F, T = Reconstruction(), Fisher(), TokenFisher()
M, D, TOKENS, SAMPLES = 3, 6, 20, 4


def observed(seed=0, m=M, d=D, tokens=TOKENS, samples=SAMPLES):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.normal(size=(tokens, d)),
        "output_gradients": rng.normal(size=(tokens, m)),
        "gradients": rng.normal(size=(samples, m, d)),
    }


WEIGHT = np.random.default_rng(5).normal(size=(M, D))
PRUNED = np.where(np.random.default_rng(6).random((M, D)) < 0.5, WEIGHT + 0.1, 0)


def called(term):
    """A term's name without its parameters."""
    return term.name.partition("(")[0]


@dataclass(frozen=True)
class Pulled(Objective):
    """A term with its own centre: outputs are to be those of the weight plus `offset`."""

    offset: float = 0.5
    factored: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def accumulate(self, statistic, observation):
        gram = observation.inputs.T @ observation.inputs
        return gram if statistic is None else statistic + gram

    def quadratic(self, statistic, weight):
        if not self.factored:
            return Quadratic(shared=statistic, centre=weight + self.offset)
        rows = np.broadcast_to(np.linalg.cholesky(statistic), (len(weight), *statistic.shape))
        return Quadratic(factors=rows, centre=weight + self.offset)


def losses(seen, V, W=WEIGHT):
    """q_t(V) of each term by its definition, sample by sample and token by token."""
    x, g, delta = seen["inputs"], seen["gradients"], seen["output_gradients"]
    moved = [np.sum((x_t @ (V - W).T) ** 2) for x_t in x]
    return {
        "Reconstruction": sum(moved),
        "Fisher": sum((g_s[i] @ (V[i] - W[i])) ** 2 for g_s in g for i in range(len(W))) / len(g),
        "TokenFisher": sum(np.mean(delta[t] ** 2) * moved[t] for t in range(len(x))),
        "Pulled": np.sum((x @ (V - W - 0.5).T) ** 2),
    }


def mean_diagonal(seen, weights, at_zero):
    """Mean diagonal of the undamped H_i, explicitly."""
    x, g, delta = seen["inputs"], seen["gradients"], seen["output_gradients"]
    _, m, d = g.shape
    s = np.mean(delta**2, axis=1)
    hessians = {
        "Reconstruction": np.stack([x.T @ x] * m),
        "Fisher": np.einsum("sij,sik->ijk", g, g) / len(g),
        "TokenFisher": np.stack([x.T @ np.diag(s) @ x] * m),
        "Pulled": np.stack([x.T @ x] * m),
    }
    joint = sum(share * hessians[name] / at_zero[name] for name, share in weights.items())
    return np.trace(joint, axis1=1, axis2=2).sum() / (m * d)


def assert_problem_is_as_written(objective, seen, fraction=0.01):
    problem = objective.problem(WEIGHT, **seen, dampening_frac=fraction)
    weights = {called(term): share for share, term in objective.weighted_terms}
    at_zero = losses(seen, np.zeros_like(WEIGHT))
    ridge = fraction * mean_diagonal(seen, weights, at_zero)
    assert problem.damping == fraction
    for V in (PRUNED, WEIGHT, np.zeros_like(WEIGHT)):
        here = losses(seen, V)
        relative = {name: here[name] / at_zero[name] for name in weights}
        expected = sum(share * relative[name] for name, share in weights.items())
        expected += ridge * np.sum((V - WEIGHT) ** 2)
        assert problem.value(V) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for term in problem.terms:
            assert term.loss(V) == pytest.approx(relative[called(term)], rel=1e-9, abs=1e-12)
            assert term.weight == pytest.approx(weights[called(term)])


# algebra


def shares(objective):
    return {term: pytest.approx(weight) for weight, term in objective.weighted_terms}


def test_a_term_alone_has_weight_one():
    assert R.weighted_terms == ((1.0, R),)


def test_weights_are_normalised():
    assert shares(7 * R + 3 * F) == {R: 0.7, F: 0.3}
    assert shares(R + F) == {R: 0.5, F: 0.5}
    assert shares(R * 0.2) == {R: 1.0}


def test_nested_sums_multiply_out():
    assert shares(2 * (R + 3 * (F + T)) + R) == {R: 3 / 15, F: 6 / 15, T: 6 / 15}
    assert shares(0.5 * (0.5 * (R + F)) + 0.5 * T) == {R: 0.25, F: 0.25, T: 0.5}


def test_duplicates_merge_in_order_of_first_appearance():
    objective = R + F + Reconstruction()
    assert [term for _, term in objective.weighted_terms] == [R, F]
    assert shares(objective) == {R: 2 / 3, F: 1 / 3}


def test_terms_that_differ_in_a_parameter_do_not_merge():
    assert len((Pulled(0.5) + Pulled(0.6)).weighted_terms) == 2


def test_zero_weights_are_dropped_and_their_data_not_needed():
    objective = 1 * R + 0 * F
    assert objective.weighted_terms == ((1.0, R),)
    assert [term.name for term in objective.problem(WEIGHT, inputs=observed()["inputs"]).terms] == [
        "Reconstruction"
    ]


def test_all_weights_zero_is_refused():
    with pytest.raises(ValueError, match="give one a positive weight"):
        _ = (0 * R + 0 * F).weighted_terms


@pytest.mark.parametrize("weight", [-1, -1e-9, nan, inf, -inf])
def test_weights_that_are_no_weights_are_refused(weight):
    with pytest.raises(ValueError, match="finite and not negative"):
        weight * R


@pytest.mark.parametrize("weight", ["0.5", None, True, [1], 1j])
def test_weights_that_are_no_numbers_are_refused(weight):
    with pytest.raises(TypeError):
        R * weight


def test_only_objectives_add():
    for other in (1, "Fisher", None):
        with pytest.raises(TypeError):
            R + other


def test_the_name_shows_weights_and_parameters():
    assert (7 * R + 3 * F).name == "0.7 Reconstruction + 0.3 Fisher"
    objective = R + Pulled(0.5) + Pulled(0.5) + Pulled(0.25, True)
    assert objective.name == (
        "0.25 Reconstruction + 0.5 Pulled(offset=0.5, factored=False) + 0.25 Pulled(offset=0.25, factored=True)"
    )
    seen = {"inputs": observed()["inputs"]}
    result = ms.solve(objective.problem(WEIGHT, **seen), 0.5, ms.Magnitude())
    assert [name.partition("(")[0] for name in result.terms] == ["Reconstruction", "Pulled", "Pulled"]


def test_terms_that_cannot_be_told_apart_are_refused():
    class Nameless(Objective):
        def __init__(self, scale):
            self.scale = scale

    with pytest.raises(
        ValueError, match="two different terms are called Nameless: make the class a frozen dataclass"
    ):
        ms.solve((Nameless(1) + Nameless(2)).problem(WEIGHT), 0.5, ms.Magnitude())

    @dataclass
    class Changing(Objective):
        scale: float = 1.0

    with pytest.raises(
        TypeError, match="Changing cannot be told from other terms: write @dataclass.frozen=True"
    ):
        R + Changing()


# problems


@pytest.mark.parametrize(
    "objective",
    [R, F, T, 0.7 * R + 0.3 * F, R + T, F + T, 0.6 * R + 0.2 * T + 0.2 * F],
    ids=lambda o: o.name,
)
@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_the_problem_is_as_written(objective, fraction):
    assert_problem_is_as_written(objective, observed(), fraction)


@pytest.mark.parametrize("term", [R, F, T], ids=lambda t: t.name)
def test_a_term_is_in_the_units_of_its_definition(term):
    quadratic = term.quadratic(term.accumulate(None, Observation(**observed())), WEIGHT)
    loss = quadratic.coefficient * Deviation(PRUNED - WEIGHT).loss(quadratic.shared, quadratic.factors)
    assert loss == pytest.approx(losses(observed(), PRUNED)[term.name], rel=1e-10)


@pytest.mark.parametrize("factored", [False, True])
def test_a_term_with_another_centre(factored):
    for objective in (R + Pulled(0.5, factored), 0.3 * F + 0.5 * Pulled(0.5, factored) + 0.2 * T):
        assert_problem_is_as_written(objective, observed())


def test_the_centre_is_the_unconstrained_minimiser():
    problem = (R + Pulled()).problem(WEIGHT, **observed())
    best = problem.value(problem.centre)
    rng = np.random.default_rng(0)
    assert all(problem.value(problem.centre + 1e-3 * rng.normal(size=WEIGHT.shape)) > best for _ in range(20))
    np.testing.assert_allclose(problem.centre, WEIGHT + 0.25, atol=0.02)  # between the two, ridge aside


def test_joint_hessians_are_explicit_sums():
    seen = observed()
    x, g = seen["inputs"], seen["gradients"]
    problem, at_zero = (0.7 * R + 0.3 * F).problem(WEIGHT, **seen), losses(seen, 0 * WEIGHT)
    ridge = 0.01 * mean_diagonal(seen, {"Reconstruction": 0.7, "Fisher": 0.3}, at_zero)
    for i in range(M):
        expected = 0.7 * x.T @ x / at_zero["Reconstruction"] + ridge * np.eye(D)
        expected += 0.3 * g[:, i].T @ g[:, i] / SAMPLES / at_zero["Fisher"]
        np.testing.assert_allclose(problem.hessian.row(i), expected, rtol=1e-12, atol=1e-14)


def test_units_cancel():
    seen = observed()
    scaled = {"inputs": 1e3 * seen["inputs"], "gradients": 1e-6 * seen["gradients"]}
    scaled["output_gradients"] = 1e-4 * seen["output_gradients"]
    left, right = ((R + F + T).problem(WEIGHT, **x).value(PRUNED) for x in (seen, scaled))
    assert left == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("term", [R, F, T], ids=lambda t: t.name)
def test_batches_add_up_to_everything_at_once(term):
    seen = observed(samples=5)
    observation, statistic = Observation(**seen), None
    for tokens, samples in [
        (slice(0, 1), slice(0, 2)),
        (slice(1, 13), slice(2, 3)),
        (slice(13, 20), slice(3, 5)),
    ]:
        statistic = term.accumulate(
            statistic,
            Observation(seen["inputs"][tokens], seen["output_gradients"][tokens], seen["gradients"][samples]),
        )
    whole = term.accumulate(None, observation)
    left, right = (term.assemble(WEIGHT, [s]) for s in (statistic, whole))
    assert left.value(PRUNED) == pytest.approx(right.value(PRUNED), rel=1e-12)
    for i in range(M):
        np.testing.assert_allclose(left.hessian.row(i), right.hessian.row(i), rtol=1e-12, atol=1e-14)


def test_observations_and_weights_are_not_changed():
    seen, weight = observed(), WEIGHT.copy()
    copies = {name: array.copy() for name, array in seen.items()}
    (R + F + T + Pulled()).problem(weight, **seen)
    np.testing.assert_array_equal(weight, WEIGHT)
    for name, array in seen.items():
        np.testing.assert_array_equal(array, copies[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_tensors_give_the_same_problem(dtype):
    seen = {name: torch.tensor(array).to(dtype) for name, array in observed().items()}
    weight = torch.tensor(WEIGHT).to(dtype)
    problem = (R + F + T).problem(weight, **seen)
    rounded = {name: tensor.double().numpy() for name, tensor in seen.items()}
    twin = (R + F + T).problem(weight.double().numpy(), **rounded)
    pruned = torch.tensor(PRUNED)
    assert problem.value(pruned) == pytest.approx(
        twin.value(PRUNED), rel=1e-12 if dtype == torch.float64 else 1e-4
    )


# damping


@dataclass(frozen=True)
class Given(Objective):
    """A term whose shared matrix is its statistic."""

    def quadratic(self, statistic, weight):
        return Quadratic(shared=statistic)


def indefinite(largest, least):
    """A matrix (D, D) with a positive diagonal whose eigenvalues are `largest` five times and `least`."""
    shared = np.diag(np.full(D, largest))
    shared[:2, :2] += (least - largest) / 2
    return shared


def test_damping_is_raised_tenfold_until_it_helps_and_recorded():
    shared = indefinite(1.0, -0.02)  # mean 0.83: needs a fraction of 0.0241
    problem = Given().assemble(WEIGHT, [shared], dampening_frac=1e-3)
    assert problem.damping == pytest.approx(0.1)
    scale = 1 / np.sum((WEIGHT @ shared) * WEIGHT)
    expected = scale * (shared + 0.1 * np.trace(shared) / D * np.eye(D))
    np.testing.assert_allclose(problem.hessian.row(0), expected, rtol=1e-12)


def test_damping_that_does_not_help_is_an_error():
    shared = indefinite(3.0, -1.0)
    with pytest.raises(NotPositiveDefiniteError, match="raise dampening_frac") as caught:
        Given().assemble(WEIGHT, [shared], dampening_frac=1e-9)
    assert caught.value.pivot < 0


def test_dead_inputs_need_damping_and_get_it():
    seen = observed()
    seen["inputs"][:, [1, 4]] = 0
    assert R.problem(WEIGHT, **seen).damping == 0.01
    assert R.problem(WEIGHT, **seen, dampening_frac=0).damping == 1e-8


def test_no_damping_where_none_is_needed():
    assert R.problem(WEIGHT, **observed(), dampening_frac=0).damping == 0


def test_fewer_tokens_than_inputs():
    assert_problem_is_as_written(R, observed(tokens=2))


def test_a_weight_of_zeros_has_a_problem_of_value_zero():
    weight = np.zeros((M, D))
    for objective in (R, F, T, R + F + T):
        problem = objective.problem(weight, **observed())
        assert problem.value(weight) == problem.zero_value() == 0
        assert all(term.loss(weight) == 0 for term in problem.terms)


def test_inputs_of_zeros_make_all_weights_matter_alike():
    problem = R.problem(WEIGHT, inputs=np.zeros((5, D)))
    np.testing.assert_array_equal(problem.hessian.row(0), np.eye(D))
    assert problem.damping == 1


@pytest.mark.parametrize("fraction", [-0.01, nan, inf, "0.01", None])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match="dampening_frac must be a number"):
        R.problem(WEIGHT, **observed(), dampening_frac=fraction)


# what is refused


@dataclass(frozen=True)
class Broken(Reconstruction):
    """Reconstruction with something done to its Gram matrix."""

    made: str = ""

    def quadratic(self, statistic, weight):
        return {
            "no quadratic": statistic,
            "nothing": Quadratic(),
            "transposed factors": Quadratic(factors=np.ones((D, M, 2))),
            "too narrow": Quadratic(shared=statistic[:3, :3]),
            "negative": Quadratic(shared=-statistic),
            "half": Quadratic(shared=np.triu(statistic)),
            "negative coefficient": Quadratic(shared=statistic, coefficient=-1.0),
        }[self.made]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("no quadratic", "quadratic must return a moonshot.Quadratic, it returns ndarray"),
        ("nothing", "neither a shared matrix nor factors: does accumulate return the statistic"),
        (
            "transposed factors",
            r"factors of the quadratic must be \(m, d, n\) with m = 3, d = 6; it is \(6, 3, 2\)",
        ),
        ("too narrow", r"shared of the quadratic must be \(d, d\)"),
        ("negative", "shared of the quadratic is not positive semidefinite: -.* is on its diagonal"),
        ("half", "shared of the quadratic is not symmetric"),
        ("negative coefficient", "coefficient of the quadratic must be finite and not negative"),
    ],
)
def test_a_term_that_gives_no_quadratic_of_the_layer_is_refused(made, message):
    with pytest.raises(ms.MoonshotError, match=rf"Broken\(made='{made}'\): .*{message}"):
        Broken(made).problem(WEIGHT, **observed())


class Misspelt(Reconstruction):
    needs: ClassVar[frozenset[str]] = frozenset({"inptus"})


def test_what_a_term_needs_is_an_observation():
    with pytest.raises(ms.MoonshotError, match=r"Misspelt: needs must name some of \('inputs', .*'inptus'"):
        ms.prune(torch.nn.Linear(4, 4), torch.ones(8, 4), 0.5, objective=R + Misspelt())


REFUSED = {
    "no inputs": (R, {"inputs": None}, ValueError, "Reconstruction needs inputs: pass inputs="),
    "no gradients": (F, {"gradients": None}, ValueError, "Fisher needs gradients: pass gradients="),
    "no output gradients": (T, {"output_gradients": None}, ValueError, "TokenFisher needs output_gradients"),
    "inputs of other width": (
        R,
        {"inputs": np.ones((4, D + 1))},
        ValueError,
        "inputs have 7 columns, the weight has 6",
    ),
    "inputs not flattened": (R, {"inputs": np.ones((2, 4, D))}, ValueError, "inputs must have 2 dimensions"),
    "empty inputs": (R, {"inputs": np.ones((0, D))}, ValueError, "inputs is empty: give more calibration data"),
    "inputs with NaN": (R, {"inputs": np.full((4, D), nan)}, ValueError, "inputs holds NaN or infinity"),
    "inputs with infinity": (R, {"inputs": np.full((4, D), inf)}, ValueError, "inputs holds NaN or infinity"),
    "inputs a list": (R, {"inputs": [[1.0] * D]}, TypeError, "convert it with numpy.asarray first"),
    "gradients of other rows": (
        F,
        {"gradients": np.ones((2, M + 1, D))},
        ValueError,
        r"gradients must be \(n, m, d\)",
    ),
    "gradients of one sample": (
        F,
        {"gradients": np.ones((M, D))},
        ValueError,
        "gradients must have 3 dimensions",
    ),
    "empty gradients": (F, {"gradients": np.ones((0, M, D))}, ValueError, "gradients is empty"),
    "gradients with NaN": (F, {"gradients": np.full((2, M, D), nan)}, ValueError, "gradients holds NaN"),
    "tokens that differ": (T, {"output_gradients": np.ones((3, M))}, ValueError, "they must agree"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_observations_are_refused(name):
    term, change, error, message = REFUSED[name]
    for objective in (term, 0.5 * term + 0.5 * Given() * 0):
        with pytest.raises(error, match=message):
            objective.problem(WEIGHT, **(observed() | change))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(D), r"weight must be \(m, d\) and not empty"),
        (np.ones((0, D)), r"weight must be \(m, d\) and not empty"),
        (np.full((M, D), nan), "weight holds NaN or infinity"),
    ],
)
def test_unusable_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        R.problem(weight, **observed())


def test_batches_of_different_width_are_refused():
    statistic = R.accumulate(None, Observation(np.ones((4, 6))))
    with pytest.raises(ValueError, match="a batch has 7 inputs to the layer, the ones before had 6"):
        R.accumulate(statistic, Observation(np.ones((4, 7))))


def test_a_sum_is_no_term():
    for use in (lambda o: o.accumulate(None, Observation()), lambda o: o.quadratic(None, WEIGHT)):
        with pytest.raises(TypeError, match="must define accumulate and quadratic"):
            use(R + F)


# grading


@pytest.mark.parametrize(
    "objective", [R, F, 0.5 * R + 0.2 * T + 0.3 * F, R + Pulled(), F + Pulled(factored=True)]
)
def test_the_sum_of_the_terms_is_the_value(objective):
    problem = objective.problem(WEIGHT, **observed())
    for V in (PRUNED, WEIGHT, 0 * WEIGHT):
        value, losses = problem.graded(V)
        assert value == pytest.approx(problem.value(V), rel=1e-9, abs=1e-12)
        assert losses == [term.loss(V) for term in problem.terms]
    assert problem.zero_value() == pytest.approx(problem.value(0 * WEIGHT), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_centre_of_terms_about_the_weight_is_the_weight(dtype):
    seen = {name: torch.from_numpy(value).float() for name, value in observed().items()}
    weight = torch.from_numpy(WEIGHT).to(dtype)
    np.testing.assert_array_equal((R + F).problem(weight, **seen).centre, weight)
