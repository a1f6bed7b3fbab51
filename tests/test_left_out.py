"""Weights that are tied, and weights that no kind of layer holds: left as they are, and named with the reason."""

import copy
import json
import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import conv2d, cross_entropy
from torch.nn.utils.prune import l1_unstructured

import moonshot as ms
from moonshot.models.calibration import as_batches
from moonshot.models.layers import layers_of
from moonshot.models.left_out import left_out
from moonshot.models.modules import ModelError
from moonshot.models.partition import partition_model
from moonshot.models.targets import TargetError

JOINT = 0.5 * ms.Reconstruction() + 0.5 * ms.Fisher()


def pair_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def pruned(model, *shape, **changes):
    """The report; inputs are random and have this shape, behind the samples."""
    x = torch.randn(20, *shape, generator=torch.Generator().manual_seed(0))
    arguments = {"objective": JOINT, "solver": ms.SparseGPT(), "loss": pair_loss} | changes
    return ms.prune(model, [(x, torch.arange(20) % 3)], 0.5, **arguments)


def zeros(weight):
    return float((weight == 0).float().mean())


class Tied(nn.Module):
    """Predicts the token that it reads, by the weight of its embedding."""

    def __init__(self, tie):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner, self.out = nn.Embedding(31, 8), nn.Linear(8, 8), nn.Linear(8, 31)
        if tie == "parameter":
            self.out.weight = self.embedding.weight
        elif tie == "memory":
            self.out.weight.data = self.embedding.weight.data

    def forward(self, x):
        return self.out(torch.relu(self.inner(self.embedding(x)))).mean(1)


@pytest.mark.parametrize("tie", ["parameter", "memory"])
def test_a_layer_that_has_an_embeddings_weight_is_left_alone(tie):
    model, data = Tied(tie), [(torch.arange(60).reshape(20, 3) % 31, torch.arange(20) % 3)]
    options = {"objective": JOINT, "solver": ms.SparseGPT(), "loss": pair_loss}
    report = ms.prune(model, data, 0.5, **options)
    assert list(report.layers) == ["inner"] and zeros(model.embedding.weight) == 0
    assert report.skipped == {"out": "its weight is also embedding.weight"}
    for words, changes in {
        "no layer is left to prune: out: its weight is also embedding": {"targets": "out"},
        "out cannot be pruned: its weight is also embedding": {"pattern": {"out": 0.5}},
    }.items():
        with pytest.raises(TargetError, match=words):
            ms.prune(model, data, **({"pattern": 0.5} | options | changes))
    free = Tied(None)
    assert list(ms.prune(free, data, 0.5, **options).layers) == ["inner", "out"]


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_of_a_transformers_model_inside_another_module_is_left_alone(tie):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=301,  # so many that the blocks are not most of the weights
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tie,
    )
    model = Wrapper(transformers.AutoModelForCausalLM.from_config(config))
    ids = torch.randint(0, 301, (4, 9), generator=torch.Generator().manual_seed(0))
    report = ms.prune(model, [{"input_ids": ids, "labels": ids}], 0.5, objective=JOINT, solver=ms.SparseGPT())
    assert len(report.layers) == 14 and not report.skipped
    assert zeros(model.model.lm_head.weight) < 0.1 and zeros(model.model.model.embed_tokens.weight) < 0.1


class Shared(nn.Module):
    """Two layers with one weight, in one list or in two."""

    def __init__(self, apart=False, kind=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        self.second = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        self.last = nn.Linear(6, 3)
        (self.second if apart else self.first)[1].weight = self.first[0].weight

    def forward(self, x):
        for layer in (*self.first, *self.second):
            x = torch.tanh(layer(x))
        return self.last(x)


@pytest.mark.parametrize("apart", [False, True])
def test_two_layers_with_one_weight_are_one_layer_with_both_uses(apart):
    model = Shared(apart).eval()
    other = (model.second if apart else model.first)[1]
    reads, gradients = {}, []
    handles = [
        layer.register_forward_hook(lambda _m, args, _out, key=key: reads.update({key: args[0].detach()}))
        for key, layer in enumerate((model.first[0], other))
    ]
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    model(x)
    for handle in handles:
        handle.remove()
    for k in range(20):
        model.zero_grad()
        pair_loss(model, (x[k : k + 1], torch.tensor([k % 3]))).backward()
        gradients.append(model.first[0].weight.grad.clone())
    problem = JOINT.problem(
        model.first[0].weight.detach(), inputs=torch.cat([reads[0], reads[1]]), gradients=torch.stack(gradients)
    )
    expected = ms.solve(problem, 0.5, ms.SparseGPT())
    report = pruned(model, 6, factors=20, targets="first.0")
    assert report.layers["first.0"].relative == pytest.approx(expected.relative, rel=1e-4)
    torch.testing.assert_close(other.weight.detach(), expected.weight, rtol=1e-3, atol=1e-5)
    assert other.weight is model.first[0].weight
    assert len(list(layers_of("", model))) == 6


def test_weights_that_lie_partly_in_the_same_memory_are_left_alone():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    model, memory = nn.Sequential(*layers), torch.randn(20, 6)
    for layer, first in zip(layers, (0, 6, 11), strict=False):  # the last two of these have a row in common
        layer.weight.data = memory[first : first + 6]
    layers[3].weight.data = torch.randn(6, 1).expand(6, 6)
    report = pruned(model, 6)
    assert report.skipped == {
        "1": "its weight shares memory with 2.weight",
        "2": "its weight shares memory with 1.weight",
        "3": "entries of its weight share memory: give it a copy first (weight.data.clone())",
    }
    assert list(report.layers) == ["0"] and zeros(memory[:6]) == 0.5 and zeros(memory[6:]) == 0


class Transposed(nn.Module):
    """An autoencoder whose decoder is a product with the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.middle, self.decoder = nn.Linear(6, 4), nn.Linear(4, 4), nn.Module()
        self.decoder.dictionary = self.encoder.weight

    def forward(self, x):
        return (torch.relu(self.middle(self.encoder(x))) @ self.decoder.dictionary)[:, :3]


def test_a_weight_that_a_module_of_ones_own_uses_too_is_left_alone():
    report = pruned(Transposed(), 6)
    assert report.skipped == {"encoder": "its weight is also decoder.dictionary"} and len(report.layers) == 1


class Autoencoder(nn.Module):
    """Its decoder multiplies by the encoder's weight, which no module but the encoder holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.middle = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return (torch.relu(self.middle(self.encoder(x))) @ self.encoder.weight)[:, :3]


def test_a_layer_that_is_called_and_whose_weight_is_multiplied_by_as_well_is_left_alone():
    def penalised(model, batch):  # reads all weights, which are no other use of them
        return pair_loss(model, batch) + sum((parameter @ parameter.T).trace() for parameter in weights)

    model = Autoencoder()
    weights = [model.encoder.weight, model.middle.weight]
    report = pruned(model, 6, loss=penalised)
    assert report.skipped == {"encoder": "the model also multiplies by its weight without calling it"}
    assert list(report.layers) == ["middle"]


def test_blocks_that_share_a_weight_are_no_chain():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    ids = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(0))
    report = ms.prune(model, ids, 0.5, objective=JOINT, solver=ms.SparseGPT())
    assert len(report.layers) == 13 and "model.layers.1.mlp.up_proj" not in report.layers
    assert zeros(second.mlp.up_proj.weight) == 0.5


# what is no layer


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return conv2d(x, weight, self.bias)


class Plain(nn.Linear):
    """As FalconLinear: a product in other words."""

    def forward(self, x):
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class PlainConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Adapted(nn.Linear):
    """Beside its weight one that is zero at first."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(self.in_features, 2), nn.Linear(2, self.out_features)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class OwnProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(1, 8, 8))

    def forward(self, x):
        return x @ self.matrix


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def doubled():
    layer = nn.Linear(8, 8)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def instance(layer):
    layer.forward = layer.forward
    return layer


class Quantised(torch.Tensor):
    """A tensor that says it is of floating-point numbers, and is not."""


def subclassed():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantised), requires_grad=False)
    return layer


LEFT_OUT = {
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "made from others: .*remove_parametrizations",
    ),
    "old weight norm": (
        lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
        "made from others: .* remove_weight_norm",
    ),
    "torch's pruning": (
        lambda: l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
        "made from others: .* prune.remove",
    ),
    "a forward on the instance": (doubled, "Linear computes something else than Linear does"),
    "an adapter": (lambda: Adapted(8, 8), "Adapted computes something else than Linear does"),
    "LSTM": (lambda: Recurrent(8, 8), "Recurrent holds weight_ih_l0, weight_hh_l0 and is no Linear"),
    "GRU with layers": (
        lambda: nn.Sequential(nn.Linear(8, 8), First(8, 8, 3)),
        "First holds .*, ... and is no",
    ),
    "in_proj": (Attention, "MultiheadAttention holds in_proj_weight and is no Linear"),
    "a parameter": (OwnProduct, "OwnProduct holds matrix and is no Linear"),
    "tensor subclass": (subclassed, "is a Quantised: prune before quantising"),
}


class First(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


class Around(nn.Module):
    """A layer between others."""

    def __init__(self, layer, first=None):
        super().__init__()
        self.first, self.layer, self.last = first or nn.Linear(8, 8), layer, nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.layer(self.first(x)))
        return self.last(h.flatten(2).mean(2) if h.ndim == 4 else h.mean(1))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_named_with_the_reason(name):
    torch.manual_seed(0)
    make, words = LEFT_OUT[name]
    model = Around(make())
    before = {key: value.detach().clone() for key, value in model.layer.state_dict().items()}
    report = pruned(model, 5, 8, unreached="skip")
    reasons = {
        layer: reason
        for layer, reason in report.skipped.items()
        if "reached" not in reason and "without calling" not in reason
    }
    ((layer, reason),) = reasons.items()
    assert layer.startswith("layer")
    assert re.search(words, reason), reason
    assert {"first", "last"} <= set(report.layers)
    inside = {f"{name}.weight" for name in report.layers}
    for key, value in model.layer.state_dict().items():
        assert f"layer.{key}" in inside or torch.equal(value, before[key]), key
    assert reason in str(report) and json.loads(report.to_json())["skipped"] == report.skipped


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_what_is_quantised_is_left_out(dtype):
    class Quantised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.float(), self.bias)

    model = Around(Quantised(4, 4), nn.Conv2d(4, 4, 1))
    model.layer.weight = nn.Parameter(model.layer.weight.detach().to(dtype), requires_grad=False)
    reasons = left_out(model, dict(layers_of("", model)))
    assert reasons == {"layer": f"the weight of Quantised is {dtype}: prune before quantising"}


def test_a_convolution_with_standardised_weights():
    torch.manual_seed(0)
    model = Around(Standardised(4, 8, 3), nn.Conv2d(3, 4, 3))
    report = pruned(model, 3, 9, 9)
    assert report.skipped == {"layer": "Standardised computes something else than Conv2d does"}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert report.model_sparsity == pytest.approx((4 * 27 + 24) / 2 / total)
    assert f"{100 * report.model_sparsity:.2f} % of the whole model is zero" in str(report)


@pytest.mark.parametrize(
    "layer", [Plain(8, 8), instance(nn.Linear(8, 8)), nn.Sequential(Plain(8, 8, bias=False))]
)
def test_a_plain_product_in_a_forward_of_its_own_is_recognised(layer):
    report = pruned(Around(copy.deepcopy(layer)), 5, 8)
    assert len(report.layers) == 3 and not report.skipped


def test_a_plain_convolution_in_a_forward_of_its_own_is_recognised():
    layer = PlainConvolution(4, 8, 3, stride=2, padding=1, dilation=2, groups=2)
    report = pruned(Around(layer, nn.Conv2d(3, 4, 3)), 3, 9, 9)
    assert len(report.layers) == 3 and not report.skipped


def test_where_nothing_can_be_pruned_the_error_says_why():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))
    with pytest.raises(ModelError, match="no Linear or convolutional layer to prune: 0: .* made from others"):
        partition_model(model, as_batches([(torch.randn(2, 8), torch.arange(2))]), pair_loss)
