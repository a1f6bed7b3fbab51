"""Kernels on two threads, and called by two at once: the same answers, bit for bit.

Other tests run with one thread in each process, so these have a process of their own. And OpenBLAS's threads, which
sleep as soon as they have nothing to do.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numba
import numpy as np
import pytest

from moonshot.bounds.certificate import lower_bound
from moonshot.layer.patterns import NM, Unstructured
from moonshot.linalg.kernels import kernel
from moonshot.solvers import solve
from strategies import random_layer
from tests.every_solver import SOLVERS
from tests.processes import new_process

ROWS = 200  # two tiles of 96 and part of a third
FEW_ROWS = 7  # where every row is a search of its own
PATTERNS = [Unstructured(0.6), Unstructured(0.6, "row"), NM(2, 4)]


@pytest.fixture(scope="module")
def elsewhere():
    """Call a function of this module in a process whose kernels have two threads."""
    with new_process(threads=2) as call:
        yield call


def which_threads():
    """The thread of each of ten iterations of a kernel's loop over rows."""

    @kernel
    def numbered(out):
        for i in numba.prange(len(out)):
            out[i] = numba.get_thread_id()

    out = np.full(10, -1)
    numbered(out)
    return out.tolist()


def test_the_loops_of_a_kernel_are_shared_by_two_threads(elsewhere):
    assert sorted(elsewhere(which_threads)) == [0] * 5 + [1] * 5


def answers(name):
    """What a solver returns, or a lower bound, for a shared Hessian, one with factors, and every kind of pattern."""
    rows, found = FEW_ROWS if name in ("Exact", "lower_bound") else ROWS, []
    for n, dtype in [(0, "float32"), (5, "float64")]:
        layer = random_layer(n, rows, 16, n, 1e3)
        problem = replace(layer, weight=layer.weight.astype(dtype)).problem
        for pattern in PATTERNS:
            if name == "lower_bound":
                found.append(lower_bound(problem, pattern, iterations=20))
            else:
                result = solve(problem, pattern, SOLVERS[name])
                found.append((result.weight.tobytes(), result.value, result.bound, result.iterations))
    return found


def on_one_thread_on_two_and_by_two_at_once(name):
    numba.set_num_threads(1)
    one = answers(name)
    numba.set_num_threads(2)
    two = answers(name)
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(answers, [name, name]))
    return one, two, *at_once


@pytest.mark.parametrize("name", [*SOLVERS, "lower_bound"])
def test_the_number_of_threads_changes_nothing(elsewhere, name):
    one, *others = elsewhere(on_one_thread_on_two_and_by_two_at_once, name)
    assert len(one) == 6 and len(others) == 3
    assert all(other == one for other in others)


SETTINGS = "import os; print(os.environ['OPENBLAS_THREAD_TIMEOUT'], numba.config.THREADING_LAYER)"


@pytest.mark.parametrize(
    "environment, before, found",
    [
        ({}, "", "6 workqueue"),
        ({"OPENBLAS_THREAD_TIMEOUT": "20", "NUMBA_THREADING_LAYER": "omp"}, "", "20 omp"),
        ({}, "numba.config.THREADING_LAYER = 'omp'", "6 omp"),
    ],
)
def test_what_is_set_before_the_import_stays(environment, before, found):
    names = ("OPENBLAS_THREAD_TIMEOUT", "NUMBA_THREADING_LAYER")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    script = f"import numba; {before}\nimport moonshot.linalg.kernels; {SETTINGS}"
    ran = subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == found


AFTER_NUMPY = """
import ctypes, threading
import numpy as np
from threadpoolctl import threadpool_info
a = np.ones((600, 600))
a @ a
{before}
import moonshot
paths = [found["filepath"] for found in threadpool_info() if found["threading_layer"] == "pthreads"]
ask = [getattr(ctypes.CDLL(path), "openblas_thread_timeout", lambda: "unknown") for path in paths]
print(*{{each() for each in ask}} or {{"unknown"}}, int((a @ a).sum()), threading.active_count())
"""
BUSY = "threading.Thread(target=lambda: [sum(range(100)) for _ in range(10**9)], daemon=True).start()"
WAITING = "threading.Thread(target=threading.Event().wait, daemon=True).start()"


@pytest.mark.parametrize(
    "environment, before, cycles, threads",
    [
        ({}, "", 6, 1),
        ({}, WAITING, 6, 2),
        ({}, BUSY, 0, 2),  # it may be in the middle of a product
        ({"OPENBLAS_THREAD_TIMEOUT": "20"}, "", 20, 1),
    ],
)
def test_openblas_that_was_loaded_before_sleeps_too(environment, before, cycles, threads):
    """As a power of two, 0 for what OpenBLAS has by itself; and it multiplies as before."""
    clean = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"}
    script = AFTER_NUMPY.format(before=before)
    environment = clean | {"OPENBLAS_NUM_THREADS": "2"} | environment
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    found = ran.stdout.split()
    if found[0] == "unknown":
        pytest.skip("NumPy's BLAS does not say how long its threads spin")
    assert found == [str(cycles), str(600**3), str(threads)]
