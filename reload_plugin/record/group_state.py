"""One whole state of a group of layers: what its holders hold and what its tensors are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .snapshot import Snapshot, put_back


@dataclass(eq=False)
class TensorState:
    """What one tensor object is made of; the object itself stays the same."""

    tensor: torch.Tensor
    data: torch.Tensor
    cls: type[torch.Tensor]
    attributes: dict[str, Any]

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorState:
        return TensorState(tensor, tensor.data, type(tensor), dict(tensor.__dict__))

    def show(self) -> None:
        """Make the object this again."""
        self.tensor.data = self.data
        self.tensor.__class__ = self.cls
        self.tensor.__dict__ = dict(self.attributes)


@dataclass(eq=False)
class GroupState:
    """A whole state of a group: what its holders hold and what its tensors are made of."""

    contents: list[tuple[object, Snapshot]]
    tensors: dict[int, TensorState]

    def show(self, now: GroupState | None = None) -> None:
        """Put it on the live objects; they are as ``now`` says, if that was just taken of the same group."""
        held = [None] * len(self.contents) if now is None else [contents for _, contents in now.contents]
        for (holder, contents), present in zip(self.contents, held, strict=True):
            put_back(holder, contents, present)
        for state in self.tensors.values():
            state.show()

    def data_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The data ``tensor`` has in this state (its present data if this state says nothing)."""
        state = self.tensors.get(id(tensor))
        return tensor.data if state is None else state.data
