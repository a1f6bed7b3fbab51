"""CUDA kernels on CuPy arrays: NVRTC compiles them when they are first needed, and CuPy keeps them on disk."""

import re
from functools import cache
from importlib.resources import files
from typing import Any

UNASKED = 48 * 1024  # bytes of shared memory that every thread block may have; for more a kernel has to ask


def shared_memory(array: Any) -> int:
    """Bytes of shared memory that a thread block can have, where the kernel asks, on the device of a CuPy array."""
    return _shared_memory(array.device.id)


@cache
def _shared_memory(device: int) -> int:
    import cupy

    return cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]


def free_memory(array: Any) -> int:
    """Bytes that are free on the device of a CuPy array."""
    return array.device.mem_info[0]


def launch(
    path: str,
    options: tuple[str, ...],
    name: str,
    blocks: int,
    threads: int,
    arguments: tuple[Any, ...],
    shared: int = 0,
) -> None:
    """Run a kernel on the device of its first argument.

    path: the source, in the package. options: what it is compiled with. name: the kernel's. blocks, threads: how many
    blocks there are, and threads in each. arguments: CuPy arrays, and NumPy scalars of the kernel's types. shared:
    bytes of dynamic shared memory for each block.
    """
    device = arguments[0].device
    with device:
        kernel = _kernel(path, options, name, device.id, shared > UNASKED)
        kernel((blocks,), (threads,), arguments, shared_mem=shared)


@cache
def _kernel(path: str, options: tuple[str, ...], name: str, device: int, asks: bool) -> Any:
    """The kernel, on the current device, which is `device`. One that asks may have all the shared memory there is."""
    kernel = _module(path, options).get_function(name)
    if asks:
        kernel.max_dynamic_shared_size_bytes = _shared_memory(device)
    return kernel


@cache
def _module(path: str, options: tuple[str, ...]) -> Any:
    import cupy

    return cupy.RawModule(code=source(path), options=options)


def source(path: str) -> str:
    """The text of a CUDA source of the package, with that of sources of the package that it includes."""
    text = files("moonshot").joinpath(path).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"\n', lambda included: source(included[1]), text, flags=re.MULTILINE)


def real(dtype: str) -> str:
    """What C calls "float32" or "float64"."""
    return {"float32": "float", "float64": "double"}[dtype]
