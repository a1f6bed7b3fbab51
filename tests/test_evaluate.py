"""`moonshot eval` and `prune --eval`: by the field's protocols, beside the dense model, by lm-eval's tasks."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

import hub
import moonshot
from moonshot.app import cli
from moonshot.files.load import load
from moonshot.models import evaluation
from tests.models import SIZES

DEMO = Path(moonshot.__file__).parent / "demo"
LINES = (DEMO / "heldout.txt").read_text("utf-8").split("\n")
DOCUMENTS = ["\n".join(LINES[first : first + 8]) for first in range(0, 160, 8)]
FEW = ["--seqlen", 32, "--nsamples", 4]
PRUNE = ["--pattern", "2:4", "--solver", "magnitude", "--objective", "reconstruction"]


@pytest.fixture(autouse=True)
def here(tmp_path, dataset_cache, monkeypatch):
    """A folder with both data sets, as on the hub, and a model."""
    hub.wikitext(tmp_path, train=LINES[:60], test=LINES[60:100])
    hub.c4(tmp_path, train=DOCUMENTS, validation=DOCUMENTS[:5])
    shutil.copytree(DEMO / "model", tmp_path / "dense")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*arguments, status=0):
        """What the command says: on standard output, or in one line on standard error where it fails."""
        monkeypatch.setattr("sys.argv", ["moonshot", *map(str, arguments)])
        try:
            cli.main()
            stopped = 0
        except SystemExit as stop:
            stopped = stop.code or 0
        said, complaint = capfd.readouterr()
        assert stopped == status, complaint
        assert complaint.count("\n") == bool(status)
        return complaint if status else said

    return run


def figures(text):
    """Every perplexity, with its context and windows."""
    return re.findall(r"([\d.]+) \(context (\d+), (\d+) windows\)", text)


def test_prune_measures_before_and_after_and_eval_agrees(run, tmp_path):
    said = run("prune", "dense", "--data", "c4", *PRUNE, *FEW, "--save", "pruned")
    first, *_ = figures(said)
    report = json.loads((tmp_path / "pruned" / "report.json").read_text())
    (found,) = report["evaluations"]
    assert found["data"] == "C4 validation" and found["metric"] == "perplexity"
    dense, pruned = found["dense"], found["pruned"]
    assert first == (f"{dense['value']:.2f}", "32", str(dense["windows"])) and dense["value"] < pruned["value"]
    assert f"C4 validation: perplexity {dense['value']:.2f}" in (tmp_path / "pruned" / "README.md").read_text()
    said = run("eval", "pruned", "--data", "c4", "--seqlen", 32)
    assert said.startswith("C4 validation\n") and said.rstrip().endswith("the dense model dense")
    assert [value for value, _, _ in figures(said)] == [f"{each['value']:.2f}" for each in (pruned, dense)]
    (tmp_path / "dense").rename(tmp_path / "elsewhere")
    said = run("eval", "pruned", "--data", "wikitext2", "--seqlen", 32, "--nsamples", 3)
    assert said.startswith("WikiText-2 test\n") and len(figures(said)) == 1
    assert "the dense model was not measured: dense is not on this machine" in said


def test_what_prune_measures_can_be_named(run, tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS))
    some = ["--data", "own.jsonl", "--text-column", "body", *PRUNE, *FEW]
    said = run("prune", "dense", *some, "--save", "one", "--eval", "wikitext2", "--eval", "own.jsonl")
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert [each["data"] for each in report["evaluations"]] == ["WikiText-2 test", "own.jsonl"]
    said = run("prune", "dense", *some, "--save", "two")
    assert "measured with --eval" in said and not figures(said)
    said = run("prune", "dense", "--data", "wikitext2", *PRUNE, *FEW, "--save", "three", "--eval", "none")
    assert not figures(said)
    (tmp_path / "allenai").rename(tmp_path / "gone")
    (tmp_path / "allenai" / "c4").mkdir(parents=True)
    said = run("prune", "dense", *some, "--save", "four", "--eval", "c4", status=1)
    assert "C4 validation (allenai/c4" in said and "--eval none" in said and not (tmp_path / "four").exists()


def test_files_that_are_no_text_are_named(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("\n".join(LINES[:60]))
    (tmp_path / "data" / "b.png").write_bytes(b"\x89PNG\0")
    said = run("eval", "dense", "--data", "data", *FEW)
    assert "1 files skipped: data/b.png is no text" in said and len(figures(said)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dense"], "say what to measure: --data wikitext2"),
        (["dense", "--data", "c4", "--include-path", "."], "add --tasks"),
        (["dense", "--data", "c4", "--seqlen", 1], "at least two tokens"),
        (["dense", "--data", "c4", "--seqlen", 8, "--nsamples", -3], "0 for all, got -3"),
        (["dense", "--tasks", "arc_easy", "--nsamples", 10], "--tasks have all of theirs"),
        (["dense", "--data", "./wikitext"], "is no file, folder or loadable dataset"),
        (["dense", "--data", "./wikitext2"], "(did you mean wikitext2?)"),
        (
            ["dense", "--data", "c4", "--seqlen", 8, "--nsamples", 999],
            "windows of 8 tokens, 999 were asked for",
        ),
        ([DEMO / "vit", "--data", "c4"], "c4 is text, and the model is an image classifier"),
        ([DEMO / "vit", "--data", "images", "--text-column", "x"], "--text-column is of text"),
        ([DEMO / "vit", "--tasks", "arc_easy"], "--tasks are of language models"),
        (["dense", "--tasks", "arc_easy", "--include-path", "nowhere"], "--include-path nowhere is no folder"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, words):
    assert words in run("eval", *arguments, status=1)


def test_without_lm_eval_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'moonshot[eval]'" in run("eval", "dense", "--tasks", "arc_easy", status=1)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_too_little_memory_is_one_line(run, monkeypatch, error):
    def too_large(*arguments):
        raise error

    monkeypatch.setattr(evaluation, "next_token_loss", too_large)
    assert "not enough memory to run the model: give a smaller --seqlen" in run(
        "eval", "dense", "--data", "c4", "--seqlen", 32, status=1
    )


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(run, monkeypatch):
    monkeypatch.setattr(
        "moonshot.files.plan.free_memory", lambda device: 6 * 10**6
    )  # of 3.2 M weights of 2 bytes
    words = "the weights of dense take 6.3 MiB, 5.7 MiB of memory are free"
    assert words in run("eval", "dense", "--data", "c4", "--seqlen", 32, status=1)


@pytest.mark.parametrize(("loss", "value"), [(1e5, "inf"), (float("nan"), "nan")])
def test_a_broken_model_s_perplexity_is_infinite_or_no_number(loss, value, monkeypatch):
    monkeypatch.setattr(evaluation, "next_token_loss", lambda model, ids: torch.tensor(loss))
    found = evaluation.perplexity(torch.nn.Linear(1, 1), torch.ones(2, 4, dtype=torch.int64))
    assert str(found.value) == value


@pytest.mark.parametrize("kind", ["Llama", "Mixtral", "Bart"])
def test_perplexity_is_of_the_next_token_alone_whatever_the_model_s_own_loss(kind):
    """Mixtral's has that of its routers in it if its configuration says so; Bart's is of the token that is read."""
    mixed = dict(num_local_experts=4, output_router_logits=True) if kind == "Mixtral" else {}
    bart = dict(d_model=16, decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2, vocab_size=61)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(bart if kind == "Bart" else SIZES | mixed))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for weight in model.parameters():
        weight.data.mul_(4)
    ids = torch.randint(4, 61, (5, 12))
    with torch.no_grad():
        chances = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    expected = float(chances.mean().neg().exp())
    for size in (None, 2):
        found = evaluation.perplexity(model, ids.int(), size)
        assert found.value == pytest.approx(expected, rel=1e-5) and found.windows == 5


def accuracy_by_hand(folder, rows):
    """How often the right choice is the one whose tokens are likeliest after the question."""
    model, tokenizer = load(folder)
    right = 0
    for row in rows:
        start, likelihoods = len(tokenizer(row["question"])["input_ids"]), []
        for choice in row["choices"]:
            ids = torch.tensor(tokenizer(f"{row['question']} {choice}")["input_ids"])
            with torch.no_grad():
                logs = model(ids[None]).logits[0].log_softmax(-1)
            likelihoods.append(float(logs[range(start - 1, len(ids) - 1), ids[start:]].sum()))
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    return right / len(rows)


def test_a_task_of_one_s_own_by_lm_eval(run, tmp_path):
    pytest.importorskip("lm_eval")
    folder, rows = tmp_path / "tasks", hub.next_words(tmp_path / "tasks")
    run("prune", "dense", "--data", "c4", *PRUNE, *FEW, "--save", "pruned", "--eval", "none")
    own = ["--tasks", "next_word", "--include-path", folder]
    said = run("eval", "pruned", *own, "--data", "c4", *FEW)
    assert re.search(r"lm-eval \d+\.\d+", said) and len(figures(said)) == 2
    right = [accuracy_by_hand(str(tmp_path / name), rows) for name in ("pruned", "dense")]
    assert [float(value) for value in re.findall(r"([\d.]+) \+- ", said)] == right
    assert "did you mean next_word?" in run("eval", "dense", "--tasks", "next_wrd", *own[2:], status=1)
    (folder / "rows.jsonl").unlink()
    assert "lm-eval cannot run next_word: " in run("eval", "dense", *own, status=1)
