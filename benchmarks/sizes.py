"""Sizes of what is saved: the weights of the dense model, of the pruned one as it is, and without its zeros.

    python benchmarks/sizes.py [--patterns 2:4 50%]

Of the shipped Llama, and of a random one of about 100 M weights in bfloat16. Each compact folder is unpacked too, and
its files compared with those that it was made from, byte for byte.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import moonshot as ms
import torch
from moonshot.app.demo import DEMO
from moonshot.files.compact import compact_folder, unpack_folder
from moonshot.files.folder import save
from moonshot.files.load import load
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "50%"])
    arguments = parser.parse_args()
    print("| model | weights | pattern | dense, MB | plain, MB | compact, MB | of dense | unpacked is plain |")
    print("|---" * 8 + "|")
    for name, model in {"shipped Llama": load(str(DEMO / "model"))[0], "random Llama": random_llama()}.items():
        weights = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"
        for pattern in arguments.patterns:
            dense, plain, compact, same = sizes(copy.deepcopy(model), pattern)
            cells = [name, weights, pattern, *(f"{size / 1e6:.2f}" for size in (dense, plain, compact))]
            cells += [f"{100 * compact / dense:.1f} %", "yes" if same else "NO"]
            print("| " + " | ".join(cells) + " |", flush=True)


def sizes(model: nn.Module, pattern: str) -> tuple[int, int, int, bool]:
    """Bytes of the dense weights, the pruned and the compact ones, and whether the latter unpack to the former."""
    tokens = torch.randint(1, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder / "dense")
        report = ms.prune(model, tokens, pattern, solver=ms.Magnitude(), objective=ms.Reconstruction())
        plain = save(model, None, report, folder / "plain")
        compact = compact_folder(plain, folder / "compact")
        again = unpack_folder(compact, folder / "again")
        files = [path.relative_to(plain) for path in plain.rglob("*.safetensors")]
        same = all((plain / name).read_bytes() == (again / name).read_bytes() for name in files)
        dense = weights(folder / "dense", ".safetensors")
        return dense, weights(plain, ".safetensors"), weights(compact, ".compact"), same


def weights(folder: Path, suffix: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(f"*{suffix}"))


def random_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


if __name__ == "__main__":
    main()
