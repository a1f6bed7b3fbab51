"""Where the time of a sweep by `ms.solve` goes, in processor time of one thread, beside SparseGPT in plain torch.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python -m benchmarks.sweep_parts [--size 2048]

Other processes hardly move that time, so that it can be measured beside them. With `MALLOC_MMAP_THRESHOLD_` and
`MALLOC_TRIM_THRESHOLD_` of some GB, memory that is given back stays with the process for the next run.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import moonshot as ms

from .solvers.benchmark_utils.references import torch_sparsegpt
from .speed.layers import random_layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    layer = random_layer(arguments.size, arguments.size, arguments.factors)
    weight, hessian = layer.tensors()
    pattern, solver = ms.NM(2, 4), ms.SparseGPT()
    times: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = run()
        times.setdefault(name, []).append(time.process_time() - start)
        return result

    for _ in range(arguments.runs + 1):  # the first to warm up
        timed("torch", lambda: torch_sparsegpt(weight, hessian))
        for kind, problem_of in (("single", layer.single), ("joint", layer.joint)):
            timed(kind, lambda make=problem_of: ms.solve(make(), pattern, solver))
            problem = timed(f"{kind}: problem", problem_of)
            state = timed(f"{kind}: init", lambda p=problem: solver.init(p))
            answer = timed(f"{kind}: compute", lambda s=state: solver.compute(s, pattern))
            timed(f"{kind}: grades", lambda p=problem, a=answer: p.graded(a.weight))
    for name, seconds in times.items():
        print(f"{name:16} {median(seconds[1:]):.3f} s")
    for one, other in (("single", "torch"), ("joint", "single")):
        ratios = sorted(a / b for a, b in zip(times[one][1:], times[other][1:], strict=True))
        print(f"{one} / {other}: {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
