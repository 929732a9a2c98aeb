"""Which weights' values are in which memory, followed through whatever a loader computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..record.staged_storage import StagedStorage
from ..tensors import storage_id
from .access import Access, Operand, operand
from .arrivals import Loaded

_MANY = 4000
"""Storages that are remembered before those that were freed are looked for among them."""


class Values(NamedTuple):
    """Where the values come from that an operator reads."""

    weights: tuple[str, ...] = ()
    """Checkpoint names, in the order in which they were met; "" for a parameter that several were written
    to. Empty where no weight is involved."""
    revisits: bool = False
    """Whether some come from a parameter that the loader read after other weights had come."""


_NOTHING = Values()


class Provenance:
    """Follows values of weights from the tensors of the stream through memory of the loader's own.

    The identity of a storage is remembered together with a weak reference, which keeps torch from giving it
    to another storage.

    Args:
        storages: identity -> staging. Shared with whoever adds to it.
        loaded: learns which parameters the loader came back to.

    """

    def __init__(self, storages: Mapping[int, StagedStorage], loaded: Loaded) -> None:
        self._storages = storages
        self._loaded = loaded
        self._sources: dict[int, tuple[str, ...]] = {}
        """Identity of a storage outside of staging -> the weights whose values are in it, or will be."""
        self._revisiting: set[int] = set()
        """Those of them with values of parameters that the loader came back to."""
        self._held: dict[int, StorageWeakRef] = {}
        """For every storage in ``_sources``."""
        self._writers: dict[str, str] = {}
        """Parameter -> the one weight that was written to it so far, or "" for several."""
        self._name = ""
        """The last weight that was begun."""
        self._loading = False
        self._of_current: list[int] = []
        """Storages that were noted since that one was begun."""
        self._late = False
        """Whether it may be written when others have come."""
        self._many = _MANY
        """How many storages there are when those that were freed are looked for next."""

    def begin(self, name: str, tensor: torch.Tensor, late: bool = False) -> None:
        """A weight is handed to the loader. ``late``: the loader may write it when others have come."""
        if not self._late and self._name in self._loaded.written:  # nothing more is expected of it
            self._forget([key for key in self._of_current if self._sources.get(key) == (self._name,)])
        elif len(self._held) > self._many:
            self._forget([key for key, storage in self._held.items() if storage.expired()])
            self._many = 2 * len(self._held) + _MANY
        self._of_current.clear()
        self._late, self._name, self._loading = late, name, True
        self._note(operand(tensor), (name,))

    def end(self) -> None:
        """The loader asks for the next weight."""
        self._loading = False

    def weights_in(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """The weights whose values are in a tensor outside of staging, as far as that is known."""
        return self._sources.get(storage_id(tensor) or 0, ())

    def read(self, access: Access) -> Values:
        """Where the values come from that an operator reads, those that it adds to included."""
        weights: tuple[str, ...] = ()
        revisits = False
        for _, key in access.writes:
            found = self._sources.get(key)
            revisits |= key in self._revisiting
            if found is not None and found != weights:
                weights = tuple(dict.fromkeys((*weights, *found)))
        for _, key in access.reads:
            found = self._sources.get(key)
            revisits |= key in self._revisiting
            if found is None and (storage := self._storages.get(key)) is not None:
                parameter = storage.primary
                if parameter.is_parameter:
                    found = (self._writers.get(parameter.name, ""),)
                    revisits |= self._comes_back_to(parameter.name)
            if found is not None and found != weights:
                weights = tuple(dict.fromkeys((*weights, *found)))
        return Values(weights, revisits) if weights or revisits else _NOTHING

    def follow(self, out: Any, values: Values) -> None:
        """An operator that read ``values`` returned ``out``, a tensor, some tensors or anything else."""
        if not values.weights:
            return
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                found = operand(tensor)
                if found.key not in self._sources and found.key not in self._storages:
                    self._note(found, values.weights)
                    if values.revisits and found.key:
                        self._revisiting.add(found.key)

    def note_write_elsewhere(self, target: Operand, values: Values) -> None:
        """The loader wrote to memory of its own, where it may be putting several weights together."""
        if values.weights:
            self._note(target, values.weights)

    def note_write(self, parameter: str, current: str, values: Values) -> None:
        """The loader wrote to staging of a parameter, while the weight ``current`` was loaded."""
        self._writers[parameter] = current if self._writers.get(parameter, current) == current else ""
        if values.revisits:
            self._loaded.read_back.add(parameter)

    def _comes_back_to(self, parameter: str) -> bool:
        """Note that the loader reads a parameter, unless the weight it loads now was just written there."""
        own = self._loading and parameter in self._loaded.written.get(self._name, ())
        if not own:
            self._loaded.read_back.add(parameter)
        return not own

    def _note(self, at: Operand, weights: tuple[str, ...]) -> None:
        if at.key:
            self._sources[at.key] = weights
            self._held[at.key] = StorageWeakRef(at.tensor.untyped_storage())
            self._of_current.append(at.key)

    def _forget(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._held.pop(key, None)
            self._sources.pop(key, None)
            self._revisiting.discard(key)
