"""rotate: the same model on the principal axes of its residual stream."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import moonshot as ms
from moonshot.models.calibration import CalibrationError
from moonshot.models.modules import ModelError
from tests.models import decoder, tokens


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def with_scales(model):
    """Norms whose scales are not all one."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2, generator=generator)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_it_computes_the_same_on_principal_axes(config, tied, tmp_path):
    model, ids = with_scales(decoder(config, tie_word_embeddings=tied)), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotated = ms.rotate(model, ids)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(rotated, ids), logits(model, ids), rtol=1e-3, atol=1e-4)

    moments = []
    for block in rotated.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.register_forward_hook(lambda _, __, output: moments.append(output.flatten(0, -2).double()))
    logits(rotated, ids)
    moment = sum(x.T @ x for x in moments)
    off = moment - moment.diagonal().diag()
    assert off.norm() < 1e-3 * moment.norm() and (moment.diagonal().diff() > -1e-3).all()

    rotated.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(rotated, ids))


def test_what_is_not_built_so_is_refused():
    with pytest.raises(ModelError, match="no RMSNorm"):
        ms.rotate(decoder(GPT2Config, n_embd=32, n_head=4, n_layer=2), tokens())
    with pytest.raises(ModelError, match="not built like a Llama"):
        ms.rotate(with_scales(decoder(Gemma2Config)), tokens())
    with pytest.raises(ModelError, match="no causal language model"):
        ms.rotate(torch.nn.Linear(3, 4), tokens())
    with pytest.raises(CalibrationError, match="token ids"):
        ms.rotate(decoder(), torch.zeros(2, 3))


def test_it_can_be_pruned():
    rotated = ms.rotate(torch.nn.DataParallel(decoder()), tokens())
    report = ms.prune(rotated, tokens(), 0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_what_is_set_around_it_changes_nothing():
    expected = ms.rotate(decoder(), tokens())
    model = decoder().train()
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        rotated = ms.rotate(model, tokens())
    for parameter, same in zip(rotated.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, same) and parameter.requires_grad and not parameter.is_inference()
    assert rotated.training and rotated.config.use_cache == expected.config.use_cache
