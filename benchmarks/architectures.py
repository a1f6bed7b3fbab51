"""What pruning does to models of many architectures, all of them tiny and random.

    python -m benchmarks.architectures [--models PART ...] [--seed 0]

Weights are as in benchmarks/models.py. Prints a markdown table: how many layers were pruned to 50 %, what was skipped
and how much of the model is zero in the end, and |outputs - dense outputs| / |dense outputs| on samples that
calibration did not see. timm's models are among them where timm can be imported.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import moonshot as ms
import torch
import transformers
from moonshot.models.batchnorm import reestimate
from moonshot.models.calibration import as_batches
from moonshot.models.chain import ChainAdapter
from moonshot.models.layers import layers_of
from moonshot.models.losses import loss_of, model_loss
from moonshot.models.partition import partition_model
from moonshot.pruning.recipe import DEFAULT_OBJECTIVE
from moonshot.pruning.report import Report
from torch import Tensor, nn

from benchmarks.models import print_table, random_weights

VOCABULARY, CLASSES, TOKENS, PIXELS, IMAGE = 96, 5, 12, 32, 90
Batch = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One to try.

    make: the model. data: a batch of so many samples, as its processor makes them. size: how many fit into a batch.
    options: of `prune`. skipped: the last parts of the names that its report skips. slow: whether it takes long.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], Batch]
    skipped: set[str] = field(default_factory=set)
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 8
    slow: bool = False


def tokens(samples: int) -> Batch:
    return {"input_ids": torch.randint(3, VOCABULARY - 10, (samples, TOKENS))}


def padded(samples: int) -> Batch:
    """Texts of different lengths."""
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (samples, 1))
    mask = (torch.arange(TOKENS) < lengths).long()
    return {"input_ids": tokens(samples)["input_ids"] * mask, "attention_mask": mask}


def classes(samples: int) -> Batch:
    return {"labels": torch.randint(CLASSES, (samples,))}


def filled_in(samples: int) -> Batch:
    """Texts in which each token is to be named."""
    return padded(samples) | {"labels": tokens(samples)["input_ids"]}


def labelled(samples: int) -> Batch:
    return padded(samples) | classes(samples)


def translations(samples: int) -> Batch:
    return padded(samples) | {"labels": tokens(samples)["input_ids"][:, : TOKENS // 2]}


def pixels(samples: int, size: int = PIXELS) -> Tensor:
    """Smooth noise: neighbouring pixels are alike, as in pictures."""
    coarse = torch.randn(samples, 3, size // 4, size // 4)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return smooth + 0.1 * torch.randn_like(smooth)


def images(samples: int, size: int = PIXELS) -> Batch:
    return {"pixel_values": pixels(samples, size)} | classes(samples)


def large_images(samples: int) -> Batch:
    return images(samples, 2 * PIXELS)


def unlabelled_images(samples: int) -> Batch:
    return {"pixel_values": pixels(samples)}


def maps(samples: int, size: int = PIXELS) -> Batch:
    """Images with a class for every pixel."""
    return {"pixel_values": pixels(samples, size), "labels": torch.randint(CLASSES, (samples, size, size))}


def large_maps(samples: int) -> Batch:
    return maps(samples, 2 * PIXELS)


def depths(samples: int) -> Batch:
    return {"pixel_values": pixels(samples), "labels": torch.rand(samples, PIXELS, PIXELS)}


def objects(samples: int, size: int = 2 * PIXELS) -> Batch:
    """Images with one to three boxes each."""
    labels = [
        {"class_labels": torch.randint(CLASSES, (count,)), "boxes": 0.2 + 0.3 * torch.rand(count, 4)}
        for count in (1 + k % 3 for k in range(samples))
    ]
    return {"pixel_values": pixels(samples, size), "labels": labels}


def masks(samples: int, size: int = 2 * PIXELS) -> Batch:
    """Images with two masks each, in lists as image processors return them."""
    return {
        "pixel_values": pixels(samples, size),
        "mask_labels": [torch.randint(2, (2, size, size)).float() for _ in range(samples)],
        "class_labels": [torch.randint(CLASSES, (2,)) for _ in range(samples)],
    }


def waves(samples: int, length: int = 800) -> Batch:
    return {"input_values": torch.randn(samples, length), "labels": tokens(samples)["input_ids"][:, :4]}


def spectra(samples: int) -> Batch:
    return {"input_values": torch.randn(samples, 32, 16)} | classes(samples)


def speech(samples: int) -> Batch:
    return {
        "input_features": torch.randn(samples, 4 * TOKENS, 16),
        "attention_mask": torch.ones(samples, 4 * TOKENS, dtype=torch.long),
        "labels": tokens(samples)["input_ids"],
    }


def captions(samples: int) -> Batch:
    return {"pixel_values": pixels(samples), "labels": tokens(samples)["input_ids"]}


def pairs(samples: int) -> Batch:
    """Images and their texts, to be told from one another: the loss of one sample alone says nothing."""
    return tokens(samples) | {"pixel_values": pixels(samples), "return_loss": True}


def talk(images: int) -> Callable[[int], Batch]:
    """Texts that begin with an image, of so many tokens."""

    def data(samples: int) -> Batch:
        ids = tokens(samples)["input_ids"]
        ids[:, :images] = IMAGE
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(samples), "labels": ids}

    return data


def qwen_talk(samples: int) -> Batch:
    """As Qwen2-VL's processor has it: images are rows of patches, and have a grid each."""
    batch = talk(4)(samples)
    grid = torch.tensor([[1, 4, 4]] * samples)
    ids = batch["input_ids"]
    return batch | {
        "pixel_values": torch.randn(16 * samples, 3 * 2 * 8 * 8),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def llava_talk(samples: int) -> Batch:
    """An image of 16 tokens, and a text."""
    ids = torch.cat([torch.full((samples, 16), IMAGE), tokens(samples)["input_ids"]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(samples),
        "labels": torch.where(ids == IMAGE, -100, ids),
    }


def paligemma_talk(samples: int) -> Batch:
    """After the image a question, of four tokens, and an answer."""
    batch = llava_talk(samples)
    types = (torch.arange(16 + TOKENS) >= 20).long().expand(samples, -1)
    return batch | {"token_type_ids": types, "labels": torch.where(types == 1, batch["input_ids"], -100)}


def idefics_talk(samples: int) -> Batch:
    batch = talk(4)(samples)
    return batch | {"pixel_values": batch["pixel_values"][:, None]}


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **SHAPE, **SPECIAL}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
VISION = {**SHAPE, "image_size": PIXELS, "patch_size": 8}
SEQUENCES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
SEQ2SEQ = {**SEQUENCES, "max_position_embeddings": 64, "forced_eos_token_id": None}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
    "num_labels": CLASSES,
}
WAVES = {
    "vocab_size": VOCABULARY,
    **SHAPE,
    "pad_token_id": 0,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "ctc_zero_infinity": True,
    "ctc_loss_reduction": "mean",
}


def of(model: str, **config: Any) -> Callable[[], nn.Module]:
    """A model of transformers by its class name, such as GPT2LMHeadModel."""
    kind = getattr(transformers, model)
    return lambda: kind(kind.config_class(**config))


def config(name: str, **fields: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**fields)


def resnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
    return config("ResNet", layer_type="basic", out_features=["stage4"], **sizes)


def swin() -> Any:
    sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1]}
    return config(
        "Swin",
        **sizes,
        num_heads=[1, 2, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def encoder_decoder() -> nn.Module:
    encoder = transformers.BertModel(config("Bert", **TEXT))
    decoder = transformers.BertLMHeadModel(config("Bert", **TEXT, is_decoder=True, add_cross_attention=True))
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def vision_encoder_decoder() -> nn.Module:
    gpt2 = config(
        "GPT2",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        add_cross_attention=True,
        **SPECIAL,
    )
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(config("ViT", **VISION)), decoder=transformers.GPT2LMHeadModel(gpt2)
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


class Classifier(nn.Module):
    """One's own module around layers of torch, which returns its loss and logits as transformers' models do."""

    def __init__(self, body: nn.Module, width: int, pick: Callable[[Any], Tensor] = lambda states: states):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.body, self.head, self.pick = body, nn.Linear(width, CLASSES), pick

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.pick(self.body(self.embedding(input_ids))).mean(1))
        loss = nn.functional.cross_entropy(logits, labels)
        return transformers.utils.ModelOutput(loss=loss, logits=logits)


def short_labelled(samples: int) -> Batch:
    return tokens(samples) | classes(samples)


class UNet(nn.Module):
    """Down, up, and what was on the way down joined to what comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = self.block(3, 8), self.block(8, 16)
        self.bottom, self.up = self.block(16, 32), nn.ConvTranspose2d(32, 16, 2, 2)
        self.middle, self.last = self.block(32, 16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.top, self.head = self.block(16, 8), nn.Conv2d(8, CLASSES, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        parts = [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        return nn.Sequential(*parts)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        pool = nn.functional.max_pool2d
        first = self.first(pixel_values)
        down = self.down(pool(first, 2))
        middle = self.middle(torch.cat([down, self.up(self.bottom(pool(down, 2)))], 1))
        logits = self.head(self.top(torch.cat([first, self.last(middle)], 1)))
        loss = nn.functional.cross_entropy(logits, labels)
        return transformers.utils.ModelOutput(loss=loss, logits=logits)


class Classified(nn.Module):
    """A network of images, such as timm's, which returns its loss and logits as transformers' models do."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        logits = self.body(pixel_values)
        return transformers.utils.ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def timm_architectures() -> dict[str, Architecture]:
    """Some of timm's models; none where timm, or the torchvision that it needs, is not there."""
    try:
        import timm
        from timm.layers import StdConv2d
        from timm.models.mlp_mixer import MlpMixer
        from timm.models.swin_transformer import SwinTransformer
    except (ImportError, RuntimeError):
        return {}

    def named(name: str, **sizes: Any) -> Callable[[], nn.Module]:
        return lambda: Classified(timm.create_model(name, num_classes=CLASSES, **sizes))

    vit = {"img_size": PIXELS, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return {
        "ViT (timm)": Architecture(named("vit_tiny_patch16_224", **vit), images),
        "ConvNeXt (timm)": Architecture(
            named("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 16, 16, 32]), large_images
        ),
        "ResNet (timm)": Architecture(
            named("resnet18", layers=[1, 1, 1, 1], channels=[8, 16, 16, 32]), large_images
        ),
        "ResNetV2, standardised (timm)": Architecture(
            named("resnetv2_50d_gn", layers=[1, 1], channels=[128, 256], conv_layer=StdConv2d),
            large_images,
            skipped={"conv", "conv1", "conv2", "conv3"},
        ),
        "Mixer (timm)": Architecture(
            lambda: Classified(MlpMixer(CLASSES, PIXELS, patch_size=4, num_blocks=2, embed_dim=32)), images
        ),
        "Swin (timm)": Architecture(
            lambda: Classified(
                SwinTransformer(
                    2 * PIXELS, 4, 3, CLASSES, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2
                )
            ),
            large_images,
        ),
    }


def sam_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The masks of a click in the middle, against those asked for."""
    labels = batch["labels"]
    points = torch.full((len(labels), 1, 1, 2), PIXELS / 2)
    found = model(pixel_values=batch["pixel_values"], input_points=points).pred_masks
    return nn.functional.binary_cross_entropy_with_logits(
        found[:, 0, 0], labels[:, : found.shape[-2], : found.shape[-1]]
    )


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    # decoders
    "Falcon": Architecture(of("FalconForCausalLM", **TEXT), padded),
    "Bloom": Architecture(of("BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4,
        **SPECIAL), padded),
    "MPT": Architecture(of("MptForCausalLM", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4,
        max_seq_len=64), tokens),
    "Cohere": Architecture(of("CohereForCausalLM", **TEXT, num_key_value_heads=2), padded),
    "Gemma 3": Architecture(of("Gemma3ForCausalLM", **TEXT, **GROUPED, sliding_window=8), padded),
    "Gemma 3n": Architecture(of("Gemma3nForCausalLM", **TEXT, **GROUPED, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
        layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0]), tokens, slow=True),
    "Llama 4": Architecture(of("Llama4ForCausalLM", **TEXT, **GROUPED, intermediate_size_mlp=64,
        num_local_experts=4), padded, skipped={"experts", "router"}),
    "GPT-OSS": Architecture(of("GptOssForCausalLM", **TEXT, **GROUPED, **EXPERTS), tokens, slow=True),
    "DeepSeek-V3": Architecture(of("DeepseekV3ForCausalLM", **TEXT, num_key_value_heads=4, n_routed_experts=4,
        n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8), tokens),
    "Qwen3-Next": Architecture(of("Qwen3NextForCausalLM", **TEXT, **GROUPED, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"]), tokens, skipped={"conv1d"}),
    "DBRX": Architecture(of("DbrxForCausalLM", vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2,
        max_seq_len=64, ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2,
        "hidden_size": 32}, attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}), tokens,
        skipped={"mlp"}),
    # state spaces
    "Mamba 2": Architecture(of("Mamba2ForCausalLM", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
        state_size=8, head_dim=8, num_heads=8, n_groups=2, chunk_size=4, **SPECIAL), tokens,
        skipped={"conv1d"}),
    "Jamba": Architecture(of("JambaForCausalLM", **TEXT, num_key_value_heads=2, num_experts=2,
        attn_layer_offset=1, attn_layer_period=2, use_mamba_kernels=False, mamba_d_state=8), tokens,
        skipped={"conv1d", "dt_proj", "mamba"}, slow=True),
    "Bamba": Architecture(of("BambaForCausalLM", **TEXT, num_key_value_heads=2, attn_layer_indices=[1],
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4), tokens, skipped={"conv1d"}),
    "RWKV": Architecture(of("RwkvForCausalLM", vocab_size=VOCABULARY, hidden_size=32, attention_hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, context_length=64, **SPECIAL), tokens),
    "LFM2": Architecture(of("Lfm2ForCausalLM", **TEXT, num_key_value_heads=2, layer_types=["conv",
        "full_attention"], block_multiple_of=8), tokens, skipped={"conv"}),
    # encoders
    "ALBERT": Architecture(of("AlbertForMaskedLM", **TEXT, embedding_size=16), filled_in),
    "DeBERTa-v2": Architecture(of("DebertaV2ForMaskedLM", **TEXT, relative_attention=True, pos_att_type=["p2c",
        "c2p"]), filled_in, slow=True),
    "ModernBERT": Architecture(of("ModernBertForMaskedLM", **TEXT, local_attention=8, cls_token_id=1,
        sep_token_id=2), filled_in),
    "XLNet": Architecture(of("XLNetForSequenceClassification", vocab_size=VOCABULARY, d_model=32, n_layer=2,
        n_head=4, d_inner=64, num_labels=CLASSES, **SPECIAL), short_labelled, skipped={"rel_attn"}, slow=True),
    "Longformer": Architecture(of("LongformerForMaskedLM", **(TEXT | {"pad_token_id": 0}), attention_window=4),
        filled_in, skipped={"query_global", "key_global", "value_global"}, options={"unreached": "skip"}, slow=True),
    "Funnel": Architecture(of("FunnelForMaskedLM", vocab_size=VOCABULARY, d_model=32, n_head=4, d_head=8,
        d_inner=64, block_sizes=[1, 1], num_decoder_layers=1, pad_token_id=0), filled_in,
        skipped={"attention"}),
    "ELECTRA": Architecture(of("ElectraForSequenceClassification", **TEXT, embedding_size=16,
        num_labels=CLASSES), labelled),
    # encoder-decoders
    "BART": Architecture(of("BartForConditionalGeneration", **SEQ2SEQ), translations),
    "mBART": Architecture(of("MBartForConditionalGeneration", **SEQ2SEQ), translations),
    "Marian": Architecture(of("MarianMTModel", **SEQ2SEQ), translations),
    "Pegasus": Architecture(of("PegasusForConditionalGeneration", **SEQ2SEQ), translations),
    "LED": Architecture(of("LEDForConditionalGeneration", **SEQUENCES, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64, attention_window=4), translations, skipped={"query_global",
        "key_global", "value_global"}, options={"unreached": "skip"}, slow=True),
    "ProphetNet": Architecture(of("ProphetNetForConditionalGeneration", vocab_size=VOCABULARY, hidden_size=32,
        num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        decoder_start_token_id=1, **SPECIAL), translations),
    "Switch Transformers": Architecture(of("SwitchTransformersForConditionalGeneration", vocab_size=VOCABULARY,
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=4, num_experts=4, decoder_start_token_id=0, pad_token_id=0),
        translations, slow=True),
    "EncoderDecoder (BERT, BERT)": Architecture(encoder_decoder, translations),
    "VisionEncoderDecoder (ViT, GPT-2)": Architecture(vision_encoder_decoder, captions),
    "Speech2Text": Architecture(of("Speech2TextForConditionalGeneration", **SEQUENCES,
        input_feat_per_channel=16, max_source_positions=64, max_target_positions=64, conv_channels=32), speech),
    # vision and language
    "LLaVA": Architecture(lambda: transformers.LlavaForConditionalGeneration(config("Llava",
        vision_config=config("CLIPVision", **VISION), text_config=config("Llama", **TEXT),
        image_token_index=IMAGE, vision_feature_layer=-1)), llava_talk),
    "Qwen2-VL": Architecture(lambda: transformers.Qwen2VLForConditionalGeneration(config("Qwen2VL",
        text_config=TEXT | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default",
        "mrope_section": [1, 1, 2], "rope_theta": 1e4}}, vision_config={"depth": 2, "embed_dim": 32,
        "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8, "spatial_merge_size": 2,
        "temporal_patch_size": 2}, image_token_id=IMAGE, vision_start_token_id=88, vision_end_token_id=89,
        video_token_id=91)), qwen_talk, size=1, slow=True),
    "Qwen2.5-VL": Architecture(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config("Qwen2_5_VL",
        text_config=TEXT | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default",
        "mrope_section": [1, 1, 2], "rope_theta": 1e4}}, vision_config={"depth": 2, "hidden_size": 32,
        "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE, vision_start_token_id=88, vision_end_token_id=89, video_token_id=91)), qwen_talk,
        size=1, slow=True),
    "PaliGemma": Architecture(lambda: transformers.PaliGemmaForConditionalGeneration(config("PaliGemma",
        vision_config=config("SiglipVision", **VISION, projection_dim=32, vision_use_head=False),
        text_config=config("Gemma", **TEXT, **GROUPED), image_token_index=IMAGE, projection_dim=32,
        hidden_size=32)), paligemma_talk, slow=True),
    "Gemma 3, images": Architecture(lambda: transformers.Gemma3ForConditionalGeneration(config("Gemma3",
        vision_config=config("SiglipVision", **VISION, vision_use_head=False), text_config=config("Gemma3Text",
        **TEXT, **GROUPED, sliding_window=8), image_token_index=IMAGE, mm_tokens_per_image=4)),
        lambda n: talk(4)(n) | {"token_type_ids": (torch.arange(TOKENS) < 4).long().expand(n, TOKENS)},
        skipped={"multi_modal_projector"}, slow=True),
    "Idefics 3": Architecture(lambda: transformers.Idefics3ForConditionalGeneration(config("Idefics3",
        vision_config={**VISION}, text_config=config("Llama", **TEXT), image_token_id=IMAGE, scale_factor=2,
        pad_token_id=0)), idefics_talk, slow=True),
    "Llama 4, images": Architecture(lambda: transformers.Llama4ForConditionalGeneration(config("Llama4",
        vision_config=config("Llama4Vision", **(VISION | {"intermediate_size": 128}), vision_output_dim=32,
        projector_input_dim=32, projector_output_dim=32, pixel_shuffle_ratio=0.5),
        text_config=config("Llama4Text", **TEXT, **GROUPED, intermediate_size_mlp=64, num_local_experts=2),
        image_token_index=IMAGE, boi_token_index=88, eoi_token_index=89)), talk(4),
        skipped={"experts", "router", "vision_model"}, slow=True),
    "BLIP": Architecture(lambda: transformers.BlipForConditionalGeneration(config("Blip", text_config={**TEXT,
        "encoder_hidden_size": 32, "sep_token_id": 2}, vision_config=VISION)),
        lambda n: tokens(n) | {"pixel_values": pixels(n), "labels": tokens(n)["input_ids"]}, slow=True),
    "ViLT": Architecture(of("ViltForQuestionAnswering", **VISION, vocab_size=VOCABULARY,
        max_position_embeddings=64, num_labels=CLASSES), lambda n: padded(n) | {"pixel_values": pixels(n),
        "labels": torch.rand(n, CLASSES)}),
    "GIT": Architecture(lambda: transformers.GitForCausalLM(config("Git", **TEXT, vision_config=VISION)),
        lambda n: tokens(n) | {"pixel_values": pixels(n), "labels": tokens(n)["input_ids"]}, slow=True),
    "CLIP": Architecture(lambda: transformers.CLIPModel(config("CLIP", text_config={**TEXT,
        "projection_dim": 16}, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)), pairs),
    "SigLIP": Architecture(lambda: transformers.SiglipModel(config("Siglip", text_config={**TEXT,
        "projection_size": 32}, vision_config=VISION)), pairs, skipped={"attention", "out_proj"}),
    # detection
    "DETR": Architecture(lambda: transformers.DetrForObjectDetection(config("Detr", **DETR,
        use_timm_backbone=False, backbone=None, backbone_config=resnet())), objects, slow=True),
    "Conditional DETR": Architecture(lambda: transformers.ConditionalDetrForObjectDetection(config("ConditionalDetr",
        **DETR, use_timm_backbone=False, backbone=None, backbone_config=resnet())), objects, slow=True),
    "Deformable DETR": Architecture(lambda: transformers.DeformableDetrForObjectDetection(config("DeformableDetr",
        **DETR, num_feature_levels=1, use_timm_backbone=False, backbone=None, backbone_config=resnet())),
        objects, slow=True),
    "RT-DETR": Architecture(lambda: transformers.RTDetrForObjectDetection(config("RTDetr",
        backbone_config=config("RTDetrResNet", embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1,
        1], layer_type="basic", out_features=["stage2", "stage3", "stage4"]), encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 16], encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32,
        num_queries=6, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_attention_heads=4,
        decoder_layers=2, num_denoising=0, num_labels=CLASSES, hidden_expansion=0.5)), objects, slow=True),
    "YOLOS": Architecture(of("YolosForObjectDetection", **(VISION | {"image_size": [64, 64]}),
        num_detection_tokens=6, num_labels=CLASSES), objects),
    # segmentation and depth
    "SegFormer": Architecture(of("SegformerForSemanticSegmentation", num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=32, num_labels=CLASSES), maps, slow=True),
    "MaskFormer": Architecture(lambda: transformers.MaskFormerForInstanceSegmentation(config("MaskFormer",
        fpn_feature_size=32, mask_feature_size=16, backbone_config=swin(), decoder_config=config("Detr",
        **DETR), num_labels=CLASSES)), masks, slow=True),
    "Mask2Former": Architecture(lambda: transformers.Mask2FormerForUniversalSegmentation(config("Mask2Former",
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64, dim_feedforward=64,
        encoder_layers=1, decoder_layers=3, num_attention_heads=4, num_queries=6, num_labels=CLASSES,
        train_num_points=64, backbone_config=swin())), masks, skipped={"cross_attn", "decoder", "out_proj"},
        slow=True),
    "UperNet": Architecture(lambda: transformers.UperNetForSemanticSegmentation(config("UperNet",
        backbone_config=config("ConvNext", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"]), hidden_size=16, pool_scales=[1, 2],
        auxiliary_in_channels=16, auxiliary_channels=16, num_labels=CLASSES)), large_maps, slow=True),
    "BEiT, maps": Architecture(of("BeitForSemanticSegmentation", **(SHAPE | {"num_hidden_layers": 4}),
        image_size=PIXELS, patch_size=8, out_indices=[1, 2, 3, 4], num_labels=CLASSES, pool_scales=[1, 2]),
        maps, slow=True),
    "DPT": Architecture(of("DPTForSemanticSegmentation", **(SHAPE | {"num_hidden_layers": 4}),
        image_size=PIXELS, patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, is_hybrid=False, num_labels=CLASSES), maps, slow=True),
    "SAM": Architecture(lambda: transformers.SamModel(config("Sam", vision_config=config("SamVision", **VISION,
        output_channels=16, mlp_dim=64, window_size=2, global_attn_indexes=[1], num_pos_feats=8),
        prompt_encoder_config=config("SamPromptEncoder", hidden_size=16, image_size=PIXELS, patch_size=8,
        mask_input_channels=4), mask_decoder_config=config("SamMaskDecoder", hidden_size=16, mlp_dim=32,
        num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16))), depths,
        options={"loss": sam_loss, "unreached": "skip"}, skipped={"attn", "conv1", "conv2", "conv3",
        "shared_embedding", "shared_image_embedding"}),
    # images
    "DINOv2": Architecture(of("Dinov2ForImageClassification", **VISION, mlp_ratio=2, num_labels=CLASSES),
        images),
    "PoolFormer": Architecture(of("PoolFormerForImageClassification", depths=[1, 1, 1, 1], hidden_sizes=[8, 16,
        16, 32], num_labels=CLASSES), large_images),
    "ViT-MAE": Architecture(of("ViTMAEForPreTraining", **VISION, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64,
        mask_ratio=0.5), unlabelled_images),
    "VideoMAE": Architecture(of("VideoMAEForVideoClassification", **VISION, num_frames=4, tubelet_size=2,
        num_labels=CLASSES), lambda n: {"pixel_values": pixels(4 * n).unflatten(0, (n, 4))} | classes(n)),
    # sound and series
    "Wav2Vec2": Architecture(of("Wav2Vec2ForCTC", **WAVES), waves),
    "HuBERT": Architecture(of("HubertForCTC", **WAVES), waves),
    "Audio Spectrogram Transformer": Architecture(of("ASTForAudioClassification", **SHAPE, patch_size=8,
        num_mel_bins=16, max_length=32, frequency_stride=8, time_stride=8, num_labels=CLASSES), spectra),
    "PatchTST": Architecture(of("PatchTSTForPrediction", num_input_channels=2, context_length=32,
        prediction_length=4, patch_length=8, patch_stride=8, d_model=32, num_attention_heads=4, ffn_dim=64,
        num_hidden_layers=2), lambda n: {"past_values": torch.randn(n, 32, 2), "future_values": torch.randn(n,
        4, 2)}, skipped={"positional_encoder"}),
    # torch
    "TransformerEncoder (torch)": Architecture(lambda: Classifier(nn.TransformerEncoder(nn.TransformerEncoderLayer(32,
        4, 64, batch_first=True), 2), 32), short_labelled, skipped={"self_attn", "out_proj"}),
    "LSTM (torch)": Architecture(lambda: Classifier(nn.LSTM(32, 32, batch_first=True), 32,
        lambda states: states[0]), short_labelled, skipped={"body"}),
    "U-Net (torch)": Architecture(UNet, maps),
}
# fmt: on


METHODS = {
    "magnitude": (ms.Magnitude(), ms.Reconstruction()),
    "ADMM, reconstruction": (ms.ADMM(), ms.Reconstruction()),
    "ADMM": (ms.ADMM(), DEFAULT_OBJECTIVE),
}


@torch.no_grad()
def built(architecture: Architecture, batches: int, seed: int) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """(model, calibration, held out), each of so many batches."""
    torch.manual_seed(seed)
    model = random_weights(architecture.make().eval())
    calibration, held_out = (
        as_batches([architecture.data(architecture.size) for _ in range(batches)]) for _ in range(2)
    )
    loss = architecture.options.get("loss", model_loss)
    reestimate(model, calibration, lambda model, batch: loss_of(loss, model, batch))
    return model, calibration, held_out


@torch.no_grad()
def outputs(architecture: Architecture, model: nn.Module, batches: list[Batch]) -> Tensor:
    """The largest of what the model returns for these batches, in one vector."""
    returned: list[Any] = []
    handle = model.register_forward_hook(lambda _model, _arguments, output: returned.append(output))
    for batch in batches:
        loss_of(architecture.options.get("loss", model_loss), model, batch)
    handle.remove()
    return torch.cat([_main(output).flatten() for output in returned])


def _main(output: Any) -> Tensor:
    names = ("logits", "class_queries_logits", "logits_per_image", "pred_masks", "prediction_outputs")
    return next(value for name in names if (value := getattr(output, name, None)) is not None)


def changed_beside(report: Report, model: nn.Module, before: nn.Module) -> list[str]:
    """What differs between two models beside the pruned layers and the running statistics of batch norms."""
    views = dict(layers_of("", model))
    pruned = {views[name].weight.untyped_storage().data_ptr() for name in report.layers}
    old = before.state_dict()
    return [
        name
        for name, value in model.state_dict().items()
        if value.untyped_storage().data_ptr() not in pruned
        and "running_" not in name
        and not torch.equal(value, old[name])
    ]


def row(architecture: Architecture, seed: int) -> tuple[list[str], bool]:
    """The cells of a row, and whether ADMM's outputs move less than magnitude's by either objective."""
    model, calibration, held_out = built(architecture, 32 // architecture.size, seed)
    dense = outputs(architecture, model, held_out)
    loss = architecture.options.get("loss", model_loss)
    adapter = partition_model(model, calibration, loss).adapter
    moved = []
    for solver, objective in METHODS.values():
        pruned = copy.deepcopy(model)
        report = ms.prune(pruned, calibration, 0.5, solver=solver, objective=objective, **architecture.options)
        if changed := changed_beside(report, pruned, model):
            raise AssertionError(f"{', '.join(changed)} changed")
        moved.append(float((outputs(architecture, pruned, held_out) - dense).norm() / dense.norm()))
    skipped = sorted({name.rpartition(".")[2] for name in report.skipped})
    cells = ["chain" if isinstance(adapter, ChainAdapter) else "graph", str(len(report.layers))]
    cells += [", ".join(f"`{name}`" for name in skipped), f"{100 * report.model_sparsity:.1f}"]
    return cells + [f"{error:.3f}" for error in moved], max(moved[1:]) < moved[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[""], help="only those whose names hold one of these")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    columns = ["architecture", "parts", "layers", "skipped", "zeros of all weights, %", *METHODS]
    every = ARCHITECTURES | timm_architectures()
    chosen = {name: each for name, each in every.items() if any(part in name for part in arguments.models)}
    print_table(columns, ((name, row(each, arguments.seed)) for name, each in chosen.items()))


if __name__ == "__main__":
    main()
