"""`allocate`: a model-wide sparsity shared among the layers of a model, which stays as it is."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import mse_loss

import moonshot as ms
from moonshot.layer.patterns import PatternError
from moonshot.models.batchnorm import estimate_in_one_pass, reestimate
from moonshot.models.calibration import CalibrationError, as_batches
from moonshot.models.losses import mean_loss, sample_losses
from moonshot.models.targets import TargetError
from moonshot.pruning.allocation import short_names
from moonshot.pruning.budgets import BudgetError
from tests.models import decoder, tokens

JOINT = 0.8 * ms.Reconstruction() + 0.2 * ms.Fisher()


class Uneven(nn.Module):
    """Two branches of one shape of which one hardly counts, and a layer that N:M patterns do not fit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.needed, self.idle = nn.Linear(16, 24), nn.Linear(16, 24)
        self.odd = nn.Linear(24, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.odd(torch.tanh(self.needed(x) + 1e-3 * self.idle(x)))))


def labelled(model, samples=128, size=16):
    """Batches (x, y) with targets that are the model's own outputs and some noise."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 16, generator=generator)
    with torch.no_grad():
        y = model(x) + 0.02 * torch.randn(samples, 5, generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def loss_of(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def allocated(model, sparsity=0.6, **options):
    options = {"objective": JOINT, "loss": loss_of, "solver": ms.SparseGPT(), "rounds": 1} | options
    return ms.allocate(model, labelled(model), sparsity, **options)


def test_a_layer_that_hardly_counts_gets_the_zeros():
    model = Uneven()
    before = copy.deepcopy(model.state_dict())
    allocation = allocated(model)
    assert list(allocation) == ["needed", "idle", "odd", "out"]
    found = {name: layer.sparsity for name, layer in allocation.layers.items()}
    assert found["idle"] > 0.8 > found["needed"]
    assert allocation.budget != "even"
    even, *others = allocation.trials
    assert even.name == "even" and even.gain == 0
    chosen = next(trial for trial in others if trial.name == allocation.budget)
    assert chosen.gain > chosen.error and chosen.loss < even.loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("sparsity", [0, 0.35, "60%", 0.97, 1])
def test_the_zeros_are_exactly_those_of_the_even_budget(sparsity):
    model = Uneven()
    allocation = allocated(model, sparsity)
    pruned, even = copy.deepcopy(model), copy.deepcopy(model)
    report = ms.prune(pruned, labelled(model), allocation, objective=JOINT, loss=loss_of)
    ms.prune(even, labelled(model), sparsity, objective=JOINT, loss=loss_of)

    def zeros(pruned):
        return sum(int((p == 0).sum()) for p in pruned.parameters() if p.ndim == 2)

    assert zeros(pruned) == zeros(even)
    assert report.sparsity == pytest.approx(allocation.sparsity)
    for name, layer in report.layers.items():
        assert layer.sparsity == pytest.approx(allocation.layers[name].sparsity)


def test_a_mixture_of_patterns_meets_the_total():
    model = Uneven()
    allocation = allocated(model, 0.5, patterns=["1:4", "2:4", 0])
    assert allocation.sparsity >= 0.5
    assert str(allocation["out"]) == "0%"  # seven inputs
    assert {str(pattern) for pattern in allocation.values()} <= {"1:4", "2:4", "0%"}
    assert str(allocation["idle"]) == "1:4"
    curve = [sparsity for sparsity, _ in allocation.layers["needed"].curve]
    assert curve == [0, 0.5, 0.75]
    report = ms.prune(model, labelled(model), allocation, objective=JOINT, loss=loss_of)
    assert report.sparsity == pytest.approx(allocation.sparsity)


def test_a_decoder_and_the_same_seed():
    model, ids = decoder(), tokens(16)
    options = dict(objective=JOINT, solver=ms.SparseGPT(), rounds=1, seed=3)
    seen = []
    first = ms.allocate(model, ids, 0.5, on_step=lambda what, total: seen.append((what, total)), **options)
    second = ms.allocate(model, ids, 0.5, **options)
    assert dict(first) == dict(second) and first.trials == second.trials
    assert len(first) == 14 and "lm_head" not in first
    assert set(first) <= {what for what, _ in seen}
    assert any(what.startswith("loss ") for what, _ in seen)
    assert len(seen) <= seen[0][1]
    assert ms.prune(model, ids, first, objective=JOINT).sparsity == pytest.approx(0.5, abs=1e-3)


def test_targets_and_ignore_choose_the_layers():
    model, ids = decoder(), tokens(16)
    allocation = ms.allocate(model, ids, 0.5, targets="q_proj", ignore="*.0.*", solver=ms.Magnitude(), rounds=0)
    assert list(allocation) == ["model.layers.1.self_attn.q_proj"]
    assert allocation.sparsity == 0.5
    with pytest.raises(TargetError, match="matches no layer"):
        ms.allocate(model, ids, 0.5, targets="nothing")


def test_half_precision_stays_half_precision():
    model = decoder().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    allocation = ms.allocate(model, tokens(16), 0.5, objective=JOINT, solver=ms.SparseGPT(), rounds=1)
    assert allocation.sparsity == pytest.approx(0.5, abs=1e-3)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point()
        assert torch.equal(tensor, before[name])


def resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def images(samples=24, size=8):
    pixels = torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(samples) % 3
    return [
        {"pixel_values": x, "labels": y} for x, y in zip(pixels.split(size), labels.split(size), strict=True)
    ]


def test_batch_norms_are_as_they_were():
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    momenta = [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    ms.allocate(model, images(), 0.5, objective=JOINT, solver=ms.SparseGPT(), rounds=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)] == momenta


@pytest.mark.parametrize("calls", [1, 3, 40])
def test_a_loss_that_fails_leaves_the_model_as_it_was(calls):
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    count = 0

    def loss(model, batch):
        nonlocal count
        count += 1
        if count > calls:
            raise RuntimeError("out of luck")
        return model(**batch).loss

    with pytest.raises(RuntimeError, match="out of luck"):
        ms.allocate(model, images(), 0.5, objective=JOINT, solver=ms.SparseGPT(), rounds=1, loss=loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_solver_that_fails_names_the_layer():
    class Broken(ms.Magnitude):
        def compute(self, state, pattern):
            answer = super().compute(state, pattern)
            return ms.Answer(answer.weight * float("nan"), answer.mask)

    with pytest.raises(ValueError, match="NaN") as error:
        allocated(Uneven(), solver=Broken())
    assert error.value.__notes__ == ["in layer needed"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sparsity": 1.2}, PatternError, "from 0 to 1"),
        ({"sparsity": "2:4"}, TypeError, "goes to patterns"),
        ({"objective": "auto"}, TypeError, "budgets are"),
        ({"solver": ms.ADMM}, TypeError, "instance"),
        ({"factors": 0}, ValueError, "factors"),
        ({"objective": ms.Fisher}, TypeError, "objective must be"),
        ({"unreached": "ignore"}, ValueError, "skip"),
        ({"rounds": -1}, ValueError, "rounds"),
        ({"patterns": ["2:4", 0], "sparsity": 0.7}, BudgetError, "sparser pattern"),
        (
            {"patterns": [0.9, 0.95], "sparsity": 0.1},
            BudgetError,
            "densest choices have .* add a denser pattern",
        ),
        ({"patterns": "2:4"}, TypeError, r"patterns are several to choose from, such as \["),
        ({"patterns": 3}, TypeError, "patterns are several"),
        ({"patterns": ["2:4"]}, PatternError, "out: none of the patterns fits"),
        ({"patterns": []}, PatternError, "needed, idle, odd, out: none of the patterns fits"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        allocated(Uneven(), **options)


def test_too_few_samples():
    model = Uneven()
    with pytest.raises(CalibrationError, match="at least 8"):
        ms.allocate(model, labelled(model, 6), 0.5, loss=loss_of)


def test_samples_and_layers_that_are_left_out_are_named():
    model, ids = decoder(), tokens(10)
    model.model.layers[0].mlp.tied = nn.Embedding(*model.model.layers[0].mlp.up_proj.weight.shape)
    model.model.layers[0].mlp.tied.weight = model.model.layers[0].mlp.up_proj.weight
    labels = ids.clone()
    labels[1] = -100
    batch, options = {"input_ids": ids, "labels": labels}, {"solver": ms.Magnitude(), "objective": JOINT}
    allocation = ms.allocate(model, [batch], 0.5, targets="*.0.mlp.*", rounds=0, **options)
    assert allocation.unused == {"batch 0, sample 1": "it has no target"}
    assert allocation.skipped == {
        "model.layers.0.mlp.up_proj": "its weight is also model.layers.0.mlp.tied.weight"
    }
    assert "1 samples left out: batch 0, sample 1: it has no target" in str(allocation)
    report = ms.prune(model, [batch], allocation, **options)
    assert report.skipped == allocation.skipped and report.unused == allocation.unused


def test_it_prints_and_draws(tmp_path):
    allocation = allocated(Uneven())
    text = str(allocation)
    assert all(name in text for name in allocation) and "tried even" in text
    assert f"4 layers, {100 * allocation.sparsity:.2f} % zeros" in text
    allocation.plot(tmp_path / "budget.png")
    assert (tmp_path / "budget.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0.mlp.up", "model.layers.1.k"], ["layers.0.mlp.up", "layers.1.k"]),
        (
            ["net.stages.0.conv", "net.stages.1.conv", "net.stem.conv"],
            ["net.stages.0", "net.stages.1", "net.stem"],
        ),
        (["a.b.c"], ["a.b.c"]),
        (["0", "2"], ["0", "2"]),
    ],
)
def test_pictures_leave_out_what_all_names_share(names, short):
    assert short_names(names) == short


def test_the_mean_loss_is_that_of_the_samples():
    model, batches = decoder(), as_batches(tokens(7))
    with torch.no_grad():
        assert mean_loss(model.eval(), batches) == pytest.approx(float(sample_losses(model, batches).mean()))


def test_statistics_of_one_pass_are_means_over_batches():
    layer = nn.BatchNorm1d(3)
    batches = list(torch.randn(24, 3).split(8))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    estimate_in_one_pass(layer, batches, lambda model, batch: model(batch))
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert layer.num_batches_tracked == before["num_batches_tracked"]
    assert layer.momentum == 0.1 and not layer.training
    exact = copy.deepcopy(layer)
    reestimate(exact, batches[:1], lambda model, batch: model(batch))
    estimate_in_one_pass(layer, batches[:1], lambda model, batch: model(batch))
    torch.testing.assert_close(layer.running_var, exact.running_var)
