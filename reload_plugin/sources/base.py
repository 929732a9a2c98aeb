"""What every source of weights offers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..memory import HostPool


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, known without reading its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Stream = Generator[tuple[str, torch.Tensor], None, None]
"""(checkpoint name, tensor) pairs; may be closed before its end."""

Room = Callable[[TensorInfo], torch.Tensor | None]
"""Gives memory of a tensor's shape and dtype, contiguous and on the CPU, for it to be read into, or None."""


class Source(Protocol):
    """Weights that can be listed before they are read, and read more than once."""

    description: str

    def infos(self) -> Sequence[TensorInfo] | None:
        """Every tensor, in stored order; None when the format cannot tell without reading."""

    def read(
        self, order: Sequence[str] | None = None, pool: HostPool | None = None, room: Room | None = None
    ) -> Stream:
        """The tensors, in ``order`` if given; in memory that ``room`` gives, else in memory of ``pool``.

        A tensor's memory is the caller's for as long as the caller refers to it. The iterator may read
        ahead into the memory that ``room`` gave until it is closed.
        """

    def unchanged(self) -> bool:
        """Whether reading again would give the same bytes, as far as sizes and times tell."""


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
