"""The tables of MOONSHOT and ALPS: which models, patterns and methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import moonshot as ms
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE

_ONE = ms.Reconstruction()
_JOINT = 0.5 * ms.Reconstruction() + 0.5 * ms.Fisher()
# What the papers call ALPS is ADMM on one objective here; MOONSHOT is the same solver on two.
METHODS: dict[str, tuple[ms.Objective, ms.Solver]] = {
    "SparseGPT": (_ONE, ms.SparseGPT()),
    "SparseGPT, joint": (_JOINT, ms.SparseGPT()),
    "ADMM": (_ONE, ms.ADMM()),
    "ADMM, joint": (_JOINT, ms.ADMM()),
    "ADMM, default": (DEFAULT_OBJECTIVE, ms.ADMM()),
}
TASKS = "boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"


@dataclass(frozen=True)
class Table:
    """A table of one model. model: its name on the hub; text: a language model, or else a classifier of ImageNet."""

    model: str
    patterns: Sequence[str] = ("50%", "60%", "70%", "2:4")
    text: bool = True


TABLES = {
    "llama-3.2-1b": Table("meta-llama/Llama-3.2-1B"),
    "llama-3.2-3b": Table("meta-llama/Llama-3.2-3B"),
    "llama-2-7b": Table("meta-llama/Llama-2-7b-hf"),
    "llama-3-8b": Table("meta-llama/Meta-Llama-3-8B"),
    "vit-b": Table("google/vit-base-patch16-224", text=False),
    "deit-b": Table("facebook/deit-base-patch16-224", text=False),
    "resnet-50": Table("microsoft/resnet-50", ("50%", "60%", "70%", "80%", "90%", "2:4"), text=False),
}
