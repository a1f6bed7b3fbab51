"""Rows of data files: JSON, JSON lines, CSV, TSV and Parquet."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from moonshot.errors import ArgumentError
from moonshot.extras import from_extra

Row = dict[str, Any]


class NotTextError(ArgumentError):
    """A file that is whole, but holds no text."""


def is_table(file: Path) -> bool:
    """Whether a file's name says that it holds rows, gzipped or not."""
    return _suffix(file) in _READERS


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, by the names of their columns.

    Raises NotTextError where its JSON is not rows, and ArgumentError, with the file's name, where it cannot be read.
    """
    return _READERS[_suffix(file)](file)


def read_characters(file: Path) -> str:
    """A text file, gzipped or not.

    Raises NotTextError for a binary file, ArgumentError for text that is not UTF-8 and for a damaged archive.
    """
    with _reading(file):
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if b"\0" in raw:
        raise NotTextError(f"{file} is no text: it has bytes that are zero")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}; convert it, or put it "
            "elsewhere"
        ) from error


def _suffix(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What a library raises for a damaged file becomes an ArgumentError that names it."""
    try:
        yield
    except (EOFError, zlib.error, ValueError, OSError) as error:
        if getattr(error, "filename", None):  # which the system's message names
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArgumentError(f"{file} cannot be read: {reason}") from error


def _json_lines(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_characters(file).split("\n"), 1):
        if line.strip():
            with _reading(Path(f"{file}, line {number},")):
                rows.append(json.loads(line))
    return _checked(rows, file)


def _json(file: Path) -> list[Row]:
    """One list of rows, one row, or a row a line."""
    try:
        found = json.loads(read_characters(file))
    except json.JSONDecodeError:
        return _json_lines(file)
    return _checked(found if isinstance(found, list) else [found], file)


def _checked(rows: list[Any], file: Path) -> list[Row]:
    if not all(isinstance(row, dict) for row in rows):
        raise NotTextError(f"{file} holds JSON, but no rows with names, such as {{'text': ...}}")
    return rows


def _separated(separator: str) -> Callable[[Path], list[Row]]:
    def read(file: Path) -> list[Row]:
        text = read_characters(file)
        limit = csv.field_size_limit(len(text) + 1)  # a document may be as long as it likes
        try:
            reader = csv.DictReader(StringIO(text, newline=""), delimiter=separator, strict=True)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise ArgumentError(
                        f"{file} cannot be read: line {reader.line_num} has another number of fields than the first; "
                        "put quotes around text with separators in it"
                    )
                rows.append(row)
        except csv.Error as error:
            raise ArgumentError(f"{file} cannot be read: {error}") from error
        finally:
            csv.field_size_limit(limit)
        return rows

    return read


def _parquet(file: Path) -> list[Row]:
    with from_extra("cli"):
        from pyarrow import parquet
    with _reading(file):
        return parquet.read_table(file).to_pylist()


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
