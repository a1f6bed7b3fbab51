"""What it takes to unfold layers and to add up their X'X: memory beyond the inputs, and seconds, on one thread.

    python benchmarks/layers.py [--repeats 3]

Every layer runs in a process of its own, so that each has its own peak. Prints a markdown table.
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from moonshot.models.layers import layer_view
from torch import nn

# What the layer is, its arguments, and the inputs it sees.
LAYERS = {
    "linear": (nn.Linear, (1024, 1024), {}, (64, 196, 1024)),
    "patches 16 x 16": (nn.Conv2d, (3, 384, 16, 16), {}, (64, 3, 224, 224)),
    "3 x 3": (nn.Conv2d, (64, 64, 3), {"padding": 1}, (32, 64, 56, 56)),
    "3 x 3, many channels": (nn.Conv2d, (256, 256, 3), {"padding": 1}, (64, 256, 14, 14)),
    "3 x 3, 32 groups": (nn.Conv2d, (256, 256, 3), {"padding": 1, "groups": 32}, (16, 256, 28, 28)),
    "3 x 3, depthwise": (nn.Conv2d, (512, 512, 3), {"padding": 1, "groups": 512}, (64, 512, 14, 14)),
    "3 x 3 x 3": (nn.Conv3d, (32, 32, 3), {"padding": 1}, (2, 32, 32, 32, 32)),
    "2 x 2, transposed": (nn.ConvTranspose2d, (128, 64, 2, 2), {}, (16, 128, 28, 28)),
    "3 x 3, one large image": (nn.Conv2d, (64, 64, 3), {"padding": 1}, (1, 64, 512, 512)),
}


def peak() -> float:
    """MB this process held at most; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measured(name: str, repeats: int) -> str:
    torch.set_num_threads(1)
    kind, arguments, options, shape = LAYERS[name]
    torch.manual_seed(0)
    view, x = layer_view(kind(*arguments, **options)), torch.randn(shape)
    before, unfolding, whole = peak(), [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        numbers = sum(
            chunk.inputs.numel() for group in range(view.groups) for chunk in view.chunks(x, group=group)
        )
        unfolding.append(time.perf_counter() - begin)
    added = peak() - before
    for _ in range(repeats):
        begin = time.perf_counter()
        for group in range(view.groups):
            gram = torch.zeros(view.shape[1], view.shape[1])
            for chunk in view.chunks(x, group=group):
                rows = chunk.inputs.flatten(0, 1)
                gram.addmm_(rows.T, rows)
        whole.append(time.perf_counter() - begin)
    m, d = view.shape
    cells = [name, f"{view.groups} of {m} x {d}", f"{4 * x.numel() / 1e6:.0f}", f"{4 * numbers / 1e6:.0f}"]
    cells += [f"{added:.0f}", f"{min(unfolding):.2f}", f"{min(whole):.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(
        "| layer | matrices | inputs, MB | all rows, MB | added to the peak, MB | unfolding, s | with X'X, s |"
    )
    print("|---" * 7 + "|")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in LAYERS:
            print(pool.submit(measured, name, repeats).result(), flush=True)


if __name__ == "__main__":
    main()
