"""Checkpoint tensors that have to be put together in one go, because layers hold parts of several of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..record.model_record import Group, ModelRecord
from .inverse_plan import InvertedTensor


@dataclass(frozen=True)
class Component:
    """Checkpoint tensors and the groups of layers that hold them, and nothing else."""

    tensors: tuple[InvertedTensor, ...]
    groups: tuple[Group, ...]


def components_of(
    tensors: Iterable[InvertedTensor], record: ModelRecord, bound: Iterable[tuple[Group, ...]]
) -> list[Component]:
    """Sort tensors into components, as small as they can be.

    Args:
        tensors: to be put together.
        record: of the model.
        bound: groups that are recovered together.

    """
    union = _Union()
    for groups in bound:
        union.join(f"group {group.name}" for group in groups)
    some = list(tensors)
    for one in some:
        held = {record.group_with(parameter).name for parameter in one.parameters}
        union.join([f"tensor {one.name}", *(f"group {name}" for name in sorted(held))])
    by_root: dict[str, list[InvertedTensor]] = {}
    for one in some:
        by_root.setdefault(union.root(f"tensor {one.name}"), []).append(one)
    groups_of: dict[str, list[Group]] = {}
    for group in record.groups:
        groups_of.setdefault(union.root(f"group {group.name}"), []).append(group)
    return [Component(tuple(found), tuple(groups_of.get(root, ()))) for root, found in by_root.items()]


class _Union:
    """Sets of names that were joined."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        """The name that stands for the set of ``name``."""
        while (above := self._parent.setdefault(name, name)) != name:
            self._parent[name] = self._parent.setdefault(above, above)
            name = above
        return name

    def join(self, names: Iterable[str]) -> None:
        """Make one set of the sets of some names."""
        first, *rest = [self.root(name) for name in names] or [""]
        for other in rest:
            self._parent[self.root(other)] = self.root(first)
