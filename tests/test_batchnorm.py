"""Batch-norm statistics estimated again: exact, whatever the batch size, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from moonshot.models.batchnorm import reestimate
from moonshot.models.calibration import CalibrationError


def images(count=12, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 + 1


def forward(model, batch):
    return model(batch["pixel_values"])


def batches(size, pixels=None):
    return [{"pixel_values": part} for part in (images() if pixels is None else pixels).split(size)]


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], num_labels=4)
    return ResNetForImageClassification(config).eval()


def small(*, track=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=track), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, track_running_stats=track), nn.Flatten(),
    )  # fmt: skip


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_statistics_are_those_of_each_layers_inputs():
    model, found = resnet(), {}
    reestimate(model, batches(5), forward)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, arguments: found.update({layer: arguments[0].double()}))
    with torch.no_grad():
        model(images())
    assert len(found) == len(layers) > 8
    for layer, x in found.items():
        variance, mean = torch.var_mean(x, (0, 2, 3))
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_batch_size_makes_no_difference(size):
    one, other = resnet(), resnet()
    reestimate(one, batches(4), forward)
    reestimate(other, batches(size), forward)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_first_layer_is_as_training_on_one_batch_leaves_it():
    ours, theirs = small(), small()
    reestimate(ours, batches(5), forward)
    theirs[1].momentum = None
    theirs.train()(images())
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)


def test_a_large_mean_costs_no_digits():
    model = nn.Sequential(nn.BatchNorm2d(3))
    pixels = images().double() + 1e6
    model.double()
    reestimate(model, batches(1, pixels), forward)
    torch.testing.assert_close(model[0].running_var, pixels.var((0, 2, 3)), rtol=1e-6, atol=0)


def test_only_running_statistics_change_and_modes_come_back():
    model = small().train()
    model[0].eval()
    before, modes = state(model), [layer.training for layer in model.modules()]
    reestimate(model, batches(5), forward)
    assert [layer.training for layer in model.modules()] == modes
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_layer_that_is_called_twice_counts_both_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            self.norm(3 * x)
            return self.norm(x)

    model = Shared()
    reestimate(model, batches(5), forward)
    variance, mean = torch.var_mean(torch.cat((images(), 3 * images())), (0, 2, 3))
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert torch.equal(model.unused.running_var, torch.ones(3))


class Residual(nn.Module):
    """What a part returned is changed in place after it; a norm lies between parts, and one is called twice."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
            for _ in range(4)
        )
        self.between, self.shared = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        for k, part in enumerate(self.parts):
            h = part(x)
            h += x
            x = self.shared(h) if k % 2 else h
            if k == 1:
                x = self.between(x)
        return x


def test_parts_whose_results_are_kept_run_less_often_and_change_nothing():
    torch.manual_seed(0)
    plain = Residual()
    kept = copy.deepcopy(plain)
    runs = dict.fromkeys(range(4), 0)

    def counted(k):
        return lambda *_: runs.update({k: runs[k] + 1})

    for k, part in enumerate(kept.parts):
        part[0].register_forward_hook(counted(k))
    reestimate(plain, batches(5), forward)
    reestimate(kept, batches(5), forward, list(kept.parts))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name]), name
    assert runs == {0: 1 + 3 * 2, 1: 1 + 3 * 3, 2: 1 + 3 * 3, 3: 1 + 3 * 2}
    hooks = [len(part._forward_hooks) + ("forward" in vars(part)) for part in kept.parts]
    assert hooks == [0] * 4


def test_a_model_in_half_precision():
    model, reference = small().half(), small()
    reestimate(model, batches(5, images().half()), forward)
    reestimate(reference, batches(5), forward)
    assert model[5].running_var.dtype == torch.float16
    torch.testing.assert_close(model[5].running_var.float(), reference[5].running_var, rtol=0.02, atol=0.01)


def test_without_batch_norm_the_model_is_not_run():
    def never(model, batch):
        raise AssertionError

    reestimate(nn.Linear(3, 3), batches(5), never)
    model = small(track=False)
    reestimate(model, batches(5), never)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "empty"),
        (batches(4, images() * float("nan")), "1 sees NaN"),
        (batches(1, images(1, size=3)), "1 sees one value"),
        ([*batches(4), {"pixel_values": torch.full((1, 3, 5, 5), torch.inf)}], "1 sees NaN"),
    ],
)
def test_a_failure_restores_the_statistics(data, words):
    model = small()
    before = state(model)
    with pytest.raises(CalibrationError, match=words):
        reestimate(model, data, lambda model, batch: model[:2](batch["pixel_values"]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_error_in_the_model_comes_through_and_restores_the_statistics():
    model = small()
    before = state(model)
    data = [*batches(6), {"pixel_values": torch.zeros(1, 4, 32, 32)}]
    with pytest.raises(RuntimeError, match="channels"):
        reestimate(model, data, forward)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
