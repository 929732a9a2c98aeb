"""The models that a worker of vLLM runs, out of the wrappers that vLLM puts around them."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The module inside of vLLM's wrappers for graphs and micro-batches, however deep; else what was given.

    ``CUDAGraphWrapper``, ``UBatchWrapper`` and ``BreakableCUDAGraphWrapper`` are no modules. They pass
    attributes on to what they wrap, so only its own class tells whether something is a model.
    """
    while not isinstance(model, nn.Module) and callable(unwrap := getattr(model, "unwrap", None)):
        inside = unwrap()
        if inside is model:
            break
        model = inside
    return model


def models_of(worker: object) -> list[nn.Module]:
    """The model of a worker and the draft model beside it, if it has one. Empty before they are loaded."""
    runner = getattr(worker, "model_runner", None)
    found = [unwrapped(_ask(runner, question)) for question in ("get_model", "get_draft_model")]
    return [model for model in found if isinstance(model, nn.Module)]


def _ask(runner: object, question: str) -> object:
    """What a runner answers; None where it has no such method, or no model yet."""
    ask = getattr(runner, question, None)
    if not callable(ask):
        return None
    try:
        return ask()
    except (AttributeError, ValueError):  # vLLM's runners raise one or the other before the model is loaded
        return None


def is_suspended(worker: object) -> bool:
    """Whether the memory of a worker is away, as far as its mechanism of sleeping says so."""
    state = getattr(getattr(worker, "_sleep_mode_backend", None), "state", None)
    return callable(state) and state() != "RUNNING"
