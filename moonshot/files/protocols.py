"""WikiText-2 and C4 as the field reads them: the windows that calibrate, and those that perplexity is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from moonshot.errors import ArgumentError
from moonshot.models.calibration import CalibrationError, load_split


@dataclass(frozen=True)
class Part:
    """A part of a data set, as `datasets` loads it. title: what messages call it."""

    title: str
    dataset: str
    split: str
    configuration: str | None = None
    file: str | None = None

    def texts(self) -> Sequence[str]:
        """Its documents, in order. Raises CalibrationError where it cannot be had."""
        try:
            column: Sequence[str] = load_split(self.dataset, self.split, self.configuration, self.file)["text"]
        except (OSError, KeyError) as error:
            where = f"{self.dataset}, {self.file or f'{self.configuration}, split {self.split}'}"
            raise CalibrationError(
                f"{self.title} ({where}) cannot be loaded: {error}; it is downloaded where the network allows it, and "
                f"read from a copy of the data set in a folder ./{self.dataset} where there is one"
            ) from error
        if not len(column):
            raise CalibrationError(f"{self.title} ({self.dataset}) is empty")
        return column


@dataclass(frozen=True)
class Protocol:
    """A data set of the field: the part that calibrates, and the part that perplexity is measured on."""

    calibration: Part
    test: Part


_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
PROTOCOLS = {
    "wikitext2": Protocol(
        Part("WikiText-2 train", _WIKITEXT[0], "train", _WIKITEXT[1]),
        Part("WikiText-2 test", _WIKITEXT[0], "test", _WIKITEXT[1]),
    ),
    "c4": Protocol(
        Part("C4 train", "allenai/c4", "train", file="en/c4-train.00000-of-01024.json.gz"),
        Part("C4 validation", "allenai/c4", "validation", file="en/c4-validation.00000-of-00008.json.gz"),
    ),
}
_C4_TEXTS, _C4_WINDOWS = 1100, 256  # what the field takes of C4's first file of validation


def evaluation_windows(name: str, tokenizer: Any, length: int = 2048) -> Tensor:
    """Token ids (windows, length) that the field measures perplexity on.

    name: "wikitext2": the documents of the test split, empty lines between them; "c4": the first 1100 documents of the
    first file of validation, spaces between them, and of these the first 256 windows.
    tokenizer: of transformers; it reads all at once, so that a token that begins a text is in the first window only.
    length: tokens in a window. What is left over at the end, less than a window, is left out.

    Raises CalibrationError where the data cannot be had, or is less than a window.
    """
    part = protocol(name).test
    if name == "c4":
        ids = _tokens(tokenizer, " ".join(part.texts()[:_C4_TEXTS]))[: _C4_WINDOWS * length]
    else:
        ids = _tokens(tokenizer, "\n\n".join(part.texts()))
    count = len(ids) // _checked(length)
    if not count:
        raise CalibrationError(
            f"{part.title} has {len(ids)} tokens, less than a window of {length}: lower seqlen"
        )
    return ids[: count * length].reshape(count, length)


def calibration_windows(
    name: str, tokenizer: Any, samples: int = 128, length: int = 2048, seed: int = 0
) -> Tensor:
    """Token ids (samples, length) that the field calibrates on.

    name: "wikitext2": windows from random places of the train split, empty lines between its documents; "c4": of the
    first file of train, random documents of more than `length` tokens, from each a window at a random place.
    tokenizer: of transformers. samples, length: how many windows, of how many tokens.
    seed: of Python's random numbers, drawn in the order of SparseGPT's code: the same seed gives the same windows.

    Raises CalibrationError where the data cannot be had, or has no document that is long enough.
    """
    part, random = protocol(name).calibration, Random(seed)
    if samples < 1:
        raise CalibrationError("at least one sample is needed")
    _checked(length)
    if name == "c4":
        return torch.stack(_long_windows(part, tokenizer, samples, length, random))
    ids = _tokens(tokenizer, "\n\n".join(part.texts()))
    if len(ids) <= length:
        raise CalibrationError(
            f"{part.title} has {len(ids)} tokens, no more than a window of {length}: lower seqlen"
        )
    return torch.stack([_window(ids, length, random) for _ in range(samples)])


def protocol(name: str) -> Protocol:
    """The protocol of this name. Raises ArgumentError where there is none."""
    if name not in PROTOCOLS:
        raise ArgumentError(f"there is no protocol {name!r}: there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def _long_windows(part: Part, tokenizer: Any, samples: int, length: int, random: Random) -> list[Tensor]:
    """A window each of random documents that are long enough."""
    documents, short = part.texts(), set[int]()
    found: list[Tensor] = []
    while len(found) < samples:
        index = random.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = _tokens(tokenizer, documents[index])
        if len(ids) > length:
            found.append(_window(ids, length, random))
            continue
        short.add(index)
        if len(short) == len(documents):
            raise CalibrationError(
                f"none of the {len(documents)} documents of {part.title} has more than {length} tokens: lower seqlen"
            )
    return found


def _window(ids: Tensor, length: int, random: Random) -> Tensor:
    start = random.randint(0, len(ids) - length - 1)
    return ids[start : start + length]


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], device="cpu", dtype=torch.int64)


def _checked(length: int) -> int:
    if length < 2:
        raise CalibrationError(f"a window has at least two tokens, got {length}")
    return length
