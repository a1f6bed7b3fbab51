"""Weights that are elsewhere, or wider, for a while: what changes is written back, and nothing else is touched."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import moonshot as ms
from moonshot.models.batchnorm import estimate_in_one_pass, reestimate
from moonshot.models.blocks import find_blocks
from moonshot.models.layers import layers_of
from moonshot.models.offload import Offload
from moonshot.models.precision import placed, tensors_of
from moonshot.models.restore import restored_on_failure
from tests.examples.own_layers import Projection, ProjectionView
from tests.models import decoder, tokens


class Experts(nn.Module):
    num_experts, is_transposed = 3, True

    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, 4, 5))


def assigned(module, view):
    view.assign(torch.full_like(view.matrices(), 7))


LAYERS = {
    "Linear": nn.Linear(4, 3),
    "Conv2d": nn.Conv2d(4, 6, 3, groups=2),
    "ConvTranspose1d": nn.ConvTranspose1d(4, 6, 3, groups=2),
    "experts": Experts(),
    "one's own": Projection(4, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_assigned_to_a_layer_is_written_back(name):
    module = LAYERS[name].bfloat16()
    views = dict(layers_of("", module)) or {"": ProjectionView(module)}
    with placed(tensors_of(module)):
        for view in views.values():
            assert view.weight.dtype == torch.float32
            view.assign(torch.full_like(view.matrices(), 7))
    for view in views.values():
        assert view.weight.dtype == torch.bfloat16 and (view.matrices() == 7).all()


def by_adam(module):
    adam = torch.optim.Adam(module.parameters(), lr=1.0)
    module(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
    adam.step()


def by_sgd_over_all_at_once(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD([module.weight], lr=1.0, foreach=True).step()


@torch.no_grad()
def by_index(module):
    module.weight[0] = 7


def put_back(module):
    with restored_on_failure(module, [], Offload()) as restore:
        with torch.no_grad():
            module.weight.fill_(7)
        restore()


@pytest.mark.parametrize("change", [by_adam, by_sgd_over_all_at_once, by_index, put_back])
def test_whatever_changes_a_parameter_is_written_back(change):
    module = nn.LayerNorm(4).bfloat16()
    with placed(tensors_of(module)):
        change(module)
        expected = module.weight.detach().bfloat16()
    assert module.weight.dtype == torch.bfloat16 and torch.equal(module.weight, expected)
    assert change is put_back or not torch.equal(expected, torch.ones(4))


@pytest.mark.parametrize("estimate", [reestimate, estimate_in_one_pass])
def test_running_statistics_are_written_back(estimate):
    norm = nn.BatchNorm1d(2).half().eval()
    x = torch.randn(50, 2) + 3
    with placed(tensors_of(norm)):
        estimate(norm, [x], lambda model, batch: model(batch))
    assert norm.running_mean.dtype == torch.float16
    torch.testing.assert_close(norm.running_mean.float(), x.mean(0), rtol=2e-3, atol=0)


def test_a_change_within_a_change_is_written_back():
    module = nn.Linear(4, 3).bfloat16()
    with placed(tensors_of(module)):
        with placed(tensors_of(module)):
            by_index(module)
        assert (module.weight[0] == 7).all()
    assert (module.weight[0] == 7).all()


class Writes(TorchFunctionMode):
    """How many numbers were written to these memories, and compared with what they hold."""

    def __init__(self, tensors):
        super().__init__()
        self._places = {tensor.data_ptr() for tensor in tensors}
        self.written = self.compared = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.copy_, torch.equal):
            there = [t for t in args if isinstance(t, torch.Tensor) and t.data_ptr() in self._places]
            if function is torch.equal:
                self.compared += sum(tensor.numel() for tensor in there)
            elif args[0].data_ptr() in self._places:
                self.written += args[0].numel()
        return function(*args, **(kwargs or {}))


def test_a_prune_writes_to_the_pruned_layers_only_and_compares_no_weights():
    model = decoder(dtype=torch.bfloat16)
    pruned = {
        name: view.weight
        for part in find_blocks(model)
        for name, view in layers_of(*part)
        if name.endswith("up_proj")
    }
    with Writes(list(model.parameters())) as seen:
        ms.prune(model, tokens(), 0.5, solver=ms.Magnitude(), targets="*.up_proj")
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim < 2)
    assert seen.written == sum(weight.numel() for weight in pruned.values())
    assert seen.compared <= vectors
