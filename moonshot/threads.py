"""Threads that have nothing to do sleep.

OpenBLAS (NumPy's and SciPy's), OpenMP (torch's) and numba each have threads of their own, and take turns on the same
cores. OpenBLAS's spin for 2**26 cycles after every product, some 27 ms, in which what the others run has fewer cores:
pruning a small model takes 1.4 times as long. OPENBLAS_THREAD_TIMEOUT says how long they spin, and is read when
OpenBLAS is loaded. Where NumPy was loaded before, its threads are ended here, as they are when a process forks: the
next product begins new ones.
"""

import ctypes
import os
import sys
import threading

_VARIABLE, _CYCLES = "OPENBLAS_THREAD_TIMEOUT", "6"  # 2**6
_WAITING = {"threading", "selectors", "ipykernel"}  # where threads stand that compute nothing


def sleep_when_idle() -> None:
    """Let OpenBLAS's threads sleep, now and when it is loaded; what the user has set stays.

    They are not ended while another thread may be in the middle of a product.
    """
    if _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = _CYCLES
    if "numpy" in sys.modules and _alone():
        from threadpoolctl import threadpool_info

        for library in threadpool_info():
            if library["internal_api"] == "openblas" and library["threading_layer"] == "pthreads":
                _begin_anew(library["filepath"])


def _alone() -> bool:
    """Whether all other threads of Python wait for something."""
    frames = sys._current_frames()
    own = threading.get_ident()
    modules = [frame.f_globals.get("__name__", "") for thread, frame in frames.items() if thread != own]
    return all(module.partition(".")[0] in _WAITING for module in modules)


def _begin_anew(path: str) -> None:
    """Let an OpenBLAS that is loaded read its variables again, and end its threads."""
    library = ctypes.CDLL(path)
    read, end = (getattr(library, name, None) for name in ("openblas_read_env", "blas_thread_shutdown_"))
    if read and end:
        read()
        end()


sleep_when_idle()
