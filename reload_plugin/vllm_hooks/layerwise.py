"""vLLM's layerwise calls, which open and finish a weight update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def opening(original: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def initialize_layerwise_reload(model: nn.Module) -> None:
        from ..record.model_record import record_of
        from ..transaction.reload import open_layerwise

        if record_of(model) is None:
            original(model)
        else:
            open_layerwise(model)

    return initialize_layerwise_reload


def finishing(original: Callable[..., None]) -> Callable[..., None]:
    def finalize_layerwise_reload(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        from ..record.model_record import record_of
        from ..transaction.reload import finish_layerwise

        if record_of(model) is None:
            original(model, *args, **kwargs)
        else:
            finish_layerwise(model)

    return finalize_layerwise_reload
