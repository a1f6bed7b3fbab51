"""How far pruning moves the outputs of small random models of every family: the default objective and ADMM, magnitude.

    python benchmarks/models.py [--models PART ...] [--samples 128] [--seed 0]

Weights are normal with variance 1 / inputs, batch norms have the statistics of the data and bias 1, images are smooth
noise. (With bias 0 a deep random network is chaotic: what a MobileNet returns at 50 % has nothing to do with what it
returned, by any method.) Both methods prune the same layers to the same sparsity; 2:4 leaves out those whose input
channels 4 does not divide. Prints a markdown table of |logits - dense logits| / |dense logits| (Frobenius), on samples
that calibration did not see.
"""

import argparse
import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import moonshot as ms
import torch
import transformers
from moonshot.models.batchnorm import reestimate
from moonshot.models.calibration import as_batches
from moonshot.models.chain import ChainAdapter
from moonshot.models.layers import layers_of
from moonshot.models.losses import model_loss
from moonshot.models.partition import partition_model
from torch import Tensor, nn

VOCABULARY, CLASSES, TOKENS, PIXELS = 96, 10, 24, 32
Make = Callable[[], nn.Module]
Data = Callable[[int], dict[str, Tensor]]  # of so many samples


def tokens(samples: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (samples, TOKENS))}


def classes(samples: int) -> dict[str, Tensor]:
    return {"labels": torch.randint(CLASSES, (samples,))}


def labelled_tokens(samples: int) -> dict[str, Tensor]:
    return tokens(samples) | classes(samples)


def images(samples: int, pixels: int = PIXELS) -> dict[str, Tensor]:
    """Smooth noise: neighbouring pixels are alike, as in pictures."""
    coarse = torch.randn(samples, 3, pixels // 4, pixels // 4)
    smooth = nn.functional.interpolate(coarse, size=pixels, mode="bicubic")
    return {"pixel_values": smooth + 0.1 * torch.randn_like(smooth)} | classes(samples)


def large_images(samples: int) -> dict[str, Tensor]:
    """For networks that reduce images to a 32nd of their size, so that more than one position is left."""
    return images(samples, 2 * PIXELS)


def translations(samples: int) -> dict[str, Tensor]:
    return tokens(samples) | {"labels": tokens(samples)["input_ids"]}


def speech(samples: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(samples, 16, 2 * TOKENS), "labels": tokens(samples)["input_ids"]}


class Plain(nn.Module):
    """A network that is no transformers model but, like one, returns its loss and logits."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, labels: Tensor) -> transformers.utils.ModelOutput:
        logits = self.body(pixel_values)
        return transformers.utils.ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def convolutional() -> nn.Module:
    widths = [3, 16, 32, 32]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return Plain(nn.Sequential(*parts, nn.Flatten(), nn.Linear(32 * 16, CLASSES)))


def perceptron() -> nn.Module:
    widths = [3 * PIXELS**2, 64, 64, 64]
    parts: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return Plain(nn.Sequential(*parts, nn.Linear(64, CLASSES)))


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **SHAPE, **SPECIAL}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": TOKENS,
    "max_target_positions": 64,
    "decoder_start_token_id": 1,
}
MOBILE = {"depth_multiplier": 0.25, "min_depth": 8, "classifier_dropout_prob": 0.0}


def transformer(model: str, **config: object) -> Make:
    """A model of transformers by its class name, such as GPT2LMHeadModel."""
    kind = getattr(transformers, model)
    return lambda: kind(kind.config_class(**config))


def vision(family: str, **config: object) -> Make:
    return transformer(f"{family}ForImageClassification", num_labels=CLASSES, image_size=PIXELS, **config)


@dataclass(frozen=True)
class Tried:
    make: Make
    data: Data = tokens


MODELS = {
    "Llama": Tried(transformer("LlamaForCausalLM", **TEXT, num_key_value_heads=2)),
    "Qwen2": Tried(transformer("Qwen2ForCausalLM", **TEXT, num_key_value_heads=2)),
    "Qwen3": Tried(transformer("Qwen3ForCausalLM", **TEXT, **GROUPED)),
    "Gemma": Tried(transformer("GemmaForCausalLM", **TEXT, **GROUPED)),
    "Phi": Tried(transformer("PhiForCausalLM", **TEXT)),
    "Phi-3": Tried(transformer("Phi3ForCausalLM", **TEXT)),
    "GPT-2": Tried(transformer("GPT2LMHeadModel", **GPT2, **SPECIAL)),
    "OPT": Tried(transformer("OPTForCausalLM", **TEXT, ffn_dim=128, word_embed_proj_dim=64)),
    "GPT-NeoX": Tried(transformer("GPTNeoXForCausalLM", **TEXT)),
    "Mixtral": Tried(transformer("MixtralForCausalLM", **TEXT, num_key_value_heads=2, num_local_experts=4)),
    "Qwen3-MoE": Tried(
        transformer(
            "Qwen3MoeForCausalLM",
            **TEXT,
            **GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        )
    ),
    "Mamba": Tried(transformer("MambaForCausalLM", **TEXT, state_size=8)),
    "BERT": Tried(transformer("BertForSequenceClassification", **TEXT, num_labels=CLASSES), labelled_tokens),
    "T5": Tried(
        transformer("T5ForConditionalGeneration", **T5, pad_token_id=0, decoder_start_token_id=0),
        translations,
    ),
    "Whisper": Tried(transformer("WhisperForConditionalGeneration", **WHISPER, **SPECIAL), speech),
    "ViT": Tried(vision("ViT", **SHAPE, patch_size=8), images),
    "Swin": Tried(
        vision("Swin", patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4), images
    ),
    "ConvNeXt": Tried(vision("ConvNext", hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 2, 1]), large_images),
    "ResNet": Tried(
        vision("ResNet", embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="bottleneck"),
        images,
    ),
    "RegNet": Tried(
        vision("RegNet", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], groups_width=8), images
    ),
    "MobileNetV1": Tried(vision("MobileNetV1", **MOBILE), large_images),
    "MobileNetV2": Tried(vision("MobileNetV2", **MOBILE), large_images),
    "convolutions, batch norm, one Linear": Tried(convolutional, images),
    "four Linear layers": Tried(perceptron, images),
}
METHODS = {"magnitude": ms.Magnitude(), "ADMM": ms.ADMM()}


@torch.no_grad()
def random_weights(model: nn.Module) -> nn.Module:
    """The model with weights of variance 1 / inputs, and biases in batch norms."""
    for _, view in layers_of("", model):
        view.weight.data.normal_(std=view.shape[1] ** -0.5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.fill_(1)
    return model


@torch.no_grad()
def built(tried: Tried, samples: int, seed: int) -> tuple[nn.Module, list, list]:
    """(model, calibration, held out)"""
    torch.manual_seed(seed)
    model = random_weights(tried.make().eval())
    calibration, held_out = (as_batches(split(tried.data(samples))) for _ in range(2))
    reestimate(model, calibration, model_loss)
    return model, calibration, held_out


def split(batch: dict[str, Tensor], size: int = 16) -> list[dict[str, Tensor]]:
    return [
        dict(zip(batch, parts, strict=True))
        for parts in zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    ]


@torch.no_grad()
def logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model(**batch).logits.flatten(0, -2) for batch in batches])


def zeros(model: nn.Module, names: list[str]) -> float:
    """The share of zeros in the layers with these names, counted."""
    layers = dict(layers_of("", model))
    weights = [layers[name].weight for name in names]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def measured(tried: Tried, samples: int, seed: int) -> tuple[list[str], bool]:
    """Cells of a row, and whether ADMM's outputs move less at every pattern."""
    model, calibration, held_out = built(tried, samples, seed)
    dense = logits(model, held_out)
    adapter = partition_model(model, calibration, model_loss).adapter
    cells = ["chain" if isinstance(adapter, ChainAdapter) else "graph"]
    names: list[str] | None = None
    better = True
    for pattern in ("50%", "2:4"):
        if names is not None:
            layers = dict(layers_of("", model))
            names = [name for name in names if layers[name].channels % 4 == 0]
        moved = []
        for solver in METHODS.values():
            pruned = copy.deepcopy(model)
            wanted = pattern if names is None else dict.fromkeys(names, pattern)
            report = ms.prune(pruned, calibration, wanted, solver=solver)
            moved.append(float((logits(pruned, held_out) - dense).norm() / dense.norm()))
        names = list(report.layers)
        cells += [str(len(names)), f"{100 * zeros(pruned, names):.2f}", *(f"{error:.3f}" for error in moved)]
        better = better and moved[1] < moved[0]
    return cells, better


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[""], help="only those whose names hold one of these")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    columns = [
        f"{pattern}: {column}" for pattern in ("50 %", "2:4") for column in ("layers", "zeros, %", *METHODS)
    ]
    chosen = {name: MODELS[name] for name in MODELS if any(part in name for part in arguments.models)}
    rows = ((name, measured(tried, arguments.samples, arguments.seed)) for name, tried in chosen.items())
    print_table(["model", "parts", *columns], rows)


def print_table(columns: Sequence[str], rows: Iterable[tuple[str, tuple[list[str], bool]]]) -> None:
    """A markdown table, row by row, and on how many ADMM is better. rows: (name, (cells, whether it is))."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    is_better: dict[str, bool] = {}
    for name, (cells, better) in rows:
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        is_better[name] = better
    lost = [name for name, better in is_better.items() if not better]
    print(f"\nADMM moves the outputs less on {len(is_better) - len(lost)} of {len(is_better)}", end="")
    print(f"; not on {', '.join(lost)}" if lost else "")


if __name__ == "__main__":
    main()
