"""Small random decoders, alone and in folders, with their calibration data, and a convolutional network."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import moonshot as ms
from moonshot.models.blocks import find_blocks
from moonshot.models.layers import layers_of

DEMO = Path(ms.__file__).parent / "demo"
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
JOINT = 0.5 * ms.Reconstruction() + 0.3 * ms.Fisher() + 0.2 * ms.TokenFisher()


def decoder(config=LlamaConfig, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**(SIZES | changes)), dtype=dtype)


def model_folder(path, shard="1GB", **changes):
    """A decoder in bfloat16 in a folder, with the tokenizer of the shipped Llama. shard: a file's size at most."""
    decoder(dtype=torch.bfloat16, vocab_size=2048, **changes).save_pretrained(path, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / "model" / name, path / name)
    return path


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(128, 5)).eval()


def tokens(samples=6, length=16):
    return torch.randint(1, 61, (samples, length), generator=torch.Generator().manual_seed(1))


def block_layers(model):
    return {name: view.module for part in find_blocks(model) for name, view in layers_of(*part)}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
