"""CuPy beside torch on one device: torch's stream and torch's memory for both."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def beside_torch(cupy: ModuleType, device: Any) -> Iterator[None]:
    """Inside, CuPy computes on torch's current stream of a device, and its new arrays are in torch's memory.

    cupy: the module. device: a torch.device of type "cuda", with an index.

    Afterwards CuPy has the stream and the allocator that it had. Where that stream is another, each of the two waits
    for what the other one was given before it takes over.
    """
    torch = sys.modules["torch"]
    theirs = torch.cuda.current_stream(device)
    with ExitStack() as stack:
        stack.enter_context(cupy.cuda.Device(device.index))
        before, stream = cupy.cuda.get_current_stream(), _wrapped(cupy, theirs)
        if before.ptr != stream.ptr:
            stream.wait_event(before.record())
            stack.callback(lambda: before.wait_event(stream.record()))
            stack.enter_context(stream)
        stack.enter_context(cupy.cuda.using_allocator(_allocator(cupy, torch, theirs.cuda_stream)))
        yield


def _wrapped(cupy: ModuleType, stream: Any) -> Any:
    """A torch stream as one of CuPy's, on the current device."""
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)  # before CuPy 14


def _allocator(cupy: ModuleType, torch: ModuleType, stream: int) -> Any:
    """An allocator for CuPy: memory of torch's, for use on a stream. It outlives the context, as arrays do."""
    free = torch.cuda.caching_allocator_delete
    return cupy.cuda.PythonFunctionAllocator(
        lambda size, device: torch.cuda.caching_allocator_alloc(size, device, stream),
        lambda pointer, device: free(pointer),
    ).malloc
