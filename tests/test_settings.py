"""`prune` finds the same answer whatever is set around the call, and however a model is wrapped or typed."""

import copy
import threading

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import moonshot as ms
from moonshot.models.modules import ModelError, patched, unwrapped
from moonshot.models.precision import activation_dtype, narrowed
from moonshot.models.settings import ready, without_cache

JOINT = 0.5 * ms.Reconstruction() + 0.3 * ms.Fisher() + 0.2 * ms.TokenFisher()


def network(**changes):
    torch.manual_seed(0)
    layers = [part for width in (6, 8, 8, 8) for part in (nn.Linear(width, 8), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, 3)).to(**changes)


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(**changes)


def pairs(samples=20):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(samples, 6, generator=generator), torch.arange(samples) % 3)]


def tokens():
    return torch.randint(1, 61, (6, 16), generator=torch.Generator().manual_seed(1))


def pair_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def pruned(model, **changes):
    """The reports of its layers."""
    graph = {"calibration": pairs(), "loss": pair_loss} if not hasattr(model, "config") else {}
    arguments = {"calibration": tokens(), "objective": JOINT, "solver": ms.SparseGPT()} | graph | changes
    return ms.prune(model, pattern=0.5, **arguments).layers


def assert_same(layers, expected, rel=1e-5):
    assert list(layers) == list(expected)
    for name, layer in layers.items():
        assert layer.terms == pytest.approx(expected[name].terms, rel=rel), name
        assert layer.terms["Fisher"] > 0, name


@pytest.fixture(params=[network, llama], ids=["graph", "chain"])
def make(request):
    return request.param


def default_dtype(dtype):
    class Set:
        def __enter__(self):
            torch.set_default_dtype(dtype)

        def __exit__(self, *_):
            torch.set_default_dtype(torch.float32)

    return Set()


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_is_set_around_the_call_changes_nothing(make, name):
    model = make()
    expected, data = pruned(copy.deepcopy(model)), tokens() if make is llama else pairs()
    with SURROUNDINGS[name]():
        if name == "inference_mode":
            data = tokens() if make is llama else pairs()  # made in it
        assert_same(pruned(model, calibration=data), expected)


def test_allocate_turns_gradients_on_for_itself():
    expected = ms.allocate(network(), pairs(), 0.5, loss=pair_loss, solver=ms.SparseGPT(), rounds=0)
    with torch.inference_mode():
        model = copy.deepcopy(network())
    with pytest.raises(ModelError, match="made under torch.inference_mode"):
        ms.allocate(model, pairs(), 0.5, loss=pair_loss)
    model = network()
    with torch.no_grad():
        found = ms.allocate(model, pairs(), 0.5, loss=pair_loss, solver=ms.SparseGPT(), rounds=0)
    assert found == expected


class Reader(nn.Module):
    """Reads integers, so that nothing that it reads has a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(self.embedding(x))).mean(1))


@pytest.mark.parametrize("make", [Reader, network, llama])
def test_frozen_weights_have_gradients_all_the_same(make):
    changes = {}
    if make is Reader:
        ids = torch.randint(0, 9, (20, 5), generator=torch.Generator().manual_seed(0))
        changes = {"calibration": [(ids, torch.arange(20) % 3)]}
    frozen = make().requires_grad_(False)
    assert_same(pruned(frozen, **changes), pruned(make(), **changes))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_loss_without_a_gradient_is_refused(make):
    loss = pair_loss if make is network else lambda model, batch: model(**batch, labels=batch["input_ids"]).loss
    with pytest.raises(ModelError, match="the loss has no gradient: .* without detach"):
        pruned(make(), loss=lambda model, batch: loss(model, batch).detach())


def test_float64_models(make):
    data = tokens() if make is llama else [(x.double(), y) for x, y in pairs()]
    model = make(dtype=torch.float64)
    assert_same(pruned(model, calibration=data), pruned(make()), rel=1e-4)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_on_half_precision_data(dtype):
    found = pruned(network(dtype=dtype), calibration=[(x.to(dtype), y) for x, y in pairs()])
    assert_same(found, pruned(network()), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16])
def test_the_first_parameters_dtype_is_not_that_of_the_hidden_states(make, dtype):
    expected = pruned(make())
    model = make()
    first = nn.Module()
    first.weight = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    inner = model.model if make is llama else model
    inner._modules = {"unused": first, **inner._modules}
    if make is network:
        first.forward = lambda x: x
    assert next(model.parameters()).dtype == dtype and activation_dtype(model) == torch.float32
    assert_same(pruned(model), expected)


def test_every_layer_keeps_its_own_dtype():
    model = network(dtype=torch.float16)
    model[4].float()
    before = model[4].weight.detach().clone()
    expected = pruned(network())
    assert_same(pruned(model), expected, rel=0.1)
    assert model[2].weight.dtype == torch.float16 and model[4].weight.dtype == torch.float32
    survivors = model[4].weight[model[4].weight != 0]
    assert (survivors.half().float() != survivors).float().mean() > 0.5  # not those in the first columns
    assert not torch.equal(before, model[4].weight)


def test_hidden_states_that_float16_cannot_hold():
    large, lowest = torch.tensor([1e5, -2.0]), torch.tensor([torch.finfo(torch.float32).min])
    with pytest.warns(UserWarning, match="float16 cannot hold what passes .* stored in bfloat16"):
        assert narrowed(large, torch.float16).dtype == torch.bfloat16
    for sign in (1, -1):
        with pytest.warns(UserWarning, match="float16"):
            narrowed(torch.tensor([sign * 1e5]), torch.float16)
    assert narrowed(large[1:], torch.float16).dtype == torch.float16
    for dtype in (torch.float16, torch.bfloat16):  # what a mask adds to the scores of what is not to be seen
        assert bool(narrowed(lowest, dtype).isfinite())
    assert narrowed(torch.tensor([torch.inf]), torch.float16).item() == torch.inf


def overflowing(make, dtype):
    """Weights that float16 can hold, hidden states between the parts that it cannot."""
    model = make(dtype=dtype)
    if make is network:
        scales = {model[0]: 1e3, model[2]: 1e3, model[4]: 1e-2, model[6]: 1e-2, model[8]: 1e-2}
    else:
        scales = dict.fromkeys((model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj), 2e4)
    for layer, scale in scales.items():
        layer.weight.data *= scale
    return model


def test_a_float16_model_whose_hidden_states_overflow_is_pruned_with_a_warning(make):
    with pytest.warns(UserWarning, match="float16 cannot hold"):
        found = pruned(overflowing(make, torch.float16))
    assert_same(found, pruned(overflowing(make, torch.float32)), rel=0.2)


def test_a_loss_that_overflows_says_float16():
    with pytest.raises(ModelError, match="got inf in float16, which holds 65504 at most"):
        pruned(network(), loss=lambda model, batch: (1e6 * pair_loss(model, batch)).half())


class Noisy(nn.Module):
    """Adds noise, part of which the loss does not depend on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.unread = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))), nn.Linear(6, 6)

    def forward(self, x):
        x = self.layers(x + torch.randn_like(x))
        self.unread(x)
        return x


def test_random_numbers_in_a_model_are_the_same_in_every_pass():
    expected, model = pruned(Noisy()), Noisy()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = pruned(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: layer.terms for name, layer in found.items()} == {
        name: layer.terms for name, layer in expected.items()
    }
    assert found["unread"].note == "the loss does not depend on it" and not found["layers.0"].note


class Counting(nn.Module):
    """Counts its calls in one buffer and replaces another."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.body[3] = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        self.count += 1
        self.last = x[-1].clone()
        return self.body(x)


def test_what_a_model_does_to_its_buffers_is_undone():
    model = Counting()
    count, running = model.count, model.body[3].running_mean
    pruned(model)
    assert model.count is count and not count and not model.last.any() and len(model.last) == 6
    assert model.body[3].running_mean is running and running.any()  # estimated again


# modules with a forward or a wrapper of their own


def test_a_forward_on_the_instance_is_there_afterwards():
    model = nn.Sequential(nn.Linear(2, 2))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    own, x = model[0].forward, torch.ones(1, 2)
    with patched(list(model), [lambda x: x]):
        assert torch.equal(model(x), x)
    assert model[0].forward is own and torch.equal(model(x), 2 * forward(x))


def test_a_patched_model_is_the_same_model_at_no_sparsity(make):
    model, x = make(), tokens() if make is llama else pairs()[0][0]
    part = model.model.layers[0] if make is llama else model[1]
    forward = part.forward
    part.forward = lambda *args, **kwargs: 3 * forward(*args, **kwargs)

    def output():
        with torch.no_grad():
            return model(x).logits if make is llama else model(x)

    before = output()
    report = ms.prune(
        model, x if make is llama else pairs(), 0, **({} if make is llama else {"loss": pair_loss})
    )
    assert report.sparsity == 0
    torch.testing.assert_close(output(), before)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_wrapped_models_are_pruned_inside():
    expected = pruned(network())
    for wrap in (nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))):
        model = network()
        wrapped = wrap(model)
        assert unwrapped(wrapped) is model
        assert_same(pruned(wrapped), expected)
        assert sum(int((p == 0).sum()) for p in model.parameters()) == sum(
            round(layer.sparsity * layer.shape[0] * layer.shape[1]) for layer in expected.values()
        )
    model = network()
    model.compile(backend="eager")
    call = model._compiled_call_impl
    assert_same(pruned(model), expected)
    assert model._compiled_call_impl is call


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_compiled_modules_inside_a_model_run_as_they_are():
    model, expected = network(), pruned(network())
    inner = model[2]
    model[2] = compiled = torch.compile(inner, backend="eager")
    forward = compiled.forward
    report = pruned(model)
    assert_same({name.removesuffix("._orig_mod"): layer for name, layer in report.items()}, expected)
    assert model[2] is compiled and compiled.forward == forward and compiled._orig_mod is inner


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_a_scripted_model_has_no_layers():
    with pytest.raises(ModelError, match="0: RecursiveScriptModule holds weight and is no Linear"):
        pruned(torch.jit.script(network()))


def test_peft_models_are_refused():
    model = network()
    model.append(type("LoraLinear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(3, 3))
    with pytest.raises(ModelError, match=r"PEFT adapters .* merge them first \(model = model.merge_and_unload"):
        pruned(model)


# caches


def test_no_configuration_in_a_model_asks_for_a_cache():
    model = llama()
    model.config.inner = transformers.LlamaConfig(use_cache=True)
    with pytest.raises(KeyError), ready(model):
        assert not model.config.use_cache and not model.config.inner.use_cache
        raise KeyError
    assert model.config.use_cache and model.config.inner.use_cache


def test_caches_are_no_arguments_of_a_replayed_call():
    cache = transformers.DynamicCache()
    args, kwargs = without_cache(
        (1, cache), {"past_key_values": 2, "cache": cache, "use_cache": True, "mask": 3}
    )
    assert args == (1, None) and kwargs == {"cache": None, "use_cache": False, "mask": 3}


# threads


def test_a_model_is_pruned_by_one_thread_at_a_time():
    model, refused, inside = network(), [], threading.Event()

    def loss(model, batch):
        if not inside.is_set():
            inside.set()
            other = threading.Thread(target=second)
            other.start()
            other.join()
        return pair_loss(model, batch)

    def second():
        with pytest.raises(ModelError, match="being pruned in another thread"):
            pruned(nn.Sequential(model))
        refused.append(True)

    assert_same(pruned(model, loss=loss), pruned(network()))
    assert refused
    pruned(model)


def test_two_models_in_two_threads():
    expected, found, models = pruned(network()), {}, [network() for _ in range(3)]

    def prune(k):
        found[k] = pruned(models[k])

    threads = [threading.Thread(target=prune, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layers in found.values():
        assert_same(layers, expected)
    assert len(found) == 3


# hooks


class Shifted(nn.Module):
    """A module whose input is scaled and whose output is shifted: what the hooks of `hooked_at` do to it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(0.5 * x) + 0.1


def hooked_at(module):
    module.register_forward_pre_hook(lambda _, args: (0.5 * args[0],))
    module.register_forward_hook(lambda _, __, output: output + 0.1)


@pytest.mark.parametrize("refit", [False, ms.Refit(epochs=1)], ids=["plain", "refit"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_hooks_that_change_what_a_module_reads_and_returns_are_part_of_the_model(place, refit):
    model, other = network(), network()
    hooked_at(model[place])
    other[place] = Shifted(other[place])
    found, expected = pruned(model, refit=refit), pruned(other, refit=refit)
    for one, same in zip(found.values(), expected.values(), strict=True):
        assert one.terms == pytest.approx(same.terms, rel=1e-5), one.name


@pytest.mark.parametrize("adapter", [None, ms.GraphAdapter()], ids=["chain", "graph"])
def test_hooks_of_a_transformers_blocks_are_part_of_it_too(adapter):
    def models():
        shift = torch.randn(32, generator=torch.Generator().manual_seed(1))
        model, other = llama(), llama()
        for part in (model.model.layers[0], model.model.layers[0].mlp):
            part.register_forward_hook(lambda _, __, output: output + shift)
        other.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + shift, *args[1:]))
        other.model.layers[0].mlp.down_proj.bias = nn.Parameter(shift)
        return model, other

    with torch.no_grad():
        model, other = models()
        torch.testing.assert_close(model(tokens()).logits, other(tokens()).logits)
    assert_same(pruned(model, adapter=adapter), pruned(other, adapter=adapter), rel=1e-4)


def test_layers_that_a_model_runs_without_gradients_have_none():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.features, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            with torch.no_grad():
                x = torch.relu(self.features(x))
            return self.head(x)

    found = pruned(Frozen())
    assert found["features"].terms["Fisher"] == 0 and "does not depend on it" in found["features"].note
    assert found["features"].terms["Reconstruction"] > 0 and found["head"].terms["Fisher"] > 0
