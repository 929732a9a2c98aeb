"""What one request reads: tensors that lie near one another in files, and the parameters they go to."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...plan.source import Destinations, DirectRead
from .locations import AssembledLocation, ContiguousLocation
from .readahead import SHARED, reader_thread_count
from .vectored import IOV_MAX

BATCH = 16 << 20
"""Bytes from which on tensors are not read together with the next, where the kernels' team reads: it takes
0.3 ms to come together and to part. Where there are threads that only read, each reads half as many, so that
several are at work."""


class FileRange(NamedTuple):
    """Neighbouring bytes of a file, at most ``SHARED``, and the parameters' memory that they go to."""

    file: str
    start: int
    nbytes: int
    first: int
    last: int
    """The first of the landing's parts, and the one behind the last."""


@dataclass(frozen=True, eq=False)
class DirectReadPlan:
    """How tensors that go as they are get from files to parameters."""

    direct_read: DirectRead
    stretches: Sequence[FileRange]
    parts: npt.NDArray[np.int64]
    """[3, parts]: number of the parameter, first byte, and number of bytes of each."""

    @functools.cached_property
    def ends(self) -> Sequence[int]:
        """Bytes that the memory of each parameter has at least."""
        numbers, first, length = self.parts
        found = np.zeros(len(self.direct_read.parameters), dtype=np.int64)
        np.maximum.at(found, numbers, first + length)
        return found.tolist()


@dataclass(eq=False)
class ReadBatch:
    """Tensors that one request reads. May be kept for the next reading of the same listing."""

    locations: Sequence[ContiguousLocation | AssembledLocation]
    nbytes: int
    _landing: tuple[object, DirectReadPlan | None] = (None, None)
    """The last answer of ``direct_read_plan``, and the key it was found by."""

    def direct_read_plan(self, destinations: Destinations) -> DirectReadPlan | None:
        """How to read all of it to where it goes; None unless that can be."""
        key = destinations.key
        if key is None:
            return None
        # One read and one write of the attribute: another thread may replace it at any time.
        last_key, plan = self._landing
        if last_key is not key:
            plan = self._direct_read_plan_in(destinations)
            self._landing = key, plan
        return plan

    def _direct_read_plan_in(self, destinations: Destinations) -> DirectReadPlan | None:
        places = [place for place in self.locations if isinstance(place, ContiguousLocation)]
        targets = (
            destinations.targets([place.info for place in places])
            if len(places) == len(self.locations)
            else None
        )
        if targets is None:
            return None
        parameters: dict[str, list[str]] = {}
        for place, (parameter, _) in zip(places, targets, strict=True):
            parameters.setdefault(parameter, []).append(place.info.name)
        shapes = {place.info.name: place.info.shape for place in places}
        direct_read = DirectRead(tuple(shapes), shapes, self.nbytes, parameters)
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        return DirectReadPlan(
            direct_read, *_file_ranges(places, [(numbers[name], start) for name, start in targets])
        )

    @functools.cached_property
    def extents(self) -> Sequence[tuple[str, int, int]]:
        """File, first byte and end of what it reads; neighbours together."""
        found: list[tuple[str, int, int]] = []
        for file, start, end in (extent for place in self.locations for extent in place.extents):
            if found and found[-1][0] == file and found[-1][2] == start:
                start = found.pop()[1]
            found.append((file, start, end))
        return found

    def place_at(self, file: str, path: str, position: int) -> tuple[str, str]:
        """The tensor that a byte of a file belongs to, behind the file's path."""
        inside = (p for p in self.locations if isinstance(p, ContiguousLocation) and p.file == file)
        return path, next(p.info.name for p in inside if p.start <= position < p.start + p.nbytes)


def _file_ranges(
    places: Sequence[ContiguousLocation], targets: Sequence[tuple[int, int]]
) -> tuple[list[FileRange], npt.NDArray[np.int64]]:
    """Neighbours in a file together, and in memory too where they are neighbours in both; and their parts."""
    found: list[FileRange] = []
    parts: list[tuple[int, int, int]] = []
    file, start, end, first = "", 0, -1, 0

    def ended() -> None:
        if end > start:
            found.append(FileRange(file, start, end - start, first, len(parts)))

    for place, (parameter, target) in zip(places, targets, strict=True):
        done = 0
        while done < place.nbytes:
            if place.file != file or place.start + done != end or len(parts) - first >= IOV_MAX:
                ended()
                file, start, end, first = place.file, place.start + done, place.start + done, len(parts)
            nbytes = min(place.nbytes - done, start + SHARED - end)
            before = parts[-1] if len(parts) > first else None
            if before is not None and before[0] == parameter and before[1] + before[2] == target + done:
                parts[-1] = (parameter, before[1], before[2] + nbytes)
            else:
                parts.append((parameter, target + done, nbytes))
            done += nbytes
            end += nbytes
            if end - start == SHARED:
                ended()
                start, first = end, len(parts)
    ended()
    return found, np.array(parts, dtype=np.int64).reshape(-1, 3).T.copy()


def read_batches_of(places: Iterable[ContiguousLocation | AssembledLocation]) -> Iterator[ReadBatch]:
    """Tensors that are read by one request: small ones together."""
    enough = BATCH // 2 if reader_thread_count() > 0 else BATCH
    batch: list[ContiguousLocation | AssembledLocation] = []
    nbytes = 0
    for place in places:
        batch.append(place)
        nbytes += place.nbytes
        if nbytes >= enough:
            yield ReadBatch(batch, nbytes)
            batch, nbytes = [], 0
    if batch:
        yield ReadBatch(batch, nbytes)
