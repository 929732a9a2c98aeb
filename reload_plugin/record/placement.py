"""Which part of a model a rank holds. The copy plan depends on it and on the listing of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .model_record import LayerRecord, ModelRecord

RANKS = ("rank", "world_size", "data_parallel_rank", "data_parallel_size")
"""Fields of the parallel config that determine the placement."""
SHARDS = ("tp_rank", "tp_size", "ep_rank", "ep_size")
"""Attributes of a layer or of its parallel config from which vLLM's loaders compute this rank's shard."""
_OF_A_RANK = frozenset((*SHARDS, "moe_config", "expert_map_manager"))
"""A layer without any of these, and without expert tables, is the same on every rank."""


def placement(record: ModelRecord) -> object:
    """The rank's number, its shards, and which experts it holds and where.

    Read from the live model, because expert tables are replaced and written to while an engine runs. With
    equal placements every weight is copied to the same regions.
    """
    parallel = getattr(record.vllm_config, "parallel_config", None)
    layers = (found for layer in record.layers if (found := _of_layer(layer)))
    return tuple(getattr(parallel, name, None) for name in RANKS), *layers


def _of_layer(layer: LayerRecord) -> tuple[object, ...]:
    """Empty for a layer that is the same on every rank."""
    module = layer.ref()
    if module is None:
        return ()
    own = vars(module)
    if not module._buffers and own.keys().isdisjoint(_OF_A_RANK):  # most
        return ()
    moe: Any = own.get("moe_config")
    parallel = getattr(moe, "moe_parallel_config", None)
    shards = tuple(own.get(name) for name in SHARDS)
    of_experts = tuple(getattr(parallel, name, None) for name in SHARDS) if parallel is not None else ()
    tables = tuple((name, tuple(table.flatten().tolist())) for name, table in _tables(layer, module))
    found = (*(shards if any(value is not None for value in shards) else ()), *of_experts, *tables)
    return (layer.name, *found) if found else ()


def _tables(layer: LayerRecord, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every table that maps experts to ranks or slots. Loaders read the one of the expert map manager."""
    for key, buffer in module._buffers.items():
        if buffer is None or buffer.is_floating_point():
            continue
        recorded = (record.name for record in layer.tensors if record.is_table)
        if "expert" in key or f"{layer.name}.{key}" in recorded:
            yield key, buffer
    manager = vars(module).get("expert_map_manager")
    asked = getattr(manager, "expert_map", None)
    if isinstance(asked, torch.Tensor):
        yield "expert_map_manager", asked
