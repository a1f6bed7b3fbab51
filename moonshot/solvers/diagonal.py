"""Magnitude and Wanda: one score a weight, no compensation of the weights that stay."""

from dataclasses import dataclass

from moonshot.layer.patterns import Pattern
from moonshot.layer.problem import Problem
from moonshot.linalg.backend import Array, as_dtype, namespace, native, squares
from moonshot.solvers.base import Answer


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest `w^2`. The baseline that looks at no data."""

    name = "magnitude"

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return None

    def row_work(self, columns: int, factors: int) -> float:
        return columns

    def init(self, problem: Problem) -> tuple[Array, Array]:
        return problem.centre, squares(problem.centre)

    def compute(self, state: tuple[Array, Array], pattern: Pattern) -> Answer:
        return _keep_best(*state, pattern)


@dataclass(frozen=True)
class Wanda:
    """Keep the largest `|w_ij| sqrt(H_i,jj)`; on reconstruction alone, `|w|` times the norm of its input.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models
    (arXiv 2306.11695), with the diagonal of the joint Hessian in place of X'X. The paper compares
    within rows: Unstructured(..., scope="row"). Nothing is promised beyond the score: where inputs differ much in size
    and repeat one another, Magnitude can be better.
    """

    name = "Wanda"

    def unsupported(self, problem: Problem, pattern: Pattern) -> str | None:
        return None

    def row_work(self, columns: int, factors: int) -> float:
        return columns

    def init(self, problem: Problem) -> tuple[Array, Array]:
        xp = namespace(problem.centre)
        scale = as_dtype(xp.sqrt(native(problem.hessian.diagonal())), problem.dtype)
        return problem.centre, squares(problem.centre * scale)

    def compute(self, state: tuple[Array, Array], pattern: Pattern) -> Answer:
        return _keep_best(*state, pattern)


def _keep_best(weight: Array, scores: Array, pattern: Pattern) -> Answer:
    mask = pattern.keep(scores)
    return Answer(namespace(weight).where(mask, weight, namespace(weight).zeros_like(weight)), mask)
