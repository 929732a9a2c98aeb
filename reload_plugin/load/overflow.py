"""Spills weights to disk while staging is full, and reads them back layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checkpoint import Destinations, SpillFile, Stream, TensorInfo
from ..device.host_memory import HostPool

Order = Callable[[Sequence[TensorInfo]], Sequence[str]]
"""The names of some weights, those of one layer next to each other."""

OPEN_BUDGET = 64 << 20
"""Bytes of staging, beyond the largest layer, that incomplete layers may hold."""
OPEN_STREAMING = 32 << 20
"""The same where layers are committed one by one: smaller, because packing takes heap memory as well. Not
zero, because small layers without processing (norms) are one group, which is incomplete until the last of
them.
"""


class Overflow:
    """Spills weights that arrive while too many layers are incomplete, as in a shuffled stream.

    Args:
        folder: where the spill file is made, when it is needed; None for the default.
        order: sorts the spilled weights by layer.

    """

    def __init__(self, folder: str | None, order: Order) -> None:
        self._folder = folder
        self._order = order
        self._file: SpillFile | None = None

    @property
    def nbytes(self) -> int:
        """Bytes spilled so far."""
        return 0 if self._file is None else self._file.nbytes

    def __contains__(self, name: str) -> bool:
        return self._file is not None and name in self._file

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Spill a weight. The caller may reuse its memory afterwards.

        Raises:
            SourceError: the disk is full.

        """
        if self._file is None:
            self._file = SpillFile(self._folder, "the weights put aside")
        self._file.add(name, tensor)

    def replay(self, destinations: Destinations, begun: Callable[[str], bool]) -> Stream:
        """The spilled weights, layer by layer; first those of layers that have other weights already.

        Args:
            destinations: where tensors are read to.
            begun: whether a weight belongs to a layer that has other weights already.

        """
        if self._file is not None:
            names = sorted(self._order(self._file.infos()), key=begun, reverse=True)
            yield from self._file.read(names, HostPool(), destinations)

    def close(self) -> None:
        """Free the disk space."""
        if self._file is not None:
            self._file.close()
            self._file = None
