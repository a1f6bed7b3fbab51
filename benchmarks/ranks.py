"""How the work of `prune` is shared by processes: CPU seconds of each, on a small random Llama.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py [--solver Magnitude] [--samples 32] [--length 256]
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/ranks.py

With Magnitude, the default, next to nothing but passes and statistics takes time. CPU seconds and not those of the
clock, so that it does not matter what else the machine does.
"""

import argparse
import os
import time

import moonshot as ms
import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver", default="Magnitude", choices=["Magnitude", "SparseGPT", "ADMM"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4, vocab_size=4096
    )
    calibration = torch.randint(1, 4096, (arguments.samples, arguments.length))
    for run in ("first, with what is compiled", "measured"):
        model = LlamaForCausalLM(config)
        begin = time.process_time()
        report = ms.prune(model, calibration, "2:4", solver=getattr(ms, arguments.solver)())
        seconds = time.process_time() - begin
        solver = sum(layer.seconds for layer in report.layers.values())
        rank = os.environ.get("RANK", "alone")
        print(f"rank {rank}, {run}: {seconds:.2f} s, all solvers {solver:.2f} s", flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
