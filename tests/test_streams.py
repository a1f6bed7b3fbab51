"""CuPy on torch's stream and in torch's memory: asked of a CuPy that only remembers it, and of a device."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moonshot as ms
from moonshot.linalg.backend import computing_on, native
from moonshot.linalg.streams import beside_torch

DEVICE = torch.device("cuda:0")


class FakeCuPy:
    """CuPy's current stream and allocator, and what streams were told to wait for, one after the other."""

    def __init__(self, stream, protocol):
        self.waits = []
        waits = self.waits

        class Stream:
            def __init__(self, ptr):
                self.ptr = ptr

            def record(self):
                return self.ptr

            def wait_event(self, event):
                waits.append((self.ptr, event))

            def __enter__(this):
                this.before, self.stream = self.stream, this

            def __exit__(this, *_):
                self.stream = this.before

        if protocol:
            Stream.from_external = classmethod(lambda kind, other: kind(other.__cuda_stream__()[1]))
        self.stream, self.allocator = Stream(stream), "CuPy's own"
        self.cuda = SimpleNamespace(
            Stream=Stream,
            ExternalStream=Stream,
            Device=lambda index: nullcontext(),
            get_current_stream=lambda: self.stream,
            using_allocator=self.using_allocator,
            PythonFunctionAllocator=lambda allocate, free: SimpleNamespace(malloc=(allocate, free)),
        )

    @contextmanager
    def using_allocator(self, allocator):
        before, self.allocator = self.allocator, allocator
        try:
            yield
        finally:
            self.allocator = before


@pytest.fixture
def memory(monkeypatch):
    """What is asked of torch's allocator; its current stream is 7."""
    asked = []
    stream = SimpleNamespace(cuda_stream=7, __cuda_stream__=lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", lambda *wanted: asked.append(wanted) or 4096)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", asked.append)
    return asked


@pytest.mark.parametrize("protocol", [True, False])
@pytest.mark.parametrize("stream", [0, 7])
def test_torchs_stream_and_memory_inside_and_none_of_it_after(memory, stream, protocol):
    cupy = FakeCuPy(stream, protocol)
    before = cupy.stream
    with pytest.raises(ZeroDivisionError), beside_torch(cupy, DEVICE):
        assert cupy.stream.ptr == 7
        assert cupy.waits == ([] if stream == 7 else [(7, stream)])
        allocate, free = cupy.allocator
        1 / 0  # noqa: B018
    assert cupy.stream is before and cupy.allocator == "CuPy's own"
    assert cupy.waits == ([] if stream == 7 else [(7, stream), (stream, 7)])
    assert allocate(100, 0) == 4096
    free(4096, 0)  # an array may outlive the context
    assert memory == [(100, 0, 7), 4096]


def layer(device):
    make = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 64, generator=make)
    weight, factors = torch.randn(32, 64, generator=make), torch.randn(32, 64, 3, generator=make)
    shared = inputs.T @ inputs / 200 + 0.01 * torch.eye(64)
    return weight.to(device), ms.RowHessian(shared.to(device), factors.to(device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_arrays_of_cupy_are_in_torchs_memory():
    pytest.importorskip("cupy")
    tensor = torch.ones(1000, 1000, device="cuda")
    before = torch.cuda.memory_allocated()
    with computing_on(tensor):
        array = native(tensor) + 1
        assert torch.cuda.memory_allocated() - before >= array.nbytes
    assert np.all(array.get() == 2)
    del array
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("solver", [ms.SparseGPT(), ms.ADMM()])
def test_a_side_stream_gives_the_same_answer_while_the_default_one_is_busy(solver):
    expected = ms.solve(ms.Problem(*layer("cuda")), "2:4", solver)
    busy = torch.rand(4000, 4000, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 2000
    with torch.cuda.stream(torch.cuda.Stream()):
        weight, hessian = layer("cuda")
        problem = ms.Problem(weight, hessian)
        found = ms.solve(problem, "2:4", solver)
        assert problem.value(found.weight) == found.value
        torch.cuda.current_stream().synchronize()
        np.testing.assert_allclose(found.weight.cpu(), expected.weight.cpu(), rtol=1e-5, atol=1e-6)
