"""CUDA source on the CPU: one thread block after the other, each of its threads a thread of the system.

What `__syncthreads` orders is in order, and what it should order and does not goes wrong here too, sooner or later.
"""

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

COMPILER = "g++"

_BEFORE = """
#include <barrier>
#include <cstddef>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__ static inline
#define __shared__ static

static struct { int x; } blockIdx, blockDim;
static thread_local struct { int x; } threadIdx;
static std::barrier<> *together;
static void __syncthreads() { together->arrive_and_wait(); }
"""

_AFTER = """
template <class... A, size_t... I>
static void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<A *>(arguments[I])...);
}

template <class... A>
static void launch(void (*kernel)(A...), int blocks, int threads, void **arguments)
{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        std::barrier<> barrier(threads);
        together = &barrier;
        std::vector<std::thread> all;
        for (int i = 0; i < threads; ++i)
            all.emplace_back([=] {
                threadIdx.x = i;
                call(kernel, arguments, std::index_sequence_for<A...>());
            });
        for (std::thread &one : all)
            one.join();
    }
}
"""


@cache
def compiled(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The kernels as functions `on_host_NAME(blocks, threads, pointers to arguments)`."""
    entries = "".join(
        f'extern "C" void on_host_{name}(int blocks, int threads, void **arguments)'
        f"{{ launch({name}, blocks, threads, arguments); }}\n"
        for name in re.findall(r"__global__ void (\w+)", source)
    )
    with TemporaryDirectory() as folder:
        code, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        code.write_text(_BEFORE + source + _AFTER + entries)
        command = [COMPILER, "-std=c++20", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread", *options]
        subprocess.run([*command, str(code), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def launch(
    source: str, options: tuple[str, ...], name: str, blocks: int, threads: int, arguments: tuple
) -> None:
    """Run a kernel on NumPy arrays and scalars, whose types must be the kernel's."""
    values = [np.array(a.ctypes.data if isinstance(a, np.ndarray) else a) for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    getattr(compiled(source, options), f"on_host_{name}")(blocks, threads, pointers)
