"""What a pickle's objects become: descriptions, none of which runs or imports anything."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any

import torch


class RefusedPickleError(pickle.UnpicklingError):
    """The pickle names something that is not allowed, or is malformed."""


@dataclass(frozen=True)
class Storage:
    """A storage that torch.save wrote beside the pickle, identified by its key."""

    key: str
    nbytes: int
    itemsize: int
    start: int = 0
    """First byte, for a view of a larger storage (files of torch before 1.6)."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a storage: strides and offset count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conj: bool = False
    """Whether its values are the conjugates (``neg``: the negatives) of the stored ones."""
    neg: bool = False
    parameter: bool = field(default=False, compare=False)
    requires_grad: bool = field(default=False, compare=False)

    @property
    def start(self) -> int:
        """First byte in the storage's record."""
        return self.storage.start + self.offset * self.dtype.itemsize


class OpaqueObject:
    """An object that was not created: the name of its class, the arguments of the call, its state."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.kind}>"

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute from the object's state, or the default."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class StoredDict(dict[Any, Any]):
    """An OrderedDict and its attributes (``_metadata`` of a state dict)."""

    __slots__ = ("attributes",)

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self.attributes: Any = None


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a distributed class (DTensor, ShardedTensor); ``state`` is its pickled state."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    state: Any
