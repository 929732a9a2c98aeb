"""Which elements of a tensor were written, by identity and not by count."""

from __future__ import annotations

import functools
import math

import torch

from .tensor_layout import Geometry

Box = tuple[tuple[int, int], ...]
"""Half-open range of indices in each dimension of a parameter."""


def box_of(view: Geometry, base: Geometry) -> Box | None:
    """The axis-aligned box of ``base`` that ``view`` covers, or None when it is not one.

    ``base`` must be dense; ``view`` may permute, narrow, select, or merge dimensions.
    """
    if view == base:
        return tuple((0, n) for n in base.size)
    if view.numel == 0:
        return None
    starts = _start_indices(view.offset - base.offset, base)
    if starts is None:
        return None
    extents = [1] * len(base.size)
    for size, stride in zip(view.size, view.stride, strict=True):
        if size != 1 and not _spread(size, stride, base, starts, extents):
            return None
    return tuple((start, start + extent) for start, extent in zip(starts, extents, strict=True))


def _start_indices(offset: int, base: Geometry) -> list[int] | None:
    starts = [0] * len(base.size)
    for dim in _outermost_first(base):
        if base.size[dim] > 1 and base.stride[dim]:
            starts[dim] = min(offset // base.stride[dim], base.size[dim] - 1)
            offset -= starts[dim] * base.stride[dim]
    return starts if offset == 0 else None


@functools.lru_cache(maxsize=64)
def _outermost_first(base: Geometry) -> tuple[int, ...]:
    return tuple(sorted(range(len(base.size)), key=lambda dim: -base.stride[dim]))


def _spread(size: int, stride: int, base: Geometry, starts: list[int], extents: list[int]) -> bool:
    """Lay ``size`` steps of ``stride`` over base's dimensions, innermost first."""
    while size > 1:
        dim = next((d for d, s in enumerate(base.stride) if s == stride and base.size[d] > 1), None)
        if dim is None or extents[dim] != 1:
            return False
        remaining = base.size[dim] - starts[dim]
        if size <= remaining:
            extents[dim] = size
            return True
        if starts[dim] or size % base.size[dim]:
            return False
        extents[dim] = base.size[dim]
        size //= base.size[dim]
        stride *= base.size[dim]
    return True


class Coverage:
    """Which elements of one tensor were written, by identity and not by count."""

    def __init__(self, base: Geometry) -> None:
        self.base = base
        self.boxes: dict[Box, None] = {}
        self.volume = 0
        self.overlaps = False
        """A box was written twice, or anything was written after the tensor was complete."""
        self._mask: torch.Tensor | None = None
        self._complete = base.numel == 0
        self._checked_at = -1

    def add(self, view: Geometry) -> Box | None:
        """Note that ``view`` was written; returns its box where it is one."""
        if view.numel == 0:
            return None
        box = box_of(view, self.base)
        if box is None:
            self._add_to_mask(view)
            return None
        if self._complete or box in self.boxes:
            self.overlaps = True
            return box
        self.boxes[box] = None
        self.volume += math.prod(stop - start for start, stop in box)
        return box

    def add_all(self) -> None:
        self.add(self.base)

    @property
    def touched(self) -> bool:
        return bool(self.boxes) or self._mask is not None

    @property
    def complete(self) -> bool:
        if not self._complete and self.volume >= self.base.numel and self._checked_at != self.volume:
            self._checked_at = self.volume
            self._complete = self._uncovered() is None
            if self._complete:
                self.boxes = dict.fromkeys(list(self.boxes)[:1])
        return self._complete

    def describe_gap(self) -> str:
        """Where the first missing part is, for an error message."""
        if not self.touched:
            return "nothing was sent for it"
        gap = self._uncovered()
        assert gap is not None, "complete tensors have no gap"
        spans = ", ".join(f"{a}:{b}" for a, b in gap)
        return f"[{spans}] of {list(self.base.size)} was not sent"

    def _add_to_mask(self, view: Geometry) -> None:
        last = sum((n - 1) * s for n, s in zip(self.base.size, self.base.stride, strict=True))
        if self._mask is None:
            self._mask = torch.zeros(last + 1, dtype=torch.bool, device="cpu")
        shifted = Geometry(view.offset - self.base.offset, view.size, view.stride)
        shifted.view(self._mask).fill_(True)
        self.volume += view.numel

    def _uncovered(self) -> Box | None:
        """A box that was not written, found on the grid of the edges of all written boxes; None if
        complete.
        """
        if self._mask is not None:
            return self._uncovered_in_mask()
        edges = [
            sorted({0, n} | {e for box in self.boxes for e in box[dim]})
            for dim, n in enumerate(self.base.size)
        ]
        index = [{edge: i for i, edge in enumerate(es)} for es in edges]
        grid = torch.zeros([len(es) - 1 for es in edges], dtype=torch.bool, device="cpu")
        for box in self.boxes:
            cells = tuple(slice(index[d][a], index[d][b]) for d, (a, b) in enumerate(box))
            grid[cells] = True
        if bool(grid.all()):
            return None
        cell = (~grid).nonzero()[0].tolist()
        return tuple((edges[d][i], edges[d][i + 1]) for d, i in enumerate(cell))

    def _uncovered_in_mask(self) -> Box | None:
        assert self._mask is not None
        written = self._mask.as_strided(self.base.size, self.base.stride, 0).clone()
        for box in self.boxes:
            written[tuple(slice(a, b) for a, b in box)] = True
        if bool(written.all()):
            return None
        return tuple((i, i + 1) for i in (~written).nonzero()[0].tolist())
