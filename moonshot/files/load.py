"""Models and their tokenizers or image processors, from a folder or a hub name."""

from typing import Any

import torch
from torch import nn

from moonshot.extras import from_extra


def load(name: str) -> tuple[nn.Module, object]:
    """(causal language model, tokenizer), in the dtype that the model was saved in.

    name: a folder or a hub name. Raises ValueError for what does not load.
    """
    with from_extra("cli"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

    return _load(name, "a causal language model", AutoModelForCausalLM, AutoTokenizer)


def load_classifier(name: str) -> tuple[nn.Module, object]:
    """(image classifier, image processor), in the dtype that the model was saved in.

    name: a folder or a hub name. Raises ValueError for what does not load.
    """
    with from_extra("vision"):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

    return _load(name, "an image classifier", AutoModelForImageClassification, AutoImageProcessor)


def _load(name: str, kind: str, models: Any, preprocessors: Any) -> tuple[nn.Module, object]:
    try:
        preprocessor = preprocessors.from_pretrained(name)
        model: nn.Module = models.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise _cannot_load(kind, name, error) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), preprocessor


def _cannot_load(kind: str, name: str, error: Exception) -> ValueError:
    return ValueError(f"cannot load {kind} from {name!r}: {str(error).splitlines()[0]}")


def is_image_classifier(name: str) -> bool:
    """Whether the configuration in a folder or under a hub name is that of an image classifier.

    Raises ValueError where there is none.
    """
    with from_extra("cli"):
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _cannot_load("a model", name, error) from error
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
