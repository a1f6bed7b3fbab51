"""objective="auto": chosen on held-out samples, and only where it beats the default by more than noise."""

import json

import pytest
import torch

import moonshot as ms
from moonshot.layer.objectives import quadratics_of
from moonshot.layer.weighting_sweep import weighting_sweeps
from moonshot.models.calibration import as_batches, count_samples, set_aside
from moonshot.models.losses import model_loss, sample_losses
from moonshot.models.modules import ModelError
from moonshot.pruning.auto import CANDIDATES
from moonshot.pruning.selection import LEVEL, best_on_held_out
from tests.models import decoder, tokens

FIRST = torch.tensor([3.0, 1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    "second, third, chosen",
    [
        (FIRST - 0.1, FIRST - 0.2, "c"),  # samples differ far more than objectives do: only pairs tell
        (FIRST - 0.2, FIRST - 0.1, "b"),
        (FIRST, FIRST + 0.1, "a"),
        (FIRST + torch.tensor([-1.0, 0.9, -0.9, 0.8]), FIRST, "a"),  # a gain within its noise
        (FIRST + torch.tensor([-1.0, 0.9, -0.9, 0.8]), FIRST - 0.01, "c"),
    ],
)
def test_the_choice_beats_the_first_by_more_than_noise(second, third, chosen):
    candidates = {"a": FIRST, "b": second, "c": third}
    winner, trials = best_on_held_out(candidates, lambda losses: losses)
    assert winner == chosen
    assert [trial.name for trial in trials] == ["a", "b", "c"]
    assert trials[0].gain == trials[0].error == 0
    assert trials[1].gain == pytest.approx(float((FIRST - second).mean()))
    assert trials[1].error == pytest.approx(float((FIRST - second).std()) / 2)


@pytest.mark.parametrize("rivals", [1, 2, 5])
@pytest.mark.parametrize("samples", [4, 32])
def test_chance_alone_replaces_the_first_in_five_per_cent_at_most(rivals, samples):
    """Rivals that differ from the first by noise: as many better ones are found as the level says, or fewer."""
    generator, runs = torch.Generator().manual_seed(0), 2000
    replaced = 0
    for _ in range(runs):
        losses = torch.randn(1, samples, generator=generator) + 0.1 * torch.randn(
            rivals + 1, samples, generator=generator
        )
        winner, _ = best_on_held_out(dict(enumerate(losses)), lambda loss: loss)
        replaced += winner != 0
    assert 0.01 < replaced / runs < LEVEL + 3 * (LEVEL / runs) ** 0.5


def test_a_gain_of_four_standard_errors_replaces_the_first_among_five_rivals():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(32, generator=generator)
    rivals = {k: first + torch.randn(32, generator=generator) for k in range(1, 5)}
    noise = torch.randn(32, generator=generator)
    noise = (noise - noise.mean()) / noise.std() * 32**0.5
    winner, trials = best_on_held_out({0: first, **rivals, 5: first - 4 - noise}, lambda loss: loss)
    assert winner == 5 and trials[5].gain / trials[5].error == pytest.approx(4, rel=1e-5)


def test_one_sample_tells_nothing():
    assert best_on_held_out({"a": torch.ones(1), "b": torch.zeros(1)}, lambda loss: loss)[0] == "a"


def test_a_loss_that_only_compares_samples_cannot_choose():
    with pytest.raises(ModelError, match="by itself is 0, as where a loss compares the samples"):
        best_on_held_out({"a": torch.zeros(4), "b": FIRST}, lambda losses: losses)


def test_samples_set_aside_are_the_others():
    ids = tokens(22)
    rest, aside = set_aside(as_batches(ids), seed=1)
    assert (count_samples(rest), count_samples(aside)) == (16, 6)
    together = torch.cat([batch["input_ids"] for batch in rest + aside])
    assert sorted(together.tolist()) == sorted(ids.tolist())
    again = set_aside(as_batches(ids), seed=1)[1]
    other = set_aside(as_batches(ids), seed=2)[1]
    assert torch.equal(torch.cat([b["input_ids"] for b in again]), torch.cat([b["input_ids"] for b in aside]))
    assert not torch.equal(
        torch.cat([b["input_ids"] for b in other]), torch.cat([b["input_ids"] for b in aside])
    )


def test_sample_losses_are_those_of_the_samples_alone():
    model, ids = decoder(), tokens(5, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = sample_losses(model, [batch])
    for index in range(5):
        alone = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        assert float(found[index]) == pytest.approx(float(model_loss(model, alone).detach()), rel=1e-6)


def test_auto_prunes_by_the_objective_it_chose():
    ids, seen = tokens(12), []
    model = decoder()
    report = ms.prune(model, ids, "2:4", objective="auto", on_layer=lambda layer, total: seen.append(total))
    assert [trial.name for trial in report.trials] == [candidate.name for candidate in CANDIDATES]
    assert seen == [14 * (len(CANDIDATES) + 1)] * (14 * (len(CANDIDATES) + 1))
    chosen = next(c for c in CANDIDATES if c.name == report.recipe["objective"])
    other = decoder()
    ms.prune(other, ids, "2:4", objective=chosen)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert len(json.loads(report.to_json())["trials"]) == len(CANDIDATES)
    assert str(report).count("held-out loss") == len(CANDIDATES)


def test_a_trial_is_the_model_pruned_by_its_objective():
    """Of one layer, whose inputs are those of the dense model for all."""
    ids, work = tokens(12), dict(targets="*.0.mlp.up_proj", solver=ms.SparseGPT(), dampening_frac=1e-8)
    report = ms.prune(decoder(), ids, "2:4", objective="auto", **work)
    fitted, held_out = set_aside(as_batches(ids), 0)
    losses = {}
    for candidate in CANDIDATES:
        model = decoder()
        ms.prune(model, fitted, "2:4", objective=candidate, **work)
        losses[candidate.name] = float(sample_losses(model, held_out).double().mean())
    assert len(set(losses.values())) == len(CANDIDATES)
    assert {trial.name: trial.loss for trial in report.trials} == pytest.approx(losses, rel=1e-6)


def test_the_first_trial_is_the_whole_model_pruned_by_the_default():
    ids, solver = tokens(12), ms.SparseGPT()
    report = ms.prune(decoder(), ids, "2:4", objective="auto", solver=solver)
    fitted, held_out = set_aside(as_batches(ids), 0)
    model = decoder()
    ms.prune(model, fitted, "2:4", objective=CANDIDATES[0], solver=solver)
    assert report.trials[0].loss == pytest.approx(float(sample_losses(model, held_out).mean()), rel=1e-3)


def test_answers_may_wait_on_disk(tmp_path):
    found = []
    for folder in (None, tmp_path):
        model = decoder()
        report = ms.prune(model, tokens(12), "2:4", objective="auto", solver=ms.SparseGPT(), scratch=folder)
        found.append((report.trials, list(model.parameters())))
    (trials, kept), (again, on_disk) = found
    assert trials == again and all(map(torch.equal, kept, on_disk))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("calls", [5, 14 * len(CANDIDATES) + 3])
def test_a_failure_among_the_trials_or_after_restores_the_model(calls):
    model = decoder()
    before, seen = [parameter.clone() for parameter in model.parameters()], []

    def fail(layer, total):
        seen.append(layer.name)
        if len(seen) == calls:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        ms.prune(model, tokens(12), "2:4", objective="auto", solver=ms.SparseGPT(), on_layer=fail)
    assert all(map(torch.equal, model.parameters(), before))


def test_the_candidates_are_two_sweeps():
    observation = ms.Observation(torch.randn(40, 8), torch.randn(40, 4), torch.randn(3, 4, 8))
    terms, weight = [ms.Reconstruction(), ms.TokenFisher(), ms.Fisher()], torch.randn(4, 8)
    statistics = [term.accumulate(None, observation) for term in terms]
    problems = list(weighting_sweeps(CANDIDATES, weight, quadratics_of(terms, weight, statistics)))
    assert [len(problem.terms) for problem in problems] == [3, 3, 3, 2, 2, 2]
