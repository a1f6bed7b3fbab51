"""Model folders: hostile and broken ones are refused in a line, and what is saved is whole."""

import json
import os
import shlex
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import moonshot as ms
from moonshot.files import draft as drafts
from moonshot.files.card import model_card
from moonshot.files.folder import opened, save
from moonshot.files.load import is_image_classifier, load, load_classifier
from moonshot.files.source import FolderError
from moonshot.models.evaluation import Perplexity
from moonshot.pruning.lock import LockedError
from moonshot.pruning.report import Evaluation
from tests.models import DEMO, SIZES, decoder, model_folder, tokens


def llama():
    return decoder(dtype=torch.bfloat16, vocab_size=2048)


@cache
def report():
    return ms.prune(llama(), tokens(), "2:4", objective=ms.Reconstruction(), solver=ms.Magnitude())


@pytest.fixture
def folder(tmp_path):
    """A small model, alone in a folder of the test."""
    return model_folder(tmp_path / "dense")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def index(path, places):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def leave_out(path):
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def other_shapes(path):
    change(path / "config.json", intermediate_size=32)


def cut_short(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path):
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(path.parent / "ran")}, path / "pytorch_model.bin")


def own_code(path):
    change(path / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (path / "mine.py").write_text(f"import os\nos.mkdir({str(path.parent / 'ran')!r})\nclass Config: ...")


def own_tokenizer(path):
    change(
        path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}, tokenizer_class="Mine"
    )
    (path / "mine.py").write_text(f"import os\nos.mkdir({str(path.parent / 'ran')!r})\nclass Mine: ...")


def masked(path):
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(path)


def encoder(path):
    masked(path)
    change(path / "config.json", architectures=None)


def classifier(path):
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES)).save_pretrained(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda p: index(p, {"a": "../private/id_rsa"}),
            "names '../private/id_rsa', which is no .safetensors file",
        ),
        (lambda p: index(p, {"a": "../x.safetensors"}), "names '../x.safetensors'"),
        (lambda p: index(p, {"a": "/etc/x.safetensors"}), "names '/etc/x.safetensors'"),
        (lambda p: index(p, {"a": "sub/../../x.safetensors"}), "names 'sub/../../x.safetensors'"),
        (lambda p: index(p, {"a": "c:\\x.safetensors"}), "names "),
        (lambda p: index(p, {"a": "config.json"}), "names 'config.json'"),
        (lambda p: index(p, {"a": 3}), "names 3"),
        (lambda p: index(p, {"a": "gone.safetensors"}), "gone.safetensors is not there"),
        (lambda p: index(p, None), "has no weight_map"),
        (lambda p: (p / "model.safetensors.index.json").write_text("[]"), "has no weight_map"),
        (lambda p: (p / "model.safetensors.index.json").write_text("[" * 10**5), "has no weight_map"),
        (cut_short, "model.safetensors is no whole safetensors file"),
        (
            lambda p: (p / "model.safetensors").write_bytes(b""),
            "model.safetensors is no whole safetensors file",
        ),
        (lambda p: (p / "model.safetensors").unlink(), "cannot load a causal language model"),
        (leave_out, "lacks weights that LlamaForCausalLM has: model.layers.0.self_attn.q_proj.weight; get"),
        (other_shapes, r"other weights than its config.json asks for: .*\(32, 48\), not \(32, 32\) and 5 more"),
        (pickled, "a pickle is never executed"),
        (own_code, "needs code of its own: .*--trust-remote-code"),
        (own_tokenizer, "needs code of its own: .*--trust-remote-code"),
        (
            lambda p: change(p / "config.json", attn_implementation="org/kernel"),
            "attention by 'org/kernel', code",
        ),
        (lambda p: change(p / "config.json", attn_implementation={"text": "a/b"}), "attention by 'a/b', code"),
        (lambda p: change(p / "config.json", num_hidden_layers=2**70), "asks for num_hidden_layers = 11805"),
        (lambda p: change(p / "config.json", model_type=3), "cannot load a model"),
        (lambda p: change(p / "config.json", architectures=5), "cannot load a causal language model"),
        (lambda p: change(p / "config.json", hidden_size="x"), "cannot load a model"),
        (
            lambda p: change(p / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
            "cannot load",
        ),
        (lambda p: (p / "config.json").write_text("[]"), "cannot load a model"),
        (lambda p: (p / "config.json").write_text("{"), "cannot load a model"),
        (lambda p: (p / "config.json").unlink(), "cannot load a model"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "cannot load the tokenizer from .*KeyError"),
        (lambda p: (p / "tokenizer.json").unlink(), "cannot load the tokenizer"),
        (masked, "no causal language model but BertForMaskedLM"),
        (encoder, "no causal language model but an encoder, bert"),
        (classifier, "no causal language model but LlamaForSequenceClassification"),
        (shutil.rmtree, "no such folder: .*dense$"),
    ],
)
def test_a_folder_that_is_refused(folder, tmp_path, monkeypatch, spoil, words):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text("secret")
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FolderError, match=words) as mapped, opened(folder, tmp_path / "pruned"):
        pass
    with pytest.raises(FolderError, match=words):
        load(str(folder))
    assert "\n" not in str(mapped.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_code_runs_for_those_who_trust_it_and_goes_along(folder, tmp_path):
    change(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    with opened(folder, tmp_path / "pruned", trust_remote_code=True) as work:
        assert type(work.model).__name__ == "Model"
        work.save(report())
    assert (tmp_path / "pruned" / "mine.py").exists()
    model, _ = load(tmp_path / "pruned", trust_remote_code=True)
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight)


@pytest.mark.parametrize("cast", [False, True])
def test_what_is_not_read_as_it_is_in_the_files_is_said(folder, tmp_path, cast):
    """A layer too many in the file, and norms in another dtype, with which the model is loaded and not mapped."""
    weights = load_file(folder / "model.safetensors")
    layer = "model.layers.2.mlp.up_proj.weight"
    norms = [name for name in weights if "norm" in name]
    weights |= {layer: torch.ones(2, 2), f"{layer}s": torch.ones(2)}
    if cast:
        weights |= {name: weights[name].float() for name in norms}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning) as said, opened(folder, tmp_path / "pruned") as work:
        work.save(report())
    fate = "left out" if cast else "saved as they are"
    words = f"{folder} has tensors that LlamaForCausalLM does not, which are {fate}: {layer} and 1 more"
    assert words in [str(warning.message) for warning in said]
    casts = [str(warning.message) for warning in said if "are cast" in str(warning.message)]
    assert [
        f": {sorted(norms)[0]} from float32 to bfloat16 and {len(norms) - 1} more" in each for each in casts
    ] == [True] * cast
    saved = load_file(tmp_path / "pruned" / "model.safetensors")
    assert (layer in saved) != cast and saved[norms[0]].dtype == torch.bfloat16


def test_shrunk_and_compact_models_end_a_text_where_the_dense_one_does(folder, tmp_path):
    """What ends a text of a chat model is said in generation_config.json alone."""
    settings = {"eos_token_id": [2, 5], "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    for name in ("shrunk", "compact"):
        with opened(folder, tmp_path / name) as work:
            assert work.mapped
            if name == "shrunk":
                columns = ms.column_patterns(work.model, 0.5)
                ms.prune(work.model, tokens(), columns, objective=ms.Reconstruction(), solver=ms.Magnitude())
                work.replace(ms.shrink(work.model))
            work.save(report(), compact=name == "compact")
        read = ms.load_compact if name == "compact" else LlamaForCausalLM.from_pretrained
        found = read(tmp_path / name).generation_config.to_dict()
        assert {key: found[key] for key in settings} == settings
    (folder / "generation_config.json").write_text("{")
    with opened(folder, tmp_path / "broken") as work:
        assert work.mapped


def test_tensors_of_a_bin_file_are_read(folder, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with opened(folder, tmp_path / "pruned") as work:
        assert not work.mapped
        work.save(report())
    found = load_file(tmp_path / "pruned" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in llama().state_dict().items())
    index = {"weight_map": {"lm_head.weight": "../pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match="names '../pytorch_model.bin'"):
        load(folder)


def test_shards_in_sub_folders_stay_there(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "sub").mkdir()
    places = {name: f"sub/{k % 2}.safetensors" for k, name in enumerate(weights)}
    for file in set(places.values()):
        save_file(
            {name: weights[name] for name in weights if places[name] == file}, folder / file, {"format": "pt"}
        )
    index(folder, places)
    with opened(folder, tmp_path / "pruned") as work:
        assert work.mapped
        work.model.lm_head.weight.data.zero_()
        work.save(report())
    assert sorted(path.name for path in (tmp_path / "pruned" / "sub").iterdir()) == [
        "0.safetensors",
        "1.safetensors",
    ]
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    assert not found.pop("lm_head.weight").any()
    assert all(torch.equal(weight, weights[name]) for name, weight in found.items())


def test_what_a_folder_came_with_goes_along_and_nothing_else(folder, tmp_path):
    came = {
        "chat_template.jinja": "{{ x }}",
        "tokenizer.model": "m",
        "LICENSE": "terms",
        "processor_config.json": "{}",
    }
    (folder / "additional_chat_templates").mkdir()
    came["additional_chat_templates/tools.jinja"] = "{{ y }}"
    left = (".env", "mine.py", "optimizer.pt", "pytorch_model.bin", "consolidated.safetensors", "trace.log")
    for name, text in [*came.items(), *((name, "no") for name in left)]:
        (folder / name).write_text(text)
    (folder / "README.md").write_text("---\nlicense: llama3.2\nbase_model: someone\n---\n# Dense\n")
    with opened(folder, tmp_path / "pruned") as work:
        work.save(report())
    pruned = tmp_path / "pruned"
    for name, text in came.items():
        assert (pruned / name).read_text() == text
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (pruned / name).read_bytes() == (folder / name).read_bytes()
    assert (pruned / "README.dense.md").read_text().endswith("# Dense\n")
    there = {str(path.relative_to(pruned)) for path in pruned.rglob("*") if path.is_file()}
    ours = {"README.md", "README.dense.md", "recipe.json", "report.json", "model.safetensors", "config.json"}
    ours |= {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert there == {*came} | ours == set(json.loads((pruned / "report.json").read_text())["files"])
    card = huggingface_hub.ModelCard.load(pruned / "README.md")
    assert card.data.license == "llama3.2" and card.data.base_model is None
    assert card.data.pipeline_tag == "text-generation" and "2:4" in card.data.tags
    assert "50.00 % of the weights of 14 layers became zero" in card.text and "as much space" in card.text


def test_the_card_does_not_say_what_folders_are_called(folder):
    data = f"{folder}::train"
    command = [
        "moonshot",
        "prune",
        "meta-llama/Llama",
        f"--data={data}",
        "--save",
        "my/out",
        "--pattern",
        "2:4",
    ]
    about = deepcopy(report())
    about.recipe.update(
        command=shlex.join([*command, "--eval", "/my/text.txt"]), model="meta-llama/Llama", data=data
    )
    about.evaluations = [Evaluation("/my/text.txt", "perplexity", Perplexity(2.0, 4, 1), Perplexity(3.0, 4, 1))]
    card = model_card(about, None)
    assert (
        "moonshot prune meta-llama/Llama --data=dense::train --save out --pattern 2:4 --eval text.txt" in card
    )
    assert "| model | meta-llama/Llama |" in card and f"| data | {folder.name}::train |" in card
    assert "\ntext.txt: perplexity" in card and str(folder.parent) not in card and "/my" not in card


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "generation_config.json", "LICENSE"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    (tmp_path / "id_rsa").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "id_rsa")
    with (
        pytest.raises(FolderError, match=f"{name} is a link out of its folder"),
        opened(folder, tmp_path / "pruned"),
    ):
        pass
    assert names(tmp_path) == ["dense", "id_rsa"]


def test_a_hub_name_is_read_from_the_hubs_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--dense" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    asked = []

    def download(name, revision=None, allow_patterns=()):
        asked.append(name)
        for path in folder.iterdir():
            if not (snapshot / path.name).exists() and any(Path(path.name).match(p) for p in allow_patterns):
                shutil.copyfile(path, blobs / path.name)
                (snapshot / path.name).symlink_to(blobs / path.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with opened("org/dense", tmp_path / "pruned") as work:
        assert work.mapped
        work.save(report())
    assert set(asked) == {"org/dense"}
    assert huggingface_hub.ModelCard.load(tmp_path / "pruned" / "README.md").data.base_model == "org/dense"
    assert not (tmp_path / "pruned" / "tokenizer.json").is_symlink()
    load(tmp_path / "pruned")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def download(*_, **__):
        raise RuntimeError("offline\nindeed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FolderError, match="no such folder: org/dense, and it .* from the hub: offline indeed"):
        load("org/dense")


def test_what_is_no_image_classifier(folder):
    assert not is_image_classifier(folder)
    with pytest.raises(FolderError, match="is a causal language model"):
        load_classifier(folder)
    with pytest.raises(FolderError, match="config.json is a file: give the folder"):
        load(folder / "config.json")


def test_batch_norm_may_lack_its_count(tmp_path):
    shutil.copytree(DEMO / "resnet", tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    weights = {
        name: value for name, value in load_file(file).items() if not name.endswith("num_batches_tracked")
    }
    save_file(weights, file, {"format": "pt"})
    with opened(tmp_path / "dense", tmp_path / "pruned") as work:
        assert not work.mapped


def saved(path, **more):
    return save(llama(), None, report(), path, **more)


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_a_second_process_is_told_at_its_start(folder, tmp_path):
    with opened(folder, tmp_path / "pruned"):
        for again in (lambda: saved(tmp_path / "pruned"), opened(folder, tmp_path / "pruned").__enter__):
            with pytest.raises(LockedError, match=f"pruned is being written to by process {os.getpid()}"):
                again()
    assert names(tmp_path) == ["dense"]


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    for name in (".out-abcdefgh", ".out-theirown", ".outer-abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".out-abcdefgh" / drafts._MARK).touch()
    (tmp_path / ".outer-abcdefgh" / drafts._MARK).touch()
    (tmp_path / ".out.lock").write_text("process 1 on nowhere")
    saved(tmp_path / "out")
    assert names(tmp_path) == [".out-theirown", ".outer-abcdefgh", "out"]


def test_only_what_moonshot_wrote_is_replaced(tmp_path):
    out = saved(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out exists: choose another folder, add --overwrite"):
        saved(out)
    (out / "old.txt").write_text("mine")
    with pytest.raises(FolderError, match="out has 'old.txt', which moonshot did not write"):
        saved(out, overwrite=True)
    (out / "old.txt").unlink()
    (out / "recipe.json").write_text("old")
    saved(out, overwrite=True)
    assert json.loads((out / "recipe.json").read_text())["pattern"] == "2:4"
    (tmp_path / "mine").mkdir()
    with pytest.raises(FolderError, match="mine is no folder that moonshot wrote"):
        saved(tmp_path / "mine", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        saved(tmp_path / "link")
    assert names(tmp_path) == ["link", "mine", "out"]


def test_what_a_link_leads_to_is_not_replaced(tmp_path):
    real = saved(tmp_path / "real")
    before = {path.name: path.read_bytes() for path in real.iterdir()}
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(
        FolderError, match="link is a link: give the name of the folder that it leads to, .*real"
    ):
        saved(tmp_path / "link", overwrite=True)
    assert names(tmp_path) == ["link", "real"]
    assert {path.name: path.read_bytes() for path in real.iterdir()} == before


def test_a_folder_is_saved_where_it_was_begun(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    for folder, move in (
        (Path("link/out"), lambda: ((tmp_path / "link").unlink(), (tmp_path / "link").symlink_to("two"))),
        (Path("one/again"), lambda: monkeypatch.chdir(tmp_path / "two")),
    ):
        with drafts.drafted(folder) as draft:
            (draft.path / "report.json").write_text("{}")
            move()
            draft.publish()
    assert names(tmp_path / "one") == ["again", "out"] and names(tmp_path / "two") == []


def test_a_replacement_that_was_killed_is_ended(tmp_path):
    out = saved(tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(FileExistsError):
        saved(out)
    assert names(tmp_path) == ["out"] and (out / "model.safetensors").read_bytes() == before
    shutil.copytree(out, tmp_path / ".out.replaced")
    saved(out, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_touched(tmp_path):
    with drafts.drafted(tmp_path / "out") as draft:
        (draft.path / "report.json").write_text("{}")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(FileExistsError):
            draft.publish()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["mine"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, rename, fsync = set(), os.rename, os.fsync

    def remember(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source, target):
        files = {str(path) for path in Path(source).rglob("*")}
        assert {*files, str(source)} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "rename", renamed)
    saved(tmp_path / "out")
    assert str(tmp_path) in synced


def test_a_saved_folder_that_cannot_be_read_gets_no_name(folder, tmp_path):
    with opened(folder, tmp_path / "pruned") as work:
        cut_short(work.draft)
        with pytest.raises(FolderError, match="no whole safetensors file"):
            work.save(report())
    assert names(tmp_path) == ["dense"]
