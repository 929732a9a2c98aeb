"""Sources made from weights that arrived as a stream: in host memory, in a temporary file, or overlaid."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import IO, Any, overload

import torch

from ..device.host_memory import HostPool
from ..errors import SourceError
from ..plan.source import Destinations, Source, Stream, TensorInfo
from .file_source import FileSource
from .io.locations import ContiguousLocation
from .io.reading import read_locations
from .io.stamps import CHECK_STORAGE

SPILL_DIRECTORY = "RELOAD_PLUGIN_SPILL_DIR"
"""Environment variable: where spill files go when the caller names no folder (else the system's)."""

_PIECE = 8 << 20
"""Bytes of a weight that are brought to the CPU and written at once."""


class SpillFile:
    """Weights in an unnamed temporary file, which the system removes however the process ends.

    Costs disk space (memory, where the folder is in a memory file system). ``close`` frees it.

    Args:
        folder: where the file is made; None for RELOAD_PLUGIN_SPILL_DIR or the system's temporary folder.
        description: name of these weights in messages.

    """

    def __init__(self, folder: str | None, description: str) -> None:
        self.description = description
        self.folder = folder or os.environ.get(SPILL_DIRECTORY) or tempfile.gettempdir()
        self.nbytes = 0
        """Bytes of the file. A weight that replaces another of its size takes its space."""
        self._locations: dict[str, ContiguousLocation] = {}
        self._free: dict[int, list[int]] = defaultdict(list)
        """Size -> offsets of regions of that size that are free."""
        try:
            self._file: IO[Any] = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - kept
        except OSError as error:
            raise self._failed(error) from error

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a weight, on any device and in any layout; the caller may overwrite its own afterwards.

        Raises:
            SourceError: the disk is full or cannot be written.

        """
        info = TensorInfo(name, tuple(tensor.shape), tensor.dtype)
        free = self._free[tensor.nbytes]
        start = free.pop() if free else self.nbytes
        place = ContiguousLocation(info, self.description, start, tensor.nbytes)
        try:
            self._write(tensor, start)
        except OSError as error:
            if start < self.nbytes:
                free.append(start)
            else:
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
            raise self._failed(error) from error
        self.nbytes = max(self.nbytes, start + place.nbytes)
        before = self._locations.get(name)
        self._locations[name] = place
        if before is not None:
            self._free[before.nbytes].append(before.start)

    def _write(self, tensor: torch.Tensor, start: int) -> None:
        for piece in bytes_of(tensor):
            while len(piece):
                done = os.pwrite(self._file.fileno(), piece, start)
                start += done
                piece = piece[done:]

    def _failed(self, error: OSError) -> SourceError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "No space is left" if full else f"Writing failed ({error})"
        return SourceError(
            f"{what} in the spill folder {self.folder} after {self.nbytes:,} bytes of {self.description}. "
            "The engine serves what it served before. Name a folder with more space (spill_dir= or "
            f"{SPILL_DIRECTORY}), or keep the weights in memory (policy='host')."
        )

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, name: str) -> bool:
        return name in self._locations

    def infos(self) -> Sequence[TensorInfo]:
        return [place.info for place in self._locations.values()]

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        places = [self._locations[name] for name in (self._locations if order is None else order)]
        handles = {self.description: self._file.fileno()}
        try:
            yield from read_locations(places, handles, HostPool() if pool is None else pool, destinations)
        except OSError as error:
            raise SourceError(
                f"The spill file of {self.description} could not be read: {error}. {CHECK_STORAGE}"
            ) from error

    def unchanged(self) -> bool:
        return not self._file.closed

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


def bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's elements in order, as pieces of plain memory on the CPU; at most one piece is copied at a
    time, whatever the layout.
    """
    if tensor.ndim and tensor.nbytes > _PIECE and not tensor.is_contiguous():
        rows = max(1, _PIECE * len(tensor) // tensor.nbytes)
        slabs = tensor.detach().split(rows) if len(tensor) > 1 else (tensor.detach()[0],)
        for slab in slabs:
            yield from bytes_of(slab)
        return
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # one element may have any stride and count as contiguous
    step = max(1, _PIECE // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].cpu().view(torch.uint8)
        yield memoryview(piece.numpy())  # type: ignore[arg-type]


class HostCopy:
    """Weights kept in host memory: one copy of the checkpoint."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all the weights."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a weight to host memory; the caller may overwrite its own afterwards."""
        self._tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def infos(self) -> Sequence[TensorInfo]:
        return [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in self._tensors.items()]

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        del pool, destinations  # they are in memory already
        for name in list(self._tensors) if order is None else order:
            yield name, self._tensors[name]

    def unchanged(self) -> bool:
        return True

    def close(self) -> None:
        """Free the memory."""
        self._tensors = {}


class Overlay:
    """Several sources as one: a name is read from the last source that has it.

    The sources are listed once, now: nothing may be added to them while the overlay is in use.

    Args:
        sources: in order of precedence, the last wins; an overlay among them counts as its own sources.

    """

    def __init__(self, *sources: Source) -> None:
        layers = [layer for source in sources for layer in overlaid_sources(source)]
        self._infos: dict[str, TensorInfo] = {}
        self._owner: dict[str, Source] = {}
        for layer in layers:
            for info in layer.infos() or ():
                self._infos[info.name], self._owner[info.name] = info, layer
        seen = {id(layer) for layer in self._owner.values()}
        self.sources: Sequence[Source] = [layer for layer in layers if id(layer) in seen]
        """Those that some name is read from, lowest precedence first."""
        self.description = " over ".join(layer.description for layer in (layers[-1], *layers[:1]))
        self.in_order = all(getattr(layer, "in_order", True) for layer in self.sources)
        """Whether ``read`` keeps to the order it is asked for."""

    def infos(self) -> Sequence[TensorInfo]:
        return list(self._infos.values())

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        names = list(self._infos) if order is None else order
        for _, neighbours in itertools.groupby(names, key=lambda name: id(self._owner[name])):
            some = list(neighbours)
            yield from self._owner[some[0]].read(some, pool, destinations)

    def unchanged(self) -> bool:
        return all(layer.unchanged() for layer in self.sources)

    def close(self) -> None:
        """Free what each of them holds."""
        for layer in self.sources:
            close_source(layer)


class DummyWeights:
    """The weights of an engine started with ``load_format=dummy``: made anew, the same every time."""

    description = "vLLM's dummy weights"

    def unchanged(self) -> bool:
        """Dummy weights do not change."""
        return True


Rereadable = Source | DummyWeights
"""What can give the same weights again."""


@overload
def overlaid_sources(source: Source | None) -> Sequence[Source]: ...
@overload
def overlaid_sources(source: Rereadable | None) -> Sequence[Rereadable]: ...
def overlaid_sources(source: Rereadable | None) -> Sequence[Rereadable]:
    """The sources of an overlay, lowest precedence first; of any other source itself, of None nothing."""
    if source is None:
        return ()
    return source.sources if isinstance(source, Overlay) else (source,)


@contextlib.contextmanager
def held_open(source: Rereadable | None) -> Iterator[None]:
    """Hold the files of a source open: while entered they can be read even if deleted or replaced.

    Raises:
        OSError: a file is not there any more, or no more files can be opened.
        SourceError: a file is another one than was listed.

    """
    with contextlib.ExitStack() as stack:
        for layer in overlaid_sources(source):
            if isinstance(layer, FileSource):
                stack.enter_context(layer.held_open())
        yield


def close_source(source: Rereadable | None) -> None:
    """Free what a source holds (memory or a spill file); files of a checkpoint hold nothing."""
    close = getattr(source, "close", None)
    if close is not None:
        close()


def spill_to_file(kept: HostCopy, folder: str | None) -> SpillFile:
    """Copy weights from host memory into a new spill file. ``kept`` is not closed.

    Raises:
        SourceError: the disk is full.

    """
    file = SpillFile(folder, kept.description)
    try:
        for name, tensor in kept.read():
            file.add(name, tensor)
    except BaseException:
        file.close()
        raise
    return file
