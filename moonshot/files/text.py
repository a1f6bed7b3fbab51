"""Text from a file, a folder or a dataset."""

from pathlib import Path

from moonshot.errors import ArgumentError
from moonshot.models.calibration import open_dataset


def read_text(data: str) -> str:
    """The text of a file, of every file in a folder by name, or of a dataset's column "text", or its first of text.

    A datasets name may carry a configuration and a split: "wikitext:wikitext-2-raw-v1:train". Raises ValueError where
    there is no text.
    """
    if not data:
        raise ArgumentError("the data has no name: give a text file, a folder or a dataset")
    path = Path(data)
    parts = _file_texts(path) if path.is_file() or path.is_dir() else _dataset_texts(data)
    text = "\n\n".join(parts)
    if not text.strip():
        raise ArgumentError(f"{data} holds no text")
    return text


def _file_texts(path: Path) -> list[str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [_file_text(file) for file in files]


def _file_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}; convert it, or put it "
            "elsewhere"
        ) from error


def _dataset_texts(data: str) -> list[str]:
    dataset = open_dataset(data)
    columns = [
        key
        for key, kind in dataset.features.items()
        if getattr(kind, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise ArgumentError(
            f"the dataset {data!r} has no column of text, its columns are {', '.join(dataset.features)}"
        )
    return [text for text in dataset["text" if "text" in columns else columns[0]] if text]
