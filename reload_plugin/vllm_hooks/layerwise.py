"""vLLM's layerwise calls, which open and finish a weight update in several calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import vllm_api
from .live import owner_of
from .transfer_backends import foreign_caller


def opening(original: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """``initialize_layerwise_reload``: opens an update. A model without a record gets vLLM's own."""

    def initialize_layerwise_reload(model: nn.Module) -> None:
        from ..record.model_record import record_of
        from ..transaction.chunked_update import open_layerwise

        model = vllm_api.unwrapped(model)
        if record_of(model) is None or foreign_caller() is not None:
            original(model)
        else:
            open_layerwise(model)

    return initialize_layerwise_reload


def finishing(original: Callable[..., None]) -> Callable[..., None]:
    """``finalize_layerwise_reload`` and ``finalize_layerwise_processing``: commits the open update.

    A model without a record gets vLLM's own, and so does one that starts: vLLM's loaders end the cold load
    of online quantization with ``finalize_layerwise_processing``. A part of a recorded model gets vLLM's own
    too; then nobody knows which weights the whole serves.
    """

    def finalize(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        from ..record.model_record import record_of
        from ..transaction.chunked_update import finish_layerwise
        from ..transaction.engine_state import state_of

        model = vllm_api.unwrapped(model)
        record = record_of(model)
        if record is None or not record.complete:
            original(model, *args, **kwargs)
            owner = owner_of(model) if record is None else None
            if owner is not None:
                what = "written by vLLM's layerwise reload of a part of the model"
                state_of(owner).mark_unknown(what)
        elif (backend := foreign_caller()) is not None:
            original(model, *args, **kwargs)
            state_of(model).mark_unknown(f"written by {backend.name}", heals=backend.whole)
        else:
            finish_layerwise(model)

    return finalize
