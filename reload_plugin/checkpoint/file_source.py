"""Tensors that lie at known locations in open files: what the readers of all formats share."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch

from ..device.host_memory import HostPool
from ..errors import SourceError
from ..plan.source import Destinations, Stream, TensorInfo, layer_order
from .io.locations import TensorLocation
from .io.read_batches import ReadBatch
from .io.reading import read_in_batches, read_locations
from .io.stamps import CHECK_STORAGE, Stamp, check_same, open_same


class FileSource:
    """A checkpoint whose tensors lie at known locations in files. Listed without reading weights.

    A format's reader fills ``stamps`` and ``_locations``; everything else is here. Iterating gives (name,
    tensor) pairs in the order of the layers. Memory beside what the caller holds: one tensor, 32 MiB of
    read-ahead and a buffer of 8 MiB.

    Attributes:
        description: the path, for messages.
        format: one word: ``safetensors``, ``torch``, ``fsdp``, ``dcp``, ``olmo`` or ``transformers``.
        stamps: file -> size, time and inode when its listing was read.

    """

    def __init__(self, description: str, kind: str) -> None:
        self.description = description
        self.format = kind
        self.stamps: dict[str, Stamp] = {}
        self.paths: dict[str, str] = {}
        """Name of a file in the locations -> its path, where the two differ."""
        self._locations: dict[str, TensorLocation] = {}
        self._open: Mapping[str, int] = {}
        """Path -> descriptor, while ``held_open`` is entered."""

    @property
    def files(self) -> Sequence[str]:
        """Every file that belongs to it."""
        return list(self.stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.infos())

    @property
    def stored_names(self) -> Collection[str]:
        """Every name, in stored order."""
        return self._locations.keys()

    def names(self) -> Sequence[str]:
        """Every name, by the number of the layer and then by name."""
        return sorted((info.name for info in self.infos()), key=layer_order)

    def sort_by_layer(self) -> None:
        """From now on list and read in the order of the layers by default."""
        self._locations = {name: self._locations[name] for name in self.names()}

    def infos(self) -> Sequence[TensorInfo]:
        """Every tensor, in stored order."""
        return [place.info for place in self._locations.values()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.read(self.names())

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        """Read tensors, up to 32 MiB ahead of the caller on threads of its own.

        Close the iterator before releasing memory that ``destinations`` gave. The pool's memory is used again
        for later tensors once the caller holds no reference to it.

        Raises:
            SourceError: a file cannot be read, or changed since it was listed. The last check comes after the
                last tensor: only a finished iterator vouches for what it gave.

        """
        memory = HostPool() if pool is None else pool
        batches = self._batches_of(order)
        places = (
            []
            if batches
            else [self._locations[name] for name in (self._locations if order is None else order)]
        )
        files = self.paths if batches else dict.fromkeys(file for place in places for file in place.files)
        paths = {file: self.paths.get(file, file) for file in files}
        with contextlib.ExitStack() as stack:
            try:
                opened = self._opened(paths.values(), stack)
                handles = {file: opened[path] for file, path in paths.items()}
                if batches:
                    yield from read_in_batches(batches, handles, paths, memory, destinations)
                else:
                    yield from read_locations(places, handles, memory, destinations)
                check_same(self.stamps, self._open)
            except OSError as error:
                raise SourceError(
                    f"{self.description} could not be read: {error}. {CHECK_STORAGE}"
                ) from error

    def _batches_of(self, order: Sequence[str] | None) -> Sequence[ReadBatch]:
        """Cached read batches for ``order``; empty where batches are made while reading."""
        del order
        return ()

    @contextlib.contextmanager
    def held_open(self) -> Iterator[None]:
        """Hold the files open: while entered they can be read even if they are deleted or replaced.

        Does nothing for more files than a quarter of those that the process may open.

        Raises:
            OSError: a file is not there any more.
            SourceError: a file is another one than was listed.

        """
        with contextlib.ExitStack() as stack:
            if not self._open and len(self.stamps) <= open_file_limit() // 4:
                self._open = open_same(self.stamps, self.stamps, stack)
                stack.callback(setattr, self, "_open", {})
            yield

    def _opened(self, files: Iterable[str], stack: contextlib.ExitStack) -> Mapping[str, int]:
        return self._open or open_same(files, self.stamps, stack)

    def unchanged(self) -> bool:
        """Whether the files are those that were listed, by size, modification time and inode."""
        try:
            check_same(self.stamps, self._open)
        except SourceError:
            return False
        return True


def open_file_limit() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
