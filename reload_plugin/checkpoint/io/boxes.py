"""Boxes of a tensor: whether some of them cover it, each element once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where it begins in the tensor, and its sizes."""


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
