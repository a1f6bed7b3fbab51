"""What the pages say: the README's code runs, commands can be read, parameters of public names are described."""

import importlib.util
import inspect
import re
import shlex
from enum import Enum
from pathlib import Path

import pytest
import typer

import moonshot as ms
from moonshot.app import cli
from moonshot.checks import check_objective

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
    check_objective(names["ClippedReconstruction"]())


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


def written_commands():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if "_build" not in page.parts:
            text = page.read_text("utf-8").replace("\\\n", " ")  # a command of several lines
            for line in re.findall(r"^    moonshot (.*)", text, re.MULTILINE):
                yield pytest.param(shlex.split(line, comments=True), id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("arguments", list(written_commands()))
def test_the_commands_of_the_pages_can_be_read(monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    for file in ("run.yaml", "pruned/run.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("model: m\ndata: d\npattern: 2:4\n")
    command = typer.main.get_command(cli.app).commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])  # raises for options and values that it cannot read
