"""Safetensors files read through one of vLLM's fast loaders, where the engine was started with one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch

from ...device.host_memory import HostPool
from ...errors import SourceError
from ...plan.source import Destinations, Stream
from ..io.stamps import check_same
from .fast_readers import READERS, Pairs
from .safetensors_files import SafetensorsSource

logger = logging.getLogger("vllm.reload_plugin")


class FastSafetensors(SafetensorsSource):
    """Listed by our own reader, so that a plan needs no bytes; read by a library, in the order of the files.

    What the library cannot read, because it is not there or fails, is read by our own reader, which then says
    what is wrong with the files, if that was why. It also reads parts of checkpoints, and files that are kept
    open.

    Args:
        files: safetensors files.
        description: what messages call them.
        load_format: vLLM's name of the loader.
        device: where the model is.

    """

    in_order = False
    """The library decides in which order tensors come."""

    def __init__(
        self, files: Sequence[str], description: str, load_format: str, device: torch.device
    ) -> None:
        super().__init__(files, description)
        self.load_format = load_format
        self._device = device

    def read(
        self,
        order: Sequence[str] | None = None,
        pool: HostPool | None = None,
        destinations: Destinations | None = None,
    ) -> Stream:
        names = list(self._locations if order is None else order)
        if len(names) < len(self._locations) or self._open:
            yield from super().read(order, pool, destinations)
            return
        check_same(self.stamps)
        left = dict.fromkeys(names)
        largest = max((place.info.nbytes for place in self._locations.values()), default=0)
        with _closing(READERS[self.load_format](list(self.stamps), self._device, largest)) as pairs:
            while left:
                try:
                    pair = [next(pairs)]
                    self._check(*pair[0], left)
                except Exception as error:  # noqa: BLE001 - of a library's own kinds; none of them fails a reload
                    self._tell(error, len(names) - len(left), len(left))
                    break
                del left[pair[0][0]]
                yield pair.pop()
        if left:
            yield from super().read([name for name in names if name in left], pool, destinations)
        check_same(self.stamps)

    def _check(self, name: str, tensor: torch.Tensor, left: dict[str, None]) -> None:
        """Raise SourceError unless this tensor is listed as it is, and was not read before."""
        place = self._locations.get(name)
        if place is None or name not in left:
            raise SourceError(f"it gave {name}, which {'came before' if place else 'the files do not hold'}")
        if place.info.shape != tuple(tensor.shape) or place.info.dtype != tensor.dtype:
            raise SourceError(f"it gave {name} as {list(tensor.shape)} {tensor.dtype}")

    def _tell(self, error: Exception, done: int, left: int) -> None:
        reason = str(error) or "it came to an end" if isinstance(error, StopIteration) else str(error)
        logger.info(
            "%s is read by our own reader (%d of %d tensors): load_format=%s failed with %s: %s",
            self.description,
            left,
            done + left,
            self.load_format,
            type(error).__name__,
            reason,
        )


@contextlib.contextmanager
def _closing(pairs: Pairs) -> Iterator[Pairs]:
    """What a library raises while it cleans up comes too late to matter: the tensors are there."""
    try:
        yield pairs
    finally:
        try:
            pairs.close()
        except Exception as error:  # noqa: BLE001 - of a library's own kinds
            logger.info("A fast loader did not end well: %s: %s", type(error).__name__, error)
