"""Calibration and test data as the command line names them: windows of text, or labelled images."""

from torch import Tensor

from moonshot.errors import ArgumentError
from moonshot.files.load import Source
from moonshot.models.calibration import CalibrationError, windows
from moonshot.models.images import Pictures, find_pictures

_SEQLEN = 2048


def text_windows(
    source: Source, text: str, samples: int | None, seqlen: int | None, seed: int | None
) -> Tensor:
    """Token ids (samples, seqlen), from random places, or from the start on without a seed.

    samples: None for as many windows as the text has. seqlen: None for 2048, or as many positions as the model has.
    Raises CalibrationError for more tokens than the text, the model's positions or its vocabulary have.
    """
    config = source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)  # None in a model that can read any number
    length = min(_SEQLEN, positions or _SEQLEN) if seqlen is None else seqlen
    if positions and length > positions:
        raise CalibrationError(f"--seqlen {length}: the model has {positions} positions, give no more")
    if samples is None:
        tokens = len(source.processor(text, verbose=False)["input_ids"])
        samples = max(tokens // max(length, 1), 1)
    ids = windows(source.processor, text, samples, length, seed)
    if int(ids.max()) >= config.vocab_size:
        raise CalibrationError(
            f"the tokenizer of {source.name} has more tokens than the model's {config.vocab_size}: they do not belong "
            "together"
        )
    return ids


def pictures(data: str, seqlen: int | None) -> Pictures:
    """The images that --data names."""
    if seqlen is not None:
        raise ArgumentError("--seqlen is tokens of text, and the model is an image classifier: leave it out")
    if not data:
        raise ArgumentError("the data has no name: give a folder of images or a dataset")
    return find_pictures(data)
