"""Layers as matrices: rows, statistics, gradients and weights against the module's own forward and autograd."""

import copy
from itertools import product
from math import prod
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import moonshot as ms
from moonshot.models import layer_view as layers
from moonshot.models.layers import UnsupportedLayerError, layer_view

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BOUNDS = st.sampled_from([2**24, 2000, 300, 40, 1])


def some(low, high, dims):
    return st.tuples(*[st.integers(low, high)] * dims)


@st.composite
def convolutions(draw):
    """(module, inputs) in float64."""
    dims = draw(st.integers(1, 3))
    groups, channels, m = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = draw(some(1, 3, dims)), draw(some(1, 3, dims)), draw(some(1, 2, dims))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    sizes = [r + extra for r, extra in zip(reach, draw(some(2, 4, dims)), strict=True)]
    padding = draw(st.one_of(some(0, 3, dims), st.sampled_from(["same", "valid"])))
    if padding == "same":
        stride = (1,) * dims
    elif padding != "valid":  # reflections reach no further than the input
        padding = tuple(min(p, size - 1) for p, size in zip(padding, sizes, strict=True))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    module = CONVOLUTIONS[dims](
        groups * channels, groups * m, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode
    )
    return module.double(), torch.randn(draw(st.integers(1, 3)), groups * channels, *sizes).double()


@st.composite
def transposed_convolutions(draw):
    """(module, inputs) in float64; paddings that crop the outputs too."""
    dims = draw(st.integers(1, 3))
    groups, channels, m = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = draw(some(1, 3, dims)), draw(some(1, 3, dims)), draw(some(1, 2, dims))
    sizes = draw(some(1, 3, dims))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    unpadded = [
        (n - 1) * s + d * (k - 1) + e
        for n, s, d, k, e in zip(sizes, stride, dilation, kernel, extra, strict=True)
    ]
    padding = tuple(draw(st.integers(0, u // 2)) for u in unpadded)
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    module = TRANSPOSED[dims](
        groups * channels, groups * m, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation
    )
    return module.double(), torch.randn(draw(st.integers(1, 3)), groups * channels, *sizes).double()


@st.composite
def linears(draw):
    """(module, inputs) in float64, with none to three dimensions between samples and inputs."""
    d, m = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    module = draw(st.sampled_from([nn.Linear(d, m), nn.Linear(d, m, bias=False), Conv1D(m, d)]))
    sizes = draw(st.lists(st.integers(1, 4), max_size=3))
    return module.double(), torch.randn(draw(st.integers(1, 3)), *sizes, d).double()


any_layer = st.one_of(linears(), convolutions(), transposed_convolutions())
any_convolution = st.one_of(convolutions(), transposed_convolutions())

# What random layers seldom are: (module, sizes of the input).
AWKWARD = {
    **{
        f"same, even kernel, {mode}": (nn.Conv2d(2, 3, (2, 4), padding="same", padding_mode=mode), (5, 6))
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    **{
        f"paddings of three sizes, {mode}": (
            nn.Conv3d(2, 3, 2, padding=(0, 1, 2), padding_mode=mode),
            (2, 3, 4),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "valid": (nn.Conv1d(2, 3, 3, padding="valid", padding_mode="reflect"), (6,)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5)),
    "depthwise, two outputs each": (nn.Conv2d(4, 8, 3, stride=2, groups=4), (5, 6)),
    "one position": (nn.Conv2d(3, 4, (4, 5)), (4, 5)),
    "pointwise": (nn.Conv2d(6, 4, 1, groups=2), (4, 5)),
    "pointwise, strided, padded": (nn.Conv2d(3, 4, 1, stride=2, padding=1), (4, 5)),
    "stride beyond the kernel": (nn.Conv1d(3, 4, 2, stride=5), (13,)),
    "more padding than input": (nn.Conv2d(2, 3, 3, padding=4, dilation=2), (2, 1)),
    "transposed depthwise": (nn.ConvTranspose2d(4, 4, 3, 2, groups=4), (3, 4)),
    "transposed, three strides": (nn.ConvTranspose3d(4, 6, 2, (1, 2, 3), groups=2), (2, 3, 2)),
    "transposed, cropped to one": (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=4), (4,)),
    "transposed, cropped beyond the kernel": (nn.ConvTranspose2d(2, 3, (1, 2), 3, padding=(1, 2)), (3, 4)),
    "transposed, output padding": (nn.ConvTranspose2d(2, 3, 3, (2, 3), 1, output_padding=(1, 2)), (3, 2)),
    "transposed, dilated": (nn.ConvTranspose2d(2, 3, 3, 1, 2, output_padding=(1, 0), dilation=(2, 3)), (3, 4)),
    "transposed, stride beyond the kernel": (nn.ConvTranspose1d(2, 3, 1, stride=4, output_padding=3), (3,)),
}


def channels_last(module, tensor):
    """(samples, positions, channels)."""
    if not isinstance(module, nn.Linear | Conv1D):
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def of_group(tensor, group, groups):
    return tensor.unflatten(-1, (groups, -1))[..., group, :]


def gathered(view, inputs, output_gradients=None, group=0):
    """All rows (samples, positions, d) and, if given, (samples, positions, m), from the chunks."""
    chunks = list(view.chunks(inputs, output_gradients, group))
    samples, positions = chunks[-1].samples.stop, chunks[-1].positions.stop
    together = [torch.cat([c.inputs.flatten(0, 1) for c in chunks]).unflatten(0, (samples, positions))]
    if output_gradients is not None:
        outputs = torch.cat([c.output_gradients.flatten(0, 1) for c in chunks])
        together.append(outputs.unflatten(0, (samples, positions)))
    return together


def source(position, size, mode):
    """Which input a padded position holds; None for a zero."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(position, 0), size - 1)
    if mode == "circular":
        return position % size
    return -position if position < 0 else 2 * (size - 1) - position


def margin_before(module):
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return module.padding


def place(module, output, kernel, sizes):
    """Which input meets the weight at `kernel` in the output at `output`; None for none."""
    found = []
    axes = zip(output, kernel, sizes, module.stride, module.dilation, margin_before(module), strict=True)
    for o, k, size, stride, dilation, padding in axes:
        if module.transposed:
            i, rest = divmod(o + padding - dilation * k, stride)
            found.append(i if not rest and 0 <= i < size else None)
        else:
            found.append(source(o * stride + k * dilation - padding, size, module.padding_mode))
    return None if None in found else tuple(found)


def explicit_rows(module, inputs, outputs, group):
    """The rows (samples, positions, d) by a loop over samples, output positions and kernel positions."""
    channels = inputs.shape[1] // module.groups
    mine = inputs[:, group * channels : (group + 1) * channels]
    kernels = list(product(*map(range, module.kernel_size)))
    if module.transposed:
        kernels.reverse()
    rows = []
    for sample in mine:
        for output in product(*map(range, outputs.shape[2:])):
            row = inputs.new_zeros(len(kernels), channels)
            for j, kernel in enumerate(kernels):
                if (at := place(module, output, kernel, sample.shape[1:])) is not None:
                    row[j] = sample[(slice(None), *at)]
            rows.append(row.flatten())
    return torch.stack(rows).unflatten(0, (len(mine), -1))


def assert_rows_give_the_outputs(module, inputs, bound):
    outputs = module(inputs).detach()
    expected = channels_last(module, outputs)
    view = layer_view(module)
    matrices = view.matrices()
    assert matrices.shape == (view.groups, *view.shape) and matrices.is_contiguous()
    bias = torch.zeros(expected.shape[-1]).double() if module.bias is None else module.bias.detach()
    with mock.patch.object(layers, "NUMBERS", bound):
        for group in range(view.groups):
            rows, seen = gathered(view, inputs, outputs, group)
            assert torch.equal(seen, of_group(expected, group, view.groups))
            torch.testing.assert_close(rows @ matrices[group].T + of_group(bias, group, view.groups), seen)


def assert_rows_are_those_of_a_loop(module, inputs):
    """And their products."""
    outputs = module(inputs)
    view = layer_view(module)
    for group in range(view.groups):
        explicit = explicit_rows(module, inputs, outputs, group)
        (rows,) = gathered(view, inputs, group=group)
        assert torch.equal(rows, explicit)
        gram = sum(x.T @ x for c in view.chunks(inputs, group=group) for x in [c.inputs.flatten(0, 1)])
        torch.testing.assert_close(gram, sum(torch.outer(x, x) for x in explicit.flatten(0, 1)))


@settings(max_examples=150)
@given(any_layer, BOUNDS)
def test_rows_times_matrices_are_the_outputs(case, bound):
    assert_rows_give_the_outputs(*case, bound)


@settings(max_examples=150)
@given(any_convolution)
def test_rows_and_their_products_are_those_of_a_loop_over_positions(case):
    assert_rows_are_those_of_a_loop(*case)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_layers(name):
    module, sizes = AWKWARD[name]
    module = copy.deepcopy(module).double()
    inputs = torch.randn(2, module.in_channels, *sizes).double()
    for bound in (2**24, 40):
        assert_rows_give_the_outputs(module, inputs, bound)
    assert_rows_are_those_of_a_loop(module, inputs)


@settings(max_examples=150)
@given(any_layer, BOUNDS)
def test_sample_gradients_are_those_of_autograd(case, bound):
    module, inputs = case
    view = layer_view(module)
    outputs = module(inputs)
    delta = torch.randn_like(outputs)
    gradients = torch.zeros(len(inputs), view.groups, *view.shape).double()
    with mock.patch.object(layers, "NUMBERS", bound):
        for group in range(view.groups):
            for chunk in view.chunks(inputs, delta, group):
                for s in range(len(chunk.inputs)):
                    gradients[chunk.samples.start + s, group] += chunk.output_gradients[s].T @ chunk.inputs[s]
    for s in range(len(inputs)):
        loss = (outputs[s] * delta[s]).sum()
        (expected,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
        as_weight = copy.deepcopy(module)
        layer_view(as_weight).assign(gradients[s])
        torch.testing.assert_close(as_weight.weight.detach(), expected)


@settings(max_examples=150)
@given(any_layer)
def test_assigned_matrices_are_what_the_layer_computes_with(case):
    module, inputs = case
    view = layer_view(module)
    before = module.weight.detach().clone()
    view.assign(view.matrices())
    assert torch.equal(module.weight, before)
    new = torch.randn(view.groups, *view.shape).double()
    view.assign(new)
    assert torch.equal(view.matrices(), new)
    outputs = channels_last(module, module(inputs).detach())
    bias = 0 if module.bias is None else module.bias.detach()
    rows = [gathered(view, inputs, group=group)[0] @ new[group].T for group in range(view.groups)]
    torch.testing.assert_close(torch.cat(rows, -1) + bias, outputs)
    view.assign_rows(2 * new.flatten(0, 1))
    assert torch.equal(view.matrices(), 2 * new)


@settings(max_examples=150)
@given(any_layer, BOUNDS)
def test_chunks_are_bounded_and_cover_every_row_once_in_order(case, bound):
    module, inputs = case
    outputs = module(inputs)
    view = layer_view(module)
    samples, positions = channels_last(module, outputs).shape[:2]
    with mock.patch.object(layers, "NUMBERS", bound):
        chunks = list(view.chunks(inputs, outputs))
        alone = list(view.chunks(inputs))
    covered = []
    for chunk in chunks:
        assert not (chunk.inputs.requires_grad or chunk.output_gradients.requires_grad)
        assert chunk.inputs.numel() + chunk.output_gradients.numel() <= max(bound, sum(view.shape))
        here = [range(p.start, p.stop) for p in (chunk.samples, chunk.positions)]
        assert chunk.inputs.shape[:2] == chunk.output_gradients.shape[:2] == tuple(map(len, here))
        assert len(here[0]) == 1 or len(here[1]) == positions
        covered.extend(product(*here))
    assert covered == list(product(range(samples), range(positions)))
    assert [(c.samples, c.positions) for c in alone] == [(c.samples, c.positions) for c in chunks]
    assert all(c.output_gradients is None for c in alone)


def test_small_chunks_are_not_needlessly_small():
    view = layer_view(nn.Conv2d(3, 5, 3, padding=1))
    with mock.patch.object(layers, "NUMBERS", 32 * 64):
        sizes = [prod(c.inputs.shape[:2]) for c in view.chunks(torch.randn(2, 3, 20, 20))]
    assert sizes == 2 * (6 * [60] + [40])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_n_of_m_runs_along_the_input_channels(dims, transposed):
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[dims]
    module = kind(16, 6, 3, groups=2)
    weight = module.weight.detach().clone()
    view = layer_view(module)
    assert (view.groups, view.shape, view.channels) == (2, (3, 8 * 3**dims), 8)
    matrices = view.matrices()
    pattern = ms.NM(2, 4)
    view.assign(matrices * torch.stack([pattern.keep(matrix.abs()) for matrix in matrices]))
    kept = module.weight.detach() != 0
    assert torch.equal(module.weight, weight * kept)
    by_channel = kept.unflatten(0, (2, 8)).movedim(1, -1) if transposed else kept.movedim(1, -1)
    assert (by_channel.unflatten(-1, (2, 4)).sum(-1) == 2).all()
    strongest = weight.unflatten(0, (2, 8)).movedim(1, -1) if transposed else weight.movedim(1, -1)
    strongest = strongest.unflatten(-1, (2, 4)).abs()
    assert (strongest.topk(2).values == strongest.mul(by_channel.unflatten(-1, (2, 4))).topk(2).values).all()


def test_the_columns_of_a_linear_are_its_inputs():
    linear, conv1d = nn.Linear(8, 3), Conv1D(3, 8)
    assert torch.equal(layer_view(linear).matrices(), linear.weight.detach()[None])
    assert torch.equal(layer_view(conv1d).matrices(), conv1d.weight.detach().T[None])
    for module in (linear, conv1d):
        view = layer_view(module)
        assert (view.groups, view.shape, view.channels) == (1, (3, 8), 8)


@settings(max_examples=150)
@given(any_convolution)
def test_reconstruction_is_the_error_of_the_output(case):
    """A whole pruning of one layer, group by group: what the solver is told is what the layer then does."""
    module, inputs = case
    view = layer_view(module)
    before = module(inputs).detach()
    matrices = view.matrices()
    pruned, error, zero = [], 0.0, 0.0
    for group in range(view.groups):
        x = gathered(view, inputs, group=group)[0].flatten(0, 1)
        problem = ms.Reconstruction().problem(matrices[group], inputs=x)
        result = ms.solve(problem, 0.5, ms.Magnitude())
        pruned.append(result.weight)
        at_zero = float((x @ matrices[group].T).square().sum())
        error += result.terms["Reconstruction"] * at_zero
        zero += at_zero
    view.assign(torch.stack(pruned))
    assert float((module(inputs).detach() - before).square().sum()) == pytest.approx(error, abs=1e-9 * zero)


def images(model, config, **options):
    return model(config(image_size=32, **options)), torch.randn(2, 3, 32, 32)


def tokens():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), torch.randint(0, 50, (2, 8))


MODELS = {
    "GPT-2": (tokens, 5),
    "MobileNet": (
        lambda: images(MobileNetV2ForImageClassification, MobileNetV2Config, depth_multiplier=0.25),
        53,
    ),
    "ConvNeXt": (
        lambda: images(
            ConvNextForImageClassification, ConvNextConfig, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]
        ),
        17,
    ),
    "Swin": (
        lambda: images(
            SwinForImageClassification, SwinConfig, embed_dim=12, depths=[1, 2], num_heads=[2, 2], window_size=4
        ),
        21,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_model(name):
    torch.manual_seed(0)
    make, count = MODELS[name]
    model, batch = make()
    seen = []
    for module in model.modules():
        if layer_view(module) is not None:
            module.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
    with torch.no_grad():
        model.eval()(batch)
    assert len(seen) == count
    for module, inputs, outputs in seen:
        view = layer_view(module)
        bias = torch.zeros(view.groups * view.shape[0]) if module.bias is None else module.bias.detach()
        for group, matrix in enumerate(view.matrices()):
            rows, found = gathered(view, inputs, outputs, group)
            torch.testing.assert_close(
                rows @ matrix.T + of_group(bias, group, view.groups), found, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("sizes", [(), (3,), (2, 3), (2, 4, 4, 3)])
def test_positions_of_a_linear_are_all_its_leading_dimensions(sizes):
    view = layer_view(nn.Linear(5, 2))
    x = torch.randn(*sizes, 5)
    (chunk,) = view.chunks(x)
    samples = sizes[0] if sizes else 1
    assert torch.equal(chunk.inputs, x.reshape(samples, -1, 5))


def test_a_caller_can_leave_padded_tokens_out():
    view = layer_view(nn.Linear(5, 2))
    x, real = torch.randn(4, 6, 5), torch.rand(4, 6) < 0.6
    for bound in (2**24, 100, 20, 1):
        with mock.patch.object(layers, "NUMBERS", bound):
            rows = [c.inputs[real[c.samples, c.positions]] for c in view.chunks(x)]
        assert torch.equal(torch.cat(rows), x[real])


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_one_image_is_one_sample(module):
    x = torch.randn(4, 7, 6)
    y = module(x).detach()
    alone, batch = gathered(layer_view(module), x, y, 1), gathered(layer_view(module), x[None], y[None], 1)
    assert all(torch.equal(a, b) for a, b in zip(alone, batch, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "module",
    [nn.Linear(8, 3), Conv1D(3, 8), nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3)],
    ids=str,
)
def test_assign_writes_in_place_in_the_weights_dtype(module, dtype):
    module = copy.deepcopy(module).to(dtype)
    view, parameter, address = layer_view(module), module.weight, module.weight.data_ptr()
    assert view.matrices().dtype == dtype
    new = torch.randn(view.groups, *view.shape)
    view.assign(new.requires_grad_())
    assert torch.equal(view.matrices(), new.detach().to(dtype))
    assert module.weight is parameter and parameter.data_ptr() == address and parameter.requires_grad
    view.matrices().zero_()
    assert torch.equal(view.matrices(), new.detach().to(dtype))


def test_tied_layers_stay_tied():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    view = layer_view(first)
    view.assign(torch.eye(6)[None])
    assert second.weight is first.weight and torch.equal(second.weight, torch.eye(6))


def test_a_view_follows_a_weight_that_is_replaced():
    module = nn.Conv2d(4, 2, 3)
    view = layer_view(module)
    module.weight.data = torch.ones_like(module.weight, dtype=torch.float64)
    assert view.matrices().dtype == torch.float64 and (view.matrices() == 1).all()
    view.assign(torch.zeros(1, *view.shape))
    assert (module.weight == 0).all()


def test_channels_last_memory_is_kept():
    module = nn.Conv2d(8, 6, 3, groups=2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    assert torch.equal(layer_view(module).matrices(), layer_view(twin).matrices())
    assert torch.equal(gathered(layer_view(module), x)[0], gathered(layer_view(twin), x.contiguous())[0])
    layer_view(module).assign(2 * layer_view(twin).matrices())
    assert torch.equal(module.weight, 2 * twin.weight)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.BatchNorm2d(4),
        nn.Embedding(4, 4),
        nn.Bilinear(4, 4, 4),
        nn.ReLU(),
        nn.Sequential(nn.Linear(4, 4)),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_no_layers_to_prune(module):
    assert layer_view(module) is None


class Renamed(nn.Linear):
    """A Linear by another name."""


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Same(nn.Module):
    def forward(self, weight):
        return weight


def parametrised(parametrisation):
    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", parametrisation)
    return module


def integer():
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return module


def test_a_subclass_that_computes_the_same_is_a_layer():
    assert layer_view(Renamed(4, 3)).shape == (3, 4)
    assert layer_view(nn.MultiheadAttention(4, 2).out_proj).shape == (4, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scaled(4, 4), "Scaled computes something else than Linear"),
        (lambda: Standardised(4, 4, 3), "Standardised computes something else than Conv2d"),
        (lambda: parametrised(Doubled()), "no parameter"),
        (lambda: parametrised(Same()), "no parameter"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "no parameter"),
        pytest.param(
            lambda: weight_norm(nn.Linear(4, 4)),
            "no parameter",
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
        ),
        (lambda: spectral_norm(nn.ConvTranspose2d(4, 4, 3)), "no parameter"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "no parameter"),
        (lambda: nn.LazyLinear(4), "run the model once"),
        (lambda: nn.LazyConv2d(4, 3), "run the model once"),
        (integer, "torch.int8"),
    ],
)
def test_a_layer_that_is_not_what_it_seems_is_an_error(make, words):
    with pytest.raises(UnsupportedLayerError, match=words):
        layer_view(make())


def test_a_lazy_layer_is_a_layer_once_it_has_run():
    module = nn.LazyConv2d(4, 3)
    module(torch.randn(1, 2, 5, 5))
    assert layer_view(module).shape == (4, 18)


@pytest.mark.parametrize(
    ("module", "inputs", "outputs", "words"),
    [
        (nn.Linear(4, 3), (2, 5), None, "inputs have 5 channels, the layer 4"),
        (nn.Linear(4, 3), (2, 6, 4), (2, 6, 4), "output_gradients have 4 channels, the layer 3"),
        (nn.Linear(4, 3), (2, 6, 4), (2, 5, 3), "give 2 samples"),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 2, 5, 5), None, "inputs have 2 channels, the layer 4"),
        (nn.Conv2d(4, 6, 3), (2, 4, 5, 5), (2, 6, 5, 5), "give 2 samples at positions"),
        (nn.Conv2d(4, 6, 3), (2, 4, 5, 5), (1, 6, 3, 3), "give 2 samples at positions"),
        (nn.Conv2d(4, 6, 3), (4, 5), None, "cannot have seen or returned"),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), (2, 6, 12, 12), "give 2 samples at positions"),
    ],
)
def test_what_the_layer_cannot_have_seen_is_an_error(module, inputs, outputs, words):
    gradients = None if outputs is None else torch.randn(outputs)
    with pytest.raises(ValueError, match=words):
        next(layer_view(module).chunks(torch.randn(inputs), gradients))


@pytest.mark.parametrize("shape", [(3, 4), (1, 4, 3), (2, 3, 4), (1, 1, 4), (1, 3, 5)])
def test_matrices_of_another_shape_are_an_error(shape):
    with pytest.raises(ValueError, match="matrices must be"):
        layer_view(nn.Linear(4, 3)).assign(torch.zeros(shape))
