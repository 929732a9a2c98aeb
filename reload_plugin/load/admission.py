"""Which weights may be loaded now: only so many layers wait at one time for the rest of theirs."""

from __future__ import annotations

import torch

from ..device.memory import Gauge
from ..plan.routes import Route
from ..record.record import Group, ModelRecord
from .ledger import Ledger


class Admission:
    """Counts the staging of layers that have begun and are not done; says of a weight whether it fits beside.

    A layer counts in whole from its first weight on: it takes that much before it is done.

    Args:
        record: of the model; its largest layer always fits.
        ledger: knows the routes of weights and the staging of parameters.
        gauge: bytes of all staging.
        nbytes: that waiting layers may have beyond the largest.

    """

    def __init__(self, record: ModelRecord, ledger: Ledger, gauge: Gauge, nbytes: int) -> None:
        self._record, self._ledger, self._gauge = record, ledger, gauge
        self._limit = record.largest + nbytes
        self._begun: dict[str, int] = {}
        """Group that waits for the rest of its weights -> bytes of all its staging."""
        self.results = 0
        """Bytes of staging that belong to layers which are done."""

    def admits(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether there is memory for a weight; what it begins is counted from now on."""
        route = self._ledger.route_for(name, tensor)
        if route is not None and route.writes and self._is_there(route):
            return True
        if self._gauge.held - self.results > self._limit:
            return False
        begins = {group.name: group.nbytes for group in self._groups_of(route)}
        if sum((self._begun | begins).values()) > self._limit:
            return begins.keys() <= self._begun.keys()
        self._begun |= begins
        return True

    def _is_there(self, route: Route) -> bool:
        """Whether all that a route leads to has its memory."""
        return all(self._ledger.storage_of(write.parameter).materialised for write in route.writes or ())

    def has_begun(self, name: str) -> bool:
        """Whether a weight belongs to a layer that waits for the rest of its weights."""
        routes = self._ledger.routes
        found = self._groups_of(routes.of.get(name) if routes is not None else None)
        return any(group.name in self._begun for group in found)

    def done(self, group: str) -> None:
        """A layer has all its weights."""
        self._begun.pop(group, None)

    def _groups_of(self, route: Route | None) -> list[Group]:
        """Groups that a route leads to and that are processed as soon as they are complete."""
        writes = (route.writes or ()) if route is not None else ()
        groups = [self._record.group_with(write.parameter) for write in writes]
        return [group for group in groups if not group.deferred]
