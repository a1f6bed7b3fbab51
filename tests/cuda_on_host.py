"""CUDA source on the CPU: one thread block after the other, each of its threads a thread of the system.

What `__syncthreads` orders is in order, and what it should order and does not goes wrong here too, sooner or later.
Dynamic shared memory has as many bytes as were asked for, full of NaN at first, and who writes beyond them is found.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from moonshot.linalg import cuda

COMPILER = "g++"
PLACES = [3, 40, pytest.param("device", marks=pytest.mark.gpu)]  # threads in a block on the CPU, or a GPU

_BEFORE = """
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__ static inline
#define __shared__ static

static struct { unsigned x; } blockIdx, blockDim, gridDim;
static thread_local struct { unsigned x; } threadIdx;
static std::barrier<> *together;
static void __syncthreads() { together->arrive_and_wait(); }
static unsigned char *dynamic_shared;

template <class T>
static T atomicAdd(T *at, T value) { return std::atomic_ref<T>(*at).fetch_add(value); }
"""

_AFTER = """
template <class... A, size_t... I>
static void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<A *>(arguments[I])...);
}

template <class... A>
static int launch(void (*kernel)(A...), int blocks, int threads, int bytes, void **arguments)
{
    constexpr int beyond = 64;
    std::vector<unsigned char> memory(bytes + beyond), untouched(beyond, 0xff);
    dynamic_shared = memory.data();
    blockDim.x = threads, gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        std::memset(dynamic_shared, 0xff, bytes + beyond);
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
        if (std::memcmp(dynamic_shared + bytes, untouched.data(), beyond) != 0)
            return 1;
    }
    return 0;
}
"""


@cache
def compiled(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The kernels as functions `on_host_NAME(blocks, threads, bytes of shared memory, pointers to arguments)`."""
    entries = "".join(
        f'extern "C" int on_host_{name}(int blocks, int threads, int bytes, void **arguments)'
        f"{{ return launch({name}, blocks, threads, bytes, arguments); }}\n"
        for name in re.findall(r"__global__ void (\w+)", source)
    )
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"#define \2 reinterpret_cast<\1 *>(dynamic_shared)", source
    )
    with TemporaryDirectory() as folder:
        code, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        code.write_text(_BEFORE + source + _AFTER + entries)
        strict = ["-std=c++20", "-O1", "-Wall", "-Wno-sign-compare", "-Werror"]
        shared = [
            "-shared",
            "-fPIC",
            "-pthread",
            "-Wl,-Bsymbolic",
        ]  # no kernel is taken for a function of libc's
        command = [COMPILER, *strict, *shared, *options, str(code), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def arrays_at(place: int | str, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """What makes arrays for kernels: at one of PLACES, those of the package are launched there in this test.

    The test is skipped where there is no compiler, or no device.
    """
    if place == "device":
        cupy = pytest.importorskip("cupy")
        if not cupy.cuda.is_available():
            pytest.skip("CuPy is installed but there is no CUDA device")
        return cupy.asarray
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed")
    monkeypatch.setattr("moonshot.linalg.cuda.launch", launcher(int(place)))
    return np.ascontiguousarray


def launcher(threads: int) -> Callable:
    """What does on NumPy arrays, whose types must be the kernel's, what `cuda.launch` does: with so many threads."""

    def launch(path, options, name, blocks, _, arguments, shared=0):
        values = [np.array(a.ctypes.data if isinstance(a, np.ndarray) else a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        run = getattr(compiled(cuda.source(path), options), f"on_host_{name}")
        assert run(blocks, threads, shared, pointers) == 0, (
            f"{name} writes beyond {shared} bytes of shared memory"
        )

    return launch
