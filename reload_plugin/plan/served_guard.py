"""Keeps loaders away from memory that is served, and from layers that are complete already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import LateReadError, LateWriteError
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from ..record.untouched_layers import UntouchedLayers
from ..tensors import storage_id
from .access import Access
from .arrivals import Loaded

Named = Iterable[tuple[str, torch.Tensor]]
"""Tensors and what to call them in messages."""


def served_tensors(
    groups: Iterable[StagedGroup], untouched: UntouchedLayers
) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that a model serves, while some of its groups are in load format."""
    yield from untouched.tensors()
    for group in groups:
        yield from group.served_tensors()


class ServedGuard:
    """Raises before an operator writes to served memory, or reads a parameter whose layer is complete.

    Storages are told apart by identity, and torch gives the identity of a freed storage to a new one. So this
    holds a weak reference to each storage that it knows, which keeps the identity taken (not the memory).

    Args:
        storages: identity -> staging that loaders may write to while it is open. Shared with whoever adds to
            it.
        loaded: learns which groups a loader came back to.

    """

    def __init__(self, storages: Mapping[int, StagedStorage], loaded: Loaded) -> None:
        self._storages = storages
        self._loaded = loaded
        self._complete: dict[int, tuple[str, str]] = {}
        """Identity -> parameter of a complete layer, and one tensor that its group has in load format."""
        self._held: list[StorageWeakRef] = []
        self._find_protected: Callable[[], Named] = tuple

    def protect(self, find: Callable[[], Named]) -> None:
        """No loader may write to these. ``find`` is asked once, if one writes elsewhere than to staging."""
        self._find_protected = find
        self.__dict__.pop("_protected", None)

    def note_complete(self, tensor: torch.Tensor, parameter: str, of_group: str) -> None:
        """A layer is complete; what ``tensor`` holds now is not what was loaded."""
        if key := storage_id(tensor):
            self._complete[key] = parameter, of_group
            self._held.append(StorageWeakRef(tensor.untyped_storage()))

    def forget(self) -> None:
        """Know of nothing any more."""
        self._complete.clear()
        self._held.clear()
        self.protect(tuple)

    def check_open(self, storage: StagedStorage, current: str) -> None:
        """Raises ``LateWriteError`` for staging of a group that was processed."""
        if storage.closed:
            raise late_write(current, storage.primary.name)

    def check(self, access: Access, current: str) -> None:
        """Raises if an operator must not be run, while the weight ``current`` is loaded.

        Raises:
            LateReadError: it reads a parameter of a complete layer. Its group is noted, so that the next
                reload leaves it open to the end.
            LateWriteError: it writes to a group that was processed, or to served memory.

        """
        if self._complete:
            for _, key in access.reads:
                if key in self._complete and key not in self._storages:
                    raise self._late_read(current, *self._complete[key])
        for _, key in access.writes:
            if (storage := self._storages.get(key)) is not None:
                self.check_open(storage, current)
            elif key in self._protected:
                raise late_write(current, self._protected[key])

    @functools.cached_property
    def _protected(self) -> Mapping[int, str]:
        found = {}
        for name, tensor in self._find_protected():
            if key := storage_id(tensor):
                found[key] = name
                self._held.append(StorageWeakRef(tensor.untyped_storage()))
        return found

    def _late_read(self, current: str, parameter: str, of_group: str) -> LateReadError:
        self._loaded.read_back.add(of_group)
        return LateReadError(
            f"While {current!r} was loaded, the model's loader looked at {parameter}, which is complete "
            "already, so that its new values are not there. The engine serves what it served before. Reload "
            "again: from now on that layer waits for the end. Or reload with whole_model=True."
        )


def late_write(current: str, target: str) -> LateWriteError:
    """The error for a write to what is complete or served already, while ``current`` was loaded."""
    return LateWriteError(
        f"While {current!r} was loaded, the model's loader wrote to {target}, which is complete or "
        "served already. The engine serves what it served before. Send each weight once; if this model's "
        "loader revisits layers on purpose, reload it with whole_model=True."
    )
