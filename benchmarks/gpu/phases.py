"""Where the time of `prune` goes on a GPU: each phase is timed apart, with the device waited for before and after.

    python -m benchmarks.gpu.phases [--solver SparseGPT] [--widths "1B's widths"] [--blocks 8] [--samples 32]
                                    [--length 1024] [--device cuda]

The sum is more than the time without, in which the GPU works while Python goes on.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce, wraps
from importlib import import_module
from typing import Any

import moonshot as ms
import torch

from .models import WIDTHS, llama, tokens

PHASES = {  # by module: functions, or methods of a class
    "moonshot.pruning.prune": ["partition_model", "zeros"],
    "moonshot.models.chain": ["block_gradients", "ChainReplay.observe", "ChainReplay.advance"],
    "moonshot.models.blocks": ["Chain.enter", "Chain.leave"],
    "moonshot.models.statistics": ["LayerStatistics.observe", "LayerStatistics._add_gradients"],
    "moonshot.pruning.calibration_pass": ["CalibrationPass.problems"],
    "moonshot.layer.objectives": ["normalised", "mean_diagonal", "damped"],
    "moonshot.layer.problem": ["Problem.graded"],
    "moonshot.linalg.hessian": ["RowHessian._take", "RowHessian.half_product", "RowHessian.shifted_inverse"],
    "moonshot.linalg.scaled": ["ScaledQuadratic.refit"],
    "moonshot.linalg.shifted": ["ShiftedInverse.solve"],
    "moonshot.solvers.base": ["check_answer"],
    "moonshot.pruning.refit": ["PartFit.run"],
}


class Clock:
    """Seconds of each phase without those of phases inside of it, and how often it came.

    wait: waits for the device, if there is one to wait for.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.seconds: Counter[str] = Counter()
        self.times: Counter[str] = Counter()
        self._wait, self._inside = wait, [0.0]  # what phases inside of each running one took

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            self._wait()
            took = time.perf_counter() - begin
            self.seconds[name] += took - self._inside.pop()
            self.times[name] += 1
            self._inside[-1] += took

    def watch(self, owner: Any, name: str) -> str:
        """Time a function of a module or a method of a class from now on; returns the name of its phase."""
        function, named = getattr(owner, name), f"{getattr(owner, '__name__', '').split('.')[-1]}.{name}"

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.phase(named):
                return function(*arguments, **options)

        setattr(owner, name, timed)
        return named


def owner_of(path: str, name: str) -> tuple[Any, str]:
    """The module, or the class in it, that has a function, and what it is called there."""
    *owners, last = name.split(".")
    return reduce(getattr, owners, import_module(path)), last


def watch_all(
    clock: Clock, functions: Mapping[str, Iterable[str]], solver: ms.Solver | None = None
) -> list[str]:
    """Time functions by module, and what a solver does; returns the names of the phases."""
    found = [clock.watch(*owner_of(path, name)) for path, names in functions.items() for name in names]
    return found + [clock.watch(type(solver), name) for name in ("init", "compute") if solver is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--solver", default="SparseGPT", choices=["SparseGPT", "ADMM", "IHT", "OBS"])
    parser.add_argument("--widths", default="1B's widths", choices=list(WIDTHS))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    solver = getattr(ms, arguments.solver)()
    data = tokens(arguments.widths, arguments.samples, arguments.length)
    ms.prune(llama(arguments.widths, 1, arguments.device), data[:4], "2:4", solver=solver)  # compiles kernels
    model = llama(arguments.widths, arguments.blocks, arguments.device)
    clock = Clock(torch.cuda.synchronize) if arguments.device.startswith("cuda") else Clock()
    watch_all(clock, PHASES, solver)
    with clock.phase("all else"):
        ms.prune(model, data, "2:4", solver=solver)
    print(f"{sum(clock.seconds.values()):9.3f} s in all")
    for name, seconds in clock.seconds.most_common():
        print(f"{seconds:9.3f} s {clock.times[name]:7d} x  {name}")


if __name__ == "__main__":
    main()
