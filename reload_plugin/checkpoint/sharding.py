"""Sharding arithmetic: the boxes that a tensor is cut into, the chunks of a dimension, and flat spans.

Every reader of sharded checkpoints and every writer into sharded memory works with these three. How a view of
a tensor lies in strided memory is another question: ``record.coverage``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..plan.source import Span

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins in its tensor, and its sizes: one number a dimension each."""

MAX_SIZE = 1 << 63
"""Sizes and offsets of tensors are below this."""


def whole_numbers(found: Any) -> tuple[int, ...]:
    """Sizes or offsets that a file states.

    Raises:
        ValueError: they are no list or tuple of integers from 0 to below ``MAX_SIZE``.

    """
    if type(found) not in (list, tuple) or not all(type(n) is int and 0 <= n < MAX_SIZE for n in found):
        raise ValueError("its sizes or offsets are no whole numbers")
    return tuple(found)


# -- boxes ----------------------------------------------------------------------------------------


def cover_error(boxes: Sequence[Box], shape: tuple[int, ...]) -> str | None:
    """Why the boxes do not cover a tensor of this shape exactly once, in words; None when they do."""
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a part has {len(sizes)} dimensions and the tensor {len(shape)}"
        reach = tuple(start + size for start, size in zip(offsets, sizes, strict=True))
        if any(end > size or start < 0 for start, end, size in zip(offsets, reach, shape, strict=True)):
            return f"a part reaches to {list(reach)} and the tensor has the shape {list(shape)}"
    solid = [box for box in boxes if math.prod(box[1])]
    overlap = _overlap(solid, len(shape))
    if overlap is not None:
        return f"parts at {list(overlap[0][0])} and {list(overlap[1][0])} overlap"
    covered = sum(math.prod(sizes) for _, sizes in solid)
    if covered != math.prod(shape):
        return f"{math.prod(shape) - covered:,} of its {math.prod(shape):,} elements are in no part"
    return None


def _overlap(boxes: Sequence[Box], dims: int) -> tuple[Box, Box] | None:
    """Two boxes that share an element."""
    if dims == 0:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    ordered = sorted(boxes)
    for index, one in enumerate(ordered):
        for other in itertools.islice(ordered, index + 1, None):
            if other[0][0] >= one[0][0] + one[1][0]:
                break
            if _share(one, other):
                return one, other
    return None


def _share(one: Box, other: Box) -> bool:
    sides = zip(*one, *other, strict=True)
    return all(start < start2 + size2 and start2 < start + size for start, size, start2, size2 in sides)


# -- chunks of one dimension ----------------------------------------------------------------------


def chunk_of(count: int, parts: int, part: int) -> tuple[int, int]:
    """First element and length of one part of ``count`` elements, by the rule of ``torch.chunk``.

    All parts are ``ceil(count / parts)`` long, but for the last that is not empty.
    """
    size = -(-count // parts)
    start = min(part * size, count)
    return start, min(size, count - start)


# -- spans of a flattened tensor ------------------------------------------------------------------


def cut(spans: Iterable[Span], first: int, last: int) -> Iterator[Span]:
    """The spans that hold elements ``first`` to before ``last`` of the concatenation of ``spans``."""
    position = 0
    for start, stop in spans:
        low, high = max(first, position), min(last, position + stop - start)
        if low < high:
            yield start + low - position, start + high - position
        position += stop - start


def joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans with neighbours that follow one another merged, and empty ones left out."""
    held: Span | None = None
    for start, stop in spans:
        if start == stop:
            continue
        if held is not None and held[1] == start:
            held = held[0], stop
            continue
        if held is not None:
            yield held
        held = start, stop
    if held is not None:
        yield held


def uncovered(spans: Sequence[Span], others: Sequence[Span]) -> Iterator[Span]:
    """What of ``spans`` no span of ``others`` covers; both are sorted and disjoint."""
    for start, stop in spans:
        position = start
        for low, high in others:
            if high <= position or low >= stop:
                continue
            if low > position:
                yield position, low
            position = max(position, high)
        if position < stop:
            yield position, stop
