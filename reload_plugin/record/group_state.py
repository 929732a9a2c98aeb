"""One whole state of a group of layers: what its holders hold and what its tensors are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .snapshot import Snapshot, put_back


@dataclass(eq=False)
class TensorState:
    """Data, class and attributes of one tensor object at one moment."""

    tensor: torch.Tensor
    data: torch.Tensor
    cls: type[torch.Tensor]
    attributes: dict[str, Any]

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorState:
        return TensorState(tensor, tensor.data, type(tensor), dict(tensor.__dict__))

    def show(self) -> None:
        """Put this state on the object."""
        self.tensor.data = self.data
        self.tensor.__class__ = self.cls
        self.tensor.__dict__ = dict(self.attributes)


@dataclass(eq=False)
class GroupState:
    """What the holders of a group hold, and the state of each of its tensors."""

    contents: list[tuple[object, Snapshot]]
    tensors: dict[int, TensorState]

    def show(self, now: GroupState | None = None) -> None:
        """Put it on the live objects. ``now``: their present state, if it was captured just before."""
        held = [None] * len(self.contents) if now is None else [contents for _, contents in now.contents]
        for (holder, contents), present in zip(self.contents, held, strict=True):
            put_back(holder, contents, present)
        for state in self.tensors.values():
            state.show()

    def data_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The data that ``tensor`` has in this state; its present data if this state does not contain it."""
        state = self.tensors.get(id(tensor))
        return tensor.data if state is None else state.data
