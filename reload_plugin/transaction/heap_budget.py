"""How much the process may grow while layers are processed."""

from __future__ import annotations

from ..device.host_memory import growth, keep_within
from ..record.staged_group import StagedGroup

HEAP_BUDGET = 112 << 20
"""Bytes that the process may grow by, beyond its largest layer, before freed pages of the heap go back:
kernels pack into the heap, and not all that the old generation leaves there is used again at once. A little
less than the 128 MiB that are promised."""
PROCESSING_BYTES = 64 << 20
"""Bytes of that for what a layer's processing needs only while it runs, which is not known before: four times
the layer, at most so many."""

UNCHECKED_BYTES = 8 << 20
"""Bytes of layers that are processed between two looks at the size of the process."""


class HeapBudget:
    """Keeps the growth of the C heap within what is promised, on a CPU.

    Args:
        largest: bytes of the model's largest group.

    """

    def __init__(self, largest: int) -> None:
        self._resident = growth.begin()
        self._largest = largest
        self._unchecked = 0
        """Bytes of the layers that were processed since the size of the process was looked at."""

    def before_processing(self, group: StagedGroup, prepared: int) -> None:
        """Make the heap give back what it does not use, if the process grew too much.

        Small layers are looked at together; not at all where processing leaves everything where it is.
        ``prepared``: bytes of results that wait for the commit.
        """
        if group.group.plain:
            return
        nbytes = group.group.nbytes
        self._unchecked += nbytes
        if self._unchecked < UNCHECKED_BYTES:
            return
        self._unchecked = 0
        needed = max(nbytes, min(4 * nbytes, PROCESSING_BYTES))
        keep_within(self._resident + prepared + self._largest + HEAP_BUDGET, needed)
