"""Memory for load-format tensors, allocated when a loader first touches them."""

from __future__ import annotations

from collections.abc import Callable

from ..record.staged_storage import StagedStorage
from ..record.tensor_layout import SMALL_BYTES

Touching = Callable[[StagedStorage], None]
"""Called with staging that lies in served memory, before anybody may write there."""


class Materialisation:
    """Allocates staging on first touch.

    Args:
        dry: whether nothing is written: then staging of parameters gets memory without initial values (views
            of it can be taken), and ``give_back`` frees it.

    """

    def __init__(self, dry: bool = False) -> None:
        self.touching: Touching | None = None
        """Called before a loader is given the served tensor itself."""
        self._dry = dry
        self._touched: list[StagedStorage] = []

    def allocate(self, storage: StagedStorage) -> None:
        """Allocate staging that has no memory yet, with the constructor's values."""
        if storage.aliases_served and self.touching is not None:
            self.touching(storage)
        # Loaders ask small tables (expert maps) where a weight goes: these have values in a dry run too.
        is_table = not storage.primary.is_parameter and storage.nbytes <= SMALL_BYTES
        storage.materialise(initialise=not self._dry or is_table)
        if self._dry and not is_table:
            self._touched.append(storage)

    def give_back(self) -> None:
        """In a dry run: free what was allocated since this was last called. Else nothing."""
        for storage in self._touched:
            storage.release()
        self._touched.clear()
