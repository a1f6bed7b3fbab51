"""Checkpoints with random damage: the run ends as it should have, or is refused in one line."""

import json
import os
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moonshot as ms
from moonshot.errors import MoonshotError
from moonshot.pruning.fingerprint import digest
from tests.faults.fuzz import fuzz
from tests.models import decoder, tokens, weights

WAYS = {
    "refit": dict(objective=ms.Reconstruction(), refit=True),
    "auto": dict(objective="auto"),
}
TEXTS = (
    "",
    "[]",
    "{}",
    "null",
    "0",
    '"x"',
    "{",
    "[{}]",
    "\x00",
    "\ufeff{}",
    '{"a": NaN}',
    "1e999",
    "[" * 10**5,
)
ODD = (None, True, -1, 2**70, 1.5, "", "x", [], [1], {}, {"a": 1})
KINDS = (
    "cut",
    "flipped",
    "longer",
    "text",
    "odd",
    "swapped",
    "copied",
    "extra",
    "locked",
    "gone",
    "folder",
    "link",
)
KINDS += ("loop", "pipe", "NaN", "reshaped")


@dataclass(frozen=True)
class Damage:
    kind: str
    file: int  # which one, among those of the folder in order
    other: int
    place: float  # how far into the file
    odd: object


damages = st.lists(
    st.builds(
        Damage,
        kind=st.sampled_from(KINDS),
        file=st.integers(0, 20),
        other=st.integers(0, 20),
        place=st.floats(0, 1, exclude_max=True),
        odd=st.sampled_from(ODD),
    ),
    min_size=1,
    max_size=3,
)


def damage(folder, how):
    """Do what a damage says, where there is a file that it can be done to."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return
    file, other = files[how.file % len(files)], files[how.other % len(files)]
    content = file.read_bytes()
    at = int(how.place * max(len(content), 1))
    if how.kind == "cut":
        file.write_bytes(content[:at])
    elif how.kind == "flipped" and content:
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 + how.other)]) + content[at + 1 :])
    elif how.kind == "longer":
        file.write_bytes(content + content[at:])
    elif how.kind == "text":
        file.write_text(TEXTS[how.other % len(TEXTS)])
    elif how.kind == "odd" and file.suffix == ".json":
        odd_value(file, how)
    elif how.kind == "swapped":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif how.kind == "copied":
        (folder / f"copy{how.other}{file.suffix}").write_bytes(content)
    elif how.kind == "extra":
        (folder / f"notes{how.other}.txt").write_text("mine")
    elif how.kind == "locked":
        file.chmod(0)
    elif how.kind in ("gone", "folder", "link", "loop", "pipe"):
        file.unlink()
        if how.kind == "folder":
            file.mkdir()
        elif how.kind == "link":
            file.symlink_to(folder / "nowhere")
        elif how.kind == "loop":
            file.symlink_to(file)
        elif how.kind == "pipe":
            os.mkfifo(file)
    elif file.suffix in (".safetensors", ".refit"):
        made_anew(file, how)


def odd_value(file, how):
    """Another value somewhere in a file of JSON."""
    try:
        place = json.loads(file.read_text())
        tree = place
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = keys[how.file % len(keys)]
            if not isinstance(place[key], dict | list) or not place[key]:
                break
            place = place[key]
        place[key] = how.odd
    except (ValueError, TypeError, IndexError):
        return
    file.write_text(json.dumps(tree))


def made_anew(file, how):
    """A file with a sound digest, of tensors that it cannot have."""
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        tensors = load_file(file)
    except Exception:  # it is damaged already
        return
    name = sorted(tensors)[how.other % len(tensors)]
    tensor = tensors[name]
    if how.kind == "NaN":
        tensors[name] = torch.full_like(tensor, torch.nan)
    elif how.kind == "reshaped":
        tensors[name] = torch.cat([tensor, tensor])
    ordered = [tensors[key] for key in (sorted(tensors, key=int) if "0" in tensors else sorted(tensors))]
    about["digest"] = digest([about["report"], about["before"], *ordered])
    save_file(tensors, file, about)


class Stopped(Exception):
    pass


class Checked:
    """A run that goes on from a damaged checkpoint. said: how often it ended how."""

    def __init__(self, folder, work):
        self.folder, self.work, self.said = folder / "whole", work, Counter()
        self.damaged, model = folder / "damaged", decoder()
        self.expected = self.finished(None)
        layers = len(self.expected[1])

        def stop(report, total):
            if len(seen) == total - layers // 2:
                raise Stopped
            seen.append(report)

        seen = []
        with pytest.raises(Stopped):
            ms.prune(model, tokens(8), "2:4", checkpoint=self.folder, on_layer=stop, **self.arguments)

    @property
    def arguments(self):
        return dict(solver=ms.SparseGPT(), factors=2, **self.work)

    def finished(self, checkpoint):
        """The pruned model's weights, and the layers' losses."""
        model = decoder()
        before = weights(model)
        try:
            report = ms.prune(model, tokens(8), "2:4", checkpoint=checkpoint, **self.arguments)
        except BaseException:
            assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
            raise
        return weights(model), {name: layer.relative for name, layer in report.layers.items()}

    def __call__(self, damages):
        shutil.rmtree(self.damaged, ignore_errors=True)
        shutil.copytree(self.folder, self.damaged)
        for each in damages:
            damage(self.damaged, each)
        extra = set(self.damaged.glob("notes*.txt"))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                found = self.finished(self.damaged)
            except (MoonshotError, OSError) as error:
                assert str(error) and "\n" not in str(error) and str(self.damaged) in str(error), error
                self.said["refused"] += 1
            else:
                assert found[1] == self.expected[1]
                assert all(torch.equal(value, self.expected[0][name]) for name, value in found[0].items())
                self.said["ended, after a warning" if warned else "ended"] += 1
        assert all("is damaged" in str(warning.message) for warning in warned), [str(w.message) for w in warned]
        assert all(path.read_text() == "mine" for path in extra)


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints(tmp_path, way):
    checked = Checked(tmp_path, WAYS[way])
    tried = fuzz(damages, checked)
    print(f"{way}: {tried} damaged checkpoints: {dict(checked.said)}")
