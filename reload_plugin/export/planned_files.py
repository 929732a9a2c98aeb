"""Safetensors files that have their full size from the start and are filled in any order."""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.io.writing import FilePlan
from ..checkpoint.stores import bytes_of
from ..errors import ExportError, export_error
from ..plan.source import TensorInfo

_OPEN = 16
"""Files held open at once."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins and how large it is, in each dimension."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def overlaps(self, other: Box) -> bool:
        """Whether the two have an element in common."""
        both = zip(self.starts, self.sizes, other.starts, other.sizes, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in both)


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: file, first byte."""

    info: TensorInfo
    file: str
    start: int


class PlannedFiles:
    """The files of a plan in one folder, open for writing tensors, or parts of them, at their offsets.

    ``create`` makes the files; several processes may then each have a ``PlannedFiles`` on the same folder and
    write different parts.

    Args:
        folder: holds the files.
        plans: what they hold.
        metadata: text for the headers; the same as for ``create``.

    """

    def __init__(self, folder: Path, plans: Sequence[FilePlan], metadata: Mapping[str, str]) -> None:
        self._folder = folder
        self._places = {place.info.name: place for plan in plans for place in _places(plan, metadata)}
        self._open: OrderedDict[str, int] = OrderedDict()
        self.written: dict[str, list[Box]] = {}
        """Tensor -> the parts of it that were written here."""

    def write(
        self,
        name: str,
        tensor: torch.Tensor,
        starts: Sequence[int] | None = None,
        wrote: Callable[[int], None] | None = None,
    ) -> None:
        """Write a tensor, or a part of it, where the plan has it.

        Args:
            name: as in the plan.
            tensor: of the planned dtype, on any device, in any layout; it may change once this returns.
            starts: where the part begins in each dimension; None if it is the whole tensor.
            wrote: called with the bytes of each piece written.

        Raises:
            ExportError: the plan has no such tensor, or another one under that name.
            OSError: writing failed.

        """
        place = self._places.get(name)
        box = Box(tuple(starts) if starts is not None else (0,) * tensor.ndim, tuple(tensor.shape))
        self._check(name, place, tensor, box, whole=starts is None)
        assert place is not None
        handle = self._handle(place.file)
        for first, part in _runs(tensor, box, place.info.shape):
            at = place.start + first * tensor.element_size()
            for piece in bytes_of(part):
                _pwrite(handle, piece, at)
                at += len(piece)
                if wrote is not None:
                    wrote(len(piece))
        self.written.setdefault(name, []).append(box)

    def _check(self, name: str, place: _Place | None, tensor: torch.Tensor, box: Box, whole: bool) -> None:
        planned = "nothing" if place is None else f"{list(place.info.shape)} {place.info.dtype}"
        fits = (
            place is not None
            and place.info.dtype == tensor.dtype
            and not tensor.is_meta
            and len(box.starts) == len(box.sizes) == len(place.info.shape)
            and (not whole or box.sizes == place.info.shape)
            and all(
                start >= 0 and start + size <= full
                for start, size, full in zip(box.starts, box.sizes, place.info.shape, strict=True)
            )
        )
        if not fits:
            at = "" if whole else f" at {list(box.starts)}"
            found = f"{list(tensor.shape)} {tensor.dtype}{' without values' if tensor.is_meta else ''}{at}"
            raise ExportError(
                f"{name} was planned as {planned} and came as {found}. Nothing was written. The model "
                "changed while it was exported: export it when nothing else works on it.",
                {name: f"{planned} planned, {found} came"},
            )

    def _handle(self, file: str) -> int:
        handle = self._open.pop(file, None)
        if handle is None:
            if len(self._open) >= _OPEN:
                _synced_and_closed(self._open.popitem(last=False)[1])
            handle = os.open(self._folder / file, os.O_WRONLY | os.O_CLOEXEC)
        self._open[file] = handle
        return handle

    def close(self) -> None:
        """Flush what was written here to disk and close the files.

        Raises:
            OSError: a write that seemed to succeed failed after all.

        """
        while self._open:
            _synced_and_closed(self._open.popitem()[1])

    def abandon(self) -> None:
        """Close the files after a failure."""
        while self._open:
            os.close(self._open.popitem()[1])


def create_files(folder: Path, plans: Sequence[FilePlan], metadata: Mapping[str, str]) -> None:
    """Make the files of a plan at their full size, headers written, disk space reserved where that can be
    done.

    Args:
        folder: an existing folder that has none of these files. New files have the mode that the umask gives.
        plans: what the files hold.
        metadata: text for the headers.

    Raises:
        OSError: a file exists, or there is no room for all of them.

    """
    for plan in plans:
        header = plan.header(metadata)
        handle = os.open(folder / plan.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _reserve(handle, len(header) + plan.nbytes)
            _pwrite(handle, memoryview(header), 0)
        finally:
            os.close(handle)


def check_written(plans: Sequence[FilePlan], written: Iterable[Mapping[str, Sequence[Box]]]) -> None:
    """Check that every element of every planned tensor was written, and none of them twice.

    Args:
        plans: what the files should hold.
        written: ``PlannedFiles.written`` of every process that wrote.

    Raises:
        ExportError: it names the tensors.

    """
    parts: dict[str, list[Box]] = {}
    for some in written:
        for name, boxes in some.items():
            parts.setdefault(name, []).extend(boxes)
    wrong = {}
    for plan in plans:
        for info in plan.infos:
            if why := why_incomplete(info, parts.get(info.name, [])):
                wrong[info.name] = why
    if wrong:
        raise export_error("could not be written as planned", "Nothing was exported. Export again.", wrong)


def why_incomplete(info: TensorInfo, boxes: Sequence[Box]) -> str | None:
    """Why parts are not a whole tensor, each element once; None if they are."""
    total = math.prod(info.shape)
    boxes = [box for box in boxes if math.prod(box.sizes)]
    if any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)):
        return "a part was written twice"
    found = sum(math.prod(box.sizes) for box in boxes)
    return None if found == total else f"{found:,} of {total:,} elements"


def _places(plan: FilePlan, metadata: Mapping[str, str]) -> Iterator[_Place]:
    start = len(plan.header(metadata))
    for info in plan.infos:
        yield _Place(info, plan.name, start)
        start += info.nbytes


def _runs(tensor: torch.Tensor, box: Box, shape: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Parts of a box that lie contiguously in the whole tensor: index of the first element, values."""
    if not tensor.numel():
        return
    inner = len(shape)  # dimensions from here on lie contiguously
    while inner > 0 and (inner == len(shape) or box.sizes[inner] == shape[inner]):
        inner -= 1
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    origin = sum(start * stride for start, stride in zip(box.starts, strides, strict=True))
    for index in itertools.product(*(range(size) for size in box.sizes[:inner])):
        first = origin + sum(at * stride for at, stride in zip(index, strides, strict=False))
        yield first, tensor[index] if index else tensor


def _pwrite(handle: int, data: memoryview, at: int) -> None:
    while len(data):
        done = os.pwrite(handle, data, at)
        at += done
        data = data[done:]


def _synced_and_closed(handle: int) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reserve(handle: int, nbytes: int) -> None:
    """Give a file its size and its disk space, so that a full disk shows before any tensor is made."""
    reserve = _fallocate()
    if reserve is not None and nbytes:
        while reserve(handle, 0, 0, nbytes) != 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                break  # of this file system: a sparse file has to do
            raise OSError(code, os.strerror(code))
    os.ftruncate(handle, nbytes)


@functools.cache
def _fallocate() -> Callable[..., int] | None:
    """Linux's own call: the C library's ``posix_fallocate`` writes to every block where the file system
    cannot.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return call
