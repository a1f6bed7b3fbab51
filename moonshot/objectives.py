"""Objectives: what a layer's pruning is judged by, as weighted sums of quadratic terms.

A term says which observations of a layer it needs, how they add up over calibration batches to a
statistic, and what quadratic that statistic is. `0.7 * Reconstruction() + 0.3 * Fisher()` is an objective;
so is each term alone. A new term is one subclass of `Objective` (docs/extending.md has an example).
"""

from dataclasses import dataclass
from math import isfinite, sqrt
from numbers import Real
from typing import Any, ClassVar

from moonshot.linalg.backend import Array, all_finite, as_dtype, eye_like, namespace, native
from moonshot.linalg.factor import NotPositiveDefiniteError, eigenbasis
from moonshot.linalg.hessian import RowHessian
from moonshot.problem import Problem, Term, check_weight, quadratic_loss

OBSERVATIONS = ("inputs", "output_gradients", "gradients")
_DAMPING_STEPS = 6


@dataclass(frozen=True)
class Observation:
    """What was seen of a layer in one batch. Token k of `inputs` is token k of `output_gradients`.

    inputs: (tokens, d); output_gradients: (tokens, m), of the training loss;
    gradients: (n, m, d), of the loss with respect to the weight, one for each calibration sample.
    """

    inputs: Array | None = None
    output_gradients: Array | None = None
    gradients: Array | None = None

    def require(self, name: str, dimensions: int, term: "Objective") -> Array:
        """One observation as it is computed on, checked; ValueError where it is missing or unusable."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{term.name} needs {name}: pass {name}=...")
        array = native(value, name)
        if array.ndim != dimensions:
            raise ValueError(f"{name} must have {dimensions} dimensions, got {tuple(array.shape)}")
        if array.shape[0] == 0:
            raise ValueError(f"{name} is empty: give more calibration data")
        if not all_finite(array):
            raise ValueError(f"{name} holds NaN or infinity: look at the calibration data and model")
        return array


@dataclass(frozen=True)
class Quadratic:
    """A term on one layer: `coefficient * sum_i (v_i - c_i)' (shared + F_i F_i') (v_i - c_i)`.

    shared: (d, d) or None; factors F: (m, d, n) or None; centre c: (m, d), None for the weight itself.
    coefficient: of the whole form, which saves a scaled copy.
    """

    shared: Array | None = None
    factors: Array | None = None
    centre: Array | None = None
    coefficient: float = 1.0


class Objective:
    """A non-negative weighted sum of terms. A subclass with `accumulate` and `quadratic` is a term itself.

    needs: the observations that a term reads, out of OBSERVATIONS.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def weighted_terms(self) -> "tuple[tuple[float, Objective], ...]":
        """(weight, term) of every term with a positive weight; the weights sum to 1."""
        return ((1.0, self),)

    def accumulate(self, statistic: Any, observation: Observation) -> Any:
        """The statistic after one more batch; `statistic` is None at the first."""
        raise TypeError(f"{self.name} is no term: it must define accumulate and quadratic")

    def quadratic(self, statistic: Any, weight: Array) -> Quadratic:
        """The term's quadratic for a layer with this weight (m, d)."""
        raise TypeError(f"{self.name} is no term: it must define accumulate and quadratic")

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

        weight: (m, d); inputs: (tokens, d); gradients: (n, m, d); output_gradients: (tokens, m), each only
        where a term needs it. dampening_frac: the ridge, as a fraction of the Hessians' mean diagonal.
        """
        observation = Observation(inputs, output_gradients, gradients)
        statistics = [term.accumulate(None, observation) for _, term in self.weighted_terms]
        return self.assemble(weight, statistics, dampening_frac=dampening_frac)

    def assemble(self, weight: Array, statistics: list[Any], *, dampening_frac: float = 0.01) -> Problem:
        """The pruning problem of one layer from one statistic for each of `weighted_terms`.

            F(V) = sum_t weight_t q_t(V) / q_t(0) + delta ||V - W||^2

        delta is dampening_frac times the mean diagonal of the undamped Hessians. Where that leaves the
        shared matrix numerically indefinite, delta is raised tenfold up to six times; `problem.damping` is
        the fraction used. Raises NotPositiveDefiniteError if that does not help.
        """
        w = check_weight(weight)
        quadratics = [
            term.quadratic(statistic, w)
            for (_, term), statistic in zip(self.weighted_terms, statistics, strict=True)
        ]
        return self._from_quadratics(weight, quadratics, dampening_frac)

    def assemble_groups(
        self, weights: Array, statistics: list[list[Any]], *, dampening_frac: float = 0.01
    ) -> Problem:
        """One pruning problem (groups m, d) of a layer whose groups of outputs read inputs of their own.

        weights: (groups, m, d); statistics: for each group one for each of `weighted_terms`, as `assemble` takes them.

        What the rows of a group share becomes d factors of each, so that one budget can be spread over all
        groups: meant for the few inputs of grouped convolutions. See `assemble` for damping and errors.
        """
        groups, m, d = weights.shape
        weight = weights.reshape(groups * m, d)
        w = check_weight(weight)
        rows = [w[g * m : (g + 1) * m] for g in range(groups)]
        quadratics = [
            _stacked(
                [term.quadratic(of_group[k], part) for of_group, part in zip(statistics, rows, strict=True)],
                rows,
            )
            for k, (_, term) in enumerate(self.weighted_terms)
        ]
        return self._from_quadratics(weight, quadratics, dampening_frac)

    def _from_quadratics(self, weight: Array, quadratics: list[Quadratic], dampening_frac: float) -> Problem:
        if not (isinstance(dampening_frac, Real) and isfinite(dampening_frac) and dampening_frac >= 0):
            raise ValueError(f"dampening_frac must be a number of 0 or more, got {dampening_frac!r}")
        w = check_weight(weight)
        terms = [
            _normalised(term, share, quadratic, w)
            for (share, term), quadratic in zip(self.weighted_terms, quadratics, strict=True)
        ]
        shared, factors = _total_shared(terms, w), _total_factors(terms)
        hessian, damping, ridge = _damped(shared, factors, float(dampening_frac))
        if all(term.centre is w for term in terms):
            return Problem(weight, hessian, terms=tuple(terms), damping=damping)
        centre, constant = _common_centre(terms, hessian, w, ridge)
        return Problem(weight, hessian, centre=centre, constant=constant, terms=tuple(terms), damping=damping)


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
        total = sum(weights.values())
        if total <= 0:
            raise ValueError("every term of the objective has weight 0: give one a positive weight")
        return tuple((weight / total, term) for term, weight in weights.items() if weight > 0)


@dataclass(frozen=True)
class Reconstruction(Objective):
    """How far the layer's output moves: `||X (V - W)'||^2` over the calibration tokens X (tokens, d)."""

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def accumulate(self, statistic: Array | None, observation: Observation) -> Array:
        return _add(statistic, _gram(observation.require("inputs", 2, self)))

    def quadratic(self, statistic: Array, weight: Array) -> Quadratic:
        return Quadratic(shared=statistic)


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
            raise ValueError(
                f"gradients must be (n, m, d) with (m, d) = {tuple(weight.shape)}, got {(n, *shape)}"
            )
        by_row = namespace(statistic).permute_dims(statistic, (1, 2, 0))
        return Quadratic(factors=by_row, coefficient=1 / n)


@dataclass(frozen=True)
class TokenFisher(Objective):
    """Reconstruction with each token weighted by how much the training loss depends on it.

    `sum_t s_t ||(V - W) x_t||^2`, s_t the mean over outputs of the squared output gradient of token t: the
    empirical Fisher with the outputs' gradients taken as isotropic and tokens as independent.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "output_gradients"})

    def accumulate(self, statistic: Array | None, observation: Observation) -> Array:
        inputs = observation.require("inputs", 2, self)
        gradients = observation.require("output_gradients", 2, self)
        if len(inputs) != len(gradients):
            raise ValueError(
                f"inputs have {len(inputs)} tokens, output_gradients {len(gradients)}: they must agree"
            )
        xp = namespace(inputs)
        importance = xp.sqrt(xp.mean(gradients**2, axis=1))
        return _add(statistic, _gram(inputs * importance[:, None]))

    def quadratic(self, statistic: Array, weight: Array) -> Quadratic:
        return Quadratic(shared=statistic)


def _check_weighting(weight: float) -> float:
    if not isinstance(weight, Real) or isinstance(weight, bool):
        raise TypeError(f"an objective's weight must be a number, got {weight!r}")
    if not (isfinite(weight) and weight >= 0):
        raise ValueError(f"an objective's weight must be finite and not negative, got {weight!r}")
    return float(weight)


def _summands(objective: Objective) -> tuple[tuple[float, Objective], ...]:
    """Terms of an objective with their weights as written, not normalised."""
    if not isinstance(objective, WeightedSum):
        return ((1.0, objective),)
    return tuple(
        (factor * weight, term) for factor, summand in objective.summands for weight, term in _summands(summand)
    )


def _gram(x: Array) -> Array:
    return as_dtype(x.T @ x, "float64")  # NumPy computes one triangle


def _add(statistic: Array | None, update: Array) -> Array:
    if statistic is not None and statistic.shape != update.shape:
        raise ValueError(
            f"a batch has {update.shape[0]} inputs to the layer, the ones before had {statistic.shape[0]}"
        )
    return update if statistic is None else statistic + update


def _normalised(term: Objective, share: float, quadratic: Quadratic, weight: Array) -> Term:
    """The term in units of its own loss at zero; its factors carry sqrt(share / q(0)) from here on."""
    m, d = weight.shape
    shared, factors = quadratic.shared, quadratic.factors
    if shared is not None and tuple(shared.shape) != (d, d):
        raise ValueError(f"{term.name}: inputs have {shared.shape[0]} columns, the weight has {d}")
    if factors is not None and tuple(factors.shape[:2]) != (m, d):
        raise ValueError(f"{term.name}: factors must be (m, d, n) with (m, d) = {(m, d)}")
    centre = weight if quadratic.centre is None else native(quadratic.centre, "centre")
    at_zero = quadratic_loss(-centre, shared, factors)
    scale = 1 / at_zero if at_zero > 0 else 0.0  # a term that is zero everywhere says nothing
    at_zero *= quadratic.coefficient
    if factors is not None:
        factors = factors * sqrt(share * scale)
        return Term(term.name, share, 1.0 / share, _scaled(shared, share * scale), factors, centre, at_zero)
    return Term(term.name, share, scale, shared, None, centre, at_zero)


def _stacked(quadratics: list[Quadratic], weights: list[Array]) -> Quadratic:
    """Quadratics of several groups of rows as one, each group's shared matrix as a root among its rows' factors."""
    xp, (m, d) = namespace(weights[0]), weights[0].shape
    by_group = []
    for quadratic in quadratics:
        scale = sqrt(quadratic.coefficient)
        parts = [] if quadratic.factors is None else [as_dtype(quadratic.factors, "float64") * scale]
        if quadratic.shared is not None:
            values, vectors = eigenbasis(quadratic.shared)
            root = vectors * (xp.sqrt(xp.clip(values, 0, None)) * scale)
            parts.append(xp.broadcast_to(root[None], (m, d, d)))
        by_group.append(xp.concat(parts, axis=2))
    if all(quadratic.centre is None for quadratic in quadratics):
        return Quadratic(factors=xp.concat(by_group, axis=0))
    centres = [
        w if q.centre is None else native(q.centre, "centre") for q, w in zip(quadratics, weights, strict=True)
    ]
    return Quadratic(factors=xp.concat(by_group, axis=0), centre=xp.concat(centres, axis=0))


def _scaled(array: Array | None, scale: float) -> Array | None:
    return None if array is None else array * scale


def _total_shared(terms: list[Term], weight: Array) -> Array:
    d = weight.shape[1]
    total = as_dtype(eye_like(weight, d) * 0, "float64")
    for term in terms:
        if term.shared is not None:
            total = total + as_dtype(term.shared, "float64") * (term.weight * term.coefficient)
    return total


def _total_factors(terms: list[Term]) -> Array | None:
    factors = [term.factors for term in terms if term.factors is not None]
    if len(factors) < 2:
        return factors[0] if factors else None
    return namespace(factors[0]).concat(factors, axis=2)


def _damped(shared: Array, factors: Array | None, fraction: float) -> tuple[RowHessian, float, float]:
    """(Hessian with the ridge added, fraction used, ridge)."""
    xp = namespace(shared)
    d = shared.shape[0]
    mean_diagonal = float(xp.mean(xp.linalg.diagonal(shared)))
    if factors is not None:
        mean_diagonal += float(xp.sum(factors**2)) / (factors.shape[0] * d)
    if mean_diagonal <= 0:  # nothing was seen of this layer: all weights matter alike
        mean_diagonal, fraction = 1.0, 1.0
    for _ in range(_DAMPING_STEPS + 1):
        ridge = fraction * mean_diagonal
        hessian = RowHessian((shared + shared.T) / 2 + ridge * eye_like(shared, d), factors)
        try:
            hessian.inverse_factor  # noqa: B018 - computed here, used by the solvers
            return hessian, fraction, ridge
        except NotPositiveDefiniteError as error:
            failure = error
            fraction = 10 * fraction if fraction else 1e-8
    raise failure


def _common_centre(terms: list[Term], hessian: RowHessian, weight: Array, ridge: float) -> tuple[Array, float]:
    """Minimiser and minimum of terms with different centres, the ridge centred on the weight.

    With q_t(x) = (x - c_t)' H_t (x - c_t) the sum is (x - c)' H (x - c) + const,
    H c = sum_t H_t c_t + delta w and const = sum_t q_t(c) + delta ||c - w||^2.
    """
    xp = namespace(weight)
    w = as_dtype(weight, "float64")
    pull = ridge * w
    for term in terms:
        centre = as_dtype(term.centre, "float64")
        scale = term.weight * term.coefficient
        if term.shared is not None:
            pull = pull + scale * (centre @ as_dtype(term.shared, "float64"))
        if term.factors is not None:
            for k in range(term.factors.shape[2]):
                u = as_dtype(term.factors[:, :, k], "float64")
                pull = pull + scale * u * xp.sum(u * centre, axis=1)[:, None]
    centre = hessian.solve(pull)
    constant = sum(term.weight * term.loss(centre) for term in terms)
    return centre, constant + ridge * float(xp.sum((centre - w) ** 2))
