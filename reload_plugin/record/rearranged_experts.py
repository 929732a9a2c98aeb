"""Experts that an engine has moved since its start (EPLB): it routes by tables that no loader reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import vllm_api
from .model_record import ModelRecord
from .module_state import holders_of
from .snapshot import read

_STATE, _TABLE = "eplb_state", "logical_to_physical_map"
"""What a layer's router holds, and in it (experts, most copies of one): places of each expert, filled up
with -1. The state is of ``vllm.distributed``, and so none of the layer's helper objects.
"""


def rearranged_layers(record: ModelRecord) -> list[str]:
    """Names of layers whose experts are no longer where vLLM's loaders put them: expert ``i`` in place ``i``,
    and its copies after all experts, in turn.

    Reads the tables of the live model; nothing without ``enable_eplb``.
    """
    if not _balances(record):
        return []
    return sorted({name for name, table in _tables(record) if not _is_initial(table)})


def is_rearranging(record: ModelRecord) -> bool:
    """Whether experts of a model are on their way to other places, in the background: then old weights will
    be copied over what is served.
    """
    if not _balances(record):
        return False
    modules = {id(module) for layer in record.layers if (module := layer.ref()) is not None}
    return any(
        any(id(module) in modules for module in model.modules())
        for model in vllm_api.models_being_rearranged()
    )


def _balances(record: ModelRecord) -> bool:
    parallel = getattr(record.vllm_config, "parallel_config", None)
    return bool(getattr(parallel, "enable_eplb", False))


def _tables(record: ModelRecord) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in record.layers:
        if (module := layer.ref()) is None:
            continue
        for _, holder in holders_of(module):
            table = getattr(read(holder).get(("attribute", _STATE)), _TABLE, None)
            if isinstance(table, torch.Tensor) and table.dim() == 2:
                yield layer.name, table


def _is_initial(table: torch.Tensor) -> bool:
    """Whether a table is the one of the start."""
    table = table.detach().cpu()
    expert = torch.arange(len(table), dtype=table.dtype).unsqueeze(1)
    at_home = (table % len(table) == expert) | (table < 0)
    return bool(at_home.all() and (table == expert).any(1).all())
