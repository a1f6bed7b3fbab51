"""Figures that papers print, each with its paper. What is not here was not looked up, and is a dash in the table."""

from dataclasses import dataclass

MOONSHOT = "MOONSHOT, arXiv 2604.13287"
ALPS = "ALPS, arXiv 2406.07831"
_REFITS = "arXiv 2603.01376, where SparseGPT is the start of a refit"
_DEIT = "DeiT, arXiv 2012.12877"
_DENSE = "the dense figure that the field's papers share"


@dataclass(frozen=True)
class Published:
    """A figure and the paper that it is from. context: of a perplexity, 0 for an accuracy in %."""

    value: float
    paper: str
    context: int = 2048


# (table, pattern, method, data): figure
PUBLISHED = {
    ("llama-2-7b", "dense", "dense", "WikiText-2 test"): Published(5.47, _DENSE),
    ("llama-2-7b", "50%", "ADMM", "WikiText-2 test"): Published(6.85, ALPS),
    ("llama-2-7b", "60%", "ADMM", "WikiText-2 test"): Published(9.36, ALPS),
    ("llama-2-7b", "70%", "ADMM", "WikiText-2 test"): Published(19.31, ALPS),
    ("llama-2-7b", "2:4", "ADMM", "WikiText-2 test"): Published(9.95, ALPS),
    ("llama-3-8b", "dense", "dense", "WikiText-2 test"): Published(6.14, _DENSE),
    ("llama-3-8b", "2:4", "SparseGPT", "C4 validation"): Published(22.65, _REFITS),
    ("deit-b", "dense", "dense", "ImageNet"): Published(81.8, _DEIT, 0),
}
# What the abstract of MOONSHOT says of its gain over one objective, for the tables it is about.
CLAIMS = {
    **dict.fromkeys(
        ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b"),
        "up to 32.6 % less C4 perplexity at 2:4, up to 4.9 points of mean zero-shot accuracy",
    ),
    **dict.fromkeys(("vit-b", "deit-b"), "over 5 points of accuracy at 70 %"),
    "resnet-50": "4 points of accuracy at 90 %",
}
