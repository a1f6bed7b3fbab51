"""What is asked of CuPy to launch a kernel, by a CuPy that only remembers it."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest

from moonshot.linalg import cuda
from moonshot.solvers import sparsegpt_cuda

H100 = 227 * 1024


class Device(nullcontext):
    attributes: ClassVar[dict[str, int]] = {"MaxSharedMemoryPerBlockOptin": H100}

    def __init__(self, number):
        super().__init__()
        self.id = number


class Kernel:
    """Refuses what a device refuses: more shared memory than it may have."""

    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self):
        self.launched = []

    def __call__(self, grid, block, arguments, *, shared_mem):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.launched.append((grid, block, shared_mem))


@pytest.fixture
def kernels(monkeypatch):
    """Every kernel by (options, name); a module has one of each name."""
    made = {}

    class RawModule:
        def __init__(self, *, code, options):
            assert "__global__" in code
            self.options = options

        def get_function(self, name):
            return made.setdefault((self.options, name), Kernel())

    for function in (cuda._kernel, cuda._module, cuda._shared_memory):
        function.cache_clear()
    fake = SimpleNamespace(RawModule=RawModule, cuda=SimpleNamespace(Device=Device))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    yield made
    for function in (cuda._kernel, cuda._module, cuda._shared_memory):
        function.cache_clear()


def test_a_kernel_may_have_what_it_asks_for_whatever_it_asked_for_before(kernels):
    array, options = SimpleNamespace(device=Device(0)), sparsegpt_cuda.options("float32", 0)
    wanted = [1000, 100_000, 60_000, 100_000, H100, 0]
    for shared in wanted:
        cuda.launch(sparsegpt_cuda.SOURCE, options, "sweep", 7, 128, (array,), shared)
    (kernel,) = kernels.values()
    assert kernel.launched == [((7,), (128,), shared) for shared in wanted]
    assert cuda.shared_memory(array) == H100


def test_a_kernel_that_asks_for_nothing_is_left_as_it_is(kernels):
    array = SimpleNamespace(device=Device(0))
    cuda.launch(
        sparsegpt_cuda.SOURCE, sparsegpt_cuda.options("float32", 0), "sweep", 1, 128, (array,), 48 * 1024
    )
    (kernel,) = kernels.values()
    assert kernel.max_dynamic_shared_size_bytes == 48 * 1024
