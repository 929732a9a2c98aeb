"""vLLM's own ``process_weights_after_loading``, which the plugin replaces by name."""

from __future__ import annotations

from .. import vllm_api
from ..process.processing import ProcessWeights

_original: list[ProcessWeights] = []
"""The function that the plugin replaced, if it did. One for the process, as the patch is."""


def use_process_weights(original: ProcessWeights | None) -> None:
    """Tell which function is vLLM's own whole-model PWAL; None when its name is not patched any more."""
    _original[:] = [] if original is None else [original]


def original_process_weights() -> ProcessWeights:
    """vLLM's whole-model ``process_weights_after_loading``, unpatched."""
    if _original:
        return _original[0]
    found: ProcessWeights = vllm_api.get(vllm_api.LOADER_UTILS, "process_weights_after_loading")
    return found
