"""Threads that have nothing to do sleep.

OpenBLAS (NumPy's and SciPy's), OpenMP (torch's) and numba each have threads of their own, and take turns on the same
cores. OpenBLAS's spin for 2**26 cycles after every product, some 27 ms, in which what the others run has fewer cores:
pruning a small model took up to twice as long. What the user has set stays. It is read when NumPy is loaded, so import
moonshot before NumPy and torch, or set OPENBLAS_THREAD_TIMEOUT yourself.
"""

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "6")  # 2**6 cycles
