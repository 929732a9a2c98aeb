"""``reload_weights`` of vLLM's model runners, and the function that it calls."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import vllm_api

logger = logging.getLogger("vllm.reload_plugin")

Weights = Iterable[tuple[str, torch.Tensor]]

_asked: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("options", default=None)
"""Options of ours on their way through a runner's ``reload_weights``, which does not know them."""

RESETS = ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache")
"""What a runner does after a reload, by its methods; not every version and runner has all of them."""


def passing_options(original: Callable[..., Any]) -> Callable[..., Any]:
    """A runner's ``reload_weights`` that calls a function of ours: it takes our options out of its arguments,
    and the older name of ``is_checkpoint_format``.
    """

    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _asked.set(_options_in(kwargs))
        try:
            returned = original(self, *args, **kwargs)
        finally:
            _asked.reset(token)
        _note_emptied(self)
        return returned

    return reload_weights


def reloading(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's ``reload_weights`` for its model runners; models without a record keep vLLM's own."""

    def reload_weights(
        vllm_config: Any,
        model: nn.Module,
        weights_iterator: Weights | None,
        weights_path: str | None,
        is_checkpoint_format: bool,
    ) -> None:
        model = vllm_api.unwrapped(model)
        if _has_record(model):
            _reload(model, weights_iterator, weights_path, is_checkpoint_format, _asked.get() or {})
        else:
            original(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)

    return reload_weights


def reloading_itself(original: Callable[..., None]) -> Callable[..., None]:
    """A runner's ``reload_weights`` that calls no function for it, and so is replaced as a whole."""

    def reload_weights(
        self: Any,
        weights_iterator: Weights | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
        **kwargs: Any,
    ) -> None:
        asked = _options_in(kwargs)
        is_checkpoint_format = kwargs.pop("is_checkpoint_format", is_checkpoint_format)
        model = vllm_api.unwrapped(self.get_model())
        if not _has_record(model):
            original(self, weights_iterator, weights_path, is_checkpoint_format, **kwargs)
            return
        if kwargs:
            raise TypeError(f"reload_weights() got an unexpected keyword argument {next(iter(kwargs))!r}")
        _reload(model, weights_iterator, weights_path, is_checkpoint_format, asked)
        for name in RESETS:
            if (reset := getattr(self, name, None)) is not None:
                reset()
        _note_emptied(self)

    return reload_weights


def _options_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take our options out of a call's arguments, and translate the older name of one of vLLM's."""
    from ..options import OPTION_NAMES

    if "process_weights_after_loading" in kwargs:
        kwargs["is_checkpoint_format"] = kwargs.pop("process_weights_after_loading")
    return {name: kwargs.pop(name) for name in OPTION_NAMES & kwargs.keys()}


def _has_record(model: nn.Module) -> bool:
    from ..record.model_record import record_of

    if record_of(model) is not None:
        return True
    logger.warning("%s was built before reload_plugin; vLLM's own reload runs.", type(model).__name__)
    return False


def _reload(
    model: nn.Module,
    iterator: Weights | None,
    path: str | None,
    is_checkpoint_format: bool,
    asked: dict[str, Any],
) -> None:
    from ..transaction.reload import reload_weights

    how = {"digest": "later"} | asked  # nobody gets the report
    report = reload_weights(model, iterator, path, is_checkpoint_format, **how)
    logger.info("Reloaded: %s", report.model_dump_json(exclude={"ignored", "kept"}))


def _note_emptied(runner: Any) -> None:
    """Tell the report what the runner has reset."""
    from ..record.model_record import record_of
    from ..transaction.caches import EMPTIED_BY_RUNNER
    from ..transaction.engine_state import state_of

    model = vllm_api.unwrapped(runner.get_model())
    if record_of(model) is not None:
        state_of(model).outcome.note_caches(EMPTIED_BY_RUNNER)
