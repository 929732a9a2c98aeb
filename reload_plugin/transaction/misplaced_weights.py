"""Reloads that would not write where the engine serves: refused before anything is touched."""

from __future__ import annotations

from .. import vllm_api
from ..errors import SERVES_OLD, UnsupportedError
from ..record.rearranged_experts import is_rearranging, rearranged_layers
from .engine_state import EngineState

SHARED = "ipc_cache"
"""vLLM's name of the loader that maps weights of a daemon."""


def refuse_misplaced_weights(state: EngineState) -> None:
    """Raises UnsupportedError where weights would not go where this engine alone serves them: see the
    functions below.
    """
    refuse_others_memory(state)
    refuse_rearranged_experts(state)


def refuse_others_memory(state: EngineState) -> None:
    """Raises UnsupportedError where the weights are the memory of vLLM's weight cache, which other engines of
    this machine serve too, or buffers that vLLM fills anew before each layer runs.
    """
    if vllm_api.load_format(state.record.vllm_config) == SHARED:
        raise UnsupportedError(
            f"This engine serves weights out of the memory of vLLM's weight cache (load_format={SHARED!r}), "
            f"and so do others: a reload would change theirs too. {SERVES_OLD} Start the engine with another "
            "load format to reload it."
        )
    if vllm_api.prefetches_weights(state.record.vllm_config):
        raise UnsupportedError(
            "vLLM's prefetch offloader serves the weights of this engine from copies of its own, which would "
            f"bring the old ones back after a reload. {SERVES_OLD} Start the engine with cpu_offload_gb in "
            "place of offload_group_size, or start it on the new weights."
        )


def refuse_rearranged_experts(state: EngineState) -> None:
    """Raises UnsupportedError where experts are no longer where loaders put them, or are being moved. Asked
    when an update begins and before it is committed: the engine may serve in between.
    """
    if layers := rearranged_layers(state.record):
        raise UnsupportedError(
            f"Experts were rearranged since the start, in {len(layers)} layers (in {layers[0]} for one), and "
            f"vLLM loads weights to where they were then. {SERVES_OLD} Reload before they are rearranged, or "
            "start the engine without enable_eplb."
        )
    if is_rearranging(state.record):
        raise UnsupportedError(
            "Experts are being rearranged in the background, which would copy old weights over new ones. "
            f"{SERVES_OLD} Start the engine without enable_eplb, or with its eplb_config.use_async=false and "
            "reload before they are rearranged."
        )
