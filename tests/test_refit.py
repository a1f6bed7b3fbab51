"""What is left of each part, fitted to what the dense part returned."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import moonshot as ms
from moonshot.models.calibration import CalibrationError, batch_samples, split
from moonshot.models.losses import model_loss
from moonshot.models.partition import partition_model
from moonshot.pruning import refit as refit_module
from moonshot.pruning import run
from moonshot.pruning.calibration_pass import CalibrationPass
from moonshot.pruning.recipe import Recipe
from tests.models import block_layers, decoder, network, tokens
from tests.test_experts import mixture
from tests.test_samples import t5

FAST = dict(solver=ms.Magnitude(), objective=ms.Reconstruction())
REFIT = ms.Refit(epochs=3, steps=4)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def zeros(model):
    return {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.ndim > 1}


def pictures(count=24, size=16):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    return [
        {"pixel_values": pixels[:16], "labels": labels[:16]},
        {"pixel_values": pixels[16:], "labels": labels[16:]},
    ]


def vit():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=4, **sizes))


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="bottleneck", num_labels=4
    )
    return ResNetForImageClassification(config)


MODELS = {
    "chain": (decoder, lambda: tokens(16)),
    "experts": (mixture, lambda: tokens(16)),
    "ViT": (vit, pictures),
    "ResNet": (resnet, pictures),
}


@pytest.mark.parametrize("name", MODELS)
def test_masks_stay_and_parts_get_better(name):
    make, data = MODELS[name]
    plain, fitted = make(), make()
    ms.prune(plain, data(), 0.5, **FAST)
    report = ms.prune(fitted, data(), 0.5, refit=replace(REFIT, stages=1), **FAST)
    for layer in report.layers.values():
        assert layer.sparsity == pytest.approx(0.5, abs=0.01)
    first = next(iter(report.parts))  # whose layers were solved on the same inputs
    for parameter, was in zeros(plain).items():
        if parameter.startswith(f"{first}."):
            assert torch.equal(zeros(fitted)[parameter], was)
    assert len(report.parts) > 1
    for part in report.parts.values():
        assert part.aside_after <= part.aside_before and part.steps > 0
    gained = [part for part in report.parts.values() if part.aside_after < part.aside_before]
    assert len(gained) > len(report.parts) / 2 and gained[0].after < gained[0].before
    assert f"{first} " in str(report) and '"aside_after"' in report.to_json()


@dataclass(frozen=True)
class AllAtOnce(ms.Unstructured):
    """A pattern that cannot be reached in stages."""

    eased = property()


@pytest.mark.parametrize("name", MODELS)
def test_later_stages_prune_what_the_earlier_ones_left(name, monkeypatch):
    make, data = MODELS[name]
    one, model = make(), make()
    ms.prune(one, data(), 0.6, refit=replace(REFIT, stages=1), **FAST)  # the first of two stages up to 84 %
    asked: list[dict[str, str]] = []
    solver = run.PruningRun._answers

    def answers(self, calibration, part, statistics, patterns, *rest):
        asked.append({layer: str(pattern) for layer, pattern in patterns.items()})
        return solver(self, calibration, part, statistics, patterns, *rest)

    monkeypatch.setattr(run.PruningRun, "_answers", answers)
    plain = make()
    report = ms.prune(plain, data(), 0.84, refit=REFIT, **FAST)
    first = next(iter(report.parts))
    earlier, last = zeros(one), zeros(plain)
    for parameter, was in earlier.items():
        if parameter.startswith(f"{first}."):
            assert bool(last[parameter][was].all())
    odd = list(report.layers)[-1]
    assert {str(pattern) for each in asked for pattern in each.values()} == {"60%", "84%"}
    for layer in report.layers.values():
        assert layer.sparsity == pytest.approx(0.84, abs=0.01) and layer.pattern == "84%"
    patterns = dict.fromkeys(report.layers, 0.84) | {odd: AllAtOnce(0.84)}
    asked.clear()
    report = ms.prune(model, data(), patterns, refit=REFIT, **FAST)
    assert {each[odd] for each in asked if odd in each} == {"84%"}
    assert report.layers[odd].sparsity == pytest.approx(0.84, abs=0.01)


def test_stages_come_nearer_to_the_dense_part_at_high_sparsity():
    errors = []
    for stages in (1, 2):
        report = ms.prune(
            vit(), pictures(96), 0.9, refit=ms.Refit(stages=stages), objective=ms.Reconstruction()
        )
        errors.append(next(iter(report.parts.values())).aside_after)
    assert errors[1] < errors[0]


class OneLayer(nn.Module):
    def __init__(self, d=8, m=4):
        super().__init__()
        self.layer = nn.Linear(d, m)

    def forward(self, x):
        return self.layer(x)


def squared(model, batch):
    return model(batch).square().mean()


def test_a_linear_part_comes_near_least_squares():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    x = torch.randn(256, 8, generator=generator) @ mixing + 1
    torch.manual_seed(0)
    model = OneLayer()
    dense = copy.deepcopy(model)(x).detach()
    refit = ms.Refit(epochs=60, lr=0.02, share=0.1, stages=1)
    report = ms.prune(model, [x], 0.5, targets="layer", loss=squared, refit=refit, **FAST)
    (part,) = report.parts.values()
    ones = torch.ones(256, 1)
    best = 0.0
    for row in range(4):  # the exact answer on each row's support, with its bias
        inputs = torch.cat((x[:, model.layer.weight[row] != 0], ones), 1)
        answer = torch.linalg.lstsq(inputs, dense[:, row : row + 1]).solution
        best += float((inputs @ answer - dense[:, row : row + 1]).square().sum())
    best /= float(dense.square().sum())
    found = float((model(x).detach() - dense).square().sum() / dense.square().sum())
    assert best <= found < best + 0.02 * (part.before - best)


@pytest.mark.parametrize(("name", "pattern"), [("chain", "2:4"), ("ResNet", 0.5)])
def test_the_same_seed_gives_the_same_model(name, pattern):
    make, data = MODELS[name]
    one, two, other = make(), make(), make()
    reports = [ms.prune(model, data(), pattern, refit=REFIT, **FAST) for model in (one, two)]
    assert same(one, two) and reports[0].recipe == reports[1].recipe
    assert "Refit(" in reports[0].recipe["refit"]
    ms.prune(other, data(), pattern, seed=1, refit=REFIT, **FAST)
    assert not same(one, other)
    if pattern == "2:4":
        for layer in block_layers(one).values():
            assert ((layer.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("stages", "stored"), [(1, 0), (1, 1), (2, 1), (2, 2), (2, 3)])
def test_a_run_cut_short_between_layers_and_refit_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, name, stages, stored
):
    make, data = MODELS[name]
    work = dict(refit=ms.Refit(epochs=2, stages=stages), checkpoint=tmp_path, **FAST)
    whole, model = make(), make()
    expected = ms.prune(whole, data(), 0.5, **(work | {"checkpoint": None}))
    fit, fits = run.PartFit.run, []

    def cut(self, estimate):
        if len(fits) == stored:
            raise Interrupted
        fits.append(self)
        return fit(self, estimate)

    before = state(model)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(run.PartFit, "run", cut)
        ms.prune(model, data(), 0.5, **work)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    monkeypatch.setattr(run.PartFit, "run", lambda self, estimate: fits.append(self) or fit(self, estimate))
    report = ms.prune(model, data(), 0.5, **work)
    assert same(model, whole) and (report.resumed > 0) == (stored >= stages or stages == 1)
    assert len(fits) == stages * len(report.parts) + (
        stored % stages
    )  # only those of a part that was not done twice
    for key, part in report.parts.items():
        assert (part.after, part.steps) == (expected.parts[key].after, expected.parts[key].steps)


def test_a_refit_of_other_work_is_refused(tmp_path):
    ms.prune(decoder(), tokens(), 0.5, refit=REFIT, checkpoint=tmp_path, **FAST)
    with pytest.raises(ValueError, match="answers of other work, refit differ"):
        ms.prune(decoder(), tokens(), 0.5, refit=ms.Refit(epochs=9), checkpoint=tmp_path, **FAST)
    other = decoder()
    with torch.no_grad():
        other.model.layers[0].input_layernorm.weight[0] = 2
    with pytest.raises(ValueError, match="answers of other work, model differ"):
        ms.prune(other, tokens(), 0.5, refit=REFIT, checkpoint=tmp_path, **FAST)


def test_half_precision_is_rounded_once_a_stage():
    model, exact = decoder(dtype=torch.bfloat16), decoder(dtype=torch.bfloat16).float()
    once = replace(REFIT, stages=1)
    report = ms.prune(model, tokens(16), 0.5, refit=once, **FAST)
    ms.prune(exact, tokens(16), 0.5, refit=once, **FAST)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(part.aside_after < part.aside_before for part in report.parts.values())
    first = "model.layers.0.self_attn.q_proj"
    rounded, fitted = block_layers(model)[first].weight.detach(), block_layers(exact)[first].weight.detach()
    # the same fit but for hidden states in bfloat16
    assert float((rounded.float() - fitted).norm() / fitted.norm()) < 0.01


def test_what_is_not_pruned_and_what_is_shared_stays():
    model = decoder()
    before = state(model)
    ms.prune(model, tokens(16), 0.5, targets="*.0.mlp.*", refit=REFIT, **FAST)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in changed} == {
        "gate_proj", "up_proj", "down_proj", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert all(".layers.0." in name for name in changed)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_padding_counts_for_nothing():
    ids, mask = tokens(16), torch.ones(16, 16, dtype=torch.long)
    padded = torch.cat((ids, torch.zeros(16, 6, dtype=torch.long)), 1)
    longer = torch.cat((mask, torch.zeros(16, 6, dtype=torch.long)), 1)
    one, other = decoder(), decoder()
    plain = ms.prune(one, [{"input_ids": ids, "attention_mask": mask}], 0.5, refit=REFIT, **FAST)
    with_padding = ms.prune(other, [{"input_ids": padded, "attention_mask": longer}], 0.5, refit=REFIT, **FAST)
    for name, part in plain.parts.items():
        assert part.aside_after == pytest.approx(with_padding.parts[name].aside_after, rel=1e-3)


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_each_half_of_an_encoder_decoder_has_padding_of_its_own(where):
    """As many inputs as labels, padded in one of the two."""
    ids, labels = tokens(16), tokens(16).flip(0)
    short = {"input_ids": ids[:, :10], "labels": labels}
    padded = short | {"input_ids": ids, "attention_mask": (torch.arange(16) < 10).long().expand(16, -1)}
    if where == "decoder":
        short = {"input_ids": ids, "labels": labels[:, :10]}
        padded = {"input_ids": ids, "labels": labels.masked_fill(torch.arange(16) >= 10, -100)}
    one, other = (ms.prune(t5(), [batch], 0.5, refit=REFIT, **FAST) for batch in (short, padded))
    for name, part in one.parts.items():
        assert part.aside_before == pytest.approx(other.parts[name].aside_before, rel=1e-3), name


def test_gradients_say_what_an_error_counts_for():
    """The moment of a block's replay is that of autograd over the whole model; padded tokens have no part in it."""
    model, ids = decoder(), tokens(6)
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[4, 4:] = 0
    batches = [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in (slice(0, 2), slice(2, 6))]
    recipe = Recipe(ms.Fisher(), ms.Magnitude())
    batches, _ = recipe.batches(model, batches)
    partition = partition_model(model, batches, model_loss)
    calibration = CalibrationPass(model, partition, [], batches, [ms.Fisher()], recipe, dense=True)
    for part in calibration.parts:
        outputs = []
        handle = part.module.register_forward_hook(lambda _m, _a, output, to=outputs: to.append(output))
        rows = []
        for sample in range(6):
            alone = {"input_ids": ids[sample : sample + 1], "attention_mask": mask[sample : sample + 1]}
            loss = model_loss(model, alone)
            (gradient,) = torch.autograd.grad(loss, outputs[-1])
            rows.append(gradient[0][mask[sample].bool()].double())
        handle.remove()
        expected = sum(each.T @ each for each in rows)
        with calibration.observed(part):
            moment = calibration.replay.output_moment(part.index)
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-9)


@given(st.integers(1, 6), st.integers(0, 5), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_the_metric_of_an_error(channels, count, share, seed):
    gradients = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed)).double()
    moment = gradients.T @ gradients
    root = refit_module._metric(moment.clone(), share)
    if not count:
        assert root is None
        return
    error = torch.randn(3, channels, generator=torch.Generator().manual_seed(seed + 1)).double()
    plain, weighted = error.square().sum(), (error @ gradients.T).square().sum() * channels / moment.trace()
    torch.testing.assert_close((error @ root).square().sum(), (1 - share) * plain + share * weighted)
    assert refit_module._metric(moment, 0) is None and refit_module._metric(None, share) is None


def test_only_an_objective_with_gradients_weighs_errors_by_them():
    def fitted(objective, fisher):
        model = decoder()
        refit = replace(REFIT, fisher=fisher, stages=1)
        ms.prune(model, tokens(16), 0.5, refit=refit, solver=ms.Magnitude(), objective=objective)
        return model

    assert same(fitted(ms.Reconstruction(), 0.5), fitted(ms.Reconstruction(), 0))
    assert same(fitted(ms.Fisher(), 0), fitted(ms.Reconstruction(), 0))  # magnitude's masks are the same
    assert not same(fitted(ms.Fisher(), 0.9), fitted(ms.Fisher(), 0))


def test_few_samples_do_no_harm():
    report = ms.prune(decoder(), tokens(8), "2:4", refit=ms.Refit(epochs=20, lr=0.5), **FAST)
    assert all(part.aside_after <= part.aside_before for part in report.parts.values())
    with pytest.raises(CalibrationError, match="at least 2"):
        ms.prune(decoder(), tokens(1), "2:4", refit=REFIT, **FAST)


def test_budgets_and_the_best_objective_come_before_it():
    allocation = ms.allocate(
        decoder(), tokens(12), 0.5, rounds=0, objective=ms.Reconstruction(), solver=ms.Magnitude()
    )
    report = ms.prune(decoder(), tokens(12), allocation, refit=REFIT, **FAST)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and len(report.parts) == 2
    report = ms.prune(
        decoder(), tokens(12), 0.5, objective="auto", solver=ms.SparseGPT(), targets="*.0.mlp.*", refit=REFIT
    )
    assert len(report.trials) == 6 and list(report.parts) == ["model.layers.0"]


def test_a_failure_halfway_puts_norms_back(monkeypatch):
    model = decoder()
    before, fit = state(model), run.PartFit.run

    def failing(self, estimate):
        fit(self, estimate)
        raise Interrupted

    monkeypatch.setattr(run.PartFit, "run", failing)
    with pytest.raises(Interrupted):
        ms.prune(model, tokens(16), 0.5, refit=REFIT, **FAST)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"stages": 0}, "stages must be a positive integer, got 0"),
        ({"steps": 2.5}, "steps must be a positive integer"),
        ({"lr": 0}, "lr must be positive"),
        ({"fisher": 1}, "fisher must be at least 0 and below 1"),
        ({"fisher": -0.1}, "fisher must be at least 0 and below 1"),
        ({"share": 1}, "share must be between 0 and 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ms.Refit(**options)
    with pytest.raises(TypeError, match=r"refit must be True, False or such as moonshot.Refit\(epochs="):
        ms.prune(decoder(), tokens(), 0.5, refit=6)


def test_batches_are_split_in_order():
    batches = [{"x": torch.arange(10)[:, None]}, {"x": torch.arange(10, 13)[:, None]}]
    parts = split(batches, 4)
    assert [batch_samples(batch) for batch in parts] == [4, 4, 2, 3]
    assert torch.cat([batch["x"] for batch in parts]).flatten().tolist() == list(range(13))


def seen_by_norms(model, pixels):
    """[(running mean, mean of what the norm reads)] in evaluation mode."""
    found = []
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [
        norm.register_forward_pre_hook(
            lambda norm, args: found.append((norm.running_mean, args[0].mean((0, 2, 3))))
        )
        for norm in norms
    ]
    with torch.no_grad():
        model.eval()(pixels)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("refit", [False, True])
def test_running_statistics_are_what_the_model_sees_and_each_part_is_solved_with_them(refit):
    batches = pictures()
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    model = resnet()
    ms.prune(model, batches, 0.5, refit=refit, **FAST)
    seen = seen_by_norms(model, pixels)
    assert len(seen) > 8
    for running, mean in seen:
        torch.testing.assert_close(running, mean, rtol=1e-3, atol=1e-4)


def test_norms_between_parts_take_their_turns():
    torch.manual_seed(0)
    layers = [
        part
        for k in range(6)
        for part in (nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    model = nn.Sequential(*layers)
    pixels = torch.randn(16, 3, 8, 8) + 1

    def loss(model, batch):
        return model(batch).square().mean()

    report = ms.prune(model, [pixels], 0.5, loss=loss, refit=REFIT, **FAST)
    assert len(report.parts) == 6
    for running, mean in seen_by_norms(model, pixels):
        torch.testing.assert_close(running, mean, rtol=1e-3, atol=1e-4)


def test_a_network_refitted_by_an_objective_with_gradients():
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    report = ms.prune(
        network(), [{"x": images, "labels": labels}], 0.5, loss=loss, solver=ms.SparseGPT(), refit=REFIT
    )
    assert all(part.aside_after <= part.aside_before for part in report.parts.values())
