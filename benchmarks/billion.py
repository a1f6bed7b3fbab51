"""`moonshot prune` on a random model of the shape of Llama-3.2-1B, in bfloat16: time, and memory by the system's count.

    python benchmarks/billion.py FOLDER [--blocks 16] [--samples 16] [--length 512] [prune's other options]

FOLDER is where the model is made, unless it is there already, and pruned; it takes three times the model's 2.5 GB. The
tokenizer and the text are those of the demo.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import moonshot
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

DEMO = Path(moonshot.__file__).parent / "demo"


def make(folder: Path, blocks: int) -> None:
    """Llama-3.2-1B as its configuration has it, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    arguments, options = parser.parse_known_args()
    model = arguments.folder / f"dense-{arguments.blocks}"
    if not model.exists():
        print(f"making {model}", flush=True)
        subprocess.run([sys.executable, __file__, "make", str(model), str(arguments.blocks)], check=True)
    saved = arguments.folder / f"pruned-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [str(Path(sys.executable).with_name("moonshot")), "prune", str(model), "--save", str(saved)]
    command += ["--data", str(DEMO / "calibration.txt"), "--nsamples", str(arguments.samples)]
    command += ["--seqlen", str(arguments.length), *options]
    if not re.search("--(pattern|sparsity)", " ".join(options)):
        command += ["--pattern", "2:4"]
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, code, usage = os.wait4(process.pid, 0)
    minutes = (time.perf_counter() - begin) / 60
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(
        f"exit code {code}; {minutes:.1f} minutes, {minutes / arguments.blocks:.2f} a decoder layer, "
        f"{(usage.ru_utime + usage.ru_stime) / 60:.1f} of processor time; "
        f"peak memory {usage.ru_maxrss / 2**20:.2f} GiB, the model {size / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
