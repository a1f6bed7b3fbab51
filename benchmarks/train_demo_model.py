"""Train the small Llama that moonshot ships, on the Python standard library's own source, or one like it on prose.

    python benchmarks/train_demo_model.py moonshot/demo
    python benchmarks/train_demo_model.py another --text docstrings

writes `model/` (weights in float16, tokenizer), `calibration.txt` (a sample of the training text)
and `heldout.txt` (files the model never saw) into the folder given.
The text is the running interpreter's standard library, under the PSF licence;
the shipped model was trained on CPython 3.11.7's. Docstrings are those of the torch, numpy, scipy and sympy that are
installed, without code.
"""

import argparse
import ast
import hashlib
import importlib.util
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
EXCLUDED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}


def standard_library() -> dict[str, str]:
    """{relative path: text} of the standard library's Python files, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not EXCLUDED & set(path.relative_to(root).parts) and not path.is_symlink()
    )
    return {str(path.relative_to(root)): path.read_text("utf-8", "ignore") for path in files}


def docstrings() -> dict[str, str]:
    """{relative path: text} of the docstrings of some packages, each docstring once, sorted by path."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for package in ("numpy", "scipy", "sympy", "torch"):
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            if texts := [text for text in _docstrings(path) if text not in seen]:
                found[str(path.relative_to(root.parent))] = "\n\n".join(texts)
                seen.update(texts)
    return found


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text("utf-8", "ignore"))
    except SyntaxError:  # of a later Python
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return list(dict.fromkeys(text for text in texts if text))


TEXTS = {"stdlib": standard_library, "docstrings": docstrings}


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 10  # about one file in 25


def is_calibration(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[1] < 20


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def concatenated(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return torch.from_numpy(np.concatenate([np.asarray(i) for i in ids]))


def held_out_perplexity(model: LlamaForCausalLM, ids: torch.Tensor, windows: int = 128) -> float:
    batch = ids[: windows * CONTEXT].reshape(-1, CONTEXT)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss for part in batch.split(16)]
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", choices=list(TEXTS), default="stdlib")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    files = TEXTS[arguments.text]()
    training = [text for name, text in files.items() if not is_held_out(name)]
    held_out = [text for name, text in files.items() if is_held_out(name)]
    calibration = [t for n, t in files.items() if is_calibration(n) and not is_held_out(n)]
    tokenizer = train_tokenizer(training, vocabulary=2048)
    ids, held_out_ids = concatenated(tokenizer, training), concatenated(tokenizer, held_out)
    print(f"{len(ids)} training tokens, {len(held_out_ids)} held out")

    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "calibration.txt").write_text("\n".join(calibration)[:600_000], "utf-8")
    (arguments.folder / "heldout.txt").write_text("\n".join(held_out)[:600_000], "utf-8")

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, arguments.rate, total_steps=arguments.steps, pct_start=0.05
    )
    start = time.time()
    for step in range(arguments.steps):
        offsets = torch.randint(len(ids) - CONTEXT, (arguments.batch, 1))
        batch = ids[offsets + torch.arange(CONTEXT)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == arguments.steps - 1:
            perplexity = held_out_perplexity(model, held_out_ids)
            seconds = time.time() - start
            print(f"{step:5d} {loss:.3f} held-out {perplexity:.2f} {seconds:.0f} s", flush=True)

    model.to(torch.float16).save_pretrained(arguments.folder / "model")
    tokenizer.save_pretrained(arguments.folder / "model")


if __name__ == "__main__":
    main()
