"""What is served beside a model and made of its weights: quantized copies of its head in a drafter."""

from __future__ import annotations

import logging

from .. import vllm_api
from .engine_state import EngineState

logger = logging.getLogger("vllm.reload_plugin")


def refresh_copied_heads(state: EngineState) -> None:
    """Make copies follow the weights that were just committed, by whatever road they came.

    vLLM does so after reloads through its runner and its worker, not after pushes by ``model.load_weights``.
    While the head is parked in host memory nothing is done; ``unpark`` does it then. A failure is logged: the
    target's weights are served, and a drafter's old head proposes worse tokens only.
    """
    if state.parked is not None:
        return
    layers = {found for layer in state.record.layers if (found := layer.ref()) is not None}
    try:
        vllm_api.refresh_copied_heads(layers, state.record.vllm_config)
    except Exception as error:  # noqa: BLE001 - kernels of any kind; the commit is over
        logger.warning("The drafter keeps its copy of the old head: %s: %s", type(error).__name__, error)
