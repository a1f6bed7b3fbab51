"""Docstrings of moonshot for Sphinx: an entry for each parameter, what is raised, and the source at the end.

In the code a docstring says what something does, and then describes parameters or fields in lines of their own:

    samples, context: calibration windows and their tokens.
    seed: of the windows; the same seed gives the same ones.

A sentence that begins with "Raises" says which errors there are and where; a paragraph that begins with "Source:" names
the paper.
"""

import dataclasses
import inspect
import re
from itertools import zip_longest
from typing import Any

_ENTRY = re.compile(r"(?:^|(?<=[.;)] ))((?:\w+, )*\w+): ")
_RAISES = re.compile(r"(?:^|(?<=\. ))(?=Raises )")


def parameters(documented: Any) -> list[str]:
    """The names of a function's parameters, or of a class's fields."""
    if dataclasses.is_dataclass(documented):
        return [field.name for field in dataclasses.fields(documented)] + list(vars(documented))
    try:
        return [name for name in inspect.signature(documented).parameters if name != "self"]
    except (TypeError, ValueError):
        return []


def parsed(docstring: str, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """(paragraphs, {parameter: text}) of a docstring; what is raised and the source are the last paragraphs."""
    body: list[str] = []
    end: list[str] = []
    described: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if paragraph.startswith(" "):
            body.append(paragraph)
            continue
        text, *raised = _RAISES.split(" ".join(line.strip() for line in paragraph.splitlines()))
        end += raised
        starts = [m for m in _ENTRY.finditer(text) if all(name in names for name in m[1].split(", "))]
        for start, following in zip_longest(starts, starts[1:]):
            said = text[start.end() : following and following.start()].strip(" ;")
            described |= dict.fromkeys(start[1].split(", "), said)
        text = text[: starts[0].start()] if starts else text
        (end if text.startswith("Source: ") else body).append(text.strip())
    return [part for part in (*body, *end) if part], described


def process(app: Any, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's autodoc-process-docstring."""
    names = parameters(documented) if what in ("class", "function", "method", "exception") else []
    paragraphs, described = parsed("\n".join(lines), names)
    lines[:] = [line for paragraph in paragraphs for line in (*paragraph.splitlines(), "")]
    lines += [f":param {name}: {text}" for name, text in described.items()]
    lines.append("")
