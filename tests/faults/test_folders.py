"""Model folders with random damage: they load, or are refused in one line, and nothing else is read or written."""

import json
import shutil

import pytest

from moonshot.files.folder import opened
from moonshot.files.source import FolderError
from tests.faults.runs import generator, names
from tests.models import model_folder

TRIES = 150
ODD = (None, True, -1, 0, 2**70, 1.5, "", "x", "../x", "/etc/passwd", [], [1], {}, {"a": 1}, "\x1b[31m", "a/b")


def flipped(content, random):
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 8))):
        content[random.randrange(min(len(content), random.choice((16, 4000, 10**9))))] = random.randrange(256)
    return bytes(content)


def cut(content, random):
    return content[: random.randrange(len(content))]


def odd_value(content, random):
    """JSON, or a safetensors file's header, with another value somewhere."""
    size = int.from_bytes(content[:8], "little")
    framed = content[:1] != b"{"
    tree = json.loads(content[8 : 8 + size] if framed else content)
    place = tree
    while True:
        key = random.choice(list(place))
        if isinstance(place[key], dict) and place[key] and random.random() < 0.8:
            place = place[key]
        else:
            break
    place[key] = random.choice(ODD)
    text = json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :] if framed else text


@pytest.mark.parametrize("damage", [flipped, cut, odd_value], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_damaged_folders(tmp_path, damage, file):
    whole = model_folder(tmp_path / "whole")
    if file.endswith("index.json"):
        shutil.rmtree(whole)
        model_folder(whole, shard="40KB")
    random, refused = generator(damage.__name__, file), 0
    content = (whole / file).read_bytes()
    for _ in range(TRIES // (5 if file == "tokenizer.json" else 1)):
        folder = shutil.copytree(whole, tmp_path / "damaged")
        (folder / file).write_bytes(damage(content, random))
        try:
            with opened(folder, tmp_path / "out") as work:
                assert work.processor is not None
        except FolderError as error:
            refused += 1
            assert "\n" not in str(error)
        shutil.rmtree(folder)
        assert names(tmp_path) == ["whole"]
    print(f"{damage.__name__} {file}: refused {refused}, the others load")
