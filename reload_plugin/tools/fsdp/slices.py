"""The elements of a tensor that a rank holds, by its placements; and which of them were written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...checkpoint import Span
from ...checkpoint.sharding import chunk_of, cut, joined, uncovered


@dataclass(frozen=True)
class Division:
    """One dimension of a mesh that divides one dimension of a tensor, as ``torch.chunk`` does.

    Args:
        dim: dimension of the tensor.
        ranks: how many parts.
        rank: which of them is ours.
        pieces: parts that are divided one by one and not as a whole: the ``split_factor`` of the placement
            that FSDP2 gives to tensors which tensor parallelism divided before (torch's ``_StridedShard``).

    """

    dim: int
    ranks: int
    rank: int
    pieces: int = 1


def spans_of(shape: Sequence[int], divisions: Iterable[Division]) -> list[Span]:
    """The elements of a flattened tensor that divisions, one after the other, leave to a rank."""
    kept: list[list[Span]] = [[(0, size)] for size in shape]
    for division in divisions:
        pieces = _chunks(kept[division.dim], division.pieces)
        parts = [_chunk(piece, division.ranks, division.rank) for piece in pieces]
        kept[division.dim] = [span for part in parts for span in part]
    return list(joined(_flat(shape, kept)))


def local_shape(shape: Sequence[int], divisions: Iterable[Division]) -> tuple[int, ...]:
    """The shape of what divisions leave to a rank."""
    sizes = list(shape)
    for d in divisions:
        count = sizes[d.dim]
        pieces = [chunk_of(count, d.pieces, piece)[1] for piece in range(d.pieces)]
        sizes[d.dim] = sum(chunk_of(piece, d.ranks, d.rank)[1] for piece in pieces)
    return tuple(sizes)


def _chunks(spans: list[Span], parts: int) -> list[list[Span]]:
    return [_chunk(spans, parts, part) for part in range(parts)]


def _chunk(spans: list[Span], parts: int, part: int) -> list[Span]:
    """Part of a sequence that is made of spans, by the rule of ``torch.chunk``."""
    count = sum(stop - start for start, stop in spans)
    first, length = chunk_of(count, parts, part)
    return list(cut(spans, first, first + length))


def _flat(shape: Sequence[int], kept: Sequence[Sequence[Span]]) -> Iterator[Span]:
    """Runs of elements: the dimensions behind the last that is divided are whole."""
    last = max((d for d, size in enumerate(shape) if list(kept[d]) != [(0, size)]), default=-1)
    inner = math.prod(shape[last + 1 :])
    if last < 0:
        yield 0, inner
        return
    strides = [math.prod(shape[d + 1 :]) for d in range(last)]
    rows = [[i for span in kept[d] for i in range(*span)] for d in range(last)]
    for indices in itertools.product(*rows):
        base = sum(i * stride for i, stride in zip(indices, strides, strict=True))
        for start, stop in kept[last]:
            yield base + start * inner, base + stop * inner


class SpanCoverage:
    """Which elements of each place have to be written, and which were. A place is named by its owner.

    It looks at positions and never at values: padding is simply not asked for, and any value may be written.
    """

    def __init__(self) -> None:
        self._needed: dict[str, list[Span]] = {}
        self._written: dict[str, list[Span]] = {}
        self._excused: dict[str, list[Span]] = {}

    def need(self, place: str, spans: Iterable[Span]) -> None:
        """These elements of a place have to be written, each once."""
        self._needed.setdefault(place, []).extend(spans)
        self._written.setdefault(place, [])
        self._excused.setdefault(place, [])

    def wrote(self, place: str, start: int, count: int) -> None:
        """``count`` elements of a place, from ``start``, were written."""
        self._written[place].append((start, start + count))

    def excuse(self, place: str, start: int, count: int) -> None:
        """``count`` elements of a place, from ``start``, keep what they have."""
        self._excused[place].append((start, start + count))

    @property
    def elements(self) -> int:
        """How many have been written."""
        return sum(stop - start for spans in self._written.values() for start, stop in spans)

    def faults(self) -> dict[str, str]:
        """Place -> its first elements that were not written, or not asked for, or written twice."""
        found = {place: self._fault(place) for place in self._needed}
        return {place: fault for place, fault in found.items() if fault is not None}

    def _fault(self, place: str) -> str | None:
        accounted = self._written[place] + self._excused[place]
        written = sorted(span for span in accounted if span[0] < span[1])
        twice = next((b[0] for a, b in itertools.pairwise(written) if b[0] < a[1]), None)
        if twice is not None:
            return f"element {twice:,} was written twice"
        needed, done = (list(joined(sorted(spans))) for spans in (self._needed[place], written))
        if needed == done:
            return None
        missing = next(uncovered(needed, done), None)
        if missing is not None:
            return f"elements {missing[0]:,} to {missing[1]:,} were not written"
        start, stop = next(uncovered(done, needed))
        return f"elements {start:,} to {stop:,} are padding and were written"
