"""Where and in which precision passes run: one part at a time moves, and the model's own memory stays its own."""

import pytest
import torch
from torch import nn

import moonshot as ms
from moonshot.app import cli
from moonshot.errors import ArgumentError
from moonshot.models import in_turn
from moonshot.models.blocks import find_blocks
from moonshot.models.calibration import token_mask
from moonshot.models.chain import ChainAdapter
from moonshot.models.losses import model_loss
from moonshot.models.modules import ModelError
from moonshot.models.offload import Offload
from moonshot.models.offload import in_turn as in_turn_of
from moonshot.models.partition import partition_model
from moonshot.models.precision import Passes, as_device, passing, tensors_of, tensors_outside
from moonshot.models.statistics import LayerStatistics
from moonshot.pruning.refit import PartFit
from tests.models import DEMO, JOINT, decoder, model_folder, network, tokens, weights
from tests.stand_in import GPU, Moves, StandIn, there_is_a_gpu

WORK = dict(objective=JOINT, solver=ms.SparseGPT())


def images(samples=6):
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def spread(model, batch):
    return model(batch).logsumexp(1).mean()


MODELS = {
    "chain": lambda dtype: (decoder(dtype=dtype), tokens(), {}),
    "graph": lambda dtype: (network().to(dtype), images(), dict(loss=spread)),
}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU is there, as far as prune looks."""
    there_is_a_gpu(monkeypatch)


@pytest.mark.parametrize("refit", [False, ms.Refit(epochs=1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_parts_that_move_give_the_same_model_in_its_own_memory(gpu, name, dtype, refit):
    model, data, others = MODELS[name](dtype)
    expected = ms.prune(model, data, 0.5, precision="float32", refit=refit, **WORK, **others)
    moved, data, others = MODELS[name](dtype)
    places = [tensor.data_ptr() for tensor in tensors_of(moved)]
    with StandIn(tensors_of(moved)):
        report = ms.prune(moved, data, 0.5, device="cuda", precision="float32", refit=refit, **WORK, **others)
    assert places == [tensor.data_ptr() for tensor in tensors_of(moved)]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), moved.state_dict().values(), strict=True)
    )
    assert [layer.terms for layer in report.layers.values()] == [
        layer.terms for layer in expected.layers.values()
    ]


@pytest.fixture(params=[None, torch.OutOfMemoryError("no more memory")], ids=["", "no memory for it"])
def ahead(request, monkeypatch):
    """How many parameters came ahead of their turns, as they do beside a GPU, or could not."""
    came = []

    def copied(data, device, unchanged):
        assert unchanged
        came.append(data.numel())
        if request.param:
            raise request.param
        return lambda: data.to(device)

    monkeypatch.setattr("moonshot.models.in_turn._can_copy", lambda device: True)
    monkeypatch.setattr("moonshot.models.in_turn.to_device", copied)
    return came


@pytest.mark.parametrize("refit", [False, ms.Refit(epochs=1)])
def test_parts_that_come_ahead_of_their_turn_give_the_same_model(gpu, ahead, refit):
    model, expected = decoder(dtype=torch.bfloat16), decoder(dtype=torch.bfloat16)
    ms.prune(expected, tokens(), 0.5, refit=refit, **WORK)
    with StandIn([]):
        ms.prune(model, tokens(), 0.5, device="cuda", precision="float32", refit=refit, **WORK)
    assert model.lm_head.weight.numel() in ahead and model.model.layers[1].mlp.up_proj.weight.numel() in ahead
    for name, value in weights(expected).items():
        assert torch.equal(weights(model)[name], value)


def test_what_the_next_part_has_in_common_with_this_one_does_not_come_ahead(monkeypatch):
    came = []
    monkeypatch.setattr(in_turn, "_can_copy", lambda device: True)
    monkeypatch.setattr(
        in_turn, "to_device", lambda data, *_, **__: came.append(data) or (lambda: data.clone())
    )
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    first.shared = second.shared = torch.nn.Parameter(torch.ones(3))
    second.register_buffer("statistics", torch.zeros(2))
    turns = in_turn.InTurn([tensors_of(first), tensors_of(second)])
    with StandIn([]), passing(Passes(GPU)):
        with turns.placed(0), torch.no_grad():
            first.shared.fill_(5.0)
            second.statistics.fill_(7.0)
        with turns.placed(1):
            assert second.shared[0] == 5 and second.statistics[0] == 7
    assert [data.shape for data in came] == [(2, 2)]


def test_in_a_pass_of_the_whole_model_the_next_block_comes_ahead(gpu, ahead):
    model = decoder(num_hidden_layers=3).eval()
    blocks = [block for _, block in find_blocks(model)]
    with StandIn([]), passing(Passes(GPU)), in_turn.placed_in_turn(blocks):
        model(tokens(1))
    assert ahead == [parameter.numel() for block in blocks[1:] for parameter in block.parameters()]


def test_one_block_at_a_time_is_there(gpu):
    model = decoder(num_hidden_layers=6)
    blocks = [block for _, block in find_blocks(model)]
    with StandIn([tensor for tensor in tensors_of(model) if tensor.ndim == 2]) as there:
        ms.prune(model, tokens(), 0.5, device="cuda", **WORK)
    block = sum(tensor.numel() for tensor in blocks[0].parameters() if tensor.ndim == 2)
    outside = sum(tensor.numel() for tensor in tensors_outside(model, blocks) if tensor.ndim == 2)
    assert there.most <= block + outside < sum(tensor.numel() for tensor in model.parameters()) / 2
    assert block <= there.most


def test_budgets_are_measured_with_one_block_at_a_time_there(gpu):
    model = decoder(num_hidden_layers=6)
    expected = ms.allocate(model, tokens(8), 0.5, rounds=1, **WORK)
    blocks = [block for _, block in find_blocks(model)]
    with StandIn([tensor for tensor in tensors_of(model) if tensor.ndim == 2]) as there:
        found = ms.allocate(model, tokens(8), 0.5, rounds=1, device="cuda", **WORK)
    block = sum(tensor.numel() for tensor in blocks[0].parameters() if tensor.ndim == 2)
    outside = sum(tensor.numel() for tensor in tensors_outside(model, blocks) if tensor.ndim == 2)
    assert block <= there.most <= block + outside
    assert found == expected


@pytest.mark.parametrize("fits", [False, True])
def test_four_passes_show_how_a_decoder_runs_and_what_fits_moves_once(monkeypatch, fits):
    model = decoder()
    size = sum(tensor.nbytes for tensor in tensors_of(model))
    there_is_a_gpu(monkeypatch, 8 * size - (not fits))
    blocks = [block for _, block in find_blocks(model)]
    moves, runs = Moves(model.parameters()), [0] * len(blocks)

    def count(k):
        runs[k] += 1

    for k, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda *_, k=k: count(k))
    with moves, passing(Passes(GPU)):
        partition_model(model, [{"input_ids": tokens(2)}, {"input_ids": tokens(2)}], model_loss)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    assert runs == [4] * len(blocks)  # a sample, another one, both, and the blocks one by one
    once = set(model.parameters()) - inside if not fits else set(model.parameters())
    assert moves.times == {parameter: 1 if parameter in once else 4 for parameter in model.parameters()}


@pytest.mark.parametrize(("adapter", "replay"), [(ChainAdapter(), "chain"), (ms.GraphAdapter(), "graph")])
def test_a_device_is_asked_once_for_each_batch_what_is_padding(monkeypatch, adapter, replay):
    asked = []
    monkeypatch.setattr(
        f"moonshot.models.{replay}.token_mask", lambda batch: asked.append(batch) or token_mask(batch)
    )
    masked = [dict(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in tokens().split(3)]
    ms.prune(decoder(), masked, 0.5, adapter=adapter, **WORK)
    assert len(asked) == 2


def test_what_is_outside_of_the_parts_moves_once_for_each():
    model, batches = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), [torch.ones(2, 4), torch.ones(3, 4)]
    model.outside = nn.Parameter(torch.ones(1))
    moves, partition = Moves([model.outside]), partition_model(model, batches, spread)
    with moves, passing(Passes(GPU)):
        replay = partition.replay(model, batches, spread, gradients=False, offload=Offload())
        for index in range(6):
            replay.observe(index, LayerStatistics({}, ms.Reconstruction(), 1, torch.ones(5)))
            replay.advance(index)
    assert moves.times == {model.outside: 6}


def test_a_failure_leaves_the_model_where_and_as_it_was(gpu):
    model = decoder()
    before, places = weights(model), [tensor.data_ptr() for tensor in tensors_of(model)]

    def fail(layer, total):
        raise RuntimeError("enough")

    with StandIn([]), pytest.raises(RuntimeError, match="enough"):
        ms.prune(model, tokens(), 0.5, device="cuda", on_layer=fail, **WORK)
    assert places == [tensor.data_ptr() for tensor in tensors_of(model)]
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("moves", [3, 40])
def test_a_gpu_that_is_full_leaves_the_model_where_it_was(gpu, moves):
    class Full(StandIn):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.most += function is torch.Tensor.to and GPU in args
            if self.most == moves:
                self.most += 1
                raise torch.OutOfMemoryError("no more memory")
            return super().__torch_function__(function, types, args, kwargs)

    model = decoder()
    before, places = weights(model), [tensor.data_ptr() for tensor in tensors_of(model)]
    with Full([]), pytest.raises(torch.OutOfMemoryError):
        ms.prune(model, tokens(), 0.5, device="cuda", **WORK)
    assert places == [tensor.data_ptr() for tensor in tensors_of(model)]
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_device_of_the_model_itself_changes_nothing():
    model, other = decoder(), decoder()
    ms.prune(model, tokens(), 0.5, **WORK)
    ms.prune(other, tokens(), 0.5, device="cpu", **WORK)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", 'device must be "cpu", "cuda" or such as "cuda:1"'),
        ("mps", "got 'mps'"),
        (3.5, "got 3.5"),
        ("meta", "got 'meta'"),
        pytest.param(
            "cuda:7",
            "is not there, this torch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_devices_that_are_none(device, words):
    with pytest.raises(ArgumentError, match=words):
        ms.prune(decoder(), tokens(), 0.5, device=device)


def test_any_device_there_is():
    assert as_device(None) is None and as_device("cpu") == torch.device("cpu")
    assert as_device("auto") == (torch.device("cuda", 0) if torch.cuda.is_available() else None)


def test_a_model_that_is_spread_over_devices_is_refused():
    model = decoder()
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}  # as from_pretrained(device_map=...) leaves it
    with pytest.raises(ModelError, match=r"load it without, .* give device=\"cuda\""):
        ms.prune(model, tokens(), 0.5)
    model.hf_device_map = {"": "cpu"}
    ms.prune(model, tokens(), 0.5, **WORK)


# Precision


def dtypes_of_passes(model, **arguments):
    """The dtypes that the blocks' layers read while a model is pruned."""
    found = set()
    for _, block in find_blocks(model):
        block.mlp.up_proj.register_forward_pre_hook(lambda _, args: found.add(args[0].dtype))
    report = ms.prune(model, tokens(), 0.5, **arguments)
    return found, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_precision_of_passes(dtype):
    """Everything but bfloat16 is the same in its own dtype and in float32, or is computed in float32 anyway."""
    plain, expected = dtypes_of_passes(decoder(dtype=dtype), **WORK)
    found, report = dtypes_of_passes(decoder(dtype=dtype), precision="model", **WORK)
    assert plain == {torch.float64 if dtype is torch.float64 else torch.float32}
    assert found == ({dtype} if dtype is torch.bfloat16 else plain)
    for name, layer in report.layers.items():
        assert layer.relative == pytest.approx(expected.layers[name].relative, rel=0.1)


class SeesFloat32(ms.Reconstruction):
    def accumulate(self, statistic, observation):
        assert str(observation.inputs.dtype).removeprefix("torch.") == "float32"
        return super().accumulate(statistic, observation)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_float32_whatever_passes_are(name):
    model, data, others = MODELS[name](torch.bfloat16)
    ms.prune(model, data, 0.5, objective=SeesFloat32(), solver=ms.SparseGPT(), precision="model", **others)


def test_a_refit_after_passes_in_bfloat16_is_computed_in_float32():
    """Steps that are too small for bfloat16 would be lost."""
    model = decoder(dtype=torch.bfloat16)
    report = ms.prune(model, tokens(12), 0.5, precision="model", refit=ms.Refit(epochs=4), **WORK)
    assert any(part.aside_after < part.aside_before for part in report.parts.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("set_before", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    ("dtype", "precision", "tf32"),
    [
        (torch.bfloat16, "model", True),
        (torch.bfloat16, "float32", False),
        (torch.float32, "model", False),
        (torch.float16, "model", False),
    ],
)
def test_a_refit_has_tf32_where_passes_have_no_more_digits(monkeypatch, dtype, precision, tf32, set_before):
    found, fit = set(), PartFit.run

    def run(*arguments):
        found.add(torch.get_float32_matmul_precision())
        return fit(*arguments)

    monkeypatch.setattr(PartFit, "run", run)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(set_before)
    try:
        ms.prune(decoder(dtype=dtype), tokens(4), 0.5, precision=precision, refit=ms.Refit(epochs=1), **WORK)
        assert torch.get_float32_matmul_precision() == set_before
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == {"high" if tf32 and set_before == "highest" else set_before}


def test_precisions_that_are_none():
    with pytest.raises(ArgumentError, match='precision must be "model" or "float32"'):
        ms.prune(decoder(), tokens(), 0.5, precision="bfloat16")


# The command line


def arguments(tmp_path, **options):
    named = {
        "data": DEMO / "calibration.txt",
        "pattern": "2:4",
        "solver": "sparsegpt",
        "save": tmp_path / "pruned",
    }
    named |= {"nsamples": 4, "seqlen": 32} | options
    return [str(part) for name, value in named.items() for part in (f"--{name}", value)]


def test_the_command_line_passes_them_on(monkeypatch, tmp_path):
    source, found = model_folder(tmp_path / "dense", pad_token_id=None), {}
    real = ms.pruning.prune

    def prune(*args, **named):
        found.update(named)
        return real(*args, **(named | {"device": None}))

    monkeypatch.setattr("moonshot.app.prune.pruning.prune", prune)
    monkeypatch.setattr("moonshot.app.arguments.as_device", lambda name: GPU if name == "cuda" else None)
    monkeypatch.setattr("moonshot.pruning.recipe.as_device", lambda name: None)
    monkeypatch.setattr("moonshot.app.resources.Resources._plan", lambda *_: None)
    monkeypatch.setattr("moonshot.app.arguments.planning.check_supported", lambda *_: None)
    argv = ["moonshot", "prune", str(source), *arguments(tmp_path, device="cuda", precision="float32")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert found["device"] == GPU and found["precision"] == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["moonshot", "prune", "nowhere", *arguments(tmp_path, device="cuda:1")])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err.startswith("moonshot: device 'cuda:1' is not there")


# on a GPU


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_what_waits_in_pinned_memory_comes_back_as_it_was_replaced_while_the_device_is_busy(cuda):
    offload = Offload(to_host=True)
    busy = torch.randn(3000, 3000, device=cuda)
    stored = [offload.store(torch.full((500, 500), float(k), device=cuda)) for k in range(6)]
    for turn in range(3):
        for b in in_turn_of(stored):
            busy = busy @ busy / 3000
            tensor = stored[b].read()
            stored[b].replace(tensor + (busy[:500, :500] * 0 + 1))
            del tensor
        assert [float(each.read().mean()) for each in stored] == [k + turn + 1 for k in range(6)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_moves_part_by_part_is_pruned_as_one_that_is_there(cuda, dtype):
    there, moved = decoder(dtype=dtype).to(cuda), decoder(dtype=dtype)
    ms.prune(there, tokens(), 0.5, **WORK)
    ms.prune(moved, tokens(), 0.5, device="cuda", **WORK)
    for name, value in weights(moved).items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, weights(there)[name].cpu(), rtol=1e-2, atol=1e-2)
