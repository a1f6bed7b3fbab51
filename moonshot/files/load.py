"""Models and their tokenizers or image processors, from a folder or a hub name."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from moonshot.extras import from_extra
from moonshot.files.mapped import DTYPES
from moonshot.files.source import CONTENTS, FolderError, check_weights, find_folder, reading, weight_files

_COUNT, _MODULES = (
    re.compile("layer|block|depth|expert"),
    10**4,
)  # keys that say how many modules there are, at most


class Source:
    """A model that is not loaded yet: its folder, its configuration, its tokenizer or image processor.

    name: a folder or a hub name. trust_remote_code: whether code that comes with the model may run.
    folder: the folder, in the hub's cache for a hub name.

    Raises FolderError for what is not there, cannot be read, or needs code that may not run.
    """

    def __init__(self, name: str, trust_remote_code: bool = False):
        with from_extra("cli"):
            import transformers  # noqa: F401 - or say what to install
        self.name, self.trusted = str(name), trust_remote_code
        self.folder = find_folder(self.name)
        self._check_config()

    def _check_config(self) -> None:
        """What transformers does not ask of a configuration before it acts on it."""
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return  # transformers says what is wrong
        kernels = [str(name) for key, name in _entries(config) if "attn_implementation" in key]
        if not self.trusted and (found := [name for name in kernels if "/" in name]):
            raise FolderError(
                f"{self.name} runs attention by {found[0]!r}, code from the hub: read that, and if you trust it say "
                "--trust-remote-code (trust_remote_code=True in Python)"
            )
        counts = [(key, n) for key, n in _entries(config) if isinstance(n, int) and _COUNT.search(key)]
        if found := [f"{key} = {n}" for key, n in counts if n > _MODULES]:
            raise FolderError(f"{self.folder / 'config.json'} asks for {found[0]}: get it once more")

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        with reading("a model", self.name):
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trusted)

    @property
    def is_image_classifier(self) -> bool:
        """Whether the configuration is that of an image classifier."""
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

        return type(self.config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    @property
    def kind(self) -> str:
        return "an image classifier" if self.is_image_classifier else "a causal language model"

    @cached_property
    def processor(self) -> Any:
        """The tokenizer, or the image processor."""
        from transformers import AutoImageProcessor, AutoTokenizer

        auto = AutoImageProcessor if self.is_image_classifier else AutoTokenizer
        with reading("the image processor" if self.is_image_classifier else "the tokenizer", self.name):
            return auto.from_pretrained(self.folder, trust_remote_code=self.trusted)

    def set_generation(self, model: nn.Module) -> None:
        """Give a model that was made of tensors what generation_config.json says, as one that is loaded has it."""
        from transformers import GenerationConfig

        if getattr(model, "generation_config", None) is not None:
            with suppress(
                OSError
            ):  # there is none, or none that can be read: transformers does without it as well
                model.generation_config = GenerationConfig.from_pretrained(self.folder)  # type: ignore[assignment]

    def skeleton(self) -> nn.Module:
        """The model without weights, on the meta device."""
        with reading(self.kind, self.name), torch.device("meta"), quiet():
            return self._auto.from_config(self.config, trust_remote_code=self.trusted).eval()

    def load(self, on_gpu: bool | None = None) -> nn.Module:
        """The model in the dtype it was saved in. on_gpu: whether on the GPU; unless given, if there is one.

        Raises FolderError where the files lack weights that the configuration asks for, or have others. Warns of
        tensors that the model has no use for, and of weights that are in another dtype in its files.
        """
        self.check_files()
        with reading(self.kind, self.name), quiet():
            model, found = self._auto.from_pretrained(
                self.folder,
                dtype="auto",
                trust_remote_code=self.trusted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        self._check_complete(model, found)
        self.say_unread(type(model), found, "left out")
        self._say_cast(model)
        return model.to("cuda" if default_on_gpu(on_gpu) else "cpu")

    def check_files(self) -> list[str]:
        """`weight_files`, each looked at by safetensors.

        Raises FolderError where one is not whole, and for a compact folder.
        """
        if (self.folder / CONTENTS).is_file():
            raise FolderError(
                f"{self.name} is a compact folder: make an ordinary one of it by moonshot unpack {self.name} --save "
                "FOLDER, or read it in Python by moonshot.load_compact"
            )
        names = weight_files(self.folder)
        for name in names:
            check_weights(self.folder / name)
        return names

    @property
    def model_class(self) -> Any:
        """The class of transformers that the model is; None for one that comes with its own.

        Raises FolderError for what was trained as something else.
        """
        with reading(self.kind, self.name):
            return self._model_class()

    def _model_class(self) -> Any:
        import transformers

        config, images = self.config, self.is_image_classifier
        kinds: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if images:
            kinds = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        if type(config) not in kinds or (self.trusted and getattr(config, "auto_map", None)):
            return None
        found = kinds[type(config)]
        classes = {kind.__name__: kind for kind in (found if isinstance(found, tuple) else (found,))}
        named = [name for name in config.architectures or () if hasattr(transformers, name)]
        base = getattr(transformers.MODEL_MAPPING.get(type(config), None), "__name__", None)
        is_encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(
            config, "is_decoder", True
        )
        if not images and (is_encoder or (named and not {*classes, base} & {*named})):
            trained = named[0] if named else f"an encoder, {config.model_type}"
            raise FolderError(
                f"{self.name} is no causal language model but {trained}: load it in Python and give ms.prune a loss"
            )
        return next((classes[name] for name in named if name in classes), next(iter(classes.values())))

    @property
    def _auto(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForImageClassification

        self.model_class  # noqa: B018 - looks whether it is one
        return AutoModelForImageClassification if self.is_image_classifier else AutoModelForCausalLM

    def say_unread(self, kind: type, found: dict[str, Any], fate: str) -> None:
        """Warn of tensors in the files that the model has no use for. fate: what becomes of them."""
        if unread := sorted(found["unexpected_keys"]):
            warnings.warn(
                f"{self.name} has tensors that {kind.__name__} does not, which are {fate}: {unread[0]}{_more(unread)}",
                stacklevel=1,
            )

    def _say_cast(self, model: nn.Module) -> None:
        """Warn of weights that the model has in another dtype than its files, as its configuration says."""
        weights, cast = model.state_dict(), []
        for name in weight_files(self.folder):
            with safe_open(self.folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dictionary
                    there = DTYPES.get(file.get_slice(key).get_dtype())
                    if key in weights and weights[key].dtype != there:
                        cast.append(f"{key} from {_word(there)} to {_word(weights[key].dtype)}")
        if cast := sorted(cast):
            warnings.warn(
                f"{self.name} has weights in another dtype than its config.json says, which are cast: {cast[0]}"
                f"{_more(cast)}",
                stacklevel=1,
            )

    def _check_complete(self, model: nn.Module, found: dict[str, Any]) -> None:
        weights = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        if other := sorted(found["mismatched_keys"]):
            name, there, wanted = other[0]
            raise FolderError(
                f"{self.name} has other weights than its config.json asks for: {name} is {tuple(there)}, not "
                f"{tuple(wanted)}{_more(other)}"
            )
        if missing := sorted(weights & set(found["missing_keys"])):
            raise FolderError(
                f"{self.name} lacks weights that {type(model).__name__} has: {missing[0]}{_more(missing)}; get the "
                "model once more, or one that was trained as this"
            )


def default_on_gpu(on_gpu: bool | None) -> bool:
    """Whether a model is loaded onto a GPU, unless that was said."""
    return torch.cuda.is_available() if on_gpu is None else on_gpu


def load(name: str, trust_remote_code: bool = False) -> tuple[nn.Module, object]:
    """(causal language model, tokenizer) of a folder or a hub name, in the dtype it was saved in.

    trust_remote_code: whether code that comes with the model may run. Raises FolderError (Source).
    """
    return _load(name, trust_remote_code, False)


def load_classifier(name: str, trust_remote_code: bool = False) -> tuple[nn.Module, object]:
    """(image classifier, image processor) of a folder or a hub name, in the dtype it was saved in; as `load`."""
    return _load(name, trust_remote_code, True)


def _load(name: str, trust_remote_code: bool, images: bool) -> tuple[nn.Module, object]:
    source = Source(name, trust_remote_code)
    if source.is_image_classifier is not images:
        raise FolderError(f"{name} is {source.kind}")
    return source.load(), source.processor


def is_image_classifier(name: str, trust_remote_code: bool = False) -> bool:
    """Whether the configuration in a folder or under a hub name is that of an image classifier.

    Raises FolderError where there is none.
    """
    return Source(name, trust_remote_code).is_image_classifier


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing meanwhile: what it would say of a model's weights is an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _entries(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a configuration, however deep; what is in a list has the list's key.

    A dictionary under attn_implementation has one for each part of the model, under that key.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _entries(value, key if "attn_implementation" in key else name)
    elif isinstance(config, list):
        for value in config:
            yield from _entries(value, key)
    else:
        yield key, config


def _word(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if names[1:] else ""
