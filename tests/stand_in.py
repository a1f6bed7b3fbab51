"""A GPU that is none: tensors that go there stay on the CPU, as copies."""

import weakref
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda:0")


def there_is_a_gpu(monkeypatch, memory=0):
    """As far as prune looks, with so many bytes of memory."""
    monkeypatch.setattr("moonshot.pruning.recipe.as_device", lambda device: GPU if device == "cuda" else None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )


class StandIn(TorchFunctionMode):
    """What goes to the GPU is copied on the CPU, and counted for as long as it lives."""

    def __init__(self, of_interest):
        super().__init__()
        self._sizes = {tensor.shape for tensor in of_interest}
        self.now = self.most = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and GPU in args:
            rest = [argument for argument in args if argument != GPU]
            copy = function(args[0], *rest[1:], **{**(kwargs or {}), "copy": True})
            if copy.shape in self._sizes:
                self.now += copy.numel()
                self.most = max(self.most, self.now)
                weakref.finalize(copy.untyped_storage(), self._gone, copy.numel())
            return copy
        return function(*args, **(kwargs or {}))

    def _gone(self, count):
        self.now -= count


class Moves(StandIn):
    """How often each of some parameters goes to the GPU."""

    def __init__(self, parameters):
        super().__init__([])
        self._by_place = {parameter.data_ptr(): parameter for parameter in parameters}
        self.times = dict.fromkeys(self._by_place.values(), 0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (
            function is torch.Tensor.to
            and GPU in args
            and (which := self._by_place.get(args[0].data_ptr())) is not None
        ):
            self.times[which] += 1
        return super().__torch_function__(function, types, args, kwargs)
