"""Which elements of which parameters were written, and by which weights."""

from __future__ import annotations

import torch

from ..record.staged_storage import StagedStorage
from ..record.tensor_layout import Geometry
from .access import Operand
from .arrivals import Loaded


class SlotLog:
    """Brings the coverage of staging up to date with every write.

    Args:
        loaded: receives, for each weight, the parameters that it went to.

    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._recent: set[int] = set()

    def note(self, target: Operand, storage: StagedStorage, weights: tuple[str, ...], current: str) -> bool:
        """A view of staging was written with values of ``weights``, while the weight ``current`` was loaded.
        A name that is "" stands for several.

        Returns whether all its elements had been written before.
        """
        parameter = storage.primary.name
        self._recent.add(target.key)
        before = storage.coverage.volume
        storage.coverage.add(in_elements_of(target.tensor, storage))
        for name in weights:
            self._loaded.note_written(name or current or parameter, parameter)
        return storage.coverage.volume == before

    def take_recent(self) -> set[int]:
        """Identities of the storages that were written to since this was last asked."""
        recent = self._recent
        if recent:
            self._recent = set()
        return recent


def in_elements_of(view: torch.Tensor, storage: StagedStorage) -> Geometry:
    """A view of staging in elements of the storage's primary tensor, which may have another dtype."""
    geometry = Geometry.of(view)
    here, there = view.element_size(), storage.primary.format.dtype.itemsize
    if here == there:
        return geometry
    start = geometry.offset * here // there
    return Geometry(start, (max(1, geometry.numel * here // there),), (1,))
