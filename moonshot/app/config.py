"""`--config`: the options of a command from a YAML file, and such a file of what a command was asked for."""

from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from moonshot.app.usage import value_mistake
from moonshot.errors import MoonshotError, meant_path
from moonshot.extras import from_extra

_NOT_IN_A_FILE = {"config", "help"}
_NULL = "tag:yaml.org,2002:null"


class ConfigError(MoonshotError):
    """A file of options that cannot be read, or that says what its command does not know."""


def read_into(context: typer.Context, file: Path | None) -> Path | None:
    """Make what the file says the defaults of the command's options: those on the command line come first.

    Raises ConfigError, which names the line, for options that the command does not have and values of another kind.
    """
    if file is None or context.resilient_parsing:  # as when a shell completes the line
        return file
    parameters = {p.name: p for p in context.command.params if p.name not in _NOT_IN_A_FILE}
    defaults: dict[str, Any] = {}
    for key, value, line in _entries(file):
        place, name = f"{file}, line {line}", key.replace("-", "_")
        if name not in parameters:
            names = [known.replace("_", "-") for known in parameters]
            close = get_close_matches(key.replace("_", "-"), names, 1)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise ConfigError(f"{place}: {context.command.name} has no option {key!r}; {meant}")
        if name in defaults:
            raise ConfigError(f"{place}: {key} is there twice")
        defaults[name] = _fitting(context, parameters[name], value, f"{place}: {key}")
    context.default_map = dict(context.default_map or {}) | defaults
    return file


def given(context: typer.Context) -> dict[str, Any]:
    """What a command's options are, in their order."""
    return {p.name: context.params[p.name] for p in context.command.params if p.name in context.params}


def saved_text(settings: Mapping[str, Any], versions: Mapping[str, str], without: set[str]) -> str:
    """A file for `--config` that repeats a run.

    settings: of the options, by name; without: those that do not change what the run gives.
    """
    import yaml

    known = {
        name: _plain(value)
        for name, value in settings.items()
        if name not in without | _NOT_IN_A_FILE and value not in (None, [], ())
    }
    made_by = ", ".join(f"{name} {number}" for name, number in versions.items())
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    return f"# repeats this run: moonshot prune --config run.yaml --save FOLDER\n# made by {made_by}\n{text}"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _entries(file: Path) -> list[tuple[str, str | list[str] | None, int]]:
    """(key, value or values as they are written, line) of a mapping in a YAML file; 2:4 stays text."""
    with from_extra("cli"):
        import yaml
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}{meant_path(file)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error or 'too deep'}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file} is no list of options: write one a line, such as pattern: 2:4")
    found = []
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{file}, line {line}: the name of an option is a word")
        found.append((key.value, _value(value, f"{file}, line {line}: {key.value}"), line))
    return found


def _value(node: Any, place: str) -> str | list[str] | None:
    if node.id == "scalar":
        return None if node.tag == _NULL else node.value
    items = node.value if node.id == "sequence" else [node]
    if any(item.id != "scalar" for item in items):
        raise ConfigError(f"{place} is one value, or a list of values, and has more inside")
    return [item.value for item in items if item.tag != _NULL]


def _fitting(context: typer.Context, parameter: Any, value: Any, place: str) -> Any:
    """A value as the option takes it: a list where it can be repeated."""
    if value is None:
        return None
    if getattr(parameter, "multiple", False):
        value = value if isinstance(value, list) else [value]
    elif isinstance(value, list):
        raise ConfigError(f"{place} is one value, not a list")
    try:
        parameter.process_value(context, value)
    except typer.BadParameter as error:
        raise ConfigError(f"{place}: {value_mistake(error)}") from error
    return value
