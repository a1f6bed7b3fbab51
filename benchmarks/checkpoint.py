"""What a checkpoint costs on a random Llama of 110 M parameters: seconds of digests, fsync and all else, and per cent.

    python benchmarks/checkpoint.py [--samples 8] [--length 256] [--folder .]

Each part is timed inside one run of `prune`, so that other work on the machine changes both alike. The folder is made
anew within --folder, whose disk is what is measured, and removed.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import moonshot as ms
import torch
from moonshot.pruning import checkpoint, fingerprint, lock
from moonshot.pruning import prune as pruning
from moonshot.pruning.checkpoint import Checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

SOLVERS = (ms.Magnitude(), ms.SparseGPT())


def decoder(length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


@contextmanager
def timed(seconds: Counter):
    """Count the seconds that functions take, by what they are for; those within another count for both."""

    def counting(what, function):
        def called(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds[what] += time.perf_counter() - begin

        return called

    places = [
        ("all", Checkpoint, "__init__"),
        ("all", Checkpoint, "store"),
        ("all", pruning, "_work"),
        ("all", Checkpoint, "close"),
        ("digests", checkpoint, "digest"),
        ("digests", fingerprint, "digest"),
        ("fsync", os, "fsync"),
        ("lock", lock, "_opened"),
    ]
    patches = [
        mock.patch.object(place, name, counting(what, getattr(place, name))) for what, place, name in places
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--folder", default=".")
    arguments = parser.parse_args()
    ids = torch.randint(0, 32000, (arguments.samples, arguments.length))
    for solver in SOLVERS:
        model, seconds = decoder(arguments.length), Counter()
        folder = tempfile.mkdtemp(dir=arguments.folder)
        try:
            with timed(seconds):
                report = ms.prune(model, ids, "2:4", solver=solver, checkpoint=f"{folder}/answers")
            written = sum(entry.stat().st_size for entry in os.scandir(f"{folder}/answers"))
        finally:
            shutil.rmtree(folder)
        total = report.seconds
        print(
            f"{solver.name}: {total:.1f} s for {len(report.layers)} layers, {written / 2**20:.0f} MiB written"
        )
        for what in ("all", "digests", "fsync", "lock"):
            share = 100 * seconds[what] / total
            print(f"  {what}: {seconds[what]:.3f} s, {share:.2f} %")


if __name__ == "__main__":
    main()
