"""Text from a file, a folder or a dataset: plain, or a column of its rows, or chats."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moonshot.errors import ArgumentError
from moonshot.files.records import NotTextError, is_table, read_characters, read_rows
from moonshot.models.calibration import open_dataset

_COLUMNS = ("text", "messages")  # what is taken of rows unless a column is named


@dataclass
class Texts:
    """What there is of text in the data, as one text.

    skipped: why the other files of a folder are not in it.
    """

    text: str
    skipped: list[str] = field(default_factory=list)


def read_text(data: str) -> str:
    """The text of a file, of every file in a folder by name, or of a dataset, joined by empty lines (`read_texts`)."""
    return read_texts(data).text


def read_texts(data: str, tokenizer: Any = None, column: str | None = None) -> Texts:
    """The text of a file, of every file in a folder by name, or of a dataset.

    data: a file of text, or of rows (JSON lines, CSV, TSV, Parquet), a folder of them, or a datasets name, which may
    carry a configuration and a split: "wikitext:wikitext-2-raw-v1:train".
    tokenizer: of transformers; its chat template makes text of chats, which are lists of messages.
    column: of rows, "text" or "messages" unless given; of a dataset otherwise its first of text.

    Raises ArgumentError where there is no text, for a file that cannot be read, and for chats without a template.
    """
    if not data:
        raise ArgumentError("the data has no name: give a text file, a folder or a dataset")
    path = Path(data)
    skipped: list[str] = []
    if path.is_file():
        values = _file_values(path, column)
    elif path.is_dir():
        values = []
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            try:
                values += _file_values(file, column)
            except NotTextError as error:
                skipped.append(str(error))
    else:
        values = _dataset_values(data, column)
    text = _joined(values, data, tokenizer)
    if not text.strip():
        raise ArgumentError("; ".join([f"{data} holds no text", *skipped[:4]]))
    return Texts(text, skipped)


def _file_values(file: Path, column: str | None) -> list[Any]:
    """The texts and chats of a file."""
    if not is_table(file):
        return [read_characters(file)]
    rows = read_rows(file)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return []
    name = _column(names, column, str(file))
    return [row[name] for row in rows if row.get(name)]


def _dataset_values(data: str, column: str | None) -> list[Any]:
    dataset = open_dataset(data)
    features = dataset.features
    texts = [key for key, kind in features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if column is None and texts and not set(_COLUMNS) & set(features):
        column = texts[0]
    return [value for value in dataset[_column(list(features), column, f"the dataset {data!r}")] if value]


def _column(names: Sequence[str], wanted: str | None, where: str) -> str:
    """The column to read. Raises NotTextError where there is none of that name."""
    found = [name for name in (_COLUMNS if wanted is None else (wanted,)) if name in names]
    if found:
        return found[0]
    close = get_close_matches(wanted or "", names, 1)
    raise NotTextError(
        f"{where} has no column {'of text' if wanted is None else repr(wanted)}, its columns are {', '.join(names)}: "
        + (f"did you mean {close[0]}?" if close else "name one of text or of messages by --text-column")
    )


def _joined(values: Sequence[Any], data: str, tokenizer: Any) -> str:
    """Texts with empty lines between them; chats as the template writes them, one after the other.

    A template writes the token that begins a text. Where the tokenizer adds it as well, the first chat is without.
    """
    parts = []
    for number, value in enumerate(values, 1):
        if isinstance(value, list):
            parts.append(_chat(value, f"chat {number} of {data}", tokenizer))
        elif isinstance(value, str):
            parts.append(value)
        else:
            raise ArgumentError(
                f"{data} has a column of {type(value).__name__}, not of text: --text-column names another"
            )
    if not values or not all(isinstance(value, list) for value in values):
        return "\n\n".join(parts)
    begin = tokenizer.bos_token or ""
    adds = begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "".join(parts).removeprefix(begin if adds else "")


def _chat(messages: list[Any], where: str, tokenizer: Any) -> str:
    """A chat as the model reads it."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            f"{where} needs a chat template, and the model's tokenizer has none: give text, or the chat model"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever a template raises for messages that it does not know
        raise ArgumentError(
            f"{where} cannot be written by the model's chat template: {type(error).__name__}: {error}"
        ) from error
