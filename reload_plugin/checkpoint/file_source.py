"""A checkpoint in files, of any format: the part that is the same for all."""

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
from .io.stamps import Stamp, check_same, open_same


class FileSource:
    """Tensors in files: listed without reading them, read one after the other with plain reads.

    Iterating gives (name, tensor) pairs in the order of the layers. At most one tensor, what is being read
    ahead (32 MiB) and a buffer of 8 MiB are in memory beside what the caller holds.

    Attributes:
        description: what messages call it; the path.
        format: one word: ``safetensors``, ``torch``, ``fsdp``, ``dcp``, ``olmo`` or ``transformers``.
        stamps: file -> size, time and inode when its listing was read.

    """

    def __init__(self, description: str, kind: str) -> None:
        self.description = description
        self.format = kind
        self.stamps: dict[str, Stamp] = {}
        self.paths: dict[str, str] = {}
        """Where files are that places call by another name than their path."""
        self._locations: dict[str, TensorLocation] = {}
        self._open: Mapping[str, int] = {}
        """Descriptors of files that are kept open."""

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
        """Make the order of the layers the stored order."""
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
        """Read ahead by up to 32 MiB on a thread of its own; close the iterator before memory that
        ``destinations`` gave goes away. Memory that the caller has let go of is used again for later tensors.

        Raises:
            SourceError: a file cannot be read, or changed since it was listed; also at the end, so that
                what came before is not to be trusted until the iterator is through.

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
                raise SourceError(f"{self.description} could not be read: {error}.") from error

    def _batches_of(self, order: Sequence[str] | None) -> Sequence[ReadBatch]:
        """The tensors in ``order``, sorted into batches that are kept; empty where nothing is kept."""
        del order
        return ()

    @contextlib.contextmanager
    def held_open(self) -> Iterator[None]:
        """While entered, its files can be read though they are deleted, or others come to have their names.

        Does nothing for more files than a quarter of those that the process may open.

        Raises:
            OSError: a file is not there any more.
            SourceError: a file is another one than was listed.

        """
        with contextlib.ExitStack() as stack:
            if not self._open and len(self.stamps) <= _open_file_limit() // 4:
                self._open = open_same(self.stamps, self.stamps, stack)
                stack.callback(setattr, self, "_open", {})
            yield

    def _opened(self, files: Iterable[str], stack: contextlib.ExitStack) -> Mapping[str, int]:
        return self._open or open_same(files, self.stamps, stack)

    def unchanged(self) -> bool:
        """Whether its files are the ones that were listed, as far as sizes and times tell."""
        try:
            check_same(self.stamps, self._open)
        except SourceError:
            return False
        return True


def _open_file_limit() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
