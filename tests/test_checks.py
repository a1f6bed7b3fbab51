"""moonshot.checks: our own plug-ins pass, and each promise that is broken on purpose is named in words."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

import moonshot as ms
from moonshot.checks import CheckError, check_objective, check_pattern, check_solver
from moonshot.checks.exhaustive import all_masks, optimum
from moonshot.layer.patterns import PatternError, PatternMismatchError
from strategies import random_layer
from tests.examples.blocks import Blocks
from tests.examples.diagonal_saliency import DiagonalSaliency
from tests.examples.normalised_reconstruction import NormalisedReconstruction

SOLVERS = [
    ms.Magnitude(),
    ms.Wanda(),
    ms.SparseGPT(),
    ms.OBS(),
    ms.IHT(),
    ms.ADMM(),
    ms.Swaps(ms.OBS()),
    ms.Exact(),
    DiagonalSaliency(),
]
OBJECTIVES = [
    ms.Reconstruction(),
    ms.Fisher(),
    ms.TokenFisher(),
    0.6 * ms.Reconstruction() + 0.2 * ms.TokenFisher() + 0.2 * ms.Fisher(),
    NormalisedReconstruction(),
]
PATTERNS = [
    0,
    0.5,
    "33.3%",
    1,
    ms.Unstructured(0.5, "row"),
    ms.Unstructured(0.3, "row"),
    "2:4",
    "1:8",
    "0:4",
    "4:4",
]


def faults(check, plugin, *arguments):
    with pytest.raises(CheckError) as caught:
        check(plugin, *arguments)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def assert_named(found, words):
    assert any(words in fault for fault in found), f"{words!r} is not in {found}"


# what is right passes


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_solvers_pass_and_refuse_nothing(solver):
    assert check_solver(solver) == ()


def test_every_solver_is_checked():
    names = {name for name in ms.__all__ if hasattr(getattr(ms, name), "compute")} - {"Solver"}
    assert names <= {type(solver).__name__ for solver in SOLVERS}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_objectives_pass(objective):
    check_objective(objective)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_pass(pattern):
    check_pattern(pattern)


# solvers that are wrong


@dataclass(frozen=True)
class Right:
    """Keep the largest saliencies and refit the rest of the row: what the wrong ones below are made of."""

    name: str = "mine"

    def unsupported(self, problem, pattern):
        return None

    def init(self, problem):
        return {"centre": problem.centre, "hessian": problem.hessian, "problem": problem}

    def scores(self, state):
        return state["centre"] ** 2 * state["hessian"].diagonal()

    def compute(self, state, pattern):
        mask = pattern.keep(self.scores(state))
        return ms.Answer(np.where(mask, state["centre"], 0), mask)


class OneZeroTooFew(Right):
    def compute(self, state, pattern):
        mask = super().compute(state, pattern).mask
        if not mask.all():
            mask[tuple(np.argwhere(~mask)[0])] = True
        return ms.Answer(np.where(mask, state["centre"], 0), mask)


class IgnoresFactors(Right):
    def scores(self, state):
        return state["centre"] ** 2 * np.diagonal(state["hessian"].A)


class FirstRowsFactors(Right):
    def scores(self, state):
        hessian = state["hessian"]
        factors = 0 if hessian.factors is None else (hessian.factors[:, :1] ** 2).sum(axis=0)
        return state["centre"] ** 2 * (np.diagonal(hessian.A) + factors)


class AbsoluteTolerance(Right):
    def scores(self, state):
        return np.maximum(super().scores(state), 1e-3)


class WeightsOfItsOwn(Right):
    def scores(self, state):
        return np.where(abs(state["centre"]) > 1, state["hessian"].diagonal(), 0)


class ChangesTheCentre(Right):
    def compute(self, state, pattern):
        mask = pattern.keep(self.scores(state))
        state["centre"][~mask] = 0
        return ms.Answer(state["centre"], mask)


class ChangesTheHessian(Right):
    def init(self, problem):
        problem.hessian.A[np.diag_indices(problem.shape[1])] += 1.0
        return super().init(problem)


class Random(Right):
    def scores(self, state):
        return np.random.default_rng().random(state["centre"].shape)


class Remembers(Right):
    def compute(self, state, pattern):
        answer = super().compute(state, pattern)
        state["centre"] = answer.weight
        return answer


class Shrinks(Right):
    def compute(self, state, pattern):
        answer = super().compute(state, pattern)
        return replace(answer, weight=0.99 * answer.weight)


class UsesTheWeight(Right):
    def init(self, problem):
        return super().init(problem) | {"centre": problem.weight.astype(problem.centre.dtype)}


class SaysOptimal(Right):
    def compute(self, state, pattern):
        return replace(super().compute(state, pattern), status=ms.Status.OPTIMAL)


class ProvesTooMuch(Right):
    def compute(self, state, pattern):
        answer = super().compute(state, pattern)
        return replace(answer, bound=state["problem"].value(answer.weight))


class Crashes(Right):
    def compute(self, state, pattern):
        return super().compute(state, pattern) if state["centre"].shape[1] > 1 else [][1]


class RefusesAll(Right):
    def unsupported(self, problem, pattern):
        return "missing everything"


class RefusesWithoutWords(Right):
    def unsupported(self, problem, pattern):
        return not isinstance(pattern, ms.NM)


class StatusInText(Right):
    def compute(self, state, pattern):
        return replace(super().compute(state, pattern), status="done")


class SharesOutByRows(ms.IHT):
    """Its rows wait for one another."""

    def row_work(self, columns, factors):
        return float(columns)


class AsksForTotalsUnevenly(ms.Magnitude):
    def init(self, problem):
        if problem.centre[0, 0] > 0:
            problem.total(1.0)
        return super().init(problem)


WRONG_SOLVERS = {
    OneZeroTooFew: "missed its pattern: 50% promises 16 zeros, the mask has 15",
    IgnoresFactors: "ignores U",
    FirstRowsFactors: "depends on the order of the rows",
    AbsoluteTolerance: "depends on the units of the objective",
    WeightsOfItsOwn: "depends on the units of the weights",
    ChangesTheCentre: "changes its input: problem.centre is written to",
    ChangesTheHessian: "changes its input: problem.hessian.A is written to",
    Random: "is not deterministic",
    Remembers: "compute may not change the state",
    Shrinks: "moves the weights away from problem.centre though nothing is to be pruned",
    UsesTheWeight: "depends on problem.weight: F is least at problem.centre",
    SaysOptimal: "calls an answer optimal, and a better one exists",
    ProvesTooMuch: "proves a bound that an answer falls below",
    Crashes: "a run raises IndexError: list index out of range [one column, 50%",
    RefusesAll: "refuses every problem: missing everything",
    RefusesWithoutWords: "unsupported must give a reason in words or None, it gives True",
    SharesOutByRows: "gives another answer for some rows alone than in the layer",
    AsksForTotalsUnevenly: "problem.total is asked for more often in some pieces than in others",
    StatusInText: "the status must be a moonshot.Status, it is 'done'",
}


def test_what_the_wrong_solvers_are_made_of_is_right():
    assert check_solver(Right()) == ()


@pytest.mark.parametrize("wrong", WRONG_SOLVERS, ids=lambda wrong: wrong.__name__)
def test_a_wrong_solver_is_named(wrong):
    assert_named(faults(check_solver, wrong()), WRONG_SOLVERS[wrong])


def test_rows_may_differ_where_blocks_span_them():
    assert check_solver(ms.Magnitude(), [Blocks(0.5)]) == ()


@pytest.mark.parametrize("patterns", [[], "2:4", 0.5])
def test_patterns_to_check_a_solver_on_are_several(patterns):
    with pytest.raises(TypeError, match="patterns are one or more to prune to"):
        check_solver(ms.Magnitude(), patterns)


def test_a_solver_of_one_pattern_is_checked_on_that():
    @dataclass(frozen=True)
    class Only(Right):
        def unsupported(self, problem, pattern):
            if problem.hessian.rank:
                return "missing factors"
            return None if isinstance(pattern, ms.NM) else f"only N:M patterns, got {pattern}"

    refused = check_solver(Only(), ["1:2", 0.5])
    assert (
        "factors, 1:2: missing factors" in refused
        and "a shared Hessian, 50%: only N:M patterns, got 50%" in refused
    )
    assert not any(line.startswith("a shared Hessian, 1:2") for line in refused)
    assert_named(
        faults(check_solver, Only(), [0.5]), "refuses every problem: missing factors; only N:M patterns"
    )


def test_several_faults_are_all_named_and_each_once():
    class Bad(ChangesTheHessian, Random):
        pass

    found = faults(check_solver, Bad())
    assert_named(found, "is not deterministic")
    assert_named(found, "problem.hessian.A is written to")
    assert len({fault.split(" [")[0] for fault in found}) == len(found)
    assert "and" in found[0].split("[")[1]  # where else


def test_one_layers_arrays_are_not_another_solvers():
    faults(check_solver, ChangesTheHessian())
    faults(check_solver, ChangesTheCentre())
    assert check_solver(Right()) == ()


# patterns that are wrong


class Half:
    """Half of the zeros in every row: what the wrong ones below are made of."""

    def __str__(self):
        return "half"

    def validate(self, shape):
        if shape[1] % 2:
            raise PatternError("half needs an even number of inputs")

    def zeros(self, shape):
        return shape[0] * shape[1] // 2

    def keep(self, scores):
        order = np.argsort(-scores, axis=1, kind="stable")
        mask = np.zeros(scores.shape, bool)
        np.put_along_axis(mask, order[:, : scores.shape[1] // 2], True, axis=1)
        return mask

    def check(self, mask):
        if ((~mask).sum(axis=1) * 2 != mask.shape[1]).any():
            raise PatternMismatchError("half: a row has too many or too few zeros")

    def groups(self, shape):
        return shape[1], shape[1] // 2


class Threshold(Half):
    """Ties on the threshold all stay."""

    def keep(self, scores):
        return scores >= np.sort(scores, axis=1)[:, scores.shape[1] // 2 :][:, :1]


class KeepsTheSmallest(Half):
    def keep(self, scores):
        return super().keep(-scores)


class ZerosOffByOne(Half):
    def zeros(self, shape):
        return super().zeros(shape) - 1


class ZerosAsFraction(Half):
    def zeros(self, shape):
        return 0.5


class ChecksNothing(Half):
    def check(self, mask):
        pass


class ChecksTheLess(Half):
    def check(self, mask):
        if ((~mask).sum(axis=1) * 2 < mask.shape[1]).any():
            raise PatternMismatchError("half: a row has too few zeros")


class RefusesItself(Half):
    def check(self, mask):
        raise PatternMismatchError("half: never")


class SortsInPlace(Half):
    def keep(self, scores):
        mask = super().keep(scores)
        scores.sort(axis=1)
        return mask


class Chance(Half):
    def keep(self, scores):
        return super().keep(np.random.default_rng().random(scores.shape))


class Numbers(Half):
    def keep(self, scores):
        return super().keep(scores).astype(float)


class Asserts(Half):
    def validate(self, shape):
        assert shape[1] % 2 == 0, "odd"


class OtherGroups(Half):
    def groups(self, shape):
        return 2, 1


class OtherTotal(Half):
    def groups(self, shape):
        return shape[1], shape[1] // 2 - 1


class FitsNothing(Half):
    def validate(self, shape):
        raise PatternError("half: not this one")


WRONG_PATTERNS = {
    Threshold: "zeros fewer than zeros(shape) [",
    KeepsTheSmallest: "keep does not keep the largest scores",
    ZerosOffByOne: "the mask of keep has 1 zeros more than zeros(shape)",
    ZerosAsFraction: "zeros must be an integer from 0 to",
    ChecksNothing: "check accepts a mask with one zero more than it promises",
    ChecksTheLess: "check accepts a mask with one zero more than it promises",
    RefusesItself: "check refuses the mask of keep",
    SortsInPlace: "keep changes the scores that it is given",
    Chance: "keep is not deterministic",
    Numbers: "keep must give booleans of the shape of the scores, it gives float64 (3, 4)",
    Asserts: "validate, which may raise PatternError only, raises AssertionError: odd",
    OtherGroups: "groups promises 1 zeros in every 2 consecutive weights, keep gives others",
    OtherTotal: "zeros(shape) gives another total",
    FitsNothing: "validate refuses every shape that was tried",
}


def test_what_the_wrong_patterns_are_made_of_is_right():
    check_pattern(Half())


@pytest.mark.parametrize("wrong", WRONG_PATTERNS, ids=lambda wrong: wrong.__name__)
def test_a_wrong_pattern_is_named(wrong):
    assert_named(faults(check_pattern, wrong()), WRONG_PATTERNS[wrong])


def test_checks_the_less_lets_one_less_through_no_more():
    assert not any("one zero less" in fault for fault in faults(check_pattern, ChecksTheLess()))


# objectives that are wrong


@dataclass(frozen=True)
class Gram(ms.Objective):
    """A right term out of all three observations."""

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "output_gradients"})

    def accumulate(self, statistic, observation):
        x = observation.require("inputs", 2, self)
        delta = observation.require("output_gradients", 2, self)
        s = np.abs(delta).sum(axis=1)
        gram = (x * s[:, None]).T @ x
        return gram if statistic is None else statistic + gram

    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic)


class MeansNotSums(Gram):
    def accumulate(self, statistic, observation):
        gram = super().accumulate(None, observation) / len(observation.inputs)
        return gram if statistic is None else statistic + gram


class ForgetsBatches(Gram):
    def accumulate(self, statistic, observation):
        return super().accumulate(None, observation)


class MixesUnits(Gram):
    """A loss gradient's square beside a plain Gram matrix."""

    def accumulate(self, statistic, observation):
        x = observation.require("inputs", 2, self)
        return (
            super().accumulate(statistic, observation) + (0 if statistic is None else 0 * statistic) + x.T @ x
        )


class AbsoluteRidge(Gram):
    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic + np.eye(len(statistic)))


class CountsFactorsTwice(ms.Fisher):
    """Parts that do not grow alike with the data."""

    def quadratic(self, statistic, weight):
        factors = np.transpose(statistic, (1, 2, 0))
        shared = np.einsum("sij,sik->jk", statistic, statistic) / len(statistic)
        return ms.Quadratic(shared=shared, factors=factors)


class ChangesInputs(Gram):
    def accumulate(self, statistic, observation):
        x = observation.require("inputs", 2, self)
        x -= x.mean(axis=0)
        return super().accumulate(statistic, observation)


class ChangesTheStatistic(Gram):
    def quadratic(self, statistic, weight):
        statistic += np.eye(len(statistic))
        return ms.Quadratic(shared=statistic)


class ChangesTheWeight(Gram):
    def quadratic(self, statistic, weight):
        weight *= 2
        return ms.Quadratic(shared=statistic)


class Noisy(Gram):
    def quadratic(self, statistic, weight):
        noise = np.random.default_rng().random(len(statistic))
        return ms.Quadratic(shared=statistic + np.diag(noise) * np.trace(statistic))


class SaysTooLittle(Gram):
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})


class NeedsUnknown(Gram):
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})


class WantsAllAtOnce(ms.Objective):
    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "gradients"})

    def accumulate(self, statistic, observation):
        observation.require("gradients", 3, self)
        gram = observation.require("inputs", 2, self).T @ observation.inputs
        return gram if statistic is None else statistic + gram

    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic)


class Negative(Gram):
    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic - np.trace(statistic) * np.eye(len(statistic)) / 3)


class Asymmetric(Gram):
    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=np.triu(statistic))


class Transposed(ms.Fisher):
    def quadratic(self, statistic, weight):
        return ms.Quadratic(factors=statistic)


class NotFinite(Gram):
    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic / 0.0)


class Repelling(Gram):
    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic, coefficient=-1.0)


class Nothing(Gram):
    def quadratic(self, statistic, weight):
        return ms.Quadratic()


class BareMatrix(Gram):
    def quadratic(self, statistic, weight):
        return statistic


class AlwaysZero(Gram):
    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=0 * statistic)


class NoHash(Gram):
    __hash__ = None


class NumPyOnly(Gram):
    """Takes what it is given as it is: tensors where the model gives tensors."""

    def accumulate(self, statistic, observation):
        if observation.inputs is None or observation.output_gradients is None:
            raise ValueError("give inputs and output_gradients")
        return (
            super().accumulate(statistic, observation) if isinstance(observation.inputs, np.ndarray) else 1 / 0
        )


class DoesNotAddUp(Gram):
    """Says that it does, and accumulates cube roots."""

    additive: ClassVar[bool] = True

    def accumulate(self, statistic, observation):
        return np.cbrt(super().accumulate(None if statistic is None else statistic**3, observation))

    def quadratic(self, statistic, weight):
        return ms.Quadratic(shared=statistic**3)


WRONG_OBJECTIVES = {
    DoesNotAddUp: "says that it is additive, and the sum of two statistics is not",
    MeansNotSums: "depends on how the data are cut into batches",
    ForgetsBatches: "depends on how the data are cut into batches",
    MixesUnits: "depends on the units of the training loss",
    AbsoluteRidge: "depends on the units of the inputs",
    CountsFactorsTwice: "depends on the amount of data",
    ChangesInputs: "changes its input: inputs is written to",
    ChangesTheStatistic: "quadratic changes the statistic",
    ChangesTheWeight: "changes its input: weight is written to",
    Noisy: "is not deterministic",
    SaysTooLittle: "reads an observation that needs does not name",
    NeedsUnknown: "needs must name some of ('inputs', 'output_gradients', 'gradients')",
    WantsAllAtOnce: "WantsAllAtOnce needs gradients",
    Negative: "shared of the quadratic is not positive semidefinite",
    Asymmetric: "shared of the quadratic is not symmetric",
    Transposed: "factors of the quadratic must be (m, d, n) with m = 3, d = 6; it is (8, 3, 6)",
    NotFinite: "shared of the quadratic holds NaN or infinity",
    Repelling: "coefficient of the quadratic must be finite and not negative, it is -1.0",
    Nothing: "neither a shared matrix nor factors",
    BareMatrix: "quadratic must return a moonshot.Quadratic, it returns ndarray",
    AlwaysZero: "the loss of the zero weight is 0",
    NoHash: "has no hash",
    NumPyOnly: "it raises ZeroDivisionError: division by zero [torch tensors]",
}


def test_what_the_wrong_objectives_are_made_of_is_right():
    check_objective(Gram())


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")
@pytest.mark.parametrize("wrong", WRONG_OBJECTIVES, ids=lambda wrong: wrong.__name__)
def test_a_wrong_objective_is_named(wrong):
    assert_named(faults(check_objective, wrong()), WRONG_OBJECTIVES[wrong])


def test_a_wrong_term_in_a_sum_is_found():
    assert_named(faults(check_objective, ms.Reconstruction() + MixesUnits()), "depends on the units")


# what cannot be checked


@pytest.mark.parametrize(
    ("check", "plugin", "message"),
    [
        (check_solver, ms.ADMM, "pass an instance, such as moonshot.ADMM(), not the class ADMM"),
        (check_solver, "admm", "str is no Solver: it is missing compute, init, name, unsupported"),
        (check_objective, ms.Fisher, "pass an instance, such as moonshot.Fisher(), not the class Fisher"),
        (check_objective, ms.ADMM(), "ADMM is no Objective"),
        (check_pattern, ms.NM, "pass an instance, such as moonshot.NM(2, 4), not the class NM"),
        (check_pattern, ms.ADMM(), "ADMM is no Pattern: it is missing check, keep, validate, zeros"),
        (check_pattern, None, "NoneType is no Pattern"),
    ],
)
def test_what_is_no_plugin_is_refused(check, plugin, message):
    with pytest.raises(TypeError) as caught:
        check(plugin)
    assert message in str(caught.value)


# the layer of a few weights


@pytest.mark.parametrize(
    ("pattern", "masks"), [("2:4", 6**3), (0.5, 924), (ms.Unstructured(0.25, "row"), 4**3), (0, 1)]
)
def test_all_masks_are_there(pattern, masks):
    assert len(all_masks(ms.as_pattern(pattern), (3, 4))) == masks


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("pattern", ["2:4", ms.Unstructured(0.5), ms.Unstructured(0.5, "row")], ids=str)
def test_the_optimum_is_that_of_the_exact_solver(pattern, n):
    layer = random_layer(n, 3, 4, n)
    problem = ms.Problem(layer.weight, layer.hessian, constant=1.0)
    exact = ms.solve(problem, pattern, ms.Exact())
    assert optimum(problem, ms.as_pattern(pattern)) == pytest.approx(exact.value, rel=1e-9)
