"""Weights put aside on disk while staging is full; they come back in the order in which layers need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checkpoint import Destinations, SpillFile, Stream, TensorInfo
from ..device.host_memory import HostPool

Order = Callable[[Sequence[TensorInfo]], Sequence[str]]
"""The names of some weights, those of one layer next to each other."""

OPEN_BUDGET = 64 << 20
"""Bytes of staging, beyond the largest layer, that layers may hold while they wait for the rest of theirs."""
OPEN_STREAMING = 32 << 20
"""The same where layers are committed one by one: the heap that is packed into needs its part as well. Small
layers without processing (norms) make one group, which waits for the last of them; so this is not nothing."""


class Overflow:
    """Spills what comes while too many layers are incomplete (a shuffled stream does that).

    Args:
        folder: where the spill file is made, when it is needed; None for the default.
        order: how to sort what was put aside.

    """

    def __init__(self, folder: str | None, order: Order) -> None:
        self._folder = folder
        self._order = order
        self._file: SpillFile | None = None

    @property
    def nbytes(self) -> int:
        """Bytes put aside so far."""
        return 0 if self._file is None else self._file.nbytes

    def __contains__(self, name: str) -> bool:
        return self._file is not None and name in self._file

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a weight aside; its memory is the caller's again afterwards.

        Raises:
            SourceError: the disk is full.

        """
        if self._file is None:
            self._file = SpillFile(self._folder, "the weights put aside")
        self._file.add(name, tensor)

    def replay(self, destinations: Destinations, begun: Callable[[str], bool]) -> Stream:
        """What was put aside, layer by layer; first what layers that have ``begun`` (by name) wait for."""
        if self._file is not None:
            names = sorted(self._order(self._file.infos()), key=begun, reverse=True)
            yield from self._file.read(names, HostPool(), destinations)

    def close(self) -> None:
        """Give the disk space back."""
        if self._file is not None:
            self._file.close()
            self._file = None
