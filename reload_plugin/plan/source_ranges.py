"""Which bytes of a checkpoint tensor a copy plan needs: a rank reads its own part, and not that of others.

A shard of rows is one range of the tensor. A shard of columns is a run in each row: runs of at least
``SHORTEST`` bytes are read one by one, shorter ones with all that lies between them, because a read costs
more than copying a few bytes does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .copy_plan import StridedCopy, TensorPlan
from .source import Region

SHORTEST = 2048
"""Bytes of a run from which on runs with gaps between them are read one by one."""


def regions_of(tensor_plan: TensorPlan) -> tuple[Region, ...] | None:
    """What to read to do all that the plan of one tensor says, without anything else; none for a weight that
    this rank does not use.

    Returns:
        Regions in the order of the tensor's bytes. None where values are converted, filled in, moved in runs
        that are too short, or needed twice: then the tensor has to be handed over.

    """
    if tensor_plan.copies is None:
        return None
    found: list[Region] = []
    for copy in tensor_plan.copies:
        region = _region_of(copy)
        if region is None:
            return None
        found.append(region)
    found.sort(key=lambda region: region.source)
    if len(found) > 1 and sum(region.total for region in found) > _nbytes(tensor_plan):
        return None
    return tuple(found)


def needed_of(tensor_plan: TensorPlan) -> tuple[Region, ...] | None:
    """The bytes that the copies of a plan read of a tensor, each once; None for all of them.

    The regions go to the same bytes of a tensor of its own, so ``target`` is ``source``, with no parameter.
    """
    copies = tensor_plan.copies
    if copies is None:
        return None
    found = [_read_by(copy) for copy in copies if copy.source is not None]
    if len(found) > 1:
        found = _merged(found)
    whole = _nbytes(tensor_plan)
    return None if sum(region.total for region in found) >= whole > 0 else tuple(found)


def _region_of(copy: StridedCopy) -> Region | None:
    if copy.source is None or copy.source_dtype != copy.target_dtype or copy.source.size != copy.target.size:
        return None
    size = copy.source_dtype.itemsize
    steps = _runs(copy.source.size, copy.source.stride, copy.target.stride)
    if steps is None:
        return None
    run, count, source_step, target_step = steps
    if count > 1 and run * size < SHORTEST:
        return None
    return Region(
        copy.parameter,
        copy.source.offset * size,
        copy.target.offset * size,
        run * size,
        count,
        source_step * size,
        target_step * size,
    )


def _read_by(copy: StridedCopy) -> Region:
    """What a copy reads, in runs that are long enough, or from its first byte to its last."""
    assert copy.source is not None, "a constant reads nothing"
    source, size = copy.source, copy.source_dtype.itemsize
    first = source.offset * size
    steps = _runs(source.size, source.stride, source.stride)
    if steps is not None and (steps[1] == 1 or steps[0] * size >= SHORTEST):
        run, count, step, _ = steps
        return Region("", first, first, run * size, count, step * size, step * size)
    if not source.numel:
        return Region("", first, first, 0)
    last = sum((n - 1) * stride for n, stride in zip(source.size, source.stride, strict=True))
    return Region("", first, first, (last + 1) * size)


def _runs(
    sizes: Sequence[int], source: Sequence[int], target: Sequence[int]
) -> tuple[int, int, int, int] | None:
    """A strided copy as runs that are contiguous on both sides.

    Returns:
        Elements of a run, how many runs, and the elements from one to the next in source and target. None
        where that takes more than one step each, or a step back.

    """
    if not math.prod(sizes):
        return 0, 1, 0, 0
    dims = [(s, t, n) for n, s, t in zip(sizes, source, target, strict=True) if n != 1]
    dims.sort(reverse=True)
    joined: list[tuple[int, int, int]] = []
    for s, t, n in reversed(dims):
        if joined and s == joined[-1][0] * joined[-1][2] and t == joined[-1][1] * joined[-1][2]:
            inner = joined.pop()
            joined.append((inner[0], inner[1], inner[2] * n))
        else:
            joined.append((s, t, n))
    if not joined:
        return 1, 1, 0, 0
    source_unit, target_unit, run = joined[0]
    if source_unit != 1 or target_unit != 1 or len(joined) > 2:
        return None
    if len(joined) == 1:
        return run, 1, 0, 0
    source_step, target_step, count = joined[1]
    return (run, count, source_step, target_step) if source_step >= run else None


def _merged(regions: list[Region]) -> list[Region]:
    """The same bytes, each in one region; runs of regions that overlap are read with what lies between."""
    regions.sort(key=lambda region: region.source)
    found: list[Region] = []
    for region in regions:
        before = found[-1] if found else None
        if before is None or region.source > _end(before) or not region.total:
            found.append(region)
        elif before.runs == region.runs == 1 or region.source < _end(before):
            nbytes = max(_end(before), _end(region)) - before.source
            found[-1] = Region("", before.source, before.source, nbytes)
        else:
            found.append(region)
    return found


def _end(region: Region) -> int:
    """The byte after the last one."""
    return region.source + (region.runs - 1) * region.source_step + region.nbytes


def _nbytes(tensor_plan: TensorPlan) -> int:
    return math.prod(tensor_plan.shape) * tensor_plan.dtype.itemsize
