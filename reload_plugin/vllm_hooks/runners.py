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

_asked: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("options", default=None)
"""Options of ours on their way through a runner's ``reload_weights``, which does not know them."""


def runner_reloading(original: Callable[..., Any]) -> Callable[..., Any]:
    """A runner's ``reload_weights`` that takes our options and the older name of ``is_checkpoint_format``."""
    from ..options import OPTION_NAMES
    from ..record.model_record import record_of
    from ..transaction.caches import EMPTIED_BY_RUNNER
    from ..transaction.engine_state import state_of

    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "process_weights_after_loading" in kwargs:
            kwargs["is_checkpoint_format"] = kwargs.pop("process_weights_after_loading")
        token = _asked.set({name: kwargs.pop(name) for name in OPTION_NAMES & kwargs.keys()})
        try:
            returned = original(self, *args, **kwargs)
        finally:
            _asked.reset(token)
        model = vllm_api.unwrapped(self.get_model())
        if record_of(model) is not None:
            state_of(model).outcome.note_caches(EMPTIED_BY_RUNNER)
        return returned

    return reload_weights


def reloading(original: Callable[..., None]) -> Callable[..., None]:
    """vLLM's ``reload_weights`` for its model runners; models without a record keep vLLM's own."""

    def reload_weights(
        vllm_config: Any,
        model: nn.Module,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None,
        weights_path: str | None,
        is_checkpoint_format: bool,
    ) -> None:
        from ..record.model_record import record_of
        from ..transaction.reload import reload_weights as ours

        model = vllm_api.unwrapped(model)
        if record_of(model) is None:
            logger.warning("%s was built before reload_plugin; vLLM's own reload runs.", type(model).__name__)
            original(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)
            return
        how = {"digest": "later"} | (_asked.get() or {})  # nobody gets the report
        report = ours(model, weights_iterator, weights_path, is_checkpoint_format, **how)
        logger.info("Reloaded: %s", report.model_dump_json(exclude={"ignored", "kept"}))

    return reload_weights
