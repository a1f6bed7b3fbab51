"""Problems that weigh the same terms differently, on one factorisation."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from moonshot.errors import ArgumentError, ArgumentTypeError
from moonshot.layer.assembly import (
    Quadratic,
    check_fraction,
    damped,
    damped_problem,
    mean_diagonal,
    normalised,
    total_factors,
    total_shared,
)
from moonshot.layer.objectives import Objective, Observation, quadratics_of
from moonshot.layer.problem import Deviation, Problem, check_weight
from moonshot.linalg.backend import Array
from moonshot.linalg.weighted import WeightedHessians

_ROUNDING = 1e-9  # how far apart ratios may be that are meant to be equal


def weighting_sweep(
    objectives: Iterable[Objective],
    weight: Array,
    *,
    inputs: Array | None = None,
    gradients: Array | None = None,
    output_gradients: Array | None = None,
    dampening_frac: float = 0.01,
) -> Iterator[Problem]:
    """The pruning problems of one layer, one for each objective, on factorisations that all have in common.

        F(V) = sum_t weight_t q_t(V) / q_t(0) + a delta ||V - W||^2

    a is the weight of the terms that rows share, such as Reconstruction. delta is dampening_frac times the mean
    diagonal of these terms alone, in the ratio in which they stand; where `Objective.problem` takes that of all terms.
    With it the shared matrices of all problems are the same up to a.

    objectives: with different weights on the same terms, as `(1 - b) * Reconstruction() + b * Fisher()` for many b.
    weight, inputs, gradients, output_gradients: see `Objective.problem`.
    dampening_frac: the ridge, as a fraction of the mean diagonal of the terms that rows share.

    Terms that rows share must keep their ratio along the sweep, and so must terms with factors. Every objective needs
    a shared term. Every problem has all terms, so that `Result.terms` has those of weight 0 too. Problems are made one
    at a time, as they are asked for. Raises ValueError where the objectives have no factorisation in common,
    NotPositiveDefiniteError as `Objective.assemble` does.
    """
    weightings = _weightings(objectives)
    terms = list(dict.fromkeys(term for weighting in weightings for term in weighting))
    observation = Observation(inputs, output_gradients, gradients)
    statistics = [term.accumulate(None, observation) for term in terms]
    return _on_one_factorisation(weightings, weight, quadratics_of(terms, weight, statistics), dampening_frac)


def weighting_sweeps(
    objectives: Iterable[Objective],
    weight: Array,
    quadratics: Mapping[Objective, Quadratic],
    dampening_frac: float = 0.01,
) -> Iterator[Problem]:
    """The pruning problems of any objectives, one for each, where neighbours that can share a factorisation do.

    quadratics: of all terms (objectives.quadratics_of). An objective that shares nothing with its neighbours has the
    ridge of `Objective.assemble`.
    """
    for run in _runs(objectives, quadratics):
        if len(run) == 1:
            yield run[0].weigh(weight, quadratics, dampening_frac)
        else:
            weightings = _weightings(run)
            seen = {term: q for term, q in quadratics.items() if any(term in each for each in weightings)}
            yield from _on_one_factorisation(weightings, weight, seen, dampening_frac)


def _runs(
    objectives: Iterable[Objective], quadratics: Mapping[Objective, Quadratic]
) -> Iterator[list[Objective]]:
    """The objectives, neighbours with a factorisation in common together."""
    run: list[Objective] = []
    for objective in objectives:
        try:
            _in_common(_weightings([*run, objective]), quadratics)
        except ValueError:
            if run:
                yield run
            run = []
        run.append(objective)
    if run:
        yield run


def _on_one_factorisation(
    weightings: list[dict[Objective, float]],
    weight: Array,
    quadratics: Mapping[Objective, Quadratic],
    dampening_frac: float,
) -> Iterator[Problem]:
    """The problems of a weighting sweep. quadratics: of its terms, and no others."""
    fraction, w = check_fraction(dampening_frac), check_weight(weight)
    ratio, factor_ratio = _in_common(weightings, quadratics)
    zero = Deviation(-w)
    terms = {
        term: normalised(term.name, factor_ratio.get(term, 1.0), q, w, zero) for term, q in quadratics.items()
    }
    shared = total_shared([replace(terms[term], weight=part) for term, part in ratio.items()], w)
    factors = total_factors([terms[term] for term in factor_ratio])
    hessian, damping, ridge = damped(shared, factors, fraction, mean_diagonal(shared, None))
    hessians = WeightedHessians(hessian)

    def problems() -> Iterator[Problem]:
        for weighting in weightings:
            a = sum(weighting.get(term, 0.0) for term in ratio)
            b = sum(weighting.get(term, 0.0) for term in factor_ratio)
            weighted = [replace(terms[term], weight=weighting.get(term, 0.0)) for term in terms]
            yield damped_problem(weight, w, hessians.weighted(a, b), weighted, damping, a * ridge)

    return problems()


def _in_common(
    weightings: list[dict[Objective, float]], quadratics: Mapping[Objective, Quadratic]
) -> tuple[dict[Objective, float], dict[Objective, float]]:
    """The ratio of the terms with a shared matrix and that of the terms with factors, which all weightings agree on.

    Raises ValueError where they do not, or where one has no shared matrix.
    """
    with_shared = [term for term, quadratic in quadratics.items() if quadratic.shared is not None]
    with_factors = [term for term, quadratic in quadratics.items() if quadratic.factors is not None]
    ratio, factor_ratio = _ratio(weightings, with_shared), _ratio(weightings, with_factors)
    for weighting in weightings:
        if not any(term in weighting for term in with_shared):
            raise ArgumentError(
                f"{' + '.join(term.name for term in weighting)} alone has no matrix that rows share to factor: give "
                "Reconstruction a small weight, or make its problem with objective.problem(...)"
            )
    return ratio, factor_ratio


def _weightings(objectives: Iterable[Objective]) -> list[dict[Objective, float]]:
    """The normalised weights of the terms of each objective."""
    if isinstance(objectives, Objective) or not isinstance(objectives, Iterable):
        raise ArgumentTypeError("a weighting sweep is made of several objectives: pass a list of them")
    weightings = []
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise ArgumentTypeError(
                "a weighting sweep is made of objectives such as 0.5 * Reconstruction() + 0.5 * Fisher(), got "
                f"{objective!r}"
            )
        weightings.append({term: share for share, term in objective.weighted_terms})
    if not weightings:
        raise ArgumentError("a weighting sweep needs at least one objective, the list is empty")
    return weightings


def _ratio(weightings: list[dict[Objective, float]], terms: list[Objective]) -> dict[Objective, float]:
    """The weights of `terms` relative to their sum, which every weighting that has any of them must agree on."""
    ratio: dict[Objective, float] = {}
    for weighting in weightings:
        total = sum(weighting.get(term, 0.0) for term in terms)
        if total == 0:
            continue
        here = {term: weighting.get(term, 0.0) / total for term in terms}
        ratio = ratio or here
        if any(abs(here[term] - ratio[term]) > _ROUNDING for term in terms):
            raise ArgumentError(
                f"the ratio of {' to '.join(term.name for term in terms)} changes along the sweep, and with it the "
                "factorisation: call weighting_sweep once for each ratio"
            )
    return ratio
