"""How the work of `prune` is shared by processes: CPU seconds of each, on a small random Llama.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py [--solver Magnitude] [--samples 32] [--length 256]
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/ranks.py
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/ranks.py --solver ADMM --blocks 1 --hidden 1024

With Magnitude, the default, next to nothing but passes and statistics takes time; with few samples and wide blocks,
next to nothing but solvers. CPU seconds and not those of the clock, so that it does not matter what else the machine
does.
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
    parser.add_argument("--solver", default="Magnitude", choices=["Magnitude", "SparseGPT", "ADMM", "OBS"])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument(
        "--hidden", type=int, default=256, help="width of the model; that of the MLP is 2.5 times"
    )
    parser.add_argument(
        "--pattern", default="2:4", help="ranks share no rows where it is a budget over the layer"
    )
    parser.add_argument("--targets", help="the layers to prune; all of the blocks' unless given")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 5 // 2,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=4,
        vocab_size=4096,
    )
    work = {"solver": getattr(ms, arguments.solver)(), "targets": arguments.targets}
    calibration = torch.randint(1, 4096, (arguments.samples, arguments.length))
    for run in ("first, with what is compiled", "measured"):
        model = LlamaForCausalLM(config)
        begin = time.process_time()
        report = ms.prune(model, calibration, arguments.pattern, **work)
        seconds = time.process_time() - begin
        solver = sum(layer.seconds for layer in report.layers.values())
        rank = os.environ.get("RANK", "alone")
        print(f"rank {rank}, {run}: {seconds:.2f} s, all solvers {solver:.2f} s", flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
