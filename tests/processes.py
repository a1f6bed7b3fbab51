"""Processes of their own, for tests of what a process has one of, threads or memory, and of several together."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
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


class Workers:
    """Processes that call functions together, each as a rank of a process group of its own (gloo, on the CPU).

    They are started when they are first needed, and stay: importing torch takes as long as a test.
    """

    def __init__(self, folder: Path):
        self._folder, self._calls = folder, 0
        self._workers: list[tuple[Any, Any]] = []

    def __call__(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a module's function of (rank, *arguments) gives on each of so many ranks, or the error that it raises.

        None for a rank that was killed.
        """
        self._calls += 1
        store = f"file://{self._folder}/{self._calls}"
        while len(self._workers) < count:
            self._workers.append(self._started())
        for rank, (_, pipe) in enumerate(self._workers[:count]):
            pipe.send_bytes(pickle.dumps((store, rank, count, function, arguments)))
        found = []
        for rank, (process, pipe) in enumerate(self._workers[:count]):
            try:
                heard = pipe.poll(120)
                found.append(
                    pickle.loads(pipe.recv_bytes()) if heard else TimeoutError(f"rank {rank} is silent")
                )
            except (EOFError, ConnectionError):
                process.join()
                found.append(None)
        self._workers = [worker for worker in self._workers if worker[0].is_alive()]
        return found

    def _started(self) -> tuple[Any, Any]:
        context = get_context("spawn")
        here, there = context.Pipe()
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
                patch.setenv(variable, "1")
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
        there.close()
        return process, here

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()


def _serve(pipe: Any) -> None:
    """Answer calls of `Workers` until this process is ended."""
    from torch import distributed

    while True:
        store, rank, count, function, arguments = pickle.loads(pipe.recv_bytes())
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
        distributed.barrier()  # all are connected, before one of them may leave
        try:
            answer = function(rank, *arguments)
        except Exception as error:
            answer = error
        if distributed.is_initialized():
            distributed.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))  # by value: what torch would share ends with the process
