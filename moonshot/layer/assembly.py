"""From the quadratics of an objective's terms to the damped problem of a layer."""

from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any

from moonshot.errors import ArgumentError, check_number
from moonshot.layer.problem import Deviation, Problem, Term
from moonshot.linalg.backend import Array, as_dtype, eye_like, namespace, native
from moonshot.linalg.factor import NotPositiveDefiniteError, eigenbasis
from moonshot.linalg.hessian import RowHessian, asymmetry
from moonshot.linalg.lowrank import by_factor, by_row, squared_norm

_DAMPING_STEPS = 6
_LEAST = 1e-300  # of a term's loss at zero, and one over the largest
_ROUNDING = 1e-5  # relative to the largest entry of a shared matrix


@dataclass(frozen=True)
class Quadratic:
    """A term on one layer: `coefficient * sum_i (v_i - c_i)' (shared + F_i F_i') (v_i - c_i)`.

    shared: (d, d) or None.
    factors: (m, d, n), F_i of every row i, or None.
    centre: (m, d), c; None for the weight itself.
    coefficient: of the whole form, which saves a scaled copy.
    """

    shared: Array | None = None
    factors: Array | None = None
    centre: Array | None = None
    coefficient: float = 1.0


def check_fraction(dampening_frac: float) -> float:
    check_number("dampening_frac", dampening_frac)
    if not 0 <= dampening_frac < inf:
        raise ArgumentError(f"dampening_frac must be a number of 0 or more, got {dampening_frac!r}")
    return float(dampening_frac)


def fault_of(quadratic: Any, shape: tuple[int, int]) -> str | None:
    """What is wrong with what a term gives as its quadratic for a layer of this shape (m, d), in words, or None.

    Nothing that takes longer than a look at every entry of the shared matrix is looked at.
    """
    if not isinstance(quadratic, Quadratic):
        return f"quadratic must return a moonshot.Quadratic, it returns {type(quadratic).__name__}"
    m, d = shape
    if quadratic.shared is None and quadratic.factors is None:
        return "quadratic gives neither a shared matrix nor factors: does accumulate return the statistic?"
    if not (quadratic.coefficient >= 0 and isfinite(quadratic.coefficient)):
        return f"coefficient of the quadratic must be finite and not negative, it is {quadratic.coefficient}"
    for name, expected in {"shared": (d, d), "factors": (m, d, None), "centre": (m, d)}.items():
        array = getattr(quadratic, name)
        found = expected if array is None else tuple(getattr(array, "shape", ()))
        if len(found) != len(expected) or any(n not in (None, k) for n, k in zip(expected, found, strict=True)):
            letters = {"shared": "(d, d)", "factors": "(m, d, n)", "centre": "(m, d)"}[name]
            return f"{name} of the quadratic must be {letters} with m = {m}, d = {d}; it is {found}"
    return None if quadratic.shared is None else _fault_of_shared(native(quadratic.shared, "shared"))


def _fault_of_shared(shared: Array) -> str | None:
    xp = namespace(shared)
    diagonal = xp.linalg.diagonal(shared)
    least, rounding = float(xp.min(diagonal)), _ROUNDING * float(xp.max(abs(diagonal)))
    if least < -rounding:
        return f"shared of the quadratic is not positive semidefinite: {least:.3g} is on its diagonal"
    if asymmetry(shared) > rounding:
        return "shared of the quadratic is not symmetric"
    return None


def normalised(name: str, share: float, quadratic: Quadratic, weight: Array, zero: Deviation) -> Term:
    """The term in units of its own loss at zero; its factors carry sqrt(share / q(0)) from here on.

    zero: how far zero is from the weight. Raises ArgumentError where that loss is beyond the range of numbers.
    """
    shared, factors = quadratic.shared, quadratic.factors
    centre = weight
    if quadratic.centre is not None:
        centre = native(quadratic.centre, "centre")
        zero = Deviation(-centre)
    at_zero = max(zero.loss(shared, factors), 0.0)
    if at_zero and not _LEAST < at_zero < 1 / _LEAST:
        raise ArgumentError(
            f"{name} of the zero weight is {at_zero:.3g}, too near the limits of float64: scale the weight, or what "
            "was seen of the layer, nearer to one"
        )
    scale = 1 / at_zero if at_zero > 0 else 0.0  # a term that is zero everywhere says nothing
    at_zero *= quadratic.coefficient
    if factors is not None:
        factors = by_row(by_factor(factors) * sqrt(share * scale))
        return Term(name, share, 1.0 / share, _scaled(shared, share * scale), factors, centre, at_zero)
    return Term(name, share, scale, shared, None, centre, at_zero)


def stacked(quadratics: list[Quadratic], weights: list[Array]) -> Quadratic:
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


def total_shared(terms: list[Term], weight: Array) -> Array:
    d = weight.shape[1]
    total = as_dtype(eye_like(weight, d) * 0, "float64")
    for term in terms:
        if term.shared is not None:
            total = total + as_dtype(term.shared, "float64") * (term.weight * term.coefficient)
    return total


def total_factors(terms: list[Term]) -> Array | None:
    factors = [term.factors for term in terms if term.factors is not None]
    if len(factors) < 2:
        return factors[0] if factors else None
    return by_row(namespace(factors[0]).concat(list(map(by_factor, factors)), axis=0))


def mean_diagonal(shared: Array, factors: Array | None) -> float:
    """Of the H_i of all rows."""
    xp = namespace(shared)
    mean = float(xp.mean(xp.linalg.diagonal(shared)))
    if factors is not None:
        mean += squared_norm(by_factor(factors)) / (factors.shape[0] * shared.shape[0])
    return mean


def damped(
    shared: Array, factors: Array | None, fraction: float, unit: float
) -> tuple[RowHessian, float, float]:
    """(Hessian with the ridge added, fraction used, ridge). unit: the ridge for a fraction of one.

    Where the shared matrix is numerically indefinite with that ridge, it is raised tenfold up to six times. Raises
    NotPositiveDefiniteError if that does not help.
    """
    d = shared.shape[0]
    if unit <= 0:  # nothing was seen of this layer: all weights matter alike
        unit, fraction = 1.0, 1.0
    for _ in range(_DAMPING_STEPS + 1):
        ridge = fraction * unit
        hessian = RowHessian((shared + shared.T) / 2 + ridge * eye_like(shared, d), factors)
        try:
            hessian.inverse_factor  # noqa: B018 - computed here, used by the solvers
            return hessian, fraction, ridge
        except NotPositiveDefiniteError as error:
            failure = error
            fraction = 10 * fraction if fraction else 1e-8
    raise failure


def damped_problem(
    weight: Array, w: Array, hessian: RowHessian, terms: list[Term], damping: float, ridge: float
) -> Problem:
    """The problem of terms whose Hessians, with a ridge about w, add up to `hessian`. w: the weight, checked."""
    if all(term.centre is w for term in terms):
        return Problem(weight, hessian, centre=w, terms=tuple(terms), damping=damping, ridge=ridge)
    centre, constant = _common_centre(terms, hessian, w, ridge)
    return Problem(
        weight,
        hessian,
        centre=centre,
        constant=constant,
        terms=tuple(terms),
        damping=damping,
        ridge=ridge,
    )


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
