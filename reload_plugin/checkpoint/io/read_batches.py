"""Read batches: tensors that one request reads, and the parameter memory that they are read into.

A batch exists because a request costs more than reading a small tensor (at 20,000 tensors, most of the time).
Batches are kept for the next checkpoint with the same header: training writes one at each step.
"""

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
"""Bytes from which on a batch takes no further tensor.

For reads on OpenMP threads: starting and joining them takes 0.3 ms. With reader threads a batch has half as
many bytes, so that several threads have one."""


class FileRange(NamedTuple):
    """At most ``SHARED`` contiguous bytes of a file, and the parts of a ``DirectReadPlan`` they fill."""

    file: str
    start: int
    nbytes: int
    first: int
    last: int
    """Index of the first part of the plan, and of the one after the last."""


@dataclass(frozen=True, eq=False)
class DirectReadPlan:
    """How a batch is read straight into parameter memory, without a tensor for each weight."""

    direct_read: DirectRead
    ranges: Sequence[FileRange]
    parts: npt.NDArray[np.int64]
    """int64 [3, parts]: index of the parameter, first byte in its memory, number of bytes."""

    @functools.cached_property
    def ends(self) -> Sequence[int]:
        """For each parameter, the end of the last part in it, in bytes: its memory is at least so large."""
        numbers, first, length = self.parts
        found = np.zeros(len(self.direct_read.parameters), dtype=np.int64)
        np.maximum.at(found, numbers, first + length)
        return found.tolist()


@dataclass(eq=False)
class ReadBatch:
    """Tensors that one request reads. Kept for later readings of the same layout, on any thread."""

    locations: Sequence[ContiguousLocation | AssembledLocation]
    nbytes: int
    _last_plan: tuple[object, DirectReadPlan | None] = (None, None)
    """The last answer of ``direct_read_plan``, and the key it was found by."""

    def direct_read_plan(self, destinations: Destinations) -> DirectReadPlan | None:
        """The plan that reads the whole batch into parameters; None if any tensor has to be handed over."""
        key = destinations.key
        if key is None:
            return None
        # One read and one write of the attribute: another thread may replace it at any time.
        last_key, plan = self._last_plan
        if last_key is not key:
            plan = self._direct_read_plan_in(destinations)
            self._last_plan = key, plan
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
        """(file, first byte, end) of what it reads, contiguous ones merged."""
        found: list[tuple[str, int, int]] = []
        for file, start, end in (extent for place in self.locations for extent in place.extents):
            if found and found[-1][0] == file and found[-1][2] == start:
                start = found.pop()[1]
            found.append((file, start, end))
        return found

    def place_at(self, file: str, path: str, position: int) -> tuple[str, str]:
        """(path, tensor name) that a byte of a file belongs to, for messages."""
        inside = (p for p in self.locations if isinstance(p, ContiguousLocation) and p.file == file)
        return path, next(p.info.name for p in inside if p.start <= position < p.start + p.nbytes)


def _file_ranges(
    places: Sequence[ContiguousLocation], targets: Sequence[tuple[int, int]]
) -> tuple[list[FileRange], npt.NDArray[np.int64]]:
    """File ranges and the parts they fill; contiguous tensors share a range, and a part where their memory is
    contiguous too.
    """
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
    """Group tensors into batches in their order, small ones together."""
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
