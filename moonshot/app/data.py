"""Calibration and test data as the command line names them: windows of text, or labelled images."""

from typing import Any

from torch import Tensor

from moonshot.models.calibration import windows
from moonshot.models.images import Pictures, find_pictures

_SEQLEN = 2048


def text_windows(
    tokenizer: Any, text: str, samples: int | None, seqlen: int | None, seed: int | None
) -> Tensor:
    """Token ids (samples, seqlen), from random places, or from the start on without a seed.

    samples: None for as many windows as the text has.
    """
    length = _SEQLEN if seqlen is None else seqlen
    if samples is None:
        tokens = len(tokenizer(text, verbose=False)["input_ids"])
        samples = max(tokens // max(length, 1), 1)
    return windows(tokenizer, text, samples, length, seed)


def pictures(data: str, seqlen: int | None) -> Pictures:
    """The images that --data names."""
    if seqlen is not None:
        raise ValueError("--seqlen is tokens of text, and the model is an image classifier: leave it out")
    return find_pictures(data)
