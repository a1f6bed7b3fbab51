"""What is written on the command line, as objectives, patterns and solvers; one's own by `module:Class`."""

import ast
import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from moonshot import solvers
from moonshot.app.names import SOLVERS, TERMS
from moonshot.errors import ArgumentError, MoonshotError
from moonshot.layer.columns import Columns
from moonshot.layer.objectives import Objective
from moonshot.layer.patterns import Pattern, as_pattern
from moonshot.models.adapter import Adapter
from moonshot.pruning.refit import Refit
from moonshot.solvers import Solver

_TERM = re.compile(r"\s*([0-9.eE-]+)?\s*\*?\s*([A-Za-z_][\w.]*(?::\w+)?)\s*(?:\((.*)\))?\s*")


def parse_objective(text: str) -> Objective | str:
    """ "0.6 reconstruction + 0.4 fisher" as an objective; a missing weight is 1. "auto" stays what it is.

    A term of one's own is `module:Class`, with arguments such as `mymodule:Huber(delta=0.1)` if it has any.
    Raises ValueError for what cannot be read.
    """
    if text.strip() == "auto":
        return "auto"
    total: Objective | None = None
    for part in re.split(r"\+(?![^(]*\))", text):
        match = _TERM.fullmatch(part)
        if match is None:
            raise ArgumentError(
                f"cannot read {part.strip()!r} in the objective: write terms with weights, such as "
                '"0.7 reconstruction + 0.3 fisher"'
            )
        weight, name, arguments = match.groups()
        kind = _found(name, TERMS, "term", "--objective")
        term = _made(kind, _arguments(arguments or ""), Objective, name)
        weighted = (_number(weight, part) if weight else 1.0) * term
        total = weighted if total is None else total + weighted
    assert total is not None  # split gives one part at least
    return total


def parse_pattern(pattern: str | None, sparsity: float | None, columns: float | None = None) -> Pattern:
    """The pattern that --pattern and --sparsity name together, or --columns alone.

    Raises ValueError where they contradict each other.
    """
    if columns is not None and (pattern is not None or sparsity is not None):
        raise ArgumentError("--columns is a pattern of its own: leave --pattern and --sparsity out")
    if columns is not None:
        return Columns(columns)
    if pattern is None and sparsity is None:
        raise ArgumentError("say how much to prune: --pattern 2:4, --sparsity 0.5 or --columns 0.25")
    if pattern is None:
        return as_pattern(sparsity)  # type: ignore[arg-type]
    chosen = _own_pattern(pattern) if _is_own(pattern) else as_pattern(pattern)
    promised = getattr(chosen, "sparsity", None)
    if sparsity is not None and (promised is None or abs(promised - sparsity) > 1e-9):
        raise ArgumentError(
            f"--pattern {pattern} and --sparsity {sparsity:g} contradict each other (N:M keeps n of every m): "
            "give one of them"
        )
    return chosen


def parse_solver(name: str, options: Iterable[str] = ()) -> Solver:
    """A solver by its name, or one's own by `module:Class`, with options such as "growth=1.05".

    They may also stand behind the name, as in "admm(growth=1.05)". Swaps start from ADMM unless the option `inner`
    names another. Raises ValueError for unknown names and options.
    """
    match = re.fullmatch(r"([^()]*)\((.*)\)\s*", name)
    name, given = (match[1].strip(), _arguments(match[2])) if match else (name, {})
    kind = _found(name, SOLVERS, "solver", "--solver")
    given |= _options(options, "--solver-option", "growth=1.05")
    if kind is solvers.Swaps:
        given["inner"] = parse_solver(str(given.get("inner", "admm")))
    return _made(kind, given, Solver, name)


def parse_refit(wanted: bool, options: Iterable[str]) -> Refit | None:
    """How parts are refitted, if `wanted` or with options such as "stages=3". Raises ValueError for unknown options."""
    given = _options(options, "--refit-option", "stages=3")
    return _made(Refit, given, Refit, "--refit") if wanted or given else None


def parse_adapter(name: str | None) -> Adapter | None:
    """A model adapter of one's own by `module:Class`."""
    return None if name is None else _made(_imported(name, "--adapter"), {}, Adapter, name)


def _own_pattern(text: str) -> Pattern:
    match = re.fullmatch(r"([\w.]+:\w+)\s*(?:\((.*)\))?", text.strip())
    if match is None:
        raise ArgumentError(f"cannot read the pattern {text!r}: write module:Class or module:Class(name=value)")
    return _made(_imported(match[1], "--pattern"), _arguments(match[2] or ""), Pattern, match[1])


def _is_own(text: str) -> bool:
    return re.match(r"[A-Za-z_][\w.]*:[A-Za-z_]", text.strip()) is not None


def _found(name: str, known: dict[str, Any], kind: str, flag: str) -> Any:
    if ":" in name:
        return _imported(name, flag)
    if name.lower() in known:
        return known[name.lower()]
    close = get_close_matches(name.lower(), known, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise ArgumentError(
        f"{flag}: no {kind} is called {name!r}; {meant}there are {', '.join(known)}, and your own as module:Class"
    )


def _imported(name: str, flag: str) -> Any:
    """A class by `module:Class`; modules beside the working directory's files are found too."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ArgumentError(f"{flag} {name}: write module:Class")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ArgumentError(
            f"{flag} {name}: {module} is no module's name: write it as Python imports it, "
            f"{Path(module).stem}:{attribute}, with its folder on PYTHONPATH"
        )
    try:
        found = import_module(module)
    except ImportError as error:
        where = ""
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        ):  # or its package
            where = f"; the file {module.replace('.', '/')}.py must be in {Path.cwd()} or on PYTHONPATH"
        raise ArgumentError(f"{flag} {name}: cannot import {module}: {error}{where}") from error
    if not isinstance(getattr(found, attribute, None), type):
        classes = [key for key, value in vars(found).items() if isinstance(value, type)]
        raise ArgumentError(
            f"{flag} {name}: {module} has no class {attribute}; it has {', '.join(classes) or 'none'}"
        )
    return getattr(found, attribute)


def _made(kind: type, arguments: dict[str, Any], protocol: type, name: str) -> Any:
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        known = list(inspect.signature(kind).parameters)
        unknown = [argument for argument in arguments if argument not in known]
        close = get_close_matches(unknown[0], known, 1) if unknown else []
        meant = f"did you mean {close[0]}? " if close else ""
        raise ArgumentError(f"{name}: {error}; {meant}it takes {', '.join(known) or 'no options'}") from error
    try:
        made = kind(**arguments)
    except MoonshotError:
        raise
    except (TypeError, ValueError) as error:  # a value of another kind than its options have
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ArgumentError(f"{name} cannot be made with {given or 'no options'}: {error}") from error
    if not isinstance(made, protocol):
        raise ArgumentError(
            f"{name} is no {protocol.__name__.lower()}: {_lack(made, protocol)}; docs/extending.md says what one needs"
        )
    return made


def _lack(made: Any, protocol: type) -> str:
    """What makes an object none of a kind."""
    if not getattr(protocol, "_is_protocol", False):
        return f"it must be a subclass of moonshot.{protocol.__name__}"
    names = [name for name in dir(protocol) if not name.startswith("_") and not hasattr(made, name)]
    return f"it is missing {', '.join(names)}"


def _arguments(text: str) -> dict[str, Any]:
    """ "delta=0.1, scale=2" as a dictionary."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ArgumentError(f"cannot read the arguments ({text}): write name=value, name=value") from error


def _options(options: Iterable[str], flag: str, example: str) -> dict[str, Any]:
    """ "delta=0.1", "scale=2" as a dictionary. flag: what they were given by."""
    given = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ArgumentError(f"cannot read {flag} {option!r}: write name=value, such as {example}")
        given[key.strip()] = _literal(value.strip())
    return given


def _literal(text: str) -> Any:
    """A value as Python writes it, a number, which may be nan or inf, or the text itself."""
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        except (SyntaxError, ValueError):
            continue
    return text


def _number(text: str, part: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ArgumentError(f"cannot read the weight {text!r} of {part.strip()!r} in the objective") from error
