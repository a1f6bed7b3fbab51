"""Peak memory and seconds of `prune` on a ResNet-50 and a ViT-Base with random weights, on images of noise.

    python benchmarks/memory_vision.py [--models ResNet-50 ViT-Base] [--images 128] [--batch 16] [--pattern 50%]

SparseGPT on the default objective. Every model is pruned in a process of its own, whose peak is the operating system's
own count. Prints a markdown table.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import moonshot as ms
import psutil
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

CLASSES = 1000
MODELS = {
    "ResNet-50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=CLASSES)),
    "ViT-Base": lambda: ViTForImageClassification(ViTConfig(num_labels=CLASSES)),
}


def measured(name: str, images: int, batch: int, pattern: str) -> str:
    torch.manual_seed(0)
    model = MODELS[name]()
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    labels = torch.randint(CLASSES, (images,))
    batches = [
        {"pixel_values": torch.randn(len(part), 3, 224, 224), "labels": part} for part in labels.split(batch)
    ]
    before = psutil.Process().memory_info().rss
    report = ms.prune(model, batches, pattern, solver=ms.SparseGPT())
    cells = [name, f"{size / 2**20:.0f}", f"{len(report.layers)}", f"{100 * report.sparsity:.2f}"]
    cells += [f"{before / 2**30:.2f}", f"{report.peak_memory / 2**30:.2f}"]
    cells += [f"{(report.peak_memory - before) / size:.1f}", f"{report.seconds:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pattern", default="50%")
    arguments = parser.parse_args()
    print("| model | size, MiB | layers | zeros, % | before, GiB | peak, GiB | above, in models | seconds |")
    print("|---" * 8 + "|")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in arguments.models:
            row = pool.submit(measured, name, arguments.images, arguments.batch, arguments.pattern)
            print(row.result(), flush=True)


if __name__ == "__main__":
    main()
