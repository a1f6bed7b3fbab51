"""What is saved goes to the hub, and nothing else does; a stand-in of huggingface_hub's interface takes it."""

import fnmatch
import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM

from moonshot.files.hub import HubError, Push
from tests.models import DEMO, model_folder
from tests.test_cli import run

OPTIONS = ["--pattern", "2:4", "--data", DEMO / "heldout.txt", "--nsamples", 4, "--seqlen", 16]
OPTIONS += ["--solver", "magnitude", "--objective", "reconstruction"]


REAL = huggingface_hub.HfApi


def checked(method):
    """A method that takes what huggingface_hub's of the same name does, and no more."""

    def call(*arguments, **named):
        inspect.signature(getattr(REAL, method.__name__)).bind(*arguments, **named)
        return method(*arguments, **named)

    return call


class Hub:
    """The calls that moonshot makes, with repositories as folders: root/me/small is me/small, and gpt2 nobody's."""

    def __init__(self, root):
        self.root, self.private, self.down = root, {}, False

    def whoami(self):
        return {"name": "me"}

    def repo_exists(self, name):
        return name == "gpt2" or (self.root / name).exists()

    @checked
    def create_repo(self, name, *, private, exist_ok):
        folder = self.root / (name if "/" in name else f"me/{name}")
        if folder.exists() and not exist_ok:
            raise OSError("409 Client Error: Conflict\n\nYou already created this model repo")
        if not folder.exists():
            self.private[folder.name] = private  # of one that is there it stays as it is
        folder.mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{folder.name}")

    @checked
    def model_info(self, name):
        return SimpleNamespace(private=self.private.get(Path(name).name))

    @checked
    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
        if self.down:
            raise ConnectionError("no route\nto host")
        for path in (self.root / repo_id).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        for path in Path(folder_path).rglob("*"):
            name = str(path.relative_to(folder_path))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.root / repo_id / name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return stand_in


@pytest.fixture
def prune(monkeypatch, tmp_path, capsys):
    (tmp_path / "dense").mkdir()
    model = model_folder(tmp_path / "dense", num_hidden_layers=1)
    capsys.readouterr()

    def command(*arguments, save="pruned"):
        code = run(monkeypatch, "prune", model, *OPTIONS, "--save", tmp_path / save, *arguments)
        return SimpleNamespace(code=code, said=(said := capsys.readouterr()).out, error=said.err)

    return command


def test_what_is_saved_is_pushed_and_what_nobody_knows_is_not(hub, prune, tmp_path):
    for name in ("passwords.txt", "token.json"):
        (tmp_path / "dense" / name).write_text("secret")
    (tmp_path / "dense" / "LICENSE").write_text("terms")
    (tmp_path / "token.txt").write_text("secret")
    ended = prune("--push-to-hub", "gpt2", "--private")
    assert ended.code == 0 and "pushed: https://huggingface.co/me/gpt2" in ended.said
    assert "not pushed, since nobody knows what it is: passwords.txt, token.json" in ended.said
    there, here = ({path.name for path in (tmp_path / each).iterdir()} for each in ("hub/me/gpt2", "pruned"))
    assert (
        there == here - {"passwords.txt", "token.json"}
        and {"LICENSE", "tokenizer.json", "README.md", "run.yaml"} <= there
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "hub/me/gpt2")
    assert hub.private == {"gpt2": True}
    assert "push_to_hub" not in (tmp_path / "pruned" / "run.yaml").read_text()


def test_a_repository_that_is_there_is_replaced_only_if_asked(hub, prune, tmp_path):
    there = tmp_path / "hub/me/small"
    there.mkdir(parents=True)
    for name in ("notes.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (there / name).write_text("theirs")
    ended = prune("--push-to-hub", "me/small")
    assert ended.code == 1 and "is on the hub already" in ended.error and not (tmp_path / "pruned").exists()
    assert prune("--push-to-hub", "me/small", "--overwrite").code == 0
    assert hub.private == {}  # as it was
    assert (there / "notes.md").exists() and {path.name for path in there.glob("model*")} == {
        "model.safetensors"
    }


def test_what_is_to_be_private_is_not_pushed_to_where_everybody_sees_it(hub, prune, tmp_path):
    """Neither what is there at the start nor what somebody has made public meanwhile."""
    there, push = tmp_path / "hub/me/small", Push("me/small", private=True, overwrite=True)
    there.mkdir(parents=True)
    ended = prune("--push-to-hub", "me/small", "--overwrite", "--private")
    assert ended.code == 1 and "me/small is public on the hub: make it private" in ended.error
    assert not (tmp_path / "pruned").exists()
    with pytest.raises(HubError, match="is public on the hub"):
        push.send(tmp_path / "dense")
    assert list(there.iterdir()) == []
    hub.private["small"] = True
    push.check("dense")
    push.send(tmp_path / "dense")
    assert (there / "model.safetensors").is_file()


def test_a_push_that_fails_leaves_what_is_saved_and_is_repeated_with_the_command(hub, prune, tmp_path):
    command = ["--push-to-hub", "small", "--checkpoint", tmp_path / "answers"]
    hub.down = True
    ended = prune(*command)
    folder = tmp_path / "pruned"
    assert ended.code == 1 and ended.error.count("\n") == 1
    assert f"no route to host ({folder} is saved: hf upload small {folder} sends it)" in ended.error
    AutoModelForCausalLM.from_pretrained(folder)
    hub.down = False
    ended = prune(*command)
    assert (
        ended.code == 0 and "done already" in ended.said and (tmp_path / "hub/me/small/config.json").is_file()
    )
    assert hub.private == {"small": None}  # as one's settings say


def test_what_cannot_work_is_said_before_anything_is_pruned(hub, prune, tmp_path, monkeypatch):
    def offline():
        raise ConnectionError("no network")

    for arguments, words in (
        (["--private"], "add --push-to-hub NAME"),
        (["--push-to-hub", "a/b/c"], "write USER/NAME"),
        (["--push-to-hub", "../x"], "write USER/NAME"),
    ):
        ended = prune(*arguments)
        assert ended.code == 1 and words in ended.error
    with pytest.raises(HubError, match="is the dense model itself"):
        Push("llama", overwrite=True).check("me/llama")
    hub.whoami = offline
    assert "no network (nothing was done yet)" in prune("--push-to-hub", "small").error
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "run `hf auth login`" in prune("--push-to-hub", "small").error
    assert not (tmp_path / "pruned").exists() and not (tmp_path / "hub").exists()
