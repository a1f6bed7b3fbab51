"""What a run was measured on and with."""

import os
import platform
import subprocess
from importlib import import_module
from pathlib import Path

import numba
import psutil
import torch

LIBRARIES = ("numpy", "scipy", "numba", "torch", "moonshot")
BLAS_LIMITS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def machine() -> dict[str, str | int]:
    """What times may be compared on: the processor, cores, memory, and the threads that are used."""
    cores = psutil.cpu_count() or 1
    return {
        "processor": _processor(),
        "cores": cores,
        "memory, GiB": round(psutil.virtual_memory().total / 2**30),
        "threads of BLAS": next((os.environ[name] for name in BLAS_LIMITS if name in os.environ), str(cores)),
        "threads of numba": numba.get_num_threads(),
        "threads of torch": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, the libraries and this checkout: git's commit, marked where files differ, or None."""
    return {
        "python": platform.python_version(),
        **{name: str(import_module(name).__version__) for name in LIBRARIES},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
