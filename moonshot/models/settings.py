"""torch and a model as pruning needs them, whatever is set around the call."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Lock, get_ident
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from moonshot.models.batchnorm import running_statistics
from moonshot.models.modules import ModelError, check_model, patched, unwrapped
from moonshot.models.ranks import joined

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

_threads: dict[int, int] = {}  # by the id of each module that is being pruned, the thread that does it
_lock = Lock()


def with_model_ready(
    function: Callable[Concatenate[nn.Module, Arguments], Answer],
) -> Callable[Concatenate[nn.Module, Arguments], Answer]:
    """A function of a model, to be called with the model itself in `ready` whatever it is wrapped in.

    Under torch.distributed the ranks have joined (`models.ranks`).
    """

    @wraps(function)
    def call(model: nn.Module, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        with joined():
            check_model(model)
            model = unwrapped(model)
            with ready(model):
                return function(model, *args, **kwargs)

    return call


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """Gradients on, autocast and inference mode off, no key-value cache and nothing compiled, whatever is set outside.

    Raises ModelError for a model that another thread is pruning, or that was made in inference mode.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "the model was made under torch.inference_mode(), where nothing has gradients: make it outside"
        )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in sorted({"cpu", *(parameter.device.type for parameter in model.parameters())}):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_in_this_thread_only(model))
        stack.enter_context(_with_its_buffers(model))
        stack.enter_context(_without_caches(model))
        stack.enter_context(_uncompiled(model))
        yield


@contextmanager
def _in_this_thread_only(model: nn.Module) -> Iterator[None]:
    modules = [id(module) for module in model.modules()]
    with _lock:
        if any(_threads.get(module, get_ident()) != get_ident() for module in modules):
            raise ModelError("the model is being pruned in another thread: wait for it, or prune a copy")
        added = [module for module in modules if module not in _threads]
        _threads.update(dict.fromkeys(added, get_ident()))
    try:
        yield
    finally:
        with _lock:
            for module in added:
                del _threads[module]


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Every configuration in the model says use_cache=False, so that no pass reads keys and values of another."""
    outer = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    inner = [value for config in outer for value in getattr(config, "__dict__", {}).values()]
    configs = {
        id(config): config for config in (*outer, *inner) if "use_cache" in getattr(config, "__dict__", ())
    }
    before = [(config, config.use_cache) for config in configs.values()]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def without_cache(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call, without the cache of keys and values that the same call filled in another pass."""
    kept = {name: _no_cache(value) for name, value in kwargs.items() if "past_key_value" not in name}
    return tuple(map(_no_cache, args)), kept | ({"use_cache": False} if "use_cache" in kept else {})


def _no_cache(value: Any) -> Any:
    is_cache = any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)
    return None if is_cache else value


@contextmanager
def _with_its_buffers(model: nn.Module) -> Iterator[None]:
    """What a model changes in its buffers as it runs, such as counters, is undone; running statistics apart."""
    estimated = {id(buffer) for buffer in running_statistics(model)}
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if id(buffer) not in estimated and not buffer.is_meta and not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Modules that are compiled run as they are: what is compiled would not see their layers observed."""
    inside = [
        (module, inner)
        for module in model.modules()
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module)
    ]
    compiled = [
        (module, call) for module in model.modules() if (call := module._compiled_call_impl) is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        with patched([outer for outer, _ in inside], [inner.__call__ for _, inner in inside]):
            yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
