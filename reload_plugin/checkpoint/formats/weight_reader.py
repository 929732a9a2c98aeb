"""Reads the weights of a model one by one, from memory and from the files they were offloaded to."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping

import torch

from ...errors import SourceError
from ..file_source import open_file_limit
from ..io.readahead import Piece, read_piece
from ..io.stamps import CHECK_STORAGE, check_same, open_same
from ..stores import bytes_of
from .model_weights import FileWeight, HeldWeight, LiveWeight, files_of


class WeightReader:
    """Fetches weights; while entered, their files stay open.

    A file that is deleted or replaced meanwhile is read to its end. For more files than a quarter of those
    that the process may open, the rest is opened when it is read.

    Args:
        weights: what ``weights_of`` gave.

    Raises:
        SourceError: a file is gone, or another one than was listed.

    """

    def __init__(self, weights: Mapping[str, HeldWeight]) -> None:
        self._weights = weights
        self._stamps = files_of(weights)
        self._held: dict[str, int] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> WeightReader:
        room = open_file_limit() // 4
        with _as_source_error(), contextlib.ExitStack() as stack:
            self._held = open_same(list(self._stamps)[:room], self._stamps, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._stack.close()

    def fetch(self, name: str) -> torch.Tensor:
        """The value of a weight, in its shape and dtype.

        A weight in memory is the model's own memory; any other is in new memory on the CPU.

        Raises:
            SourceError: its file cannot be read, was cut or replaced.

        """
        weight = self._weights[name]
        if isinstance(weight, LiveWeight):
            return weight.tensor
        if isinstance(weight, FileWeight):
            return self._read(weight)
        with _as_source_error():
            return weight.mapping[weight.key].detach()

    def _read(self, weight: FileWeight) -> torch.Tensor:
        tensor = torch.empty(weight.info.shape, dtype=weight.stored, device="cpu")
        with _as_source_error(), contextlib.ExitStack() as stack:
            handle = self._held.get(weight.file)
            if handle is None:
                handle = open_same([weight.file], self._stamps, stack)[weight.file]
            if tensor.numel():
                read_piece(Piece(handle, weight.start, tensor, weight.file, weight.info.name))
        return tensor.to(weight.info.dtype)

    def check_unchanged(self) -> None:
        """Check that no file changed since it was listed, the open ones even if they were deleted.

        Raises:
            SourceError: it names the file.

        """
        held = {file: stamp for file, stamp in self._stamps.items() if file in self._held}
        check_same(held, self._held)
        rest = {file: stamp for file, stamp in self._stamps.items() if file not in self._held}
        check_same(rest)


def same_values(one: HeldWeight, other: HeldWeight) -> bool:
    """Whether two weights are the same bytes. Those that lie in the same place are not read."""
    if (one.info.shape, one.info.dtype) != (other.info.shape, other.info.dtype):
        return False
    if type(one) is type(other) and one.identity == other.identity:
        return True
    with WeightReader({"one": one, "other": other}) as reader:
        pieces = zip(bytes_of(reader.fetch("one")), bytes_of(reader.fetch("other")), strict=True)
        return all(mine == theirs for mine, theirs in pieces)


@contextlib.contextmanager
def _as_source_error() -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError) as error:
        raise SourceError(f"Offloaded weights could not be read: {error}. {CHECK_STORAGE}") from error
