"""The load format of a model, and what ``process_weights_after_loading`` (PWAL) does to it.

The record keeps descriptions and differences. Tensors are held weakly: whatever vLLM lets go of is
freed as before, and whatever somebody still holds is put back as the same object.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..device.host_memory import HostPool
from .generation import Generation
from .snapshot import Contents, Key
from .tensor_layout import (
    Geometry,
    TensorFormat,
    Uninitialised,
    Values,
)

_FEW_BYTES = 64
"""Bytes of a tensor that count as nothing beside the tensor itself."""


RECORD_ATTRIBUTE = "_reload_plugin_record"
"""Where a model keeps its record, so that both are freed together."""


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

    @property
    def name(self) -> str:
        return self.format.name

    @functools.cached_property
    def scalars(self) -> torch.Tensor | None:
        """What the constructor left in a buffer of a few elements, laid out as in the load format: the scales
        that attention has, and that few checkpoints bring. None for parameters, whose weights may be read
        straight to where they are served.
        """
        initial = self.format.initial
        if self.is_parameter or not isinstance(initial, Values) or initial.tensor.nbytes > _FEW_BYTES:
            return None
        return initial.tensor if Geometry.of(initial.tensor) == self.format.geometry else None

    @property
    def expected(self) -> bool:
        """Whether a loader is expected to write every element: nobody else ever did."""
        return self.is_parameter and isinstance(self.format.initial, Uninitialised)

    @property
    def is_table(self) -> bool:
        """Whether it says where experts are. An engine that balances its load or gets more ranks writes to
        such tables, and new weights go by what they say then.
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

    @functools.cached_property
    def keys(self) -> list[Key]:
        """All keys that were recorded, in an order of their own; to be asked when the record is complete."""
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
    """Attention-like: vLLM processes it after all other layers."""
    online: bool
    """Its quant method creates weights on meta and is processed while the weights stream in."""
    late: bool = False
    """The tail of PWAL changes it once more, so its result is taken only after the tail."""
    passed_over: bool = False
    """PWAL has nothing to call for it."""
    grown: bool = False
    """A loader gave it a parameter that its constructor had not made."""

    @property
    def effect(self) -> bool:
        """Whether PWAL changed anything in it."""
        return any(holder.undo for holder in self.holders)

    @functools.cached_property
    def has_keys(self) -> bool:
        """Whether any of its holders has keys; to be asked when the record is complete."""
        return any(holder.keys for holder in self.holders)


@dataclass(eq=False)
class Group:
    """Layers that share load-format memory or what comes of it, so they are loaded and processed together.

    What it says of them all is asked when they are known to be all.
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
    def passed_over(self) -> bool:
        """Whether processing neither does anything to its layers nor has anything to call for them."""
        return self.plain and all(layer.passed_over for layer in self.layers)

    @functools.cached_property
    def plain(self) -> bool:
        """Whether processing leaves its layers as they were loaded (embeddings, norms)."""
        return not any(layer.effect or layer.deferred or layer.online or layer.late for layer in self.layers)


@dataclass(eq=False)
class ModelRecord:
    """Everything needed to put a model back into load format and process it again."""

    layers: list[LayerRecord]
    vllm_config: Any
    model_config: Any = None
    target_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: list[Group] = field(default_factory=list)
    group_of: dict[str, int] = field(default_factory=dict)
    """Load-format tensor -> number of its group in ``groups``, which keep the model's order."""
    complete: bool = False
    deferred_groups: set[str] = field(default_factory=set)
    """Names of groups that are open until all weights have come: a loader made a parameter for one, of which
    its load format tells nothing, or comes back to its parameters when others have come."""
    generation: Generation = field(default_factory=Generation)
    """The generation of weights that the model answers with."""
    changes: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Reloads that have begun and are not over; see ``digest.Change``."""
    last_report: Any = None
    """ReloadReport of the last good reload, without its long lists."""
    last_error: str | None = None
    """What the last reload that failed said; None once one succeeded."""
    handles: dict[int, bytes | None] = field(default_factory=dict)
    """Native handle -> digest of what it was made of; see ``native.Handles``."""
    native: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Group name -> memory that the group's native handles point into."""
    session: Any = None
    """The session that vLLM's layerwise calls have open."""
    rollback_source: Any = None
    """A Source that would give the served weights again, if there is one."""
    names_of_group: dict[str, frozenset[str]] | None = None
    """Group name -> weights that went into it at the last good reload."""
    copy_plan: Any = None
    """Routes of the last good reload."""
    last_infos: Any = None
    """What the last reload through the model's loader brought, as TensorInfo."""
    planned_for: Any = None
    """The placement and the listing that routes were last learnt from; they are not tried twice."""
    plan: Any = None
    """Plan of the last checkpoint that was read from files."""
    kept: dict[str, str] = field(default_factory=dict)
    """What the last good reload kept, as in its report."""
    start_stamps: dict[str, tuple[int, int, int]] | None = None
    """Weight file -> size, time and inode when the engine had just started from it."""
    start_config: dict[str, Any] | None = None
    """The config.json that the engine had just started with, as it was on disk."""
    start_shapes: dict[str, tuple[int, ...]] | None = None
    """Name -> shape in the checkpoint the engine started with."""
    start_coverage: dict[str, str] | None = None
    """Parameter -> how completely that checkpoint writes it."""
    has_cross_group_effects: bool = False
    """Whether processing some layers alone was seen to change others, so that all are reloaded always."""
    broken: str | None = None
    """Why the model holds a mixture of two generations, if it does."""
    asleep: bool = False
    """Whether the memory of the weights has been given away by ``sleep``, so that nobody may read it."""
    pool: HostPool = field(default_factory=HostPool)
    """Memory for staging, kept from reload to reload."""
    vote: Any = None
    """This rank's vote in the reload that is under way, where several ranks hold the model."""

    @property
    def largest(self) -> int:
        """Bytes of staging that the largest group needs."""
        return max((group.nbytes for group in self.groups), default=0)

    def group_with(self, tensor: str) -> Group:
        """The group of a load-format tensor."""
        return self.groups[self.group_of[tensor]]

    def defer_groups_of(self, parameters: Iterable[str]) -> None:
        """A loader came back to these parameters: keep their groups open to the end from now on."""
        self.deferred_groups.update(self.group_with(parameter).name for parameter in parameters)


def record_of(model: nn.Module) -> ModelRecord | None:
    """The record of a model, or None when it was built without one."""
    found = model.__dict__.get(RECORD_ATTRIBUTE)
    return found if isinstance(found, ModelRecord) else None
