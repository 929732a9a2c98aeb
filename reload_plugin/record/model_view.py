"""What the live model shows: the weights it serves, or the load format that is being filled.

The only code that puts load-format tensors on live modules and removes them. ``show`` and ``hide``
are inverses of one another and copy nothing.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from ..device.host_memory import MemoryGauge
from .layer_groups import shared_tensors
from .model_record import ModelRecord
from .module_tree import WrappedTree, rewrap_tree, unwrap_tree
from .staged_group import StagedGroup


@dataclass(frozen=True)
class EnterOptions:
    """How groups are put into load format; see ``StagedGroup.enter``."""

    by_copy_plan: bool = False
    noting: bool = False
    from_served: bool = False
    write_to_served: bool = False
    alias_served: bool = False


class ModelView:
    """Shows one of two states of some groups of a model.

    A group follows ``show`` and ``hide`` until ``release``; afterwards it shows what it serves. Groups are
    released when their result has been captured, or when nothing was written to them.

    Args:
        record: of the model.
        groups: those that are reloaded.
        options: how they are put into load format, at the first ``show``.

    """

    def __init__(self, record: ModelRecord, groups: Sequence[StagedGroup], options: EnterOptions) -> None:
        self.groups = list(groups)
        self.entered = False
        """Whether the groups have been put into load format once."""
        self.shown = False
        """Whether the load format is what the live model shows now."""
        self._record = record
        self._options = options
        self._following: dict[int, StagedGroup] = {}
        self._tree: WrappedTree = []

    def show(self) -> bool:
        """Put the load format on the live model, which cannot serve until ``hide``.

        Returns whether this was the first time, so that the storages of the groups are new.
        """
        if self.shown:
            return False
        self.shown = True
        self._tree = unwrap_tree(self._record)
        if self.entered:
            for group in self._following.values():
                group.unhide()
            return False
        self.entered = True
        options = self._options
        for group in self.groups:
            self._following[id(group)] = group
            group.enter(
                options.by_copy_plan,
                options.noting,
                options.from_served,
                options.write_to_served,
                options.alias_served,
            )
        return True

    def hide(self) -> None:
        """Put the served state on the live model. What was loaded is kept for the next ``show``."""
        if not self.shown:
            return  # a call that loads one weight by the copy plan must not cost a walk over the model
        for group in self._following.values():
            if not group.hidden:
                group.hide()
        rewrap_tree(self._tree)
        self._tree = []
        self.shown = False

    def release(self, group: StagedGroup) -> None:
        """Let a group show what it serves from now on; ``show`` and ``hide`` skip it."""
        self._following.pop(id(group), None)

    def drop(self) -> None:
        """Drop all state that is not served. The view has to be hidden."""
        for group in self.groups:
            group.drop()
        self.groups, self._following = [], {}


def staged_groups(
    record: ModelRecord, chosen: Container[str] | None, gauge: MemoryGauge
) -> list[StagedGroup]:
    """A ``StagedGroup`` for each group to reload; the live model is unchanged.

    Args:
        record: of the model.
        chosen: names of the groups; None for all.
        gauge: counts the bytes of their staging.

    """
    shared, device = shared_tensors(record), record.target_device
    groups = [group for group in record.groups if chosen is None or group.name in chosen]
    return [StagedGroup(group, device, shared, gauge) for group in groups]
