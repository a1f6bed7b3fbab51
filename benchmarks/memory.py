"""Peak memory of `prune` on a random Llama, by the operating system's own count, against the model's size.

    python benchmarks/memory.py [--dtype bfloat16] [--samples 16] [--length 512] [--factors 16]

The default shape has 110 M parameters: 12 blocks, hidden 768, MLP 2048, vocabulary 32000, tied embeddings.
"""

import argparse

import moonshot as ms
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--pattern", default="2:4")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=arguments.length,
    )
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, arguments.dtype))
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    before = psutil.Process().memory_info().rss
    ids = torch.randint(0, 32000, (arguments.samples, arguments.length))
    report = ms.prune(model, ids, arguments.pattern, factors=arguments.factors, solver=ms.SparseGPT())
    print(f"{parameters / 1e6:.1f} M parameters in {arguments.dtype}, {size / 2**20:.0f} MiB")
    print(f"before: {before / 2**20:.0f} MiB in the process (model, torch, transformers)")
    peak = report.peak_memory
    print(f"peak: {peak / 2**20:.0f} MiB, {(peak - before) / 2**20:.0f} MiB above, ", end="")
    print(f"{(peak - before) / size:.2f} times the model; {report.seconds:.0f} s")


if __name__ == "__main__":
    main()
