"""Which layers to prune: names, globs and `re:` expressions."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from moonshot.errors import ArgumentTypeError, MoonshotError


class TargetError(MoonshotError):
    """A target or ignore expression that matches no layer."""


def select(
    names: Iterable[str], targets: str | Iterable[str] | None, ignore: str | Iterable[str] = ()
) -> list[str]:
    """The layers among `names` that match a target and no ignore, in order.

    An expression is a full name, the end of one after a dot ("q_proj"), a glob ("*.mlp.*") or `re:` with a
    regular expression that must match the whole name. No targets: every layer. An expression that matches
    nothing is an error.
    """
    names = list(names)
    chosen = set(names) if targets is None else _matching(names, targets, "target")
    left_out = _matching(names, ignore, "ignore")
    selected = [name for name in names if name in chosen and name not in left_out]
    if not selected:
        raise TargetError(
            "no layer is left to prune: "
            + (
                "ignore leaves out all that targets match"
                if chosen
                else "targets is empty, without it all are pruned"
            )
        )
    return selected


def listed(names: Iterable[str], separator: str = ", ", most: int = 4) -> str:
    """Some names in one line."""
    names = list(names)
    return separator.join(names[:most]) + (f"{separator}..." if len(names) > most else "")


def _matching(names: list[str], expressions: str | Iterable[str], kind: str) -> set[str]:
    matched: set[str] = set()
    for expression in _as_texts(expressions, kind):
        found = {name for name in names if _matches(expression, name)}
        if not found:
            endings = {name.rpartition(".")[2] for name in names}
            close = get_close_matches(expression, [*names, *sorted(endings)], 1)
            if any(_matches(f"*.{expression}", name) for name in names):  # a glob is of the whole name
                close = [f"*.{expression}"]
            meant = f"did you mean {close[0]}? " if close else ""
            raise TargetError(f"the {kind} {expression!r} matches no layer; {meant}layers are {listed(names)}")
        matched |= found
    return matched


def _as_texts(expressions: str | Iterable[str], kind: str) -> list[str]:
    if isinstance(expressions, str):
        return [expressions]
    texts = list(expressions) if isinstance(expressions, Iterable) else [expressions]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ArgumentTypeError(f'each {kind} expression is text such as "q_proj", got {wrong[0]!r}')
    return texts


def _matches(expression: str, name: str) -> bool:
    if expression.startswith("re:"):
        try:
            return re.fullmatch(expression[3:], name) is not None
        except re.error as error:
            raise TargetError(f"{expression!r} is not a regular expression: {error}") from error
    return name == expression or name.endswith("." + expression) or fnmatchcase(name, expression)
