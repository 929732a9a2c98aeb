"""Puts weights aside while staging is full, and reads them back layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checkpoint import Destinations, HostCopy, SpillFile, Stream, TensorInfo
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
    """Keeps weights that arrive while too many layers are incomplete, as in a shuffled stream.

    Args:
        folder: where the spill file is made, when it is needed; None for the default.
        order: sorts the weights by layer.
        in_memory: keep them in host memory and not in a file: where a device serves, that is not the memory
            which is scarce, and a file is slower than the bus by far.

    """

    def __init__(self, folder: str | None, order: Order, in_memory: bool = False) -> None:
        self._folder = folder
        self._order = order
        self._in_memory = in_memory
        self._kept: SpillFile | HostCopy | None = None

    @property
    def nbytes(self) -> int:
        """Bytes put aside so far."""
        return 0 if self._kept is None else self._kept.nbytes

    @property
    def file_bytes(self) -> int:
        """Bytes of them that went to a file."""
        return 0 if self._in_memory else self.nbytes

    def __contains__(self, name: str) -> bool:
        return self._kept is not None and name in self._kept

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a weight aside. The caller may reuse its memory afterwards.

        Raises:
            SourceError: the disk is full.

        """
        if self._kept is None:
            what = "the weights put aside"
            self._kept = HostCopy(what) if self._in_memory else SpillFile(self._folder, what)
        self._kept.add(name, tensor)

    def replay(self, destinations: Destinations, begun: Callable[[str], bool]) -> Stream:
        """These weights, layer by layer; first those of layers that have other weights already.

        Args:
            destinations: where tensors are read to.
            begun: whether a weight belongs to a layer that has other weights already.

        """
        if self._kept is not None:
            names = sorted(self._order(self._kept.infos()), key=begun, reverse=True)
            yield from self._kept.read(names, HostPool(), destinations)

    def close(self) -> None:
        """Free the disk space, or the memory."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
