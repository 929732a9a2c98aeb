"""Read batches: tensors that one request reads, and the parameter memory that they are read into.

A batch exists because a request costs more than reading a small tensor (at 20,000 tensors, most of the time).
Batches are kept for the next checkpoint with the same header: training writes one at each step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...plan.source import Destinations, DirectRead, Region
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


class GappedRange(NamedTuple):
    """Runs of bytes of a file with gaps between them, and the memory of a parameter that they fill: about
    ``SHARED`` bytes of them.
    """

    file: str
    start: int
    step: int
    nbytes: int
    """Of each run."""
    runs: int
    parameter: int
    """Its number in the plan."""
    target: int
    """First byte in its memory."""
    target_step: int

    @property
    def end(self) -> int:
        """The byte of the parameter after the last that is written."""
        return self.target + (self.runs - 1) * self.target_step + self.nbytes


@dataclass(frozen=True, eq=False)
class DirectReadPlan:
    """How a batch is read straight into parameter memory, without a tensor for each weight."""

    direct_read: DirectRead
    ranges: Sequence[FileRange]
    parts: npt.NDArray[np.int64]
    """int64 [3, parts]: index of the parameter, first byte in its memory, number of bytes."""
    gapped: Sequence[GappedRange]

    @functools.cached_property
    def ends(self) -> Sequence[int]:
        """For each parameter, the end of the last part in it, in bytes: its memory is at least so large."""
        numbers, first, length = self.parts
        found = np.zeros(len(self.direct_read.parameters), dtype=np.int64)
        np.maximum.at(found, numbers, first + length)
        for gapped in self.gapped:
            found[gapped.parameter] = max(found[gapped.parameter], gapped.end)
        return found.tolist()

    @functools.cached_property
    def extents(self) -> Sequence[tuple[str, int, int]]:
        """(file, first byte, end) of what is read, gaps between runs included: ranks of one machine share
        what the kernel reads ahead.
        """
        ranges = [(one.file, one.start, one.start + one.nbytes) for one in self.ranges]
        runs = [(one.file, one.start, one.start + one.step * one.runs) for one in self.gapped]
        return sorted(ranges + runs)


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
        for place, regions in zip(places, targets, strict=True):
            for parameter in dict.fromkeys(region.parameter for region in regions):
                parameters.setdefault(parameter, []).append(place.info.name)
        shapes = {place.info.name: place.info.shape for place in places}
        direct_read = DirectRead(tuple(shapes), shapes, self.nbytes, parameters)
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        return DirectReadPlan(
            direct_read, *_file_ranges(places, targets, numbers), _gapped_ranges(places, targets, numbers)
        )

    def extents_for(self, destinations: Destinations | None) -> Sequence[tuple[str, int, int]]:
        """(file, first byte, end) of what is read of it for these destinations."""
        if destinations is None:
            return self.extents
        plan = self.direct_read_plan(destinations)
        if plan is not None:
            return plan.extents
        return [
            extent
            for place in self.locations
            if destinations.needed(place.info) != ()
            for extent in place.extents
        ]

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


def _gapped_ranges(
    places: Sequence[ContiguousLocation], targets: Sequence[Sequence[Region]], numbers: Mapping[str, int]
) -> list[GappedRange]:
    """Runs with gaps, cut so that several threads share them."""
    found: list[GappedRange] = []
    for place, regions in zip(places, targets, strict=True):
        for region in regions:
            if region.runs == 1:
                continue
            rows = max(1, SHARED // region.nbytes)
            found += [
                GappedRange(
                    place.file,
                    place.start + region.source + first * region.source_step,
                    region.source_step,
                    region.nbytes,
                    min(rows, region.runs - first),
                    numbers[region.parameter],
                    region.target + first * region.target_step,
                    region.target_step,
                )
                for first in range(0, region.runs, rows)
            ]
    return found


def _file_ranges(
    places: Sequence[ContiguousLocation], targets: Sequence[Sequence[Region]], numbers: Mapping[str, int]
) -> tuple[list[FileRange], npt.NDArray[np.int64]]:
    """File ranges and the parts they fill; contiguous regions share a range, and a part where their memory is
    contiguous too. Regions of several runs are not among them.
    """
    found: list[FileRange] = []
    parts: list[tuple[int, int, int]] = []
    file, start, end, first = "", 0, -1, 0

    def ended() -> None:
        if end > start:
            found.append(FileRange(file, start, end - start, first, len(parts)))

    whole = [
        (place.file, place.start + region.source, region.nbytes, numbers[region.parameter], region.target)
        for place, regions in zip(places, targets, strict=True)
        for region in regions
        if region.runs == 1
    ]
    for where, begin, length, parameter, target in whole:
        done = 0
        while done < length:
            if where != file or begin + done != end or len(parts) - first >= IOV_MAX:
                ended()
                file, start, end, first = where, begin + done, begin + done, len(parts)
            nbytes = min(length - done, start + SHARED - end)
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
