"""What every source of weights offers."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

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


_NUMBER = re.compile(r"(\d+)")


def layer_order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Sorts names by layer number (names without one first), then by name with numbers counted as numbers."""
    pieces = name.split(".")
    layer = next((int(piece) for piece in pieces if piece.isascii() and piece.isdigit()), -1)
    found = [p for p in _NUMBER.split(name) if p]
    natural = [(0, int(p), p) if p.isascii() and p.isdigit() else (1, 0, p) for p in found]
    return layer, natural
