"""Load-format memory of one storage while its group is reloaded, allocated at the first write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..device.host_memory import HostPool, MemoryGauge
from ..device.ops import ops_for
from ..tensors import storage_id, wraps_others
from .coverage import Coverage
from .model_record import TensorRecord
from .tensor_layout import AsServed, Constant, Geometry, TensorFormat, Uninitialised, Values

POISON = "RELOAD_PLUGIN_POISON"
"""Environment variable: fill new staging with NaN (or the largest integer), so that a forgotten weight
shows.
"""


_NOTHING = torch.UntypedStorage(0)
"""Replaces the storage whose reference was dropped."""


class DataHolder(Protocol):
    """A tensor, or the state of a tensor while the live object shows another one."""

    data: torch.Tensor


class StagedStorage:
    """Load-format memory for all tensors that are views of one storage. Allocated at the first write."""

    def __init__(
        self,
        records: list[TensorRecord],
        device: torch.device,
        gauge: MemoryGauge | None = None,
        *,
        from_served: bool = False,
        aliases_served: bool = False,
    ) -> None:
        self.records = records
        self._device = device
        self._gauge = MemoryGauge() if gauge is None else gauge
        self._held = 0
        """Bytes of this storage that the gauge counts."""
        self.primary = records[0]
        if len(records) > 1:
            self.primary = max(records, key=lambda r: (r.is_parameter, r.format.nbytes))
        self.coverage = Coverage(self.primary.format.geometry)
        self.nbytes = max(r.format.end for r in records)
        self.materialised = False
        self.closed = False
        """Its group is processed: nothing may be written to it."""
        self.from_served = from_served
        """Its values start as the served ones."""
        self.served: dict[int, torch.Tensor] = {}
        self.objects: dict[int, torch.Tensor] = {}
        self.hidden_states: Mapping[int, DataHolder] | None = None
        """While the group is hidden: object (by identity) -> its load-format state, which gets new memory
        instead of the object."""
        self.served_memory: torch.UntypedStorage | None = None
        """Served storage that weights may be loaded into directly, because it has the load format."""
        self.is_served_memory = False
        """Its memory is ``served_memory``: loading overwrites what was served."""
        self.aliases_served = aliases_served and self._alias_served(device)
        """Its memory is ``served_memory`` from the beginning: the served tensors themselves are loaded."""
        if not self.aliases_served:
            self._begin(device)
        self.key: int = self.storage._cdata
        """Identity of its present memory."""
        self._placeholder = self.storage
        """Kept alive, so that no other storage gets its identity: loaders are still watched by it."""
        self._identity: StorageWeakRef | None = None
        """Keeps the identity of the placeholder taken once its memory is given back."""

    def _alias_served(self, device: torch.device) -> bool:
        """Use the served memory if all served tensors have the load format. Returns whether they have."""
        tensors = [(id(record), record.ref()) for record in self.records]
        self.served = {
            key: tensor.data
            for key, tensor in tensors
            if tensor is not None and tensor.device == device and not wraps_others(type(tensor))
        }
        self.use_served_memory()
        if self.served_memory is None:
            self.served = {}
            return False
        self.storage, self.views = self.served_memory, dict(self.served)
        return True

    def _begin(self, device: torch.device) -> None:
        """Make placeholders; or the values themselves for a tensor smaller than its description."""
        only = self.records[0] if len(self.records) == 1 else None
        if only is not None and only.scalars is not None and not self.from_served:
            view = only.scalars.to(device, copy=True)
            self.storage, self.views = view.untyped_storage(), {id(only): view}
            self.materialised = True
            return
        self.storage = torch.UntypedStorage(0, device=device)
        self.views = {id(record): self._placeholder_of(record.format, device) for record in self.records}

    def _placeholder_of(self, fmt: TensorFormat, device: torch.device) -> torch.Tensor:
        """A tensor with the load format's geometry over an empty storage. Allocates no memory for values."""
        # A temporary allocation between many small objects would leave a gap in the C heap that fits no other
        # layer, and the heap would grow by all of them. A reshape alias does not check the storage's size.
        geometry = fmt.geometry
        empty = torch.empty(0, dtype=fmt.dtype, device=device).set_(self.storage, geometry.offset, (0,), (1,))
        whole: torch.Tensor = torch.ops.aten._reshape_alias.default(empty, geometry.size, geometry.stride)
        return whole.data

    def _view(self, fmt: TensorFormat, device: torch.device) -> torch.Tensor:
        geometry = fmt.geometry
        empty = torch.empty(0, dtype=fmt.dtype, device=device)
        return empty.set_(self.storage, geometry.offset, geometry.size, geometry.stride)

    def materialise(
        self, initialise: bool = True, pool: HostPool | None = None, unwritten: bool = False
    ) -> None:
        """Allocate the memory and write the constructor's values.

        Args:
            initialise: whether the constructor's values are written.
            pool: the tensors move to a block of it, or to served memory where that may be used; views of them
                that were made before do not move.
            unwritten: no weight was sent for it, so elements that the constructor did not write get the
                served values.

        """
        if self.materialised:
            return
        self.materialised = True
        self.is_served_memory = self.aliases_served or (pool is not None and self.served_memory is not None)
        self._hold(0 if self.is_served_memory else self.nbytes)
        if self.is_served_memory and self.served_memory is not None:
            if not self.aliases_served:
                self._move_to(self.served_memory)
        else:
            memory = ops_for(self.storage.device).allocate(self.storage, self.nbytes, pool)
            if memory is not self.storage:
                self._move_to(memory)
        if not initialise:
            return
        if os.environ.get(POISON):
            _poison(self.views[id(self.primary)])
        for record in self.records:
            self._initialise(record, unwritten)

    @property
    def has_values(self) -> bool:
        """Whether elements without a weight have their values: allocated, or served values that stay."""
        as_served = self.aliases_served and all(isinstance(r.format.initial, AsServed) for r in self.records)
        return self.materialised or as_served

    def _move_to(self, block: torch.UntypedStorage) -> None:
        self.storage, self.key = block, block._cdata
        for record in self.records:
            view = self._view(record.format, self.storage.device)
            self.views[id(record)] = view
            tensor = self.objects[id(record)]
            holder: DataHolder = tensor if self.hidden_states is None else self.hidden_states[id(tensor)]
            holder.data = view

    def drop_references(self) -> None:
        """Drop all references to the memory: it is free, or its pool reuses it, once there is no other."""
        self._forget()
        if self._placeholder.nbytes():  # on a device the placeholder is the memory
            self._identity, self._placeholder = StorageWeakRef(self._placeholder), _NOTHING
        self.views.clear()
        self.objects.clear()
        self.storage, self.key = _NOTHING, _NOTHING._cdata

    def release(self) -> None:
        """Free the memory, also under views that a loader still holds. Never frees served memory."""
        self._forget()
        own = not self.is_served_memory and not self.aliases_served
        if own and self.storage.resizable():  # a storage shared with numpy is freed with its last view
            self.storage.resize_(0)

    def _forget(self) -> None:
        self._hold(0)
        self.materialised = False

    def _hold(self, nbytes: int) -> None:
        """Set the bytes that the gauge counts for this storage."""
        self._gauge.add(nbytes - self._held)
        self._held = nbytes

    def use_served_memory(self) -> None:
        """Let weights be loaded into the served storage, if all served tensors are in one and have the load
        format.
        """
        served = [(record.format, self.served.get(id(record))) for record in self.records]
        if all(tensor is not None and _has_format(tensor, fmt) for fmt, tensor in served):
            places = {storage_id(tensor): tensor for _, tensor in served if tensor is not None}
            only = next(iter(places.values()))
            there = ops_for(only.device).on_host == ops_for(self._device).on_host  # and not parked
            if len(places) == 1 and there:
                self.served_memory = only.untyped_storage()

    def _initialise(self, record: TensorRecord, unwritten: bool) -> None:
        view, initial = self.views[id(record)], record.format.initial
        if unwritten and isinstance(initial, Uninitialised) and not record.rewritten:
            initial = AsServed()
        if self.from_served:
            served = self.served.get(id(record))
            if served is not None and served.shape == view.shape and served.dtype == view.dtype:
                initial = AsServed()
            elif isinstance(initial, (Uninitialised, AsServed)):
                _poison(view)
        if isinstance(initial, Constant):
            view.fill_(initial.value)
        elif isinstance(initial, Values):
            view.copy_(initial.tensor)
        elif isinstance(initial, AsServed):
            served = self.served.get(id(record))
            if served is not None and served.shape == view.shape and served.dtype == view.dtype:
                view.copy_(served)
        else:
            assert isinstance(initial, Uninitialised)


def _has_format(tensor: torch.Tensor, fmt: TensorFormat) -> bool:
    return tensor.dtype == fmt.dtype and Geometry.of(tensor) == fmt.geometry


def _poison(view: torch.Tensor) -> None:
    if view.dtype.is_floating_point or view.dtype.is_complex:
        view.fill_(float("nan"))
    elif view.dtype != torch.bool:
        view.fill_(torch.iinfo(view.dtype).max)
