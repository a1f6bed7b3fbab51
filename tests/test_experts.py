"""Mixtures of experts: what each expert sees, what comes out, and layers that few tokens or none reach."""

import copy
import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, linear, silu

import moonshot as ms
from moonshot.files.folder import save
from moonshot.models.calibration import one_by_one
from moonshot.models.expert_view import ExpertView
from moonshot.models.layers import layers_of
from moonshot.models.modules import ModelError
from moonshot.models.offload import Offload
from moonshot.models.partition import partition_model
from moonshot.models.statistics import LayerStatistics
from tests.models import JOINT, SIZES

SIZES = SIZES | dict(bos_token_id=1, eos_token_id=2)
FINE = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
# config, what differs, whether weights are (experts, d, m)
MIXTURES = {
    "Mixtral": (transformers.MixtralConfig, dict(num_local_experts=4), False),
    "Qwen3-MoE": (transformers.Qwen3MoeConfig, FINE, False),
    "Qwen2-MoE": (transformers.Qwen2MoeConfig, FINE | dict(shared_expert_intermediate_size=24), False),
    "OLMoE": (transformers.OlmoeConfig, dict(num_experts=4, num_experts_per_tok=2), False),
    "PhiMoE": (transformers.PhimoeConfig, dict(num_local_experts=4), False),
    "GPT-OSS": (transformers.GptOssConfig, dict(num_local_experts=4, num_experts_per_tok=2), True),
}


def mixture(name="Mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    config, changes, _ = MIXTURES[name]
    return transformers.AutoModelForCausalLM.from_config(config(**(SIZES | changes)), dtype=dtype)


def tokens(samples=6, length=16):
    return torch.randint(3, 61, (samples, length), generator=torch.Generator().manual_seed(1))


def state(model):
    return copy.deepcopy(model.state_dict())


def unchanged(model, before):
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# what an expert sees


class Gated(nn.Module):
    """One expert as modules."""

    def __init__(self, gate_up, down):
        super().__init__()
        d, width = down.shape
        self.gate_proj, self.up_proj = nn.Linear(d, width, bias=False), nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)
        for layer, weight in zip(self.children(), (*gate_up.chunk(2), down), strict=True):
            layer.weight.data = weight.clone()

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class AsModules(nn.Module):
    """A list of experts, each called with its tokens."""

    def __init__(self, gate_up, down):
        super().__init__()
        self.experts = nn.ModuleList(map(Gated, gate_up, down))

    def forward(self, x, index, weights):
        result = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(index == e)
            result = result.index_add(0, token, expert(x[token]) * weights[token, place, None])
        return result


class AsParameters(nn.Module):
    """transformers' experts, or GPT-OSS's order of the dimensions, by any means of multiplying."""

    def __init__(self, gate_up, down, is_transposed, product):
        super().__init__()
        self.num_experts, self.is_transposed, self.product = len(down), is_transposed, product
        order = (lambda w: w.mT.contiguous()) if is_transposed else torch.clone
        self.gate_up_proj, self.down_proj = nn.Parameter(order(gate_up)), nn.Parameter(order(down))

    def forward(self, x, index, weights):
        result = torch.zeros_like(x)
        for e in index.unique():
            token, place = torch.where(index == e)
            gate, up = self.product(x[token], self.gate_up_proj[e]).chunk(2, dim=-1)
            out = self.product(silu(gate) * up, self.down_proj[e])
            result = result.index_add(0, token, out * weights[token, place, None])
        return result


KINDS = {
    "modules": AsModules,
    "linear": lambda *weights: AsParameters(*weights, False, linear),
    "@ T": lambda *weights: AsParameters(*weights, False, lambda x, w: x @ w.T),
    "transposed": lambda *weights: AsParameters(*weights, True, lambda x, w: x @ w),
    "torch.mm": lambda *weights: AsParameters(*weights, True, torch.mm),
}


class Net(nn.Module):
    def __init__(self, kind, gate_up, down, router, head, k):
        super().__init__()
        self.mlp, self.head, self.k = KINDS[kind](gate_up, down), nn.Linear(len(router.T), 3), k
        self.router = nn.Parameter(router)
        self.head.weight.data = head

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, index = linear(flat, self.router).softmax(-1).topk(self.k)
        return self.head((flat + self.mlp(flat, index, weights)).view(x.shape).mean(1))


def net_loss(net, batch):
    return cross_entropy(net(batch[0]), batch[1])


def loop(net, gate_up, down, x, y):
    """What every expert reads and the gradient at what it returns, one sample, token and expert at a time."""
    seen = [{name: ([], []) for name in ("gate_up", "down")} for _ in gate_up]
    rows = []
    for token in x:
        scores, chosen = linear(token, net.router.detach()).softmax(-1).topk(net.k)
        total = token
        for score, e in zip(scores, chosen.tolist(), strict=True):
            h = (gate_up[e] @ token).requires_grad_()
            gate, up = h.chunk(2)
            inner = silu(gate) * up
            out = down[e] @ inner
            out.retain_grad()
            for name, read, made in (("gate_up", token, h), ("down", inner.detach(), out)):
                seen[e][name][0].append(read)
                seen[e][name][1].append(made)
            total = total + score * out
        rows.append(total)
    logits = linear(torch.stack(rows).mean(0), net.head.weight.detach(), net.head.bias.detach())
    cross_entropy(logits[None], y[None]).backward()
    return [
        {
            name: (torch.stack(x), torch.stack([m.grad for m in made])) if x else None
            for name, (x, made) in e.items()
        }
        for e in seen
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(
    samples=st.integers(1, 4),
    length=st.integers(1, 5),
    experts=st.integers(2, 4),
    k=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_statistics_are_those_of_a_loop_over_samples_tokens_and_experts(
    kind, samples, length, experts, k, seed
):
    torch.manual_seed(seed)
    gate_up, down = torch.randn(experts, 8, 5), torch.randn(experts, 5, 4)
    net = Net(kind, gate_up, down, torch.randn(experts, 5), torch.randn(3, 5), k).eval()
    x, y = torch.randn(samples, length, 5), torch.arange(samples) % 3
    signs = torch.tensor([1.0, -1, -1, 1])[:samples]
    found, read = {}, {}
    cut = partition_model(net, [(x, y)], net_loss)
    replay = cut.replay(net, [(x, y)], net_loss, True, Offload())
    for index, part in enumerate(replay.parts):
        layers = {name: view for name, view in layers_of(*part) if name not in cut.unreached}
        statistics = LayerStatistics(layers, JOINT, 16, signs, cut.routed)
        replay.observe(index, statistics)
        read |= statistics.tokens
        found |= {name: list(map(torch.as_tensor, statistics.of(name)[0])) for name in layers}
        replay.advance(index)
    seen = [loop(net, gate_up, down, x[s], y[s]) for s in range(samples)]
    for e in range(experts):
        for name, shape in (("gate_up", (8, 5)), ("down", (5, 4))):
            gram, weighted = torch.zeros(2, shape[1], shape[1], dtype=torch.float64)
            gradients = torch.zeros(samples, *shape)
            count = 0
            for s, sample in enumerate(seen):
                if sample[e][name] is not None:
                    rows, deltas = sample[e][name]
                    count += len(rows)
                    gram += (rows.T @ rows).double()
                    weighted += (rows.T * deltas.square().mean(1) @ rows).double()
                    gradients[s] = signs[s] * deltas.T @ rows
            layers = {
                ("gate_up", True): (f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj"),
                ("down", True): (f"mlp.experts.{e}.down_proj",),
            }.get((name, kind == "modules"), (f"mlp.{name}_proj.{e}",))
            if layers[0] in cut.unreached:
                assert count == 0
                continue
            assert all(read[layer] == count for layer in layers)
            terms = list(zip(*(found[layer] for layer in layers), strict=True))
            torch.testing.assert_close(terms[0][0].double(), gram, rtol=1e-4, atol=1e-5)
            gathered = torch.cat([factors.expand(samples, -1, -1) for factors in terms[1]], dim=1)
            torch.testing.assert_close(gathered, gradients, rtol=1e-3, atol=1e-5)
            if len(layers) == 1:  # gate and up have half of the outputs each
                torch.testing.assert_close(terms[2][0].double(), weighted, rtol=1e-3, atol=1e-6)


def test_gradients_go_with_the_inputs_of_the_dense_model():
    torch.manual_seed(0)
    view = next(
        view
        for _, view in layers_of("", AsParameters(torch.randn(2, 6, 3), torch.randn(2, 3, 3), False, linear))
    )
    x, dense, deltas = torch.randn(3, 3), torch.randn(5, 3), torch.randn(5, 6)
    statistics = LayerStatistics({"e": view, "other": view}, JOINT, 16, torch.ones(1), routed=True)
    statistics.observe(
        1, {"e": [x]}, {"e": [deltas], "other": [deltas]}, {"e": [dense], "other": [dense]}, None
    )
    popped = [list(map(torch.as_tensor, statistics.of(name)[0])) for name in ("e", "other")]
    (gram, factors, weighted), (none, *rest) = popped
    torch.testing.assert_close(gram, x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(factors[0], deltas.T @ dense)
    expected = dense.T * deltas.square().mean(1) @ dense
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-5)
    assert not none.any() and statistics.tokens == {"e": 3, "other": 0}
    for found, expected in zip(rest, (factors, weighted), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_padding_counts_for_nothing(name, side):
    ids, mask = tokens(5, 12), torch.ones(5, 12, dtype=torch.long)
    padding = torch.zeros(5, 4, dtype=torch.long)
    order = (lambda a, b: (a, b)) if side == "left" else (lambda a, b: (b, a))
    padded = [
        {
            "input_ids": torch.cat(order(padding, ids), 1),
            "attention_mask": torch.cat(order(padding, mask), 1),
        }
    ]
    plain, other = mixture(name), mixture(name)
    ms.prune(plain, ids, "2:4", objective=JOINT, solver=ms.SparseGPT())
    ms.prune(other, padded, "2:4", objective=JOINT, solver=ms.SparseGPT())
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_padding_counts_for_nothing_in_an_encoder_decoder():
    sizes = dict(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_experts=3)
    sparse = dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=16)
    config = transformers.SwitchTransformersConfig(**sizes, **sparse, decoder_start_token_id=0, pad_token_id=0)

    def pruned(batch):
        torch.manual_seed(0)
        model = transformers.SwitchTransformersForConditionalGeneration(config)
        options = dict(objective=JOINT, solver=ms.SparseGPT(), unreached="skip")
        return ms.prune(model, [batch], 0.5, **options)

    ids, real = tokens(6, 12), torch.arange(12) < 7
    labels = ids.flip(0)
    one = pruned({"input_ids": ids[:, :7], "labels": labels[:, :7]})
    mask = real.long().expand(6, -1)
    other = pruned({"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(~real, -100)})
    assert list(one.layers) == list(other.layers)
    for name, layer in one.layers.items():
        assert layer.terms == pytest.approx(other.layers[name].terms, rel=1e-3), name


def test_samples_one_by_one():
    ids = torch.tensor([[5, 6, 7], [8, 9, 0], [0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids + 1, "weight": torch.ones(3)}
    first, second = one_by_one([batch], aligned=True)
    assert first["labels"].tolist() == [[6, 7, 8]] and first["weight"].tolist() == [1]
    assert second["input_ids"].tolist() == [[8, 9]] and second["labels"].tolist() == [[9, 10]]
    assert second["attention_mask"].tolist() == [[1, 1]]
    labels = torch.tensor([[6, 7, 8], [-100, 9, -100], [4, 5, 6]])
    _, second = one_by_one([batch | {"labels": labels, "decoder_input_ids": ids}], aligned=False)
    assert second["input_ids"].tolist() == [[8, 9]] and second["labels"].tolist() == [[-100, 9]]
    assert second["decoder_input_ids"].tolist() == [[8, 9]]
    pairs = one_by_one([(torch.arange(4), torch.arange(4))], aligned=True)
    assert [tuple(map(int, pair)) for pair in pairs] == [(k, k) for k in range(4)]


# what comes out


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_gets_the_pattern(name):
    model = mixture(name)
    before, implementation = state(model), model.config._experts_implementation
    report = ms.prune(model, tokens(), "2:4", objective=JOINT, solver=ms.SparseGPT())
    experts = {n: view for n, view in layers_of("", model) if isinstance(view, ExpertView)}
    assert len(experts) == 16 and set(experts) < set(report.layers)
    assert "model.layers.0.mlp.experts.gate_up_proj.3" in experts
    for view in experts.values():
        assert (view.matrices().unflatten(2, (-1, 4)).count_nonzero(3) == 2).all()
    assert all(0 < report.layers[n].relative < 1 for n in experts)
    assert model.config._experts_implementation == implementation
    assert "forward" not in vars(next(iter(experts.values())).module)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {n.rpartition(".")[0] if n in experts else f"{n}.weight" for n in report.layers}
    assert not any(
        "router" in key or key.endswith(("mlp.gate.weight", "expert_gate.weight")) for key in changed
    )


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_outputs_move_less_than_by_magnitude(name):
    model = mixture(name).eval()
    for parameter in model.parameters():  # weights and activations large enough to matter
        parameter.data *= 1 + 2 * (parameter.ndim > 1)
    ids = tokens(16)

    def outputs(objective, solver):
        pruned = copy.deepcopy(model)
        targets = "*.experts.*"
        ms.prune(pruned, ids, 0.5, objective=objective, solver=solver, targets=targets)
        with torch.no_grad():
            return pruned(ids).logits

    with torch.no_grad():
        dense = model(ids).logits
    joint = 0.8 * ms.Reconstruction() + 0.1 * ms.Fisher() + 0.1 * ms.TokenFisher()
    moved = [float((outputs(*how) - dense).norm()) for how in ((joint, ms.ADMM()), (joint, ms.Magnitude()))]
    assert moved[0] < 0.9 * moved[1]


def test_half_precision_and_saving(tmp_path):
    model = mixture(dtype=torch.bfloat16)
    report = ms.prune(model, tokens(), "50%", objective=JOINT, solver=ms.SparseGPT())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and report.sparsity == 0.5
    folder = save(model, None, report, tmp_path / "pruned")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)


def test_a_failure_halfway_restores_the_experts():
    model = mixture()
    before = state(model)

    def fail(layer, total):
        if "layers.1.mlp.experts.down_proj.1" in layer.name:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        ms.prune(model, tokens(), 0.5, objective=JOINT, solver=ms.SparseGPT(), on_layer=fail)
    assert unchanged(model, before)


def test_the_best_objective_for_a_mixture():
    model = mixture("Qwen3-MoE")
    report = ms.prune(model, tokens(8), 0.5, objective="auto", solver=ms.SparseGPT())
    assert len(report.trials) > 1 and report.sparsity == 0.5


def test_routers_are_left_alone_unless_they_are_named():
    model, gate = mixture("Qwen2-MoE"), "shared_expert_gate"
    assert not any(gate in name for name in ms.prune(model, tokens(), 0.5, solver=ms.Magnitude()).layers)
    named = ms.prune(model, tokens(), 0.5, solver=ms.Magnitude(), targets=gate)
    assert list(named.layers) == [f"model.layers.{k}.mlp.{gate}" for k in range(2)]


class Routed(nn.Module):
    """Someone's own mixture: the first feature of a token chooses its expert."""

    def __init__(self):
        super().__init__()
        self.gate, self.proj = nn.Linear(6, 3, bias=False), nn.Linear(6, 6)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(3)
        )
        self.gate.weight.data = torch.tensor([[1.0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if bool((chosen == e).any()):
                out[chosen == e] = expert(x[chosen == e])
        return self.proj(x + out).mean(1)


def routed_batch(first):
    """Samples of four tokens whose first features are these."""
    x = torch.randn(len(first), 4, 6, generator=torch.Generator().manual_seed(0))
    x[..., 0] = torch.tensor(first)[:, None] * torch.tensor([1.0, 2, 1, 3])
    return [(x, torch.arange(len(first)) % 3)]


def test_ones_own_mixture():
    torch.manual_seed(0)
    model = Routed()
    batches = routed_batch([1.0, -1, 1]) + routed_batch([-1.0])
    cut = partition_model(model, batches, net_loss)
    assert cut.routed and cut.routers == {"gate"} and set(cut.unreached) == {"experts.2.0", "experts.2.2"}
    before = state(model)
    with pytest.raises(ModelError, match=r'reached experts.2.0, experts.2.2: .*unreached="skip"'):
        ms.prune(model, batches, 0.5, objective=JOINT, loss=net_loss)
    assert unchanged(model, before)
    report = ms.prune(model, batches, 0.5, objective=JOINT, loss=net_loss, unreached="skip")
    assert set(report.layers) == {"experts.0.0", "experts.0.2", "experts.1.0", "experts.1.2", "proj"}
    assert all(layer.sparsity == 0.5 for layer in report.layers.values())
    assert list(report.skipped) == ["experts.2.0", "experts.2.2"]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.weight" for name in report.layers}


def test_a_mixture_is_known_by_every_sample():
    """Twice two of six tokens in all, but not of each sample."""
    x = torch.ones(3, 4, 6)
    x[..., 0] = torch.tensor([[1, 1, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    assert partition_model(Routed(), [(x, torch.arange(3))], net_loss).routed
    for sizes in ([1, 1, 1], [1, 2]):
        batches = list(zip(x.split(sizes), torch.arange(3).split(sizes), strict=True))
        assert partition_model(Routed(), batches, net_loss).routed
    x[1:, :, 0] = x[0, :, 0]
    assert not partition_model(Routed(), [(x, torch.arange(3))], net_loss).routed


# layers that few tokens or none reach


def starved():
    """A mixture whose last expert is never chosen."""
    model = mixture("GPT-OSS")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -1e4
    return model


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named():
    model = starved()
    before = {name: view.matrices()[0] for name, view in layers_of("", model)}
    report = ms.prune(model, tokens(), "2:4", objective=JOINT, solver=ms.ADMM())
    after = {name: view.matrices()[0] for name, view in layers_of("", model)}
    without = {name for name, layer in report.layers.items() if layer.note.startswith("no token")}
    assert without == {
        f"model.layers.{k}.mlp.experts.{p}_proj.3" for k in range(2) for p in ("gate_up", "down")
    }
    for name in without:
        keep = ms.as_pattern("2:4").keep(before[name].abs())
        torch.testing.assert_close(after[name], before[name] * keep)
        assert f"{name} " in str(report)
    assert str(report).count("no token reached it: pruned by magnitude") == 4
    assert report.sparsity == 0.5 and not report.skipped


def test_an_expert_with_few_tokens_is_named():
    report = ms.prune(mixture(), tokens(2, 8), 0.5, objective=JOINT, solver=ms.SparseGPT())
    notes = [layer.note for name, layer in report.layers.items() if "down_proj" in name]
    assert all(note.endswith(" tokens for 48 inputs") for note in notes)
    assert sum(int(note.split()[0]) for note in notes[:4]) == 2 * 8 * 2  # two experts for each token
    assert json.loads(report.to_json())["layers"]["model.layers.0.mlp.experts.down_proj.0"]["note"] == notes[0]


class Rare(nn.Module):
    """One layer for some samples, one for none."""

    def __init__(self):
        super().__init__()
        self.usual, self.rare, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.more, self.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x):
        h = self.usual(x)
        if bool((x[..., 0] < 0).any()):
            h = h + self.rare(h)
        return self.head(self.more(h).mean(1))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("objective", [ms.Reconstruction(), JOINT])
def test_a_layer_that_only_some_batches_reach(objective, order):
    torch.manual_seed(0)
    model = Rare()
    batches = [*routed_batch([1.0, 1]), *routed_batch([1.0]), *routed_batch([-1.0, -1])][::order]
    reads, dense = [], copy.deepcopy(model).eval()
    dense.rare.register_forward_hook(lambda _m, args, _out: reads.append(args[0].flatten(0, 1)))
    for x, _ in batches:
        with torch.no_grad():
            dense(x)
    report = ms.prune(
        model,
        batches,
        {"rare": 0.5, "never": 0.5},
        objective=objective,
        solver=ms.SparseGPT(),
        loss=net_loss,
        unreached="skip",
    )
    assert list(report.layers) == ["rare"] and list(report.skipped) == ["never"]
    if objective is not JOINT:
        problem = objective.problem(dense.rare.weight.detach(), inputs=torch.cat(reads))
        expected = ms.solve(problem, 0.5, ms.SparseGPT())
        torch.testing.assert_close(model.rare.weight.detach(), expected.weight, rtol=1e-3, atol=1e-5)
    assert torch.equal(model.never.weight, dense.never.weight)


def test_skipped_layers_are_named_in_the_table_and_in_json():
    model = Rare()
    before = state(model)
    with pytest.raises(
        ModelError, match=r"no calibration sample reached never: .* with ignore, .*unreached=\"skip\""
    ):
        ms.prune(model, routed_batch([-1.0]), 0.5, loss=net_loss)
    with pytest.raises(ValueError, match='unreached must be "error" or "skip"'):
        ms.prune(model, routed_batch([-1.0]), 0.5, loss=net_loss, unreached="ignore")
    assert unchanged(model, before)
    report = ms.prune(model, routed_batch([-1.0]), 0.5, loss=net_loss, unreached="skip")
    (line,) = [line for line in str(report).splitlines() if line.startswith("never")]
    assert line.endswith("skipped: no calibration sample reached it")
    assert json.loads(report.to_json())["skipped"] == {"never": "no calibration sample reached it"}


def test_experts_whose_products_are_not_recognised_are_not_pruned_blindly():
    torch.manual_seed(0)
    weights = torch.randn(2, 8, 5), torch.randn(2, 5, 4), torch.randn(2, 5), torch.randn(3, 5), 1
    net = Net("linear", *weights)
    net.mlp.product = lambda x, w: (x[:, None] * w).sum(-1)
    batch = [(torch.randn(3, 4, 5), torch.arange(3))]
    before = state(net)
    with pytest.raises(ModelError, match="no calibration sample reached mlp.gate_up_proj.0, "):
        ms.prune(net, batch, 0.5, loss=net_loss)
    report = ms.prune(net, batch, 0.5, loss=net_loss, unreached="skip")
    assert list(report.layers) == ["head"]
    assert [reason for reason in report.skipped.values() if "reached" in reason] == 4 * [
        "no calibration sample reached it"
    ]
    assert torch.equal(net.mlp.gate_up_proj, before["mlp.gate_up_proj"])
    with pytest.raises(ModelError, match="reached"):  # transposed, and said not to be
        wrong = Net("transposed", *weights)
        wrong.mlp.is_transposed = False
        ms.prune(wrong, batch, 0.5, loss=net_loss)
