"""Every solver that the package names, and which of them a property is true of."""

import pytest

import moonshot.solvers as package
from moonshot.solvers import Solver, Wanda

# Solvers that take arguments, by name; every other solver that the package names is made without any. Swaps has a poor
# start that depends on no order and no unit, so that what it adds is seen.
ARGUMENTS = {"Swaps": lambda solver: solver(Wanda()), "Exact": lambda solver: solver(nodes=2000)}
SOLVERS = {
    name: ARGUMENTS.get(name, lambda solver: solver())(getattr(package, name))
    for name in package.__all__
    if isinstance(getattr(package, name), type) and hasattr(getattr(package, name), "compute")
    if getattr(package, name) is not Solver
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())

TABLES = {}  # {test: names of the solvers that its table has}


def true_of(names, *, seldom_false=(), **reasons):
    """Run a test for the solvers named. Those it is false of, each with the reason, must fail it.

    seldom_false: (name, reason) of those that pass on most layers, so that there is nothing to assert.
    """

    def mark(test):
        TABLES[test.__name__] = sorted([*names.split(), *reasons, *(name for name, _ in seldom_false)])
        true = [pytest.param(SOLVERS[name], id=name) for name in names.split()]
        false = [
            pytest.param(
                SOLVERS[name],
                id=name,
                marks=pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True),
            )
            for name, reason in reasons.items()
        ]
        skipped = [
            pytest.param(SOLVERS[name], id=name, marks=pytest.mark.skip(reason))
            for name, reason in seldom_false
        ]
        return pytest.mark.parametrize("solver", true + false + skipped)(test)

    return mark
