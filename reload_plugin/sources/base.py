"""What every source of weights offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Source(Protocol):
    """Weights that can be listed before they are read, and read more than once."""

    description: str

    def infos(self) -> Sequence[TensorInfo] | None:
        """Every tensor, in stored order; None when the format cannot tell without reading."""

    def read(
        self, order: Sequence[str] | None = None, pool: HostPool | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, in ``order`` if given, in memory of ``pool`` if given.

        A tensor's memory is the caller's for as long as the caller refers to it.
        """

    def unchanged(self) -> bool:
        """Whether reading again would give the same bytes, as far as sizes and times tell."""
