"""Objectives: what a layer's pruning is judged by, as weighted sums of quadratic terms.

A term says which observations of a layer it needs, how they add up over calibration batches to a
statistic, and what quadratic that statistic is. `0.7 * Reconstruction() + 0.3 * Fisher()` is an objective;
so is each term alone. A new term is one subclass of `Objective` (docs/extending.md has an example).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from typing import Any, ClassVar

from moonshot.errors import ArgumentError, ArgumentTypeError, check_number
from moonshot.layer.assembly import (
    Quadratic,
    check_fraction,
    damped,
    damped_problem,
    fault_of,
    mean_diagonal,
    normalised,
    stacked,
    total_factors,
    total_shared,
)
from moonshot.layer.problem import Deviation, Problem, check_weight
from moonshot.linalg import half_products
from moonshot.linalg.backend import Array, all_finite, computing_on, is_numpy, namespace, native
from moonshot.linalg.lowrank import by_row

OBSERVATIONS = ("inputs", "output_gradients", "gradients")


@dataclass(frozen=True)
class Observation:
    """What was seen of a layer in one batch. Token k of `inputs` is token k of `output_gradients`.

    inputs: (tokens, d), what the layer read.
    output_gradients: (tokens, m), of the training loss at what the layer returned.
    gradients: (n, m, d), of the loss with respect to the weight, one for each calibration sample.
    """

    inputs: Array | None = None
    output_gradients: Array | None = None
    gradients: Array | None = None

    def require(self, name: str, dimensions: int, term: "Objective") -> Array:
        """One observation as it is computed on, checked; ValueError where it is missing or unusable."""
        array = native(self._seen(name, dimensions, term), name)
        _check_finite(name, array)
        return array

    def gram(self, term: "Objective", importance: str | None = None) -> Array:
        """`sum_t s_t x_t x_t'` over the tokens, (d, d), in float32 or better; x_t the inputs.

        importance: the observation (tokens, m) whose mean square for each token is s_t; None for s_t = 1.

        Whether arrays on a device are finite is asked once, of the whole sum (`check_gram`).
        """
        names = ("inputs",) if importance is None else ("inputs", importance)
        arrays = [self._seen(name, 2, term) for name in names]
        if len({len(array) for array in arrays}) > 1:
            raise ArgumentError(
                f"inputs have {len(arrays[0])} tokens, {importance} {len(arrays[1])}: they must agree"
            )
        if half_products.possible(*arrays):
            return native(half_products.gram(*arrays))
        x, *gradients = map(native, arrays)
        if is_numpy(x):
            for name, array in zip(names, (x, *gradients), strict=True):
                _check_finite(name, array)
        xp = namespace(x)
        for gradient in gradients:
            x = x * xp.sqrt(xp.mean(gradient**2, axis=1))[:, None]
        return x.T @ x  # symmetric, of which NumPy computes one triangle

    def _seen(self, name: str, dimensions: int, term: "Objective") -> Array:
        """One observation, in bfloat16 if it can be multiplied so; ValueError if it is missing or of another shape."""
        value = getattr(self, name)
        if value is None:
            raise ArgumentError(f"{term.name} needs {name}: pass {name}=...")
        array = value if half_products.possible(value) else native(value, name)
        if array.ndim != dimensions:
            raise ArgumentError(f"{name} must have {dimensions} dimensions, got {tuple(array.shape)}")
        if array.shape[0] == 0:
            raise ArgumentError(f"{name} is empty: give more calibration data")
        return array


def _check_finite(name: str, array: Array) -> None:
    if not all_finite(array):
        raise ArgumentError(f"{name} holds NaN or infinity: look at the calibration data and model")


def check_gram(statistic: Array) -> Array:
    """The sum of some `Observation.gram`. ValueError where the inputs were not finite, if that has not been asked."""
    if not is_numpy(statistic):
        _check_finite("inputs", statistic)
    return statistic


class Objective:
    """A non-negative weighted sum of terms. A subclass with `accumulate` and `quadratic` is a term itself.

    needs: the observations that a term reads, out of OBSERVATIONS.
    additive: whether the statistic from inputs and output gradients is an array, and that of two sets of batches the
    sum of those of each: what several processes need that prune a model together.

    A term with parameters is a frozen dataclass: their values are in its name, and other values make another term.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    additive: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What results and reports call the term: its class, and its parameters if it has any."""
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({values})" if values else type(self).__name__

    @property
    def weighted_terms(self) -> "tuple[tuple[float, Objective], ...]":
        """(weight, term) of every term with a positive weight; the weights sum to 1."""
        return ((1.0, self),)

    @property
    def needed(self) -> frozenset[str]:
        """The observations that any of its terms reads."""
        return frozenset[str]().union(*(term.needs for _, term in self.weighted_terms))

    def check_needs(self) -> None:
        """ArgumentError for a term whose `needs` names something else than OBSERVATIONS, or nothing."""
        for _, term in self.weighted_terms:
            if not term.needs or set(term.needs) - set(OBSERVATIONS):
                raise ArgumentError(
                    f"{term.name}: needs must name some of {OBSERVATIONS}, it is {set(term.needs) or '{}'}"
                )

    def accumulate(self, statistic: Any, observation: Observation) -> Any:
        """The statistic after one more batch; `statistic` is None at the first.

        A term that needs gradients and something else as well has them in calls of their own while a model is pruned:
        inputs (and output_gradients) batch by batch, gradients once, after all of these. It looks for what is there.
        """
        raise ArgumentTypeError(f"{self.name} is no term: it must define accumulate and quadratic")

    def quadratic(self, statistic: Any, weight: Array) -> Quadratic:
        """The term's quadratic for a layer with this weight (m, d)."""
        raise ArgumentTypeError(f"{self.name} is no term: it must define accumulate and quadratic")

    def __mul__(self, weight: float) -> "Objective":
        return WeightedSum(((_check_weighting(weight), self),))

    __rmul__ = __mul__

    def __add__(self, other: "Objective") -> "Objective":
        if not isinstance(other, Objective):
            return NotImplemented
        return WeightedSum((*_summands(self), *_summands(other)))

    def problem(
        self,
        weight: Array,
        *,
        inputs: Array | None = None,
        gradients: Array | None = None,
        output_gradients: Array | None = None,
        dampening_frac: float = 0.01,
    ) -> Problem:
        """The pruning problem of one layer from everything seen of it at once.

        weight: (m, d).
        inputs, gradients, output_gradients: (tokens, d), (n, m, d) and (tokens, m), where a term needs them.
        dampening_frac: the ridge, as a fraction of the Hessians' mean diagonal.
        """
        observation = Observation(inputs, output_gradients, gradients)
        self.check_needs()
        for _, term in self.weighted_terms:
            if missing := [
                name for name in OBSERVATIONS if name in term.needs and getattr(observation, name) is None
            ]:
                raise ArgumentError(f"{term.name} needs {missing[0]}: pass {missing[0]}=...")
        with computing_on(weight):
            _check_columns(inputs, weight)
            statistics = [term.accumulate(None, observation) for _, term in self.weighted_terms]
        return self.assemble(weight, statistics, dampening_frac=dampening_frac)

    def assemble(self, weight: Array, statistics: list[Any], *, dampening_frac: float = 0.01) -> Problem:
        """The pruning problem of one layer from one statistic for each of `weighted_terms`.

            F(V) = sum_t weight_t q_t(V) / q_t(0) + delta ||V - W||^2

        delta is dampening_frac times the mean diagonal of the undamped Hessians. Where that leaves the
        shared matrix numerically indefinite, delta is raised tenfold up to six times; `problem.damping` is
        the fraction used. Raises NotPositiveDefiniteError if that does not help.
        """
        terms = [term for _, term in self.weighted_terms]
        return self.weigh(weight, quadratics_of(terms, weight, statistics), dampening_frac)

    def weigh(
        self, weight: Array, quadratics: Mapping["Objective", Quadratic], dampening_frac: float = 0.01
    ) -> Problem:
        """`assemble`, from the terms' quadratics."""
        with computing_on(weight):
            fraction, w = check_fraction(dampening_frac), check_weight(weight)
            zero = Deviation(-w)
            terms = [
                normalised(term.name, share, quadratics[term], w, zero) for share, term in self.weighted_terms
            ]
            shared, factors = total_shared(terms, w), total_factors(terms)
            hessian, damping, ridge = damped(shared, factors, fraction, mean_diagonal(shared, factors))
            return damped_problem(weight, w, hessian, terms, damping, ridge)


@dataclass(frozen=True)
class WeightedSum(Objective):
    """A sum of terms; built by `+` and `*`."""

    summands: tuple[tuple[float, Objective], ...]

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:.3g} {term.name}" for weight, term in self.weighted_terms)

    @property
    def weighted_terms(self) -> tuple[tuple[float, Objective], ...]:
        weights: dict[Objective, float] = {}
        for factor, summand in self.summands:
            for weight, term in _summands(summand):
                weights[term] = weights.get(term, 0.0) + factor * weight
        names = [term.name for term in weights]
        if alike := sorted({name for name in names if names.count(name) > 1}):
            raise ArgumentError(
                f"two different terms are called {alike[0]}: make the class a frozen dataclass, whose name has its "
                "parameters and of which equal ones are one term, or define `name`"
            )
        total = sum(weights.values())
        if total <= 0:
            raise ArgumentError("every term of the objective has weight 0: give one a positive weight")
        return tuple((weight / total, term) for term, weight in weights.items() if weight > 0)


@dataclass(frozen=True)
class Reconstruction(Objective):
    """How far the layer's output moves: `||X (V - W)'||^2` over the calibration tokens X (tokens, d)."""

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})
    additive: ClassVar[bool] = True

    def accumulate(self, statistic: Array | None, observation: Observation) -> Array:
        return _add(statistic, observation.gram(self))

    def quadratic(self, statistic: Array, weight: Array) -> Quadratic:
        return Quadratic(shared=check_gram(statistic))


@dataclass(frozen=True)
class Fisher(Objective):
    """Second-order Taylor term of the training loss through the empirical Fisher, one block a row.

    `1/n sum_s sum_i (g_si . (v_i - w_i))^2`, g_s (m, d) the gradient of calibration sample s.

    Source: MOONSHOT (arXiv 2604.13287); WoodFisher (Singh and Alistarh, 2020) for the row blocks.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def accumulate(self, statistic: Array | None, observation: Observation) -> Array:
        gradients = observation.require("gradients", 3, self)
        if statistic is None:
            return gradients
        return namespace(gradients).concat([statistic, gradients], axis=0)

    def quadratic(self, statistic: Array, weight: Array) -> Quadratic:
        n, *shape = statistic.shape
        if tuple(shape) != tuple(weight.shape):
            raise ArgumentError(
                f"gradients must be (n, m, d) with (m, d) = {tuple(weight.shape)}, got {(n, *shape)}"
            )
        return Quadratic(factors=by_row(statistic), coefficient=1 / n)


@dataclass(frozen=True)
class TokenFisher(Objective):
    """Reconstruction with each token weighted by how much the training loss depends on it.

    `sum_t s_t ||(V - W) x_t||^2`, s_t the mean over outputs of the squared output gradient of token t: the
    empirical Fisher with the outputs' gradients taken as isotropic and tokens as independent.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "output_gradients"})
    additive: ClassVar[bool] = True

    def accumulate(self, statistic: Array | None, observation: Observation) -> Array:
        return _add(statistic, observation.gram(self, "output_gradients"))

    def quadratic(self, statistic: Array, weight: Array) -> Quadratic:
        return Quadratic(shared=check_gram(statistic))


def quadratics_of(
    terms: Iterable[Objective], weight: Array, statistics: Iterable[Any]
) -> dict[Objective, Quadratic]:
    """{term: its quadratic} on a layer with this weight (m, d). statistics: one for each term.

    Raises ArgumentError for what is no quadratic of such a layer (assembly.fault_of).
    """
    with computing_on(weight):
        w, quadratics = check_weight(weight), {}
        for term, statistic in zip(terms, statistics, strict=True):
            quadratics[term] = term.quadratic(statistic, w)
            if fault := fault_of(quadratics[term], w.shape):
                raise ArgumentError(f"{term.name}: {fault}")
        return quadratics


def quadratics_of_groups(
    terms: Iterable[Objective], weights: Array, statistics: Iterable[Iterable[Any]]
) -> dict[Objective, Quadratic]:
    """{term: its quadratic} on all rows (groups m, d) of a layer whose groups of outputs read inputs of their own.

    weights: (groups, m, d); statistics: for each group one for each term.

    What the rows of a group share becomes d factors of each, so that one budget can be spread over all groups: meant
    for the few inputs of grouped convolutions.
    """
    terms, rows = list(terms), [check_weight(weight) for weight in weights]
    by_group = [
        quadratics_of(terms, weight, of_group) for weight, of_group in zip(rows, statistics, strict=True)
    ]
    return {term: stacked([group[term] for group in by_group], rows) for term in terms}


def _check_columns(inputs: Array | None, weight: Array) -> None:
    shapes = [tuple(getattr(array, "shape", ())) for array in (inputs, weight)]
    if all(len(shape) == 2 for shape in shapes) and shapes[0][1] != shapes[1][1]:
        raise ArgumentError(f"inputs have {shapes[0][1]} columns, the weight has {shapes[1][1]}")


def _check_weighting(weight: float) -> float:
    check_number("an objective's weight", weight)
    if not (isfinite(weight) and weight >= 0):
        raise ArgumentError(f"an objective's weight must be finite and not negative, got {weight!r}")
    return float(weight)


def _summands(objective: Objective) -> tuple[tuple[float, Objective], ...]:
    """Terms of an objective with their weights as written, not normalised."""
    if not isinstance(objective, WeightedSum):
        try:
            hash(objective)
        except TypeError as error:
            raise ArgumentTypeError(
                f"{type(objective).__name__} cannot be told from other terms: write @dataclass(frozen=True)"
            ) from error
        return ((1.0, objective),)
    return tuple(
        (factor * weight, term) for factor, summand in objective.summands for weight, term in _summands(summand)
    )


def _add(statistic: Array | None, update: Array) -> Array:
    if statistic is not None and statistic.shape != update.shape:
        raise ArgumentError(
            f"a batch has {update.shape[0]} inputs to the layer, the ones before had {statistic.shape[0]}"
        )
    if statistic is None:
        return update
    statistic += update
    return statistic
