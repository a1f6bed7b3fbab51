"""Options with several values after one flag: `--solver sparsegpt admm`."""

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand


class Variadic(TyperCommand):
    """A command whose options that can be repeated take all values up to the next flag, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        return super().parse_args(ctx, list(spread(args, flags)))


def spread(arguments: Iterable[str], flags: set[str]) -> Iterable[str]:
    """`--flag a b` as `--flag a --flag b`, for flags among these."""
    flag, first = "", True
    for argument in arguments:
        if argument.startswith("-"):
            flag, first = argument if argument in flags else "", True
        elif flag and not first:
            yield flag
        yield argument
        first = first and argument.startswith("-")
