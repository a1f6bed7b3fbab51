"""What transformers alone makes of saved language models: run it where moonshot is not installed, and where it is.

    python benchmarks/alone.py FOLDER ...

For each folder the class of the model, its parameters, and a digest of its logits on fixed tokens. Compact folders are
read by moonshot, where it is there.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path

import torch
import transformers


@torch.no_grad()
def main(folders: list[str]) -> None:
    moonshot = "with moonshot" if importlib.util.find_spec("moonshot") else "without moonshot"
    print(f"{moonshot}, transformers {transformers.__version__}, torch {torch.__version__}")
    for folder in folders:
        if (Path(folder) / "compact.json").is_file():
            from moonshot.files.compact import load_compact as read
        else:
            read = transformers.AutoModelForCausalLM.from_pretrained
        model = read(folder).eval()
        ids = torch.arange(1, 257).reshape(2, 128) % model.config.vocab_size
        logits = model(input_ids=ids).logits.float().numpy().tobytes()
        digest = hashlib.sha256(logits).hexdigest()[:12]
        print(
            f"{folder}: {type(model).__name__}, {model.num_parameters() / 1e6:.2f} M, logits {digest}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
