"""Whether a Llama runs faster with zeros by OpenVINO, as optimum-intel exports it: one of 90 % beside the dense one.

    pip install "optimum-intel[openvino]"    # in an environment of its own, without moonshot
    python benchmarks/openvino_llama.py [--zeros 0.9] [--runs 30] [--blocks 6]

A random Llama, and the same with the smallest weights of every layer in its blocks at zero, by OVModelForCausalLM, in
float32 and with its weights in int8, OpenVINO's sparse weights decompression on for the one with zeros. The median of
the ratios of the times of a forward pass, both models in turns, and the middle half of them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import openvino
import torch
import transformers
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig, __version__
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SPARSE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zeros", type=float, default=0.9)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--blocks", type=int, default=6)
    arguments = parser.parse_args()
    print(
        f"optimum-intel {__version__}, openvino {openvino.__version__}, transformers {transformers.__version__}"
    )
    print(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    with tempfile.TemporaryDirectory() as place:
        folders = saved(Path(place), arguments.blocks, arguments.zeros)
        print("| weights | tokens | dense, ms | time over dense | middle half |\n|---|---|---|---|---|")
        for precision in ("float32", "int8"):
            models = [exported(folder, precision) for folder in folders]
            for tokens in (1, 64):
                times = [[seconds(model, tokens) for model in models] for _ in range(arguments.runs + 4)][4:]
                low, middle, high = statistics.quantiles([sparse / dense for dense, sparse in times], n=4)
                dense = 1e3 * statistics.median(dense for dense, _ in times)
                print(
                    f"| {precision} | {tokens} | {dense:.1f} | {middle:.2f} | {low:.2f} to {high:.2f} |",
                    flush=True,
                )


def saved(place: Path, blocks: int, zeros: float) -> tuple[Path, Path]:
    """The folders of the dense model and of the one with zeros."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(place / "dense")
    with torch.no_grad():
        for layer in (each for each in model.model.modules() if isinstance(each, nn.Linear)):
            size = layer.weight.abs()
            layer.weight[size <= size.flatten().kthvalue(round(zeros * size.numel())).values] = 0
    model.save_pretrained(place / "sparse")
    return place / "dense", place / "sparse"


def exported(folder: Path, precision: str) -> OVModelForCausalLM:
    return OVModelForCausalLM.from_pretrained(
        folder,
        export=True,
        quantization_config=OVWeightQuantizationConfig(bits=8) if precision == "int8" else None,
        load_in_8bit=None if precision == "int8" else False,
        ov_config={"INFERENCE_PRECISION_HINT": "f32", **(SPARSE if folder.name == "sparse" else {})},
    )


def seconds(model: OVModelForCausalLM, tokens: int) -> float:
    ids = torch.arange(1, tokens + 1)[None]
    begin = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
