"""Quantized copies of a model's head, which its drafter serves: vLLM's ``draft_lm_head_quantization``.

vLLM makes them again after the reloads that its runner and its worker know of. A copy shares no memory with
the head, and the drafter's own weights do not hold it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .loading import loading_context
from .symbols import COPIED_HEADS


def refresh_copied_heads(layers: Collection[object], vllm_config: Any) -> int:
    """Quantize again each copy whose head is one of the layers, into the memory of the copy.

    Args:
        layers: of a model, with its new weights.
        vllm_config: of its engine.

    Returns:
        The number of copies.

    """
    heads = sys.modules.get(COPIED_HEADS)
    if heads is None:  # no drafter of this process has one
        return 0
    found = [copy for copy, (head, _) in list(heads._SOURCES.items()) if head in layers]
    if found:
        with loading_context(vllm_config, None):
            for copy in found:
                heads.refresh_quantized_lm_heads(copy)
    return len(found)


def put_back_copied_heads(drafter: nn.Module) -> None:
    """End vLLM's loan of the unquantized head to a drafter that is updated: it serves its copies again."""
    heads = sys.modules.get(COPIED_HEADS)
    if heads is not None:
        with torch.no_grad():
            heads.restore_quantized_lm_heads(drafter, refresh=False)
