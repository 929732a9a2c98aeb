"""Weight updates in several calls: vLLM's layerwise calls and its weight-transfer engines."""

from __future__ import annotations

import sys
import types
from typing import Any

from torch import nn

from .ranges import calls
from .symbols import RELOAD, TRANSFER, get


def initialize_layerwise(model: nn.Module) -> None:
    """Open a weight update, by the call that transfer engines use (and the plugin takes over)."""
    get(RELOAD, "initialize_layerwise_reload")(model)


def finalize_layerwise(model: nn.Module, model_config: Any) -> None:
    """Finish a weight update, by the call that transfer engines use (and the plugin takes over)."""
    get(RELOAD, "finalize_layerwise_reload")(model, model_config)


def transfer_engine(name: str, cls: type) -> type:
    """A subclass of ``cls`` and of vLLM's weight-transfer engine, whose methods ``cls`` brings."""
    base = get(TRANSFER + ".base", "WeightTransferEngine")
    return types.new_class(
        name, (cls, base), exec_body=lambda body: body.update(calls().transfer_methods(cls))
    )


def register_transfer_engine(name: str, module: str, cls: str) -> str | None:
    """Tell vLLM's factory where an engine is; it is imported when one is created. Returns why not."""
    try:
        get(TRANSFER + ".factory", "WeightTransferEngineFactory").register_engine(name, module, cls)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return str(error)
    return None


def reset_update_target(engine: Any) -> None:
    """End what a transfer engine updates: after this it is the worker's model again."""
    calls().reset_update_target(engine)


def unregister_transfer_engine(name: str) -> None:
    """Undo ``register_transfer_engine``; harmless when it did nothing."""
    factory = sys.modules.get(TRANSFER + ".factory")
    if factory is not None:
        factory.WeightTransferEngineFactory._registry.pop(name, None)
