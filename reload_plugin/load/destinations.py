"""Where weights are read to: staging, for those that go there as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..checkpoint import TensorInfo
from ..device.host_memory import HostPool
from ..device.ops import ops_for
from ..plan.copy_plan import StridedCopy, TensorPlan
from ..plan.materialisation import Touching
from ..plan.source import Region
from ..plan.source_ranges import needed_of, regions_of
from ..plan.tracer import LoadTrace
from .completeness import Completeness


class StagingMemory:
    """Staging of parameters by their names, allocated when it is first asked for.

    Args:
        ledger: knows the staging.
        trace: watches over it.
        pool: memory for it.
        touching: called with staging that lies in served memory, before that is given to anybody.

    """

    def __init__(
        self, completeness: Completeness, trace: LoadTrace, pool: HostPool, touching: Touching
    ) -> None:
        self._completeness = completeness
        self._trace = trace
        self._pool = pool
        self._touching = touching

    def __call__(self, parameter: str) -> torch.UntypedStorage:
        """Raises ``LateWriteError`` when the parameter's group is processed already."""
        storage = self._completeness.storage_of(parameter)
        if storage.closed:
            raise self._trace.late(parameter)
        if not storage.materialised:
            if storage.served_memory is not None:
                self._touching(storage)
            storage.materialise(pool=self._pool)
            self._completeness.renewed(storage)
            self._trace.watch([storage])
        return storage.storage


class StagingDestinations:
    """Staging of a session as a place to read files into.

    The memory is the session's and goes with it: whoever reads into it has to stop before that.

    Args:
        ledger: knows the routes of weights and the staging of parameters.
        memory: staging of a parameter, allocated.
        by_hand: every weight has to be handed over, because somebody wants to see it.
        reads_files: whether files can be read into staging. If not, none is allocated ahead of its weights.

    """

    def __init__(
        self,
        completeness: Completeness,
        memory: Callable[[str], torch.UntypedStorage],
        by_hand: bool = False,
        reads_files: bool = True,
    ) -> None:
        self._completeness = completeness
        self._memory = memory
        self._by_hand = by_hand
        self._reads_files = reads_files
        self._given: dict[str, torch.Tensor] = {}
        """Weights that are read to where they go."""
        self.bytes_read: int | None = None
        """Bytes of files that were read; None where no file said so."""

    def __call__(self, info: TensorInfo) -> torch.Tensor | None:
        copy = self._copy_of(info) if self._reads_files else None
        if copy is None:
            return None
        memory = self._memory(copy.parameter)
        if not ops_for(memory.device).reads_files:
            return None
        place = torch.empty(0, dtype=info.dtype, device=memory.device)
        place.set_(memory, copy.target.offset, copy.target.size, copy.target.stride)
        self._given[info.name] = place
        return place

    @property
    def key(self) -> object | None:
        return None if self._by_hand or not self._reads_files else self._completeness.copy_plan

    def targets(self, infos: Sequence[TensorInfo]) -> Sequence[Sequence[Region]] | None:
        found = []
        for info in infos:
            tensor_plan = self._plan_of(info)
            regions = None if tensor_plan is None else regions_of(tensor_plan)
            if regions is None or any(self._is_closed(region.parameter) for region in regions):
                return None
            found.append(regions)
        return found

    def needed(self, info: TensorInfo) -> Sequence[Region] | None:
        tensor_plan = None if self._by_hand else self._plan_of(info)
        if tensor_plan is None or tensor_plan.plain is not None:
            return None
        copy_plan = self._completeness.copy_plan
        assert copy_plan is not None, "a tensor plan is part of a copy plan"
        if info.name not in copy_plan.needed:
            copy_plan.needed[info.name] = needed_of(tensor_plan)
        found: Sequence[Region] | None = copy_plan.needed[info.name]
        return found

    def note_read(self, nbytes: int) -> None:
        self.bytes_read = (self.bytes_read or 0) + nbytes

    def memory(self, parameter: str) -> torch.UntypedStorage | None:
        memory = self._memory(parameter)
        return memory if ops_for(memory.device).reads_files else None

    def took(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this weight was read to where it goes."""
        return self._given.pop(name, None) is tensor

    def _copy_of(self, info: TensorInfo) -> StridedCopy | None:
        """The one write of a weight that goes as it is to a layer which is still open, and alone."""
        tensor_plan = self._plan_of(info)
        copy = None if tensor_plan is None else tensor_plan.plain
        return None if copy is None or self._is_closed(copy.parameter) else copy

    def _is_closed(self, parameter: str) -> bool:
        return self._completeness.storage_of(parameter).closed

    def _plan_of(self, info: TensorInfo) -> TensorPlan | None:
        """The copy plan of a weight that shares no slot with another."""
        copy_plan = self._completeness.copy_plan
        if copy_plan is None or info.name in copy_plan.contenders:
            return None
        tensor_plan = copy_plan.of.get(info.name)
        fits = tensor_plan is not None and tensor_plan.dtype == info.dtype and tensor_plan.shape == info.shape
        return tensor_plan if fits else None
