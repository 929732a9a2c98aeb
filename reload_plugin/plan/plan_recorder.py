"""Learns the copy plan: what a loader does with each weight, as writes that can be done again without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..record.tensor_layout import Geometry, shared
from ..tensors import storage_id
from .access import Access, Kind, Operand
from .arrivals import Loaded
from .copy_plan import Slot, StridedCopy, TensorPlan
from .provenance import Values


@dataclass(slots=True)
class _Incoming:
    """The weight that is being loaded, as it came: its loader may give the tensor other memory."""

    name: str
    key: int
    """Identity of its storage."""
    held: StorageWeakRef | None
    """Keeps that identity from being given to another storage."""
    offset: int
    contiguous: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    changed: bool = False
    """Its values are others than those that came."""

    @property
    def as_it_came(self) -> bool:
        """Whether a copy of a part of its memory is a copy of a part of the weight."""
        return self.contiguous and not self.changed


class PlanRecorder:
    """Notes the writes of one weight after the other, and makes a ``TensorPlan`` of each.

    Args:
        loaded: receives the plans, and whether what was seen can be repeated at all.

    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._incoming: _Incoming | None = None
        self._copies: list[StridedCopy] = []
        self._computed: list[Slot] = []
        self._read_scalar = False
        """The loader read a value, so what it writes next may depend on it."""

    def begin(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        """A weight is handed to the loader."""
        key = storage_id(tensor) or 0
        held = StorageWeakRef(tensor.untyped_storage()) if key else None
        offset = int(tensor.storage_offset())
        self._incoming = _Incoming(name, key, held, offset, tensor.is_contiguous(), shape, tensor.dtype)

    def end(self) -> tuple[str, TensorPlan] | None:
        """The loader is done with the weight. Returns its name and its plan; None if none was begun."""
        incoming, copies = self._incoming, tuple(self._copies)
        computed = tuple(self._computed)
        self._incoming = None
        self._copies.clear()
        self._computed.clear()
        self._read_scalar = False
        if incoming is None:
            return None
        if computed:
            self._loaded.computed[incoming.name] = computed
        tensor_plan = TensorPlan(incoming.shape, incoming.dtype, None if computed else copies)
        self._loaded.tensor_plans[incoming.name] = tensor_plan
        return incoming.name, tensor_plan

    def note_scalar_read(self) -> None:
        """An element of a tensor became a Python number."""
        self._read_scalar = True

    def note_write_elsewhere(self, target: Operand) -> None:
        """The loader wrote to memory that is no staging."""
        if self._incoming is not None and target.key == self._incoming.key:
            self._incoming.changed = True

    def note_write(
        self, access: Access, target: Operand, parameter: str, values: Values
    ) -> StridedCopy | None:
        """The loader wrote to staging of a parameter.

        Returns the write as a copy of a part of the weight, or of a constant; None if it was computed.
        """
        if self._incoming is None or (values.weights and values.weights != (self._incoming.name,)):
            self._loaded.repeatable = False
        copy = self._copy_of(access, target.tensor, parameter)
        if copy is None:
            self._computed.append((parameter, Geometry.of(target.tensor)))
        else:
            self._copies.append(copy)
        return copy

    def _copy_of(self, access: Access, target: torch.Tensor, parameter: str) -> StridedCopy | None:
        where, dtype, incoming = Geometry.of(target), target.dtype, self._incoming
        if access.kind is Kind.ZERO:
            return StridedCopy(parameter, where, dtype, None, dtype, 0)
        if access.kind is Kind.FILL and incoming is not None and not self._read_scalar:
            return StridedCopy(parameter, where, dtype, None, dtype, access.value)
        if access.source is None or incoming is None:
            return None
        source, key = access.source
        same = key == incoming.key and source.element_size() == incoming.dtype.itemsize
        if not same or not key or not incoming.as_it_came or source.shape != target.shape:
            return None
        start = int(source.storage_offset()) - incoming.offset
        view = Geometry(start, where.size, shared(tuple(source.stride())))
        plain = Geometry.contiguous(where.size)  # nearly always, and then the same object
        return StridedCopy(parameter, where, dtype, plain if view == plain else view, source.dtype)
