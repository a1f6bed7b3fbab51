"""check_objective: does a term keep what the objective promises?"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from moonshot.checks.faults import Faults, Unchanged, is_instance
from moonshot.layer.assembly import fault_of
from moonshot.layer.objectives import OBSERVATIONS, Objective, Observation, Quadratic
from moonshot.layer.problem import Deviation

_M, _D, _TOKENS, _SAMPLES = 3, 6, 40, 8
_ROUNDING = 1e-6
Batch = dict[str, Any]


def check_objective(objective: Objective) -> None:
    """Raise CheckError, with every fault in words, unless each term of an objective keeps its promises.

    `needs` names what a term reads and nothing else. `accumulate` gives
    the same loss q(V) / q(0) whether data come at once, in unequal batches or in another order, and from the same data
    twice over; it does not depend on the units of the training loss or of the inputs. `quadratic` gives finite arrays
    of the right shapes, symmetric and positive semidefinite, the same each time. Neither changes what it
    is given. float32 and torch tensors are taken like float64. Where it is `additive`, statistics add up.

    Raises TypeError for what is no objective.
    """
    is_instance(objective, Objective, "moonshot.Fisher()")
    faults = Faults(objective.name)
    for _, term in objective.weighted_terms:
        _Check(term, faults).all()
    faults.raise_if_any()


class _Check:
    """One term on random observations; `loss` is q(V) / q(0) on a fixed V."""

    def __init__(self, term: Objective, faults: Faults):
        self.term, self.faults = term, faults
        rng = np.random.default_rng(0)
        self.weight, self.other = rng.normal(size=(2, _M, _D))
        self.seen = {
            "inputs": rng.normal(size=(_TOKENS, _D)),
            "output_gradients": rng.normal(size=(_TOKENS, _M)),
            "gradients": rng.normal(size=(_SAMPLES, _M, _D)),
        }

    def all(self) -> None:
        self.terms_are_keys()
        if not self.needs():
            return
        if (loss := self.loss([self.seen], "all data at once")) is None:
            return
        self.depends_on_nothing_but_the_data(loss)
        self.units(loss)
        self.kinds(loss)
        if self.term.additive and self.term.needs != {"gradients"}:
            self.adds_up(loss)

    def terms_are_keys(self) -> None:
        """Equal terms merge in sums, which needs hash and ==."""
        try:
            hash(self.term)
        except TypeError:
            self.faults.add(
                "has no hash, so it cannot be part of a sum: make it a frozen dataclass", "0.5 * term"
            )

    def needs(self) -> bool:
        """Whether it runs on what it says it needs, and is indifferent to the rest."""
        unknown = set(self.term.needs) - set(OBSERVATIONS)
        if unknown or not self.term.needs:
            self.faults.add(f"needs must name some of {OBSERVATIONS}, it is {set(self.term.needs)}", "needs")
            return False
        self.seen, everything = {name: self.seen[name] for name in self.term.needs}, self.seen
        alone = self._attempt([self.seen])
        if isinstance(alone, Exception) and not isinstance(self._attempt([everything]), Exception):
            self.faults.add(
                f"reads an observation that needs does not name: needs is {set(self.term.needs)}", "needs"
            )
            return False
        return True

    def depends_on_nothing_but_the_data(self, loss: float) -> None:
        first, second = ({name: half(value) for name, value in self.seen.items()} for half in (_first, _rest))
        ways: dict[str, list[Batch]] = {
            "is not deterministic: the same data gave another loss": [self.seen],
            "depends on how the data are cut into batches: accumulate must add up sums, not means": [
                first,
                second,
            ],
            "depends on the order of the batches": [second, first],
            "depends on the amount of data: the same data twice over gave another loss, so its parts have "
            "different units": [self.seen, self.seen],
        }
        if "gradients" in self.term.needs and len(self.term.needs) > 1:
            rows = {name: value for name, value in self.seen.items() if name != "gradients"}
            gradients = {"gradients": self.seen["gradients"]}
            alone = (
                "does not take gradients in a call of their own, after the others, as it has them in a model"
            )
            ways[alone] = [rows, gradients]
        for fault, batches in ways.items():
            self.equal(loss, self.loss(batches, "batches"), fault)

    def adds_up(self, loss: float) -> None:
        """Two statistics without gradients, which come last, have a sum that is the statistic of both."""

        def loss_of_sum() -> float:
            gradients = {name: value for name, value in self.seen.items() if name == "gradients"}
            rows = {name: value for name, value in self.seen.items() if name != "gradients"}
            parts = ({name: half(value) for name, value in rows.items()} for half in (_first, _rest))
            total = sum(np.asarray(self.term.accumulate(None, Observation(**part))) for part in parts)
            if gradients:
                total = self.term.accumulate(total, Observation(**gradients))
            quadratic = self.term.quadratic(total, self.weight)
            return self._value(quadratic, self.other) / self._value(quadratic, 0 * self.weight)

        found = self.faults.run("it", "additive", loss_of_sum)
        self.equal(loss, found, "says that it is additive, and the sum of two statistics is not that of both")

    def units(self, loss: float) -> None:
        """Losses and inputs in other units scale some observations, and F(V) / F(0) not at all."""
        scaled = {
            "the training loss": ("output_gradients", "gradients"),
            "the inputs": ("inputs", "gradients"),
        }
        for what, names in scaled.items():
            batch = {name: value * (64.0 if name in names else 1.0) for name, value in self.seen.items()}
            self.equal(
                loss,
                self.loss([batch], "other units"),
                f"depends on the units of {what}: it adds up things of different units; make them two terms, and "
                "constants relative",
            )

    def kinds(self, loss: float) -> None:
        import torch

        kinds = {
            "float32": lambda x: x.astype(np.float32),
            "torch tensors": lambda x: torch.tensor(x, dtype=torch.float32),
        }
        for kind, convert in kinds.items():
            batch = {name: convert(value) for name, value in self.seen.items()}
            self.equal(loss, self.loss([batch], kind), f"gives another loss for {kind}", rounding=1e-3)

    def equal(self, loss: float, other: float | None, fault: str, rounding: float = _ROUNDING) -> None:
        if other is not None and not abs(loss - other) <= rounding * abs(loss):
            self.faults.add(f"{fault} ({other:.6g}, not {loss:.6g})", "q(V) / q(0)")

    def loss(self, batches: Iterable[Batch], where: str) -> float | None:
        """q(V) / q(0), or None, and a fault, where that cannot be had."""
        return self.faults.run("it", where, lambda: self._loss(batches, where))

    def _attempt(self, batches: Iterable[Batch]) -> Exception | None:
        try:
            self._quadratic(batches)
        except Exception as error:
            return error
        return None

    def _quadratic(self, batches: Iterable[Batch]) -> tuple[Any, Quadratic]:
        statistic = None
        for batch in batches:
            statistic = self.term.accumulate(statistic, Observation(**batch))
        return statistic, self.term.quadratic(statistic, self.weight)

    def _loss(self, batches: Iterable[Batch], where: str) -> float | None:
        batches = list(batches)
        before = Unchanged(weight=self.weight, **{k: np.asarray(v) for k, v in batches[0].items()})
        statistic, quadratic = self._quadratic(batches)
        for name in before.changed():
            self.faults.add(f"changes its input: {name} is written to; work on a copy", where)
        if fault := _malformed(quadratic):
            self.faults.add(fault, where)
            return None
        at_zero, here = self._value(quadratic, 0 * self.weight), self._value(quadratic, self.other)
        again = self.term.quadratic(statistic, self.weight)
        if self._value(again, self.other) != here:
            self.faults.add("quadratic changes the statistic: a second call gave another loss", where)
        if not at_zero > 0:
            self.faults.add(
                "the loss of the zero weight is 0 on random data, so there is nothing to compare with", where
            )
            return None
        return here / at_zero

    def _value(self, quadratic: Quadratic, V: np.ndarray) -> float:
        centre = self.weight if quadratic.centre is None else quadratic.centre
        return quadratic.coefficient * Deviation(V - centre).loss(quadratic.shared, quadratic.factors)


def _first(array: np.ndarray) -> np.ndarray:
    return array[: len(array) // 4]


def _rest(array: np.ndarray) -> np.ndarray:
    return array[len(array) // 4 :]


def _malformed(quadratic: Any) -> str | None:
    """What is wrong with a quadratic, in words."""
    if fault := fault_of(quadratic, (_M, _D)):
        return fault
    for name in ("shared", "factors", "centre"):
        array = getattr(quadratic, name)
        if array is not None and not np.isfinite(np.asarray(array)).all():
            return f"{name} of the quadratic holds NaN or infinity"
    if quadratic.shared is not None:
        shared = np.asarray(quadratic.shared, np.float64)
        least = float(np.linalg.eigvalsh((shared + shared.T) / 2)[0])
        if least < -1e-5 * abs(shared).max():
            return f"shared of the quadratic is not positive semidefinite: an eigenvalue is {least:.3g}"
    return None
