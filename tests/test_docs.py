"""What the README and the reference say: the README's code runs, and every parameter of a public name is described."""

import importlib.util
import inspect
import re
from enum import Enum
from pathlib import Path

import pytest

import moonshot as ms

ROOT = Path(ms.__file__).parent.parent


def test_the_code_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    said = capsys.readouterr().out
    dense, pruned = (float(value) for value in re.findall(r"^(?:dense|pruned): +([\d.]+)", said, re.MULTILINE))
    assert 10 < dense < pruned < 1.4 * dense
    assert names["report"].sparsity == 0.5
    assert 0 <= names["result"].gap <= 1


def docstrings():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described():
    """The public names that have parameters of their own."""
    for name in ms.__all__:
        public = getattr(ms, name)
        plain = inspect.isclass(public) and issubclass(public, Exception | Enum)
        if not plain and not getattr(public, "_is_protocol", False):
            yield name


@pytest.mark.parametrize("name", list(described()))
def test_every_parameter_is_described(name):
    public, reader = getattr(ms, name), docstrings()
    _, entries = reader.parsed(public.__doc__, reader.parameters(public))
    lacking = [parameter for parameter in inspect.signature(public).parameters if parameter not in entries]
    assert lacking == []


def test_a_docstring_becomes_entries():
    text = """What it is.

    first, second: (m, d), both.
    third: one sentence. fourth: another; fifth: and
    a long one: with a colon.

    More words. Raises ValueError for nothing.

    Source: a paper.
    """
    body, entries = docstrings().parsed(text, ["first", "second", "third", "fourth", "fifth"])
    assert body == ["What it is.", "More words.", "Raises ValueError for nothing.", "Source: a paper."]
    assert entries == {
        "first": "(m, d), both.",
        "second": "(m, d), both.",
        "third": "one sentence.",
        "fourth": "another",
        "fifth": "and a long one: with a colon.",
    }
