"""Which weights may be loaded now: only so many layers wait at one time for the rest of theirs."""

from __future__ import annotations

import torch

from ..device.host_memory import MemoryGauge
from ..plan.copy_plan import TensorPlan
from ..record.model_record import Group, ModelRecord
from .completeness import Completeness


class Admission:
    """Counts the staging of layers that have begun and are not done; says of a weight whether it fits beside.

    A layer counts in whole from its first weight on: it takes that much before it is done.

    Args:
        record: of the model; its largest layer always fits.
        ledger: knows the routes of weights and the staging of parameters.
        gauge: bytes of all staging.
        nbytes: that waiting layers may have beyond the largest.

    """

    def __init__(
        self, record: ModelRecord, completeness: Completeness, gauge: MemoryGauge, nbytes: int
    ) -> None:
        self._record, self._completeness, self._gauge = record, completeness, gauge
        self._limit = record.largest + nbytes
        self._begun: dict[str, int] = {}
        """Group that waits for the rest of its weights -> bytes of all its staging."""
        self.results = 0
        """Bytes of staging that belong to layers which are done."""

    def admits(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether there is memory for a weight; what it begins is counted from now on."""
        tensor_plan = self._completeness.plan_for_tensor(name, tensor)
        if tensor_plan is not None and tensor_plan.copies and self._is_there(tensor_plan):
            return True
        if self._gauge.held - self.results > self._limit:
            return False
        begins = {group.name: group.nbytes for group in self._groups_of(tensor_plan)}
        if sum((self._begun | begins).values()) > self._limit:
            return begins.keys() <= self._begun.keys()
        self._begun |= begins
        return True

    def _is_there(self, tensor_plan: TensorPlan) -> bool:
        """Whether all that a route leads to has its memory."""
        return all(
            self._completeness.storage_of(copy.parameter).materialised for copy in tensor_plan.copies or ()
        )

    def has_begun(self, name: str) -> bool:
        """Whether a weight belongs to a layer that waits for the rest of its weights."""
        copy_plan = self._completeness.copy_plan
        found = self._groups_of(copy_plan.of.get(name) if copy_plan is not None else None)
        return any(group.name in self._begun for group in found)

    def done(self, group: str) -> None:
        """A layer has all its weights."""
        self._begun.pop(group, None)

    def _groups_of(self, tensor_plan: TensorPlan | None) -> list[Group]:
        """Groups that a route leads to and that are processed as soon as they are complete."""
        copies = (tensor_plan.copies or ()) if tensor_plan is not None else ()
        groups = [self._record.group_with(copy.parameter) for copy in copies]
        return [group for group in groups if not group.deferred]
