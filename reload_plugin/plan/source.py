"""What every source of weights offers."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from ..device.host_memory import HostPool


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, known without reading its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.meta().nbytes


def tensor_info(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorInfo:
    """A tensor that a file claims to hold.

    Raises:
        ValueError: no tensor can have this shape.

    """
    info = TensorInfo(name, shape, dtype)
    try:
        info.meta()
    except (RuntimeError, TypeError, OverflowError) as error:
        sizes = str(list(shape[:8]))[:60]
        raise ValueError(f"{name} has the shape {sizes}, which no tensor has") from error
    return info


class Region(NamedTuple):
    """Equally long runs of bytes of a tensor, and where they go: ``runs`` of them, each ``nbytes`` long."""

    parameter: str
    source: int
    """First byte, in the tensor laid out contiguously."""
    target: int
    """First byte in the memory of the parameter."""
    nbytes: int
    runs: int = 1
    source_step: int = 0
    """Bytes from the start of a run to that of the next."""
    target_step: int = 0

    @property
    def total(self) -> int:
        """Bytes of all runs."""
        return self.nbytes * self.runs


@dataclass(frozen=True, eq=False)
class DirectRead:
    """Tensors that were read to where they go, all at once; nobody has to hand them on."""

    names: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    nbytes: int
    """Bytes of the whole tensors; less is read where a rank has a part of them."""
    parameters: Mapping[str, Sequence[str]]
    """Everything they went to, and the names of what went there."""


Stream = Generator[tuple[str, torch.Tensor], None, None]
"""(checkpoint name, tensor) pairs; may be closed before its end. ``DirectRead`` stands for several of
them where the destinations that were given have targets."""


class Destinations(Protocol):
    """Where whoever asks for tensors wants them."""

    def __call__(self, info: TensorInfo) -> torch.Tensor | None:
        """Memory of a tensor's shape and dtype, contiguous and on the CPU, to read it into, or None."""

    @property
    def key(self) -> object | None:
        """What ``targets`` depends on: same key, same answers. None where every tensor is handed over."""

    def targets(self, infos: Sequence[TensorInfo]) -> Sequence[Sequence[Region]] | None:
        """Where the bytes of tensors go, where copying them is all there is to do: the regions of each
        tensor, in the order of its bytes; none of a tensor that is not used.

        None unless all can. The stream then gives ``DirectRead`` in place of the tensors.
        """

    def needed(self, info: TensorInfo) -> Sequence[Region] | None:
        """Which bytes of a tensor that is handed over are read by anybody, each once; None for all of them.
        The tensor has its whole shape, and anything in its other bytes.
        """

    def note_read(self, nbytes: int) -> None:
        """So many bytes of files were read."""

    def memory(self, parameter: str) -> torch.UntypedStorage | None:
        """Memory of a parameter that ``targets`` named; None when files cannot be read to it."""


class Source(Protocol):
    """Weights that can be listed before they are read, and read more than once."""

    description: str

    def infos(self) -> Sequence[TensorInfo] | None:
        """Every tensor, in stored order; None when the format cannot tell without reading."""

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        """The tensors, in ``order`` if given; in memory of ``destinations``, else in memory of ``pool``.

        A tensor's memory is the caller's for as long as the caller refers to it. The iterator may read
        ahead into the memory that ``destinations`` gave until it is closed.
        """

    def unchanged(self) -> bool:
        """Whether reading again would give the same bytes, as far as sizes and times tell."""


_NUMBER = re.compile(r"(\d+)")


def layer_order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Sorts names by layer number (names without one first), then by name with numbers counted as numbers."""
    pieces = name.split(".")
    layer = next((int(piece) for piece in pieces if piece.isascii() and piece.isdigit()), -1)
    found = [p for p in _NUMBER.split(name) if p]
    natural = [(0, int(p), p) if p.isascii() and p.isdigit() else (1, 0, p) for p in found]
    return layer, natural


Span = tuple[int, int]
"""Half-open range of elements of a flattened tensor."""


@runtime_checkable
class Ranged(Protocol):
    """A source that can read parts of a tensor without the rest of it."""

    def read_spans(self, name: str, spans: Sequence[Span], out: torch.Tensor) -> None:
        """Read ranges of a tensor's elements, one behind the other, into ``out``.

        Args:
            name: checkpoint name.
            spans: ranges of the flattened tensor.
            out: contiguous, on the CPU, of the tensor's dtype, with as many elements as the spans.

        Raises:
            SourceError: the file changed or cannot be read.

        """
