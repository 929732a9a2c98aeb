"""One group's new values become the served ones, at the addresses of the old ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..device.ops import ops_for
from ..record.module_state import tensors_in
from ..record.snapshot import ABSENT, OUR_ATTRIBUTES, Key, read, write
from ..record.staged_group import StagedGroup
from ..tensors import storage_id


@dataclass(eq=False)
class Commit:
    """All changes that make one group's new values the served ones. Owns the new tensors."""

    name: str
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(served, new), same shape, stride and dtype."""
    moves: list[tuple[torch.Tensor, torch.Tensor, str]] = field(default_factory=list)
    """(served, new, path) whose layout changed: the object is kept, the address is not."""
    exchanges: list[tuple[object, object]] = field(default_factory=list)
    """(served, new) owners of native resources, whose contents are exchanged."""
    writes: list[tuple[object, Key, object]] = field(default_factory=list)
    tensor_attributes: list[tuple[torch.Tensor, type, dict[str, Any]]] = field(default_factory=list)
    """(served tensor, class, attributes) where processing changed them."""
    cells: list[tuple[Any, object]] = field(default_factory=list)
    """(closure cell of a served function, new content)."""

    begun: bool = False
    """Whether served values may have changed already."""
    native: list[torch.Tensor] = field(default_factory=list)
    """New memory that native handles point into; it has to live as long as the handles."""

    def kept_storages(self, applied: bool) -> set[int]:
        """Identities of the storages that the commit (before it is applied) or the served values (after)
        read.
        """
        values = [value for _, _, value in self.writes] + [value for _, value in self.cells]
        values += [attributes for _, _, attributes in self.tensor_attributes]
        held = [new for _, new, _ in self.moves] + self.native
        held += [tensor for value in values for tensor in tensors_in(value)]
        held += [] if applied else [new for _, new in self.copies]
        held += [] if applied else [t for _, new in self.exchanges for t in tensors_in(new)]
        return {key for tensor in held if (key := storage_id(tensor))}

    def nbytes_beside(self, staged: StagedGroup) -> int:
        """Bytes of new tensors that are not in the group's staging."""
        keys = {storage.key for storage in staged.storages}
        return sum(new.nbytes for _, new in self.copies if storage_id(new) not in keys)

    def changes_nothing(self) -> bool:
        """Whether the served values are the new ones already, bit for bit."""
        if self.moves or self.exchanges or self.writes or self.tensor_attributes or self.cells:
            return False
        return all(torch.equal(_bits(served), _bits(new).to(served.device)) for served, new in self.copies)

    def forget(self) -> None:
        """Drop the new tensors after they were applied."""
        lists = (self.copies, self.moves, self.exchanges, self.writes, self.tensor_attributes, self.cells)
        for held in lists:
            held.clear()
        self.native = []

    def apply(self) -> None:
        """Serve the new values. Writes only to memory that exists already."""
        self.begun = True
        with torch.inference_mode(False), torch.no_grad():
            for served, new in self.copies:
                ops_for(served.device).copy(served, new)
            for served, new, _ in self.moves:
                served.data = new.cpu() if _is_parked(served, new) else new
            for holder, other in self.exchanges:
                exchange_contents(holder, other)
            for holder, key, value in self.writes:
                write(holder, key, value)
            for cell, value in self.cells:
                cell.cell_contents = value
            for tensor, cls, attributes in self.tensor_attributes:
                tensor.__class__ = cls
                tensor.__dict__ = attributes


def _is_parked(served: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a served tensor is in host memory meanwhile, while its new value is on the device."""
    if served.device == new.device or served.is_meta or new.is_meta:
        return False
    return ops_for(served.device).on_host and not ops_for(new.device).on_host


def _fits_in_place(served: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether the new value can be copied over the served one."""
    if not _is_parked(served, new):
        return _same_layout(served, new)
    return served.shape == new.shape and served.dtype == new.dtype and served.stride() == new.stride()


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.stride() == b.stride()
        and a.layout == b.layout
        and a.is_meta == b.is_meta
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def exchange_contents(served: object, new: object) -> None:
    """Exchange what two objects hold; each keeps its own tensor objects.

    Afterwards ``new`` owns the old native resource and releases it when it is freed.
    """
    ours, theirs = read(served), read(new)
    gone = ((key, ours.get(key), ABSENT) for key in ours.keys_missing_in(theirs))
    changes = [*ours.changes_to(theirs, frozenset()), *gone]
    for key, a, b in changes:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _same_layout(a, b):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
        elif key[1] not in OUR_ATTRIBUTES:
            write(served, key, b)
            write(new, key, a)
