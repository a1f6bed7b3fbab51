"""What a checkpoint costs on a random Llama of 110 M parameters: seconds of digests, fsync and all else, and per cent.

    python benchmarks/checkpoint.py [--samples 4] [--length 128] [--folder FOLDER]

Each part is timed inside one run of `prune`: the processor's time, in which other work on the machine does not count,
and for fsync that on the clock. More text makes the share smaller.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import moonshot as ms
import torch
from moonshot.pruning import checkpoint, fingerprint, lock
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
    """Count the seconds that functions take, by what they are for: of the processor, but for fsync."""

    def counting(what, function):
        clock = time.perf_counter if what == "fsync" else time.process_time

        def called(*arguments, **options):
            begin = clock()
            try:
                return function(*arguments, **options)
            finally:
                seconds[what] += clock() - begin

        return called

    places = [
        ("all but waiting", Checkpoint, "__init__"),
        ("all but waiting", Checkpoint, "store"),
        ("all but waiting", import_module("moonshot.pruning.prune"), "_work"),
        ("all but waiting", Checkpoint, "close"),
        ("of it digests", checkpoint, "digest"),
        ("of it digests", fingerprint, "digest"),
        ("fsync", os, "fsync"),
        ("of it the lock", lock, "_opened"),
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
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--folder", help="on the disk to measure; the system's for temporary files unless given"
    )
    arguments = parser.parse_args()
    ids = torch.randint(0, 32000, (arguments.samples, arguments.length))
    for solver in SOLVERS:
        model, seconds = decoder(arguments.length), Counter()
        folder = tempfile.mkdtemp(dir=arguments.folder)
        try:
            begin = time.process_time()
            with timed(seconds):
                report = ms.prune(model, ids, "2:4", solver=solver, checkpoint=f"{folder}/answers")
            total = time.process_time() - begin
            written = sum(entry.stat().st_size for entry in os.scandir(f"{folder}/answers"))
        finally:
            shutil.rmtree(folder)
        print(f"{solver.name}: {total:.1f} s for {len(report.layers)} layers, {written / 2**20:.0f} MiB")
        for what, part in seconds.items():
            print(f"  {what}: {part:.3f} s, {100 * part / total:.2f} %", flush=True)


if __name__ == "__main__":
    main()
