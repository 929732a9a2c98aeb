"""Where weights are read to: staging, for those that go there as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checkpoint import TensorInfo
from ..device.memory import HostPool
from ..plan.load import LoadTrace, Touching
from ..plan.routes import Write
from .ledger import Ledger


class StagingMemory:
    """Staging of parameters by their names, allocated when it is first asked for.

    Args:
        ledger: knows the staging.
        trace: watches over it.
        pool: memory for it.
        touching: called with staging that lies in served memory, before that is given to anybody.

    """

    def __init__(self, ledger: Ledger, trace: LoadTrace, pool: HostPool, touching: Touching) -> None:
        self._ledger = ledger
        self._trace = trace
        self._pool = pool
        self._touching = touching

    def __call__(self, parameter: str) -> torch.UntypedStorage:
        """Raises ``LateWriteError`` when the parameter's group is processed already."""
        storage = self._ledger.storage_of(parameter)
        if storage.closed:
            raise self._trace.late(parameter)
        if not storage.materialised:
            if storage.final is not None:
                self._touching(storage)
            storage.materialise(pool=self._pool)
            self._ledger.renewed(storage)
            self._trace.watch([storage])
        return storage.storage


class StagingRoom:
    """Staging of a session as a place to read files into.

    The memory is the session's and goes with it: whoever reads into it has to stop before that.

    Args:
        ledger: knows the routes of weights and the staging of parameters.
        memory: staging of a parameter, allocated.
        by_hand: every weight has to be handed over, because somebody wants to see it.

    """

    def __init__(
        self, ledger: Ledger, memory: Callable[[str], torch.UntypedStorage], by_hand: bool = False
    ) -> None:
        self._ledger = ledger
        self._memory = memory
        self._by_hand = by_hand
        self._given: dict[str, torch.Tensor] = {}
        """Weights that are read to where they go."""

    def __call__(self, info: TensorInfo) -> torch.Tensor | None:
        write = self._write_of(info)
        if write is None:
            return None
        memory = self._memory(write.parameter)
        if memory.device.type != "cpu":
            return None
        place = torch.empty(0, dtype=info.dtype, device="cpu")
        place.set_(memory, write.target.offset, write.target.size, write.target.stride)
        self._given[info.name] = place
        return place

    @property
    def key(self) -> object | None:
        return None if self._by_hand else self._ledger.routes

    def targets(self, infos: Sequence[TensorInfo]) -> Sequence[tuple[str, int]] | None:
        found = []
        for info in infos:
            write = self._write_of(info)
            if write is None:
                return None
            found.append((write.parameter, write.target.offset * write.target_dtype.itemsize))
        return found

    def memory(self, parameter: str) -> torch.UntypedStorage | None:
        memory = self._memory(parameter)
        return memory if memory.device.type == "cpu" else None

    def took(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this weight was read to where it goes."""
        return self._given.pop(name, None) is tensor

    def _write_of(self, info: TensorInfo) -> Write | None:
        """The one write of a weight that goes as it is to a layer which is still open, and alone."""
        routes = self._ledger.routes
        if routes is None or info.name in routes.contenders:
            return None
        route = routes.of.get(info.name)
        if route is None or route.dtype != info.dtype or route.shape != info.shape:
            return None
        write = route.plain
        closed = write is not None and self._ledger.storage_of(write.parameter).closed
        return None if closed else write
