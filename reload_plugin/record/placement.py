"""Which part of a model a rank holds: what routes of weights depend on beside the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .model_record import LayerRecord, ModelRecord

RANKS = ("rank", "world_size", "data_parallel_rank", "data_parallel_size")
"""What counts in the parallel config of an engine."""
SHARDS = ("tp_rank", "tp_size", "ep_rank", "ep_size")
"""What vLLM's loaders ask a layer, or its parallel config, to find their part of a weight."""
_OF_A_RANK = frozenset((*SHARDS, "moe_config", "expert_map_manager"))
"""Attributes without which a layer, unless it has tables, is the same on every rank."""


def placement(record: ModelRecord) -> object:
    """A rank's place among the others, its shards, and which experts it holds and where.

    Read from the model as it is now: tables of experts are exchanged, and written to, while an engine runs.
    Two that are equal stand for the same place of every weight.
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
    """Every table that says where experts are; the one that loaders ask is the manager's."""
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
