"""WikiText-2 and C4 as the field reads them, held against what its code does, written out once more."""

import gzip
import json
import math
import random
from pathlib import Path

import pytest
import torch

import hub
import moonshot
from moonshot.files import protocols
from moonshot.files.load import load
from moonshot.models.calibration import CalibrationError
from moonshot.models.evaluation import perplexity

DEMO = Path(moonshot.__file__).parent / "demo"
LINES = (DEMO / "heldout.txt").read_text("utf-8").split("\n")
SHORT = [line for line in LINES if line][:1200]
LONG = ["\n".join(LINES[first : first + 12]) for first in range(0, 300, 12)]
C4_TRAIN = [text for pair in zip(SHORT, LONG, strict=False) for text in pair]


@pytest.fixture(scope="module")
def demo():
    return load(str(DEMO / "model"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub.wikitext(folder, train=LINES[:200], test=LINES[200:300])
    hub.c4(folder, train=C4_TRAIN, validation=SHORT)
    return folder


@pytest.fixture(autouse=True)
def here(root, dataset_cache, monkeypatch):
    monkeypatch.chdir(root)


def perplexity_by_hand(model, ids, length):
    """exp of the mean over windows of the mean loss of their tokens, each predicted from those before it."""
    losses = []
    for first in range(0, len(ids) - length + 1, length):
        window = torch.tensor([ids[first : first + length]])
        with torch.no_grad():
            logits = model(window).logits[0, :-1].double()
        probabilities = torch.softmax(logits, -1)
        losses.append(
            -math.fsum(math.log(p[k]) for p, k in zip(probabilities, window[0, 1:], strict=True)) / (length - 1)
        )
    return math.exp(sum(losses) / len(losses))


def test_perplexity_on_wikitext2(demo):
    model, tokenizer = demo
    ids = tokenizer("\n\n".join(LINES[200:300]))["input_ids"]
    assert len(ids) % 48  # something is left over
    found = protocols.evaluation_windows("wikitext2", tokenizer, 48)
    measured = perplexity(model, found)
    assert (measured.context, measured.windows) == (48, len(ids) // 48)
    assert measured.value == pytest.approx(perplexity_by_hand(model, ids, 48), rel=1e-5)


@pytest.mark.parametrize(("length", "windows"), [(8, 256), (48, None)])
def test_perplexity_on_c4(demo, root, length, windows):
    model, tokenizer = demo
    file = root / "allenai" / "c4" / "en" / "c4-validation.00000-of-00008.json.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) > 1100
    ids = tokenizer(" ".join(texts[:1100]))["input_ids"][: 256 * length]
    found = protocols.evaluation_windows("c4", tokenizer, length)
    assert found.tolist() == torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length).tolist()
    assert len(found) == (windows or len(ids) // length)
    some = 16 * length
    measured = perplexity(model, found[:16])
    assert measured.value == pytest.approx(perplexity_by_hand(model, ids[:some], length), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 7])
def test_calibration_on_c4_draws_what_the_field_s_code_draws(demo, seed):
    _, tokenizer = demo
    length, expected = 60, []
    random.seed(seed)
    for _ in range(6):
        while True:
            text = C4_TRAIN[random.randint(0, len(C4_TRAIN) - 1)]
            ids = tokenizer(text)["input_ids"]
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        expected.append(ids[start : start + length])
    assert protocols.calibration_windows("c4", tokenizer, 6, length, seed).tolist() == expected


def test_calibration_on_wikitext2_draws_what_the_field_s_code_draws(demo):
    _, tokenizer = demo
    ids = tokenizer("\n\n".join(LINES[:200]))["input_ids"]
    random.seed(3)
    starts = [random.randint(0, len(ids) - 32 - 1) for _ in range(5)]
    found = protocols.calibration_windows("wikitext2", tokenizer, 5, 32, seed=3)
    assert found.tolist() == [ids[start : start + 32] for start in starts]


class Beginning:
    """A tokenizer that begins every text with token 1."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [1, *(3 + len(word) for word in text.split())]}


def test_a_token_that_begins_texts_is_in_the_first_window_only():
    assert (protocols.evaluation_windows("wikitext2", Beginning(), 20) == 1).sum() == 1
    assert (protocols.evaluation_windows("c4", Beginning(), 20) == 1).sum() == 1


def test_too_little_text_is_said(demo, tmp_path, monkeypatch):
    _, tokenizer = demo
    with pytest.raises(
        CalibrationError, match=r"none of the 50 documents of C4 train has more than 5000 tokens"
    ):
        protocols.calibration_windows("c4", tokenizer, 1, 5000)
    with pytest.raises(CalibrationError, match="WikiText-2 test has .* tokens, less than a window of 50000"):
        protocols.evaluation_windows("wikitext2", tokenizer, 50000)
    hub.c4(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=r"C4 validation \(allenai/c4.*"):
        protocols.evaluation_windows("c4", tokenizer, 8)


def test_a_data_set_that_cannot_be_reached_is_named(demo, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub\nmore")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(CalibrationError) as caught:
        protocols.calibration_windows("c4", demo[1], 1, 8)
    said = str(caught.value)
    assert "C4 train (allenai/c4, en/c4-train.00000-of-01024.json.gz) cannot be loaded" in said
    assert "./allenai/c4" in said and "\n" not in said
    assert capfd.readouterr() == ("", "")
