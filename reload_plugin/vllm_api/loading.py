"""What a cold start loads weights with: its context, its loaders, and what they check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..device.default_device import cpu_by_default
from .ranges import calls
from .symbols import MODEL_UTILS, TORCH_UTILS, WEIGHT_UTILS, get


def default_weight_loader() -> Callable[..., Any]:
    """What loads a parameter that has no loader of its own."""
    loader: Callable[..., Any] = get(WEIGHT_UTILS, "default_weight_loader")
    return loader


def unwrap_weight_loader(value: Any) -> Any:
    """A parameter's attribute; a loader without vLLM's layer-by-layer wrapper around it."""
    while getattr(value, "__name__", "") == "online_process_loader":
        value = value.__wrapped__
    return value


def current_vllm_config() -> Any:
    """The config that vLLM has set for the current context, or None."""
    return get("vllm.config", "get_current_vllm_config_or_none")()


@contextlib.contextmanager
def loading_context(vllm_config: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """The context in which a cold start loads and processes weights (config, default dtype and device).

    Inference mode is left, so that tensors made inside are ordinary ones as at a cold start.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_by_default())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if vllm_config is not None:
            stack.enter_context(get("vllm.config", "set_current_vllm_config")(vllm_config))
        if dtype is not None:
            stack.enter_context(get(TORCH_UTILS, "set_default_torch_dtype")(dtype))
        yield


@contextlib.contextmanager
def partial_loading() -> Iterator[None]:
    """Keeps loaders from calling a part of a checkpoint incomplete.

    Draft models count their layers, and vLLM's automatic loader wants the embedding beside a head that is
    tied to it, in one and the same call.
    """
    loader, check = get(MODEL_UTILS, "AutoWeightsLoader"), "_check_skipped_aliases"
    original = vars(loader).get(check)
    with calls().completeness_unchecked():
        if original is not None:
            setattr(loader, check, lambda self, loaded: None)  # noqa: ARG005 - the shape of the original
        try:
            yield
        finally:
            if original is not None:
                setattr(loader, check, original)
