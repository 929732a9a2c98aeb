"""Names of checkpoint weights, as vLLM's models and quantizations map them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .ranges import calls


def passes_over(model: nn.Module, name: str) -> bool:
    """Whether the model or its quantization tells vLLM's loaders to drop weights of this name."""
    return any(calls().map_name(mapper, name) is None for mapper in _mappers(model))


def _mappers(model: nn.Module) -> Iterator[Any]:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        yield mapper
    for module in (model, *model.children()):
        quant_config = getattr(module, "quant_config", None)
        if quant_config is not None:
            yield from calls().quantization_mappers(quant_config)
            return
