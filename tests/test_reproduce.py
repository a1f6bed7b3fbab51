"""benchmarks/reproduce, every table from end to end on a tiny model and data sets in the layout of the real ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

import hub
import moonshot
from benchmarks.reproduce import __main__ as reproduce
from benchmarks.reproduce.published import PUBLISHED
from benchmarks.reproduce.tables import METHODS, TABLES
from models import DEMO, model_folder

LINES = (DEMO / "heldout.txt").read_text("utf-8").split("\n")
SYNSETS = ["n01440764", "n01443537", "n01484850"]
TEXT = [name for name, table in TABLES.items() if table.text]
EACH = dict(zip(TEXT, METHODS, strict=False))  # all methods, one for each table
VISION = {"vit-b": ViTConfig, "deit-b": ViTConfig, "resnet-50": ResNetConfig}  # the hub's DeiT-B is a ViT


@pytest.fixture(autouse=True)
def here(tmp_path, dataset_cache, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table_of(output):
    """The cells of every row of the markdown table that was printed, by pattern and method."""
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return rows[0], {tuple(row[:2]): row[2:] for row in rows[1:]}


@pytest.mark.parametrize("name", TEXT)
def test_a_table_of_a_language_model(tmp_path, capsys, name):
    hub.wikitext(tmp_path, train=LINES[:10], test=LINES[:20])
    hub.c4(tmp_path, train=["\n".join(LINES[:12]), "\n".join(LINES[12:24])], validation=LINES[:30])
    model = model_folder(tmp_path / "model", num_hidden_layers=1)
    options = ["--model", str(model), "--seqlen", "16", "--nsamples", "2", "--output", "outputs"]
    reproduce.main([name, *options, "--methods", EACH[name]])
    head, rows = table_of(capsys.readouterr().out)
    assert head == [
        "pattern",
        "method",
        "WikiText-2 test",
        "published",
        "C4 validation",
        "published",
        "minutes",
    ]
    assert set(rows) == {("dense", "dense"), *((pattern, EACH[name]) for pattern in TABLES[name].patterns)}
    for wikitext, _, c4, _, _ in rows.values():
        assert 1000 < float(wikitext) < 4000 and 1000 < float(c4) < 4000  # a random model of 2048 tokens
    assert len({row[0] for row in rows.values()}) == len(rows)  # each has its own


def test_a_table_with_tasks(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    hub.wikitext(tmp_path, train=LINES[:10], test=LINES[:20])
    hub.c4(tmp_path, train=["\n".join(LINES[:12])], validation=LINES[:30])
    hub.next_words(tmp_path / "tasks")
    options = ["--seqlen", "16", "--nsamples", "2", "--patterns", "2:4", "--methods", "SparseGPT"]
    options += ["--output", "outputs", "--tasks", "next_word", "--include-path", "tasks"]
    reproduce.main(["llama-3-8b", "--model", str(model_folder(tmp_path / "model")), *options])
    head, rows = table_of(capsys.readouterr().out)
    assert head[-5:] == ["next_word", "published", "zero-shot mean", "published", "minutes"]
    for row in rows.values():
        assert row[-5] == row[-3] and float(row[-3]) in (0, 25, 50, 75, 100)


@pytest.mark.parametrize("name", list(VISION))
def test_a_table_of_an_image_classifier(tmp_path, capsys, name):
    for part, count in (("train", 2), ("val", 3)):
        for number, synset in enumerate(SYNSETS):
            (tmp_path / "imagenet" / part / synset).mkdir(parents=True)
            for image in range(count):
                file = tmp_path / "imagenet" / part / synset / f"{synset}_{image}.JPEG"
                Image.new("RGB", (20, 16), (90 * number, 40 * image, 7)).save(file)
    labels = {"id2label": {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark"}}
    sizes = dict(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, intermediate_size=32)
    if name == "resnet-50":
        sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    config = VISION[name](**sizes, **labels, label2id={label: k for k, label in labels["id2label"].items()})
    AutoModelForImageClassification.from_config(config).save_pretrained("model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained("model")
    options = ["--model", "model", "--images", "imagenet", "--nsamples", "4", "--output", "outputs"]
    reproduce.main([name, *options, "--methods", "ADMM, default"])
    head, rows = table_of(capsys.readouterr().out)
    assert head == ["pattern", "method", "ImageNet", "published", "minutes"]
    assert len(rows) == 1 + len(TABLES[name].patterns)
    thirds = {f"{100 * right / 9:.2f}" for right in range(10)}
    assert {row[0] for row in rows.values()} <= thirds
    with pytest.raises(SystemExit, match="--images IMAGENET"):
        reproduce.main([name])


def test_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    known = {"nsamples": 2, "seqlen": 2048, "seed": 0, "tasks": None, "model": "model"}
    shutil.copytree(Path(moonshot.__file__).parent / "demo" / "model", "model")
    rows = [
        known | {"pattern": pattern, "method": method, "figures": {"WikiText-2 test": 7.0}, "minutes": 1}
        for pattern, method in (("dense", "dense"), ("70%", "ADMM"), ("70%", "SparseGPT"))
    ]
    (tmp_path / "llama-2-7b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["llama-2-7b", "--model", "model", "--nsamples", "2", "--output", str(tmp_path)]
    reproduce.main([*command, "--patterns", "70%", "--methods", "ADMM"])
    said = capsys.readouterr().out
    head, found = table_of(said)
    assert found == {("dense", "dense"): ["7.00", "5.47", "1.0"], ("70%", "ADMM"): ["7.00", "19.31", "1.0"]}
    assert "19.31: ALPS, arXiv 2406.07831" in said
    with pytest.raises(SystemExit, match=r"llama-2-7b: C4 train .*cannot be loaded"):
        monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: 1 / 0)
        reproduce.main([*command, "--seqlen", "16"])


def test_published_figures_belong_to_rows_that_there_are():
    data = {True: {"WikiText-2 test", "C4 validation"}, False: {"ImageNet"}}
    for (name, pattern, method, about), figure in PUBLISHED.items():
        table = TABLES[name]
        assert about in data[table.text] and (figure.context == 0) is not table.text
        assert (pattern, method) == ("dense", "dense") or (pattern in table.patterns and method in METHODS)
        assert re.search(r"arXiv \d{4}\.\d{5}", figure.paper) or pattern == "dense"
