"""Whether OpenVINO makes use of zeros on this CPU: layers of which 90 % are zero beside the same without zeros.

    pip install openvino nncf
    python benchmarks/openvino_sparse.py [--zeros 0.9] [--runs 40]

Six linear layers of 2048 x 2048 with random weights, in float32, bfloat16 and int8 (weights and inputs), with
OpenVINO's sparse weights decompression on for those that have zeros. Times are the median of the ratios, both
models in turns.
"""

import argparse
import statistics
import time

import nncf
import openvino
import torch
from torch import nn

SIZE, LAYERS = 2048, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zeros", type=float, default=0.9)
    parser.add_argument("--runs", type=int, default=40)
    arguments = parser.parse_args()
    core = openvino.Core()
    print(openvino.__version__, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    print("| rows | precision | dense, ms | time over dense |\n|---|---|---|---|")
    for rows in (1, 32):
        x = torch.randn(rows, SIZE)
        for precision in ("f32", "bf16", "int8"):
            dense, sparse = (compiled(core, x, precision, zeros) for zeros in (0.0, arguments.zeros))
            times = [[seconds(model, x.numpy()) for model in (dense, sparse)] for _ in range(arguments.runs)][
                4:
            ]
            ratio = statistics.median(other / one for one, other in times)
            dense_time = 1e3 * statistics.median(one for one, _ in times)
            print(f"| {rows} | {precision} | {dense_time:.2f} | {ratio:.2f} |", flush=True)


def compiled(core, x, precision, zeros):
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))).eval()
    with torch.no_grad():
        for layer in layers:
            layer.weight[torch.rand_like(layer.weight) < zeros] = 0
    model = openvino.convert_model(layers, example_input=x, input=list(x.shape))
    if precision == "int8":
        model = nncf.quantize(model, nncf.Dataset([x.numpy()] * 4))
    options = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    if zeros:
        options["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = 0.8
    return core.compile_model(model, "CPU", options)


def seconds(model, x):
    begin = time.perf_counter()
    model([x])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
