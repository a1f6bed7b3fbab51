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


def true_of(names, **others):
    """Run a test for the solvers named: what it says is promised of them.

    others: every other solver, with the reason why it promises nothing. It may pass all the same.
    """

    def mark(test):
        TABLES[test.__name__] = sorted([*names.split(), *others])
        promising = {name: SOLVERS[name] for name in names.split()}
        return pytest.mark.parametrize("solver", promising.values(), ids=promising.keys())(test)

    return mark
