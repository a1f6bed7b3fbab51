"""Words of a command that cannot be read, each said in one line."""

from difflib import get_close_matches
from typing import Any

import typer

UsageError: Any = typer.BadParameter.__mro__[1]  # click's, which newer versions of typer have inside


def usage_mistake(error: Any) -> str:
    """What a UsageError is about, and where the command's help is."""
    words = error.format_message()
    if close := get_close_matches(
        getattr(error, "option_name", ""), getattr(error, "possibilities", ()) or (), 1
    ):
        words = f"{error.message}, did you mean {close[0]}?"
    elif isinstance(error, typer.BadParameter) and error.param and error.message:
        words = f"{error.param.opts[0]}: {value_mistake(error)}"
    words = (words[:1].lower() + words[1:]).rstrip(".")
    return words if error.ctx is None else f"{words} ({error.ctx.command_path} --help says more)"


def value_mistake(error: Any) -> str:
    """What a BadParameter says of a value, and the value: newer versions of typer leave that to the error's cause."""
    found: Any = getattr(error.__cause__, "errors", list)()
    if not found:
        return error.message
    words = found[0]["msg"].removeprefix("Value error, ").split(", unable to")[0]
    value = repr(found[0]["input"])
    return words if value in words else f"{words[:1].lower()}{words[1:]}, got {value}"
