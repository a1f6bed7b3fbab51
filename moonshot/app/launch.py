"""Processes that torchrun started: they work as one, of which the first speaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from torch import distributed as dist

from moonshot.errors import ArgumentError, MoonshotError
from moonshot.models.ranks import Ranks, current, joined


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks that torchrun has started and this process is one of, together; this process alone without torchrun.

    They talk by NCCL where there are GPUs, each with one of its own (LOCAL_RANK), and by gloo otherwise. What all of
    them know is wrong the first one says.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    ranks = current()
    try:
        with joined():
            ranks = current()
            yield ranks
    except (MoonshotError, OSError):
        if ranks.is_first or not ranks.told:
            raise
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()


def refuse_several(command: str) -> None:
    """Raises ArgumentError in the first of several processes that torchrun started, and ends the others quietly."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(1)
    raise ArgumentError(
        f"{command} runs in one process: start it without torchrun, which shares the work of prune alone"
    )


def processes_here() -> int:
    """How many processes torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def console_of(ranks: Ranks, console: Console) -> Console:
    """The console for the first rank, one that prints nothing for the others."""
    return console if ranks.is_first else Console(quiet=True)
