"""Several processes that prune one model together: the same model as one gives, and what becomes of failures."""

import json
import os
import signal
import socket
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import MixtralConfig

import moonshot as ms
from moonshot.app import cli
from moonshot.models.calibration import as_batches
from moonshot.models.ranks import RankError, owners, shares
from moonshot.pruning import by_rows
from tests.models import DEMO, JOINT, decoder, model_folder, network, tokens, weights
from tests.processes import Workers
from tests.test_cli import run


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5))
def test_every_item_has_one_rank_and_equal_ones_are_spread_evenly(sizes, count):
    runs = shares(sizes, count)
    assert [item for run in runs for item in run] == list(range(len(sizes))) and runs[0]
    if len(set(sizes)) == 1 and len(sizes) >= count:
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e9), min_size=1), st.integers(1, 5), st.data())
def test_the_rank_with_most_to_do_has_little_more_than_the_others(costs, count, data):
    first = data.draw(st.sets(st.sampled_from(sorted(costs))))
    found, _ = owners(costs, count, first)
    assert list(found) == list(costs) and all(found[name] == 0 for name in first)
    rest = {name: cost for name, cost in costs.items() if name not in first}
    loads = [sum(cost for name, cost in rest.items() if found[name] == rank) for rank in range(count)]
    assert max(loads) - min(loads) <= max(rest.values(), default=0) * (1 + 1e-9)
    shared = {name: cost / count for name, cost in rest.items() if data.draw(st.booleans())}
    together, last = owners(costs, count, first, shared)
    assert all(together[name] == 0 for name in first)
    assert {name for name, owner in together.items() if owner is None} <= set(shared)
    assert end(together, rest, shared, count) == pytest.approx(last) and last <= max(loads) * (1 + 1e-9)


def end(found, costs, shared, count):
    """When the last of so many ranks has done what is its own of work of these costs, and its part of what all do."""
    own = [sum(cost for name, cost in costs.items() if found[name] == rank) for rank in range(count)]
    return max(own) + sum(shared[name] for name in costs if found[name] is None)


@pytest.mark.parametrize(
    ("costs", "each", "count", "together"),
    [
        (dict(down=9, up=1, gate=1), 1 / 2, 2, "down"),
        (dict(down=9, up=1, gate=1), 0.95, 2, ""),  # each rank would do most of it
        (dict(q=1, k=1), 1 / 2, 2, ""),  # one each
        (dict(q=4, k=4, v=4), 1 / 2, 2, "q"),  # and one for the other two
        (dict(gate=4, up=4, q=1, k=1, v=1), 1 / 3, 3, "gate up"),
    ],
)
def test_all_work_together_where_that_ends_sooner(costs, each, count, together):
    found, _ = owners(costs, count, shared={name: cost * each for name, cost in costs.items()})
    assert [name for name, owner in found.items() if owner is None] == together.split()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    found = Workers(tmp_path_factory.mktemp("groups"))
    yield found
    found.close()


def mixture():
    return decoder(MixtralConfig, num_local_experts=4, bos_token_id=1, eos_token_id=2)


def images(samples=12):
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def spread(model, batch):
    """A loss of images without labels."""
    return model(batch).logsumexp(1).mean()


def from_a_generator(data):
    yield from data.split(1)


def pruned(rank, make, data, pattern, arguments, by_rank=None):
    """(the weights, the layers' losses, the report) of a model that was pruned."""
    model = make()
    before = weights(model)
    arguments = arguments | ((by_rank or {}).get(rank) or {})
    try:
        report = ms.prune(model, arguments.pop("calibration", data), pattern, **arguments)
    except Exception:
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        raise
    state = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    return state, {name: layer.relative for name, layer in report.layers.items()}, report


def close(found, expected, rtol=1e-3):
    """Whether two models have the same zeros, and the same values up to rounding."""
    for name, value in expected.items():
        assert torch.equal(found[name] == 0, value == 0), name
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * float(value.abs().max()))


@dataclass(frozen=True)
class Telling(ms.Swaps):
    """Says how many rows it has solved."""

    def compute(self, state, pattern):
        return replace(super().compute(state, pattern), note=f"{state.problem.shape[0]} rows")


SPARSEGPT, ADMM = dict(solver=ms.SparseGPT(), objective=JOINT), dict(solver=ms.ADMM())
CASES = {
    "chain": (decoder, tokens(), "2:4", ADMM),
    "chain, uneven, frugal": (decoder, tokens(7), 0.6, SPARSEGPT | dict(factors=3)),
    "padding": (
        decoder,
        [dict(input_ids=ids, attention_mask=(torch.arange(16) < length).long()[None]) for ids, length in
         zip(tokens().split(1), (16, 9, 12, 16, 5, 11), strict=True)],
        "2:4",
        SPARSEGPT,
    ),
    "graph": (network, images(), 0.5, ADMM | dict(loss=spread)),
    "graph, one batch": (network, [images(4)], 0.5, SPARSEGPT | dict(loss=spread)),
    "experts": (mixture, tokens(), "2:4", SPARSEGPT),
    "more ranks than samples": (decoder, tokens(2), "2:4", SPARSEGPT),
    "one batch of several": (decoder, as_batches(tokens()), "2:4", SPARSEGPT),
    "refit": (decoder, tokens(), "2:4", SPARSEGPT | dict(refit=ms.Refit(epochs=2, steps=2))),
    "refit of a graph": (network, images(), 0.5, SPARSEGPT | dict(loss=spread, refit=ms.Refit(epochs=2, steps=2))),
    "auto": (decoder, tokens(12), 0.5, dict(solver=ms.SparseGPT(), objective="auto")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count"), [*((name, 2) for name in CASES), *((name, 3) for name in ("chain", "graph", "experts"))]
)
def test_ranks_find_what_one_process_finds(workers, name, count):
    expected, losses, whole = pruned(0, *CASES[name])
    results = workers(count, pruned, *CASES[name])
    for state, relative, report in results:
        close(state, expected)
        assert relative == pytest.approx(losses, rel=1e-4)
        assert list(report.layers) == list(whole.layers)
        for layer, other in zip(report.layers.values(), whole.layers.values(), strict=True):
            assert layer.note == other.note and layer.terms == pytest.approx(other.terms, rel=1e-3, abs=1e-6)
        assert [trial.name for trial in report.trials] == [trial.name for trial in whole.trials]
        for part, other in zip(report.parts.values(), whole.parts.values(), strict=True):
            assert (part.steps, part.aside_after) == (other.steps, pytest.approx(other.aside_after, rel=1e-2))
        assert all(torch.equal(value, results[0][0][name]) for name, value in state.items())


# Rows of a layer


def grouped():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 1))
    return nn.Sequential(*layers).eval()


BY_ROW = ms.Unstructured(0.5, "row")


def pruned_by_rows(rank, *case):
    """`pruned`, by ranks that may share rows of the smallest layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(by_rows._EXCHANGES, "cpu", 0)
        return pruned(rank, *case)


DOWN = dict(targets="down_proj")
STAGES = dict(solver=ms.SparseGPT(), refit=ms.Refit(epochs=2, steps=2, stages=2))
ROWS = {
    "ADMM": (3, decoder, tokens(), "2:4", ADMM | DOWN),
    "SparseGPT": (3, decoder, tokens(7), BY_ROW, SPARSEGPT | DOWN),
    "OBS": (2, decoder, tokens(), "2:4", dict(solver=ms.OBS()) | DOWN),
    "auto": (2, decoder, tokens(12), "2:4", dict(objective="auto", solver=ms.SparseGPT()) | DOWN),
    "stages": (2, decoder, tokens(), BY_ROW, STAGES | DOWN),
    "groups, and fewer rows than ranks": (3, grouped, images(), BY_ROW, ADMM | dict(loss=spread)),
    "an expert": (3, mixture, tokens(), "2:4", ADMM | dict(targets="0.mlp.experts.down_proj.0")),
}


@pytest.mark.parametrize("name", ROWS)
def test_ranks_that_share_rows_find_what_one_process_finds(workers, name):
    count, make, data, pattern, arguments = ROWS[name]
    expected, losses, whole = pruned(0, make, data, pattern, arguments)
    results = workers(count, pruned_by_rows, make, data, pattern, arguments)
    for state, relative, report in results:
        close(state, expected)
        assert relative == pytest.approx(losses, rel=1e-4)
        for layer, other in zip(report.layers.values(), whole.layers.values(), strict=True):
            assert (layer.status, layer.sparsity) == (other.status, other.sparsity)
            assert layer.terms == pytest.approx(other.terms, rel=1e-3, abs=1e-6) and layer.seconds > 0
        assert all(torch.equal(value, results[0][0][name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("arguments", "count", "said"),
    [
        ({}, 2, "16 rows"),
        ({}, 3, "11 rows"),
        (dict(bound=True), 2, "32 rows"),
        (dict(solver=Telling(ms.IHT())), 2, "32 rows"),
        (dict(pattern=0.5), 2, "32 rows"),
    ],
)
def test_rows_are_shared_where_they_are_independent(workers, arguments, count, said):
    arguments = dict(solver=Telling(ms.Wanda()), targets="0.mlp.down_proj", pattern=BY_ROW) | arguments
    pattern = arguments.pop("pattern")
    for _, _, report in workers(count, pruned_by_rows, decoder, tokens(), pattern, arguments):
        assert [layer.note for layer in report.layers.values()] == [said]


def test_a_generator_is_read_on_each_rank(workers):
    expected, _, _ = pruned(0, decoder, tokens(), "2:4", SPARSEGPT)
    for state, _, _ in workers(2, pruned_from_a_generator):
        close(state, expected)


def pruned_from_a_generator(rank):
    return pruned(rank, decoder, from_a_generator(tokens()), "2:4", SPARSEGPT)


@pytest.mark.parametrize(
    ("make", "data", "arguments"),
    [
        (decoder, as_batches(tokens(12), batch_tokens=16), {}),
        (network, list(images().split(2)), dict(loss=spread, patterns=[0.25, 0.5, 0.75])),
    ],
)
def test_ranks_allocate_as_one_process_does(workers, make, data, arguments):
    expected = allocated(0, make, data, arguments)
    for found in workers(2, allocated, make, data, arguments):
        assert {name: str(pattern) for name, pattern in found.items()} == {
            name: str(pattern) for name, pattern in expected.items()
        }
        assert [trial.loss for trial in found.trials] == pytest.approx(
            [trial.loss for trial in expected.trials]
        )


def allocated(rank, make, data, arguments):
    model = make()
    before = weights(model)
    found = ms.allocate(model, data, 0.5, solver=ms.SparseGPT(), objective=JOINT, rounds=1, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    return found


# What goes wrong


def assert_all_failed(results, failed, words):
    """One rank raised an error with these words, the others were told."""
    for rank, error in enumerate(results):
        if rank == failed:
            assert words in str(error) and not isinstance(error, RankError)
        else:
            assert (
                isinstance(error, RankError) and words in str(error) and f"rank {failed} failed" in str(error)
            )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(seed=1), "seed differ"),
        (dict(calibration=tokens() % 59), "calibration differ"),
        (dict(targets="q_proj"), "targets, patterns"),
        (dict(refit=True), "refit differ"),
        (dict(objective=ms.Reconstruction()), "objective differ"),
    ],
)
def test_other_arguments_on_another_rank_are_an_error_on_all(workers, changed, words):
    for error in workers(3, pruned, decoder, tokens() % 60, "2:4", SPARSEGPT, {1: changed}):
        assert isinstance(error, RankError) and words in str(error) and "rank 1" in str(error)


def other_decoder():
    model = decoder()
    model.lm_head.weight.data[:, 0] += 0.1
    return model


def test_another_model_on_another_rank_is_an_error_on_all(workers):
    for error in workers(2, pruned_of_another_model):
        assert isinstance(error, RankError) and "the model differ" in str(error)


def pruned_of_another_model(rank):
    return pruned(rank, other_decoder if rank else decoder, tokens(), "2:4", SPARSEGPT)


@dataclass(frozen=True)
class FailsOnRank(ms.Reconstruction):
    """A plug-in objective that fails at its n-th batch on one rank."""

    where: int
    name = "FailsOnRank"
    batches: ClassVar[list] = []

    def accumulate(self, statistic, observation):
        self.batches.append(1)
        if torch.distributed.get_rank() == self.where and len(self.batches) == 5:
            raise RuntimeError("no more")
        return super().accumulate(statistic, observation)


@pytest.mark.parametrize("failed", [0, 1])
def test_an_error_in_a_plug_in_is_told_to_the_other_ranks(workers, failed):
    results = workers(3, pruned_by_what_fails, failed)
    assert_all_failed(results, failed, "no more")


def pruned_by_what_fails(rank, failed):
    FailsOnRank.batches.clear()
    return pruned(rank, decoder, tokens(), "2:4", dict(objective=FailsOnRank(failed), solver=ms.SparseGPT()))


def test_an_error_before_anything_was_exchanged_is_told(workers):
    assert_all_failed(
        workers(2, pruned, decoder, tokens(), "2:4", SPARSEGPT, {1: dict(factors=0)}), 1, "factors"
    )


def test_an_error_at_the_very_end_is_told(workers):
    """The first rank alone calls on_layer."""
    assert_all_failed(workers(2, pruned_with_a_bad_ending), 0, "the last")


def pruned_with_a_bad_ending(rank):
    def on_layer(layer, total):
        assert rank == 0
        seen.append(layer.name)
        if len(seen) == total:
            raise ValueError("the last")

    seen = []
    return pruned(rank, decoder, tokens(), "2:4", SPARSEGPT | dict(on_layer=on_layer))


class FailsWhileAnotherWorks(ms.Reconstruction):
    """On one rank, while the other one takes longer than a rank waits to be heard."""

    def accumulate(self, statistic, observation):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("no more")
        time.sleep(0.5)
        return super().accumulate(statistic, observation)


def test_a_rank_hears_later_of_one_that_did_not_wait(workers):
    assert_all_failed(workers(2, pruned_by_an_impatient_rank), 1, "no more")


def pruned_by_an_impatient_rank(rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moonshot.models.ranks._LAST_WORD", 0.1)
        work = dict(objective=FailsWhileAnotherWorks(), solver=ms.SparseGPT(), targets="0.self_attn.q_proj")
        return pruned(rank, decoder, tokens(), "2:4", work)


class Unsaid(ms.Reconstruction):
    """A term that does not say that its statistics add up."""

    additive = False


def test_statistics_that_may_not_add_up_are_refused(workers):
    for error in workers(2, pruned, decoder, tokens(), "2:4", SPARSEGPT | dict(objective=Unsaid())):
        assert "additive = True" in str(error)


@dataclass(frozen=True)
class FailsInItsRows(ms.ADMM):
    """Ends on one rank, by an error or as if that were killed, while the others solve the rest of the rows."""

    where: int = 0
    killed: bool = False

    def compute(self, state, pattern):
        if torch.distributed.get_rank() != self.where:
            return super().compute(state, pattern)
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no more")


def test_an_error_in_some_rows_is_told_to_the_other_ranks(workers):
    assert_all_failed(
        workers(3, pruned_by_rows, decoder, tokens(), "2:4", dict(solver=FailsInItsRows(where=1)) | DOWN),
        1,
        "no more",
    )


def test_a_rank_that_is_killed_in_its_rows_ends_the_others(workers):
    solver = FailsInItsRows(where=2, killed=True)
    *others, last = workers(3, pruned_by_rows, decoder, tokens(), "2:4", dict(solver=solver) | DOWN)
    assert last is None
    for error in others:
        assert isinstance(error, RankError) and "has ended" in str(error)


def killed(rank):
    def on_layer(layer, total):
        os.kill(os.getpid(), signal.SIGKILL)

    return pruned(rank, decoder, tokens(), "2:4", SPARSEGPT | dict(on_layer=on_layer))


def test_a_rank_that_is_killed_ends_the_others_with_a_message(workers):
    first, *others = workers(3, killed)
    assert first is None
    for error in others:
        assert isinstance(error, RankError) and "has ended" in str(error)


# Checkpoints


@pytest.mark.parametrize(
    ("arguments", "resumed", "layers"),
    [(SPARSEGPT, 8, 14), (ADMM | dict(targets=["up_proj", "down_proj"]), 3, 4)],
    ids=["layers", "rows"],
)
def test_a_checkpoint_of_some_ranks_is_continued_by_others(workers, tmp_path, arguments, resumed, layers):
    expected, _, whole = pruned(0, decoder, tokens(), "2:4", arguments)
    folder = tmp_path / "answers"
    assert_all_failed(workers(2, interrupted, folder, arguments), 0, "interrupted")
    for state, _, report in workers(3, pruned_with_a_checkpoint, folder, arguments):
        close(state, expected)
        assert report.resumed == resumed and list(report.layers) == list(whole.layers)
    state, _, report = pruned(0, decoder, tokens(), "2:4", arguments | dict(checkpoint=folder))
    close(state, expected)
    assert report.resumed == layers


def interrupted(rank, folder, arguments):
    def on_layer(layer, total):
        if layer.name.startswith("model.layers.1"):
            raise RuntimeError("interrupted")

    model = decoder()
    place = folder if rank == 0 else "/proc/nothing/can/be/made/here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(by_rows._EXCHANGES, "cpu", 0)
        return ms.prune(model, tokens(), "2:4", on_layer=on_layer, checkpoint=place, **arguments)


def pruned_with_a_checkpoint(rank, folder, arguments):
    place = folder if rank == 0 else "/proc/nothing/can/be/made/here"
    return pruned_by_rows(rank, decoder, tokens(), "2:4", arguments | dict(checkpoint=place))


# The command line


def command(rank, count, port, arguments):
    """(exit code, output, errors) of a command in a process that torchrun has started."""
    torch.distributed.destroy_process_group()  # that of the tests
    launched = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    launched |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    output, errors = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        for name, value in launched.items():
            patch.setenv(name, str(value))
        patch.setattr("sys.argv", ["moonshot", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, output.getvalue(), errors.getvalue()


def commands(workers, *arguments):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return workers(2, command, 2, port, arguments)


def test_the_command_line_under_torchrun(workers, tmp_path, monkeypatch):
    source = model_folder(tmp_path / "dense", pad_token_id=None)
    work = ["prune", source, "--data", DEMO / "calibration.txt", "--nsamples", "6", "--seqlen", "32"]
    work += ["--pattern", "2:4", "--solver", "sparsegpt"]
    saved, alone = tmp_path / "together" / "pruned", tmp_path / "alone"
    measured = ["--eval", DEMO / "heldout.txt"]
    first, other = commands(workers, *work, *measured, "--save", saved, "--checkpoint", tmp_path / "answers")
    assert first[0] == other[0] == 0 and other[1:] == ("", "")
    assert f"saved: {saved}" in first[1] and "14 layers" in first[1]
    (evaluation,) = json.loads((saved / "report.json").read_text())["evaluations"]
    assert f"{evaluation['dense']['value']:.2f}" in first[1] and evaluation["dense"] != evaluation["pruned"]
    assert [path.name for path in saved.parent.iterdir()] == ["pruned"]  # nothing is left of the others' copies
    monkeypatch.setattr("sys.argv", ["moonshot", *map(str, work), "--save", str(alone)])
    with pytest.raises(SystemExit):
        cli.main()
    close(load_file(saved / "model.safetensors"), load_file(alone / "model.safetensors"), rtol=1e-2)

    first, other = commands(workers, *work, "--save", saved)
    assert first[0] == other[0] == 1 and other[1:] == ("", "")
    assert first[1] == "" and f"{saved} exists" in first[2] and first[2].count("\n") == 1


@pytest.mark.parametrize(
    ("rank", "said"),
    [(0, "moonshot: eval runs in one process, and WORLD_SIZE is 2: start it without torchrun"), (1, "")],
)
def test_what_does_not_share_its_work_is_refused(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert run(monkeypatch, "eval", "model", "--data", "c4") == 1
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == bool(said)
