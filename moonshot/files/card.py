"""What a pruned model's folder says of itself: to whoever opens it, and to the hub."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from moonshot.files.load import Source
from moonshot.files.source import is_hub_name
from moonshot.pruning.report import Evaluation, Report

_TERMS = (
    "license",
    "license_name",
    "license_link",
    "language",
)  # what a dense model's card says of the pruned one
_PLACES = ("--save", "--html", "--checkpoint")  # options whose values are paths that need not be there yet

_MASK = "A layer's mask is `weight != 0`; `report.json` has the figures of every layer."
_ZEROS = (
    "The zeros are stored as they are, so that the model loads as the dense one does, takes as much space and runs "
    f"as fast. {_MASK}"
)
_COMPACT = (
    "It was saved without its zeros. While there is a `compact.json` beside this card, `moonshot.load_compact` reads "
    f"the folder and `moonshot unpack` makes an ordinary one of it. {_MASK}"
)
_SHRUNK = (
    "What was zero as a whole, hidden units and groups of attention heads, is cut out: this is an ordinary model with "
    "a smaller configuration. `report.json` has the figures of every layer as it was before that."
)


def model_card(report: Report, source: Source | None, compact: bool = False) -> str:
    """A README.md with front matter.

    source: where the dense model is from, where that is known. compact: whether it is saved without its zeros.
    Whoever sees it does not learn what the folders of this machine are called: of a path it has the last part.
    """
    from huggingface_hub import ModelCardData

    recipe = report.recipe
    pattern = str(recipe.get("pattern", ""))
    about: dict[str, Any] = {"library_name": "transformers", "tags": ["moonshot", "pruned", "sparse", pattern]}
    title = "A pruned model"
    if source is not None:
        about |= _terms(source)
        about["pipeline_tag"] = "image-classification" if source.is_image_classifier else "text-generation"
        if is_hub_name(source.name):
            about["base_model"] = source.name
        title = f"{source.name if is_hub_name(source.name) else source.folder.resolve().name}, pruned"
    lines = ["---", ModelCardData(**about).to_yaml(), "---", "", f"# {title}", ""]
    lines += [
        f"Pruned in one shot with moonshot to {pattern}: {100 * report.sparsity:.2f} % of the weights of "
        f"{len(report.layers)} layers became zero.",
        "",
        _SHRUNK if "shrink" in recipe else _COMPACT if compact else _ZEROS,
    ]
    lines += [part for evaluation in report.evaluations for part in ("", f"{_public(evaluation)}.")]
    if "command" in recipe:
        lines += ["", "    " + _command(str(recipe["command"]))]
    lines += ["", "| recipe | |", "|---|---|"]
    lines += [
        f"| {name} | {_cell(_last_part(value) if name in ('model', 'data') else value)} |"
        for name, value in recipe.items()
        if name not in ("command", "read_from")
    ]
    lines += [
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in report.versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _terms(source: Source) -> dict[str, Any]:
    """The terms of use and languages in the front matter of the dense model's card."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(source.folder / "README.md") or {}
    except Exception:  # no card, or one that cannot be read: neither is needed
        return {}
    return {name: found[name] for name in _TERMS if isinstance(found.get(name), str | list)}


def _command(text: str) -> str:
    words = shlex.split(text)
    return shlex.join(
        _last_part(word, before in _PLACES) for before, word in zip(["", *words], words, strict=False)
    )


def _last_part(word: Any, is_path: bool = False) -> str:
    """The last part of a word that is a path, or an option with one; all of any other, such as a name on the hub.

    is_path: whether it is one for sure.
    """
    flag, equals, value = str(word).partition("=") if str(word).startswith("--") else ("", "", str(word))
    name, colon, rest = value.partition(":")  # of a dataset, a configuration and a split
    if "/" in name and (is_path or flag in _PLACES or not is_hub_name(name)):
        name = Path(name).name
    return f"{flag}{equals}{name}{colon}{rest}"


def _public(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, data=_last_part(evaluation.data))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
