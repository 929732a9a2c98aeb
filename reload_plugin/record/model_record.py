"""The load format of a model, and what ``process_weights_after_loading`` (PWAL) does to it.

The record keeps descriptions and differences. It holds tensors by weak references: a tensor that vLLM drops
is freed as without the plugin, and a tensor that still exists is restored as the same object.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import NotRecordedError
from .changes import Changes
from .late_bound import LateBound
from .snapshot import Contents, Key
from .tensor_layout import (
    Geometry,
    TensorFormat,
    Uninitialised,
    Values,
)

_FEW_BYTES = 64
"""Up to so many bytes of values are smaller than the tensor object that describes them."""


RECORD_ATTRIBUTE = "_reload_plugin_record"
"""Where a model keeps its record, so that both are freed together."""

STATE_ATTRIBUTE = "_reload_plugin_state"
"""Where a model keeps its ``EngineState``."""


@dataclass(eq=False)
class TensorRecord:
    """One load-format tensor: its format, its storage, and the object itself while it lives."""

    format: TensorFormat
    storage: int
    """Number of the storage; tensors with the same number are views of one memory."""
    ref: weakref.ref[torch.Tensor]
    is_parameter: bool
    layer: str
    traced: bool = True
    """Whether the construction was watched, so that what the constructor wrote is known."""
    rewritten: bool = False
    """PWAL kept the object and changed its memory, layout or values: what is served was not loaded so."""

    @property
    def name(self) -> str:
        return self.format.name

    @functools.cached_property
    def scalars(self) -> torch.Tensor | None:
        """The constructor's values of a buffer of at most ``_FEW_BYTES``, in load-format layout: attention
        scales, which few checkpoints contain. In host memory. None for parameters, whose weights may be read
        directly into served memory. The record owns the tensor.
        """
        initial = self.format.initial
        if self.is_parameter or not isinstance(initial, Values) or initial.tensor.nbytes > _FEW_BYTES:
            return None
        return initial.tensor if Geometry.of(initial.tensor) == self.format.geometry else None

    @property
    def expected(self) -> bool:
        """Whether a loader has to write every element, because the constructor wrote none."""
        return self.is_parameter and isinstance(self.format.initial, Uninitialised)

    @property
    def is_table(self) -> bool:
        """Whether this buffer maps experts to ranks or slots. An engine that rebalances experts or adds ranks
        writes to such tables, and weights are loaded by what the table holds at the reload.
        """
        return not self.is_parameter and "expert" in self.name and not self.format.dtype.is_floating_point


@dataclass(eq=False)
class HolderRecord:
    """One holder of a layer and how PWAL changed it: ``undo`` maps a key to its load-format value.

    Values that are tensors are kept as their TensorRecord; ABSENT means PWAL added the key.
    """

    ref: Callable[[], object | None]
    path: str
    constructed: Contents
    undo: Contents = field(default_factory=dict)
    by_loader: frozenset[Key] = frozenset()
    """Keys in ``undo`` that loading changed and processing did not."""
    rewritten: frozenset[Key] = frozenset()
    """Keys not in ``undo`` whose tensors PWAL kept and changed."""

    def is_bound_late(self, key: Key, value: object) -> bool:
        """Whether neither the constructor nor PWAL made what the holder has under a key: it was bound after
        the start, like a KV cache. A table of experts is state of the model whoever made it.
        """
        constructed = self.constructed.get(key)
        if not isinstance(constructed, TensorRecord) or constructed.ref() is value:
            return False
        return key not in self.undo and not constructed.is_table

    @functools.cached_property
    def keys(self) -> list[Key]:
        """All recorded keys, sorted. Cached: valid once the record is complete."""
        return sorted(self.constructed.keys() | self.undo.keys(), key=str)


@dataclass(eq=False)
class LayerRecord:
    """A module that owns state directly."""

    name: str
    ref: weakref.ref[nn.Module]
    holders: list[HolderRecord]
    tensors: list[TensorRecord]
    children: dict[str, weakref.ref[nn.Module]]
    deferred: bool
    """An attention layer, which vLLM processes after all other layers: part of the tail of PWAL."""
    online: bool
    """Its quant method creates weights on meta and is processed while the weights stream in."""
    late: bool = False
    """The tail of PWAL (attention layers and the model's own hook, processed last) changes it as well, so its
    result is captured after the tail."""
    needs_no_processing: bool = False
    """PWAL calls nothing for it."""
    has_added_parameters: bool = False
    """A loader registered a parameter that the constructor had not made."""

    @property
    def effect(self) -> bool:
        """Whether PWAL changed anything in it."""
        return any(holder.undo or holder.rewritten for holder in self.holders)

    @functools.cached_property
    def has_keys(self) -> bool:
        """Whether any holder has keys. Cached: valid once the record is complete."""
        return any(holder.keys for holder in self.holders)


@dataclass(eq=False)
class Group:
    """Layers that share load-format memory or results of processing, and so are loaded and processed
    together.

    The cached properties are valid once the grouping is complete.
    """

    layers: list[LayerRecord]
    tensors: list[TensorRecord] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.layers[0].name

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of staging the group needs in load format."""
        by_storage: dict[int, int] = {}
        for record in self.tensors:
            end = record.format.geometry.offset * record.format.dtype.itemsize + record.format.nbytes
            by_storage[record.storage] = max(end, by_storage.get(record.storage, 0))
        return sum(by_storage.values())

    @functools.cached_property
    def deferred(self) -> bool:
        return any(layer.deferred for layer in self.layers)

    @functools.cached_property
    def late(self) -> bool:
        return any(layer.late for layer in self.layers)

    @functools.cached_property
    def effect(self) -> bool:
        """Whether processing changes anything in its layers."""
        return any(layer.effect for layer in self.layers)

    @functools.cached_property
    def needs_no_processing(self) -> bool:
        """Whether PWAL changes nothing in its layers and calls nothing for them."""
        return self.plain and all(layer.needs_no_processing for layer in self.layers)

    @functools.cached_property
    def plain(self) -> bool:
        """Whether PWAL leaves its layers as they were loaded (embeddings, norms)."""
        return not any(layer.effect or layer.deferred or layer.online or layer.late for layer in self.layers)


@dataclass(frozen=True, eq=False)
class ModelRecord:
    """Everything needed to put a model back into load format and process it again. Not changed after the
    start: ``transaction.engine_state.EngineState`` has what the model serves and what later reloads learnt.
    """

    layers: list[LayerRecord]
    vllm_config: Any
    model_config: Any = None
    target_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: list[Group] = field(default_factory=list)
    group_of: dict[str, int] = field(default_factory=dict)
    """Load-format tensor -> number of its group in ``groups``, which keep the model's order."""
    complete: bool = False
    """Whether the effect of PWAL is recorded, which ends the start."""
    late_bound: LateBound = field(default_factory=LateBound)
    """What the first forward pass sets."""
    changes: Changes = field(default_factory=Changes)
    """The reloads that are under way."""

    @functools.cached_property
    def groups_with_added_parameters(self) -> frozenset[str]:
        """Names of groups for which a loader made a parameter that the constructor had not made."""
        added = (group for group in self.groups if any(layer.has_added_parameters for layer in group.layers))
        return frozenset(group.name for group in added)

    @property
    def world_size(self) -> int:
        """How many ranks share the model."""
        parallel = getattr(self.vllm_config, "parallel_config", None)
        return int(getattr(parallel, "world_size", 1))

    @property
    def largest(self) -> int:
        """Bytes of staging that the largest group needs."""
        return max((group.nbytes for group in self.groups), default=0)

    def group_with(self, tensor: str) -> Group:
        """The group of a load-format tensor."""
        return self.groups[self.group_of[tensor]]


def record_of(model: nn.Module) -> ModelRecord | None:
    """The record of a model, or None when it was built without one."""
    found = model.__dict__.get(RECORD_ATTRIBUTE)
    return found if isinstance(found, ModelRecord) else None


def complete_record_of(model: nn.Module) -> ModelRecord:
    """The model's record; raises NotRecordedError when there is none or it is not complete."""
    record = record_of(model)
    if record is None or not record.complete:
        raise NotRecordedError(
            f"{type(model).__name__} has no recorded load format, so its weights cannot be reloaded. Install "
            "the plugin (entry point group vllm.general_plugins) in the process that builds the model, or "
            "call record_for_reloading(model) right after it is constructed, before its weights are loaded."
        )
    return record
