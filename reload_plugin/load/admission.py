"""Which weights may be loaded now, so that incomplete layers stay within a budget of staging."""

from __future__ import annotations

import torch

from ..device.host_memory import MemoryGauge
from ..plan.copy_plan import TensorPlan
from ..record.model_record import Group, ModelRecord
from .completeness import Completeness


class Admission:
    """Counts the staging of incomplete layers, and decides whether a weight may be loaded now.

    A layer counts with all its staging from its first weight on.

    Args:
        record: of the model; its largest layer always fits.
        completeness: has the copy plan and the staging of parameters.
        gauge: bytes of all staging.
        nbytes: bytes that incomplete layers may take beyond the largest layer.

    """

    def __init__(
        self, record: ModelRecord, completeness: Completeness, gauge: MemoryGauge, nbytes: int
    ) -> None:
        self._record, self._completeness, self._gauge = record, completeness, gauge
        self._limit = record.largest + nbytes
        self._begun: dict[str, int] = {}
        """Incomplete group -> bytes of all its staging."""
        self.results = 0
        """Bytes of staging that results of processed layers hold."""

    def admits(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a weight may be loaded now. If so, the layers that it begins are counted."""
        tensor_plan = self._completeness.plan_for_tensor(name, tensor)
        if tensor_plan is not None and tensor_plan.copies and self._is_allocated(tensor_plan):
            return True
        if self._gauge.held - self.results > self._limit:
            return False
        begins = {group.name: group.nbytes for group in self._groups_of(tensor_plan)}
        if sum((self._begun | begins).values()) > self._limit:
            return begins.keys() <= self._begun.keys()
        self._begun |= begins
        return True

    def _is_allocated(self, tensor_plan: TensorPlan) -> bool:
        """Whether the staging that a tensor is copied to is allocated."""
        return all(
            self._completeness.storage_of(copy.parameter).materialised for copy in tensor_plan.copies or ()
        )

    def has_begun(self, name: str) -> bool:
        """Whether a weight belongs to an incomplete layer that has other weights already."""
        copy_plan = self._completeness.copy_plan
        found = self._groups_of(copy_plan.of.get(name) if copy_plan is not None else None)
        return any(group.name in self._begun for group in found)

    def done(self, group: str) -> None:
        """Stop counting a complete layer."""
        self._begun.pop(group, None)

    def _groups_of(self, tensor_plan: TensorPlan | None) -> list[Group]:
        """Groups that a tensor is copied to and that are processed as soon as they are complete."""
        copies = (tensor_plan.copies or ()) if tensor_plan is not None else ()
        groups = [self._record.group_with(copy.parameter) for copy in copies]
        return [group for group in groups if not group.deferred]
