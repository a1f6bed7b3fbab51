"""Processes of their own, for tests of what a process has one of: threads, memory."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest


@contextmanager
def new_process(threads: int) -> Iterator[Callable[..., Any]]:
    """Yields what calls a module's function in a new process, whose kernels have so many threads, and BLAS one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_NUM_THREADS", str(threads))
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(variable, "1")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named).result()
