"""A saved folder on the Hugging Face hub: looked at before hours of pruning, sent once it is safe on disk."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path

from moonshot.errors import MoonshotError
from moonshot.files.source import CONTENTS, INDEX

_WEIGHTS = ("model*.safetensors", "model*.compact", INDEX, CONTENTS)
# What transformers and tokenizers write, what moonshot does, and terms of use; a model's folder may have other files.
_KNOWN = (
    *("*.safetensors", "*.compact", INDEX, CONTENTS),
    *("config.json", "generation_config.json", "README.md", "README.dense.md"),
    *("report.json", "recipe.json", "run.yaml", "*.html", "*.py"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "*.model", "*.tiktoken"),
    *("merges.txt", "tekken.json", "normalizer.json", "*processor_config.json", "*chat_template*"),
    *(
        "[Ll][Ii][Cc][Ee][Nn]*",
        "[Nn][Oo][Tt][Ii][Cc][Ee]*",
        "COPYING*",
        "[Uu][Ss][Ee]_[Pp][Oo][Ll][Ii][Cc][Yy]*",
    ),
)


class HubError(MoonshotError):
    """The hub cannot be reached, does not know who asks, or has something under this name already."""


@dataclass(frozen=True)
class Push:
    """Where a folder goes on the hub.

    name: of the repository, as USER/NAME, or NAME for one's own.
    private: whether nobody else sees it; otherwise as the user's or organisation's settings say.
    overwrite: whether it may be there already; it then gets a new commit, and loses weights of its own that moonshot
    or transformers wrote.

    Raises HubError for what is no name.
    """

    name: str
    private: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.name, re.ASCII) or self.name.endswith(".git"):
            raise HubError(f"--push-to-hub {self.name}: write USER/NAME, or NAME for a repository of your own")

    def check(self, model: str) -> None:
        """Raises HubError for what would keep `send` from its work. model: the name of the dense one."""
        from huggingface_hub import HfApi, get_token

        if not get_token():
            raise HubError("--push-to-hub needs to know who you are: run `hf auth login`, or set HF_TOKEN")
        with self._answering("nothing was done yet"):
            user = HfApi().whoami()["name"]
            name = self.name if "/" in self.name else f"{user}/{self.name}"
            there = HfApi().repo_exists(name)
            if there and self.overwrite:
                self._check_private(name)
        if model == name and not Path(model).exists():
            raise HubError(f"--push-to-hub {name} is the dense model itself: choose another name")
        if there and not self.overwrite:
            raise HubError(
                f"{name} is on the hub already: choose another name, or add --overwrite for a new commit there"
            )

    def send(self, folder: Path) -> tuple[str, list[str]]:
        """Send a saved folder, in one commit. Returns its address, and the files that nobody knows and that stay here.

        Raises HubError, which says that the folder is saved and how to send it.
        """
        from huggingface_hub import HfApi

        files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        others = [name for name in files if not any(matching([name], known) for known in _KNOWN)]
        with self._answering(f"{folder} is saved: hf upload {shlex.join([self.name, str(folder)])} sends it"):
            place = HfApi().create_repo(self.name, private=self.private or None, exist_ok=self.overwrite)
            self._check_private(place.repo_id)
            HfApi().upload_folder(
                repo_id=place.repo_id,
                folder_path=folder,
                commit_message="A model pruned with moonshot",
                allow_patterns=list(_KNOWN),
                delete_patterns=list(_WEIGHTS),
            )
        return str(place), others

    def _check_private(self, name: str) -> None:
        """Raises HubError where everybody sees what is to be private: to push to a repository does not change that."""
        from huggingface_hub import HfApi

        if self.private and not HfApi().model_info(name).private:
            raise HubError(
                f"{name} is public on the hub: make it private in its settings, or leave --private out"
            )

    @contextmanager
    def _answering(self, state: str) -> Iterator[None]:
        """Whatever goes wrong on the way to the hub is said in a line. state: what there is meanwhile."""
        try:
            yield
        except HubError:
            raise
        except Exception as error:  # of the network, of the hub, of the disk
            reason = " ".join(str(error).split()) or type(error).__name__
            raise HubError(f"could not push to {self.name}: {reason} ({state})") from error
