"""Calibration and test data as the command line names them: windows of text, or labelled images."""

from dataclasses import dataclass, field
from difflib import get_close_matches

from rich.console import Console
from torch import Tensor

from moonshot.app.terminal import one_line, say
from moonshot.errors import ArgumentError
from moonshot.files import protocols
from moonshot.files.load import Source
from moonshot.files.text import Texts, read_texts
from moonshot.models.calibration import CalibrationError, windows
from moonshot.models.images import Pictures, find_pictures

_SEQLEN = 2048


@dataclass
class Windows:
    """Token ids (samples, seqlen) of the data. title: what it is; skipped: why files of it are not in it."""

    ids: Tensor
    title: str
    skipped: list[str] = field(default_factory=list)


def calibration_windows(
    source: Source, data: str, samples: int, seqlen: int | None, seed: int, column: str | None = None
) -> Windows:
    """Windows at random places of a data set of the field, by its protocol, or of any other text.

    seqlen: None for 2048, or as many positions as the model has. column: of rows (`read_texts`).
    Raises CalibrationError for more tokens than the text, the model's positions or its vocabulary have.
    """
    if data in protocols.PROTOCOLS:
        ids = protocols.calibration_windows(data, source.processor, samples, _context(source, seqlen), seed)
        return Windows(_fitting(source, ids), protocols.protocol(data).calibration.title)
    found = _texts(source, data, column)
    return Windows(text_windows(source, found.text, samples, seqlen, seed), data, found.skipped)


def held_out_windows(
    source: Source, data: str, samples: int | None, seqlen: int | None, column: str | None = None
) -> Windows:
    """Windows one after the other: what perplexity is measured on; as `calibration_windows`.

    samples: how many from the start on; None for as many as there are.
    """
    if data in protocols.PROTOCOLS:
        ids = protocols.evaluation_windows(data, source.processor, _context(source, seqlen))
        if samples is not None and samples > len(ids):
            raise CalibrationError(
                f"{data} has {len(ids)} windows of {ids.shape[1]} tokens, {samples} were asked for"
            )
        return Windows(_fitting(source, ids[:samples]), protocols.protocol(data).test.title)
    found = _texts(source, data, column)
    return Windows(text_windows(source, found.text, samples, seqlen, None), data, found.skipped)


def text_windows(
    source: Source, text: str, samples: int | None, seqlen: int | None, seed: int | None
) -> Tensor:
    """Token ids (samples, seqlen), from random places, or from the start on without a seed.

    samples: None for as many windows as the text has; the rest as in `calibration_windows`.
    """
    length = _context(source, seqlen)
    if samples is None:
        tokens = len(source.processor(text, verbose=False)["input_ids"])
        samples = max(tokens // max(length, 1), 1)
    return _fitting(source, windows(source.processor, text, samples, length, seed))


def _texts(source: Source, data: str, column: str | None) -> Texts:
    """The text of the data. An error says which data set of the field may have been meant."""
    try:
        return read_texts(data, source.processor, column)
    except CalibrationError as error:
        if close := get_close_matches(data, protocols.PROTOCOLS, 1):
            error.add_note(f"(did you mean {close[0]}?)")
        raise


def _context(source: Source, seqlen: int | None) -> int:
    """How many tokens a window has."""
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)  # None: any number
    length = min(_SEQLEN, positions or _SEQLEN) if seqlen is None else seqlen
    if positions and length > positions:
        raise CalibrationError(f"--seqlen {length}: the model has {positions} positions, give no more")
    return length


def _fitting(source: Source, ids: Tensor) -> Tensor:
    """The ids. Raises CalibrationError where the model has no embedding for one of them."""
    size = source.config.get_text_config().vocab_size
    if int(ids.max()) >= size:
        raise CalibrationError(
            f"the tokenizer of {source.name} has more tokens than the model's {size}: they do not belong together"
        )
    return ids


def pictures(data: str, seqlen: int | None, column: str | None = None) -> Pictures:
    """The images that --data names."""
    for name, value in (("--seqlen is tokens", seqlen), ("--text-column is", column)):
        if value is not None:
            raise ArgumentError(f"{name} of text, and the model is an image classifier: leave it out")
    if not data:
        raise ArgumentError("the data has no name: give a folder of images or a dataset")
    if data in protocols.PROTOCOLS:
        raise ArgumentError(f"{data} is text, and the model is an image classifier: give images")
    return find_pictures(data)


def say_skipped(console: Console, skipped: list[str], images: bool) -> None:
    """Name what of the data could not be read, if there is anything."""
    if skipped:
        names = ", ".join(map(one_line, skipped))
        say(console, f"{len(skipped)} {'broken images' if images else 'files'} skipped: {names}")
