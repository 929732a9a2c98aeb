"""Completeness tracking: which tensors arrived and which groups are complete."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..checkpoint import DirectRead
from ..plan.arrivals import Loaded
from ..plan.copy_plan import TensorPlan
from ..plan.known_checkpoint import KnownCheckpoint
from ..plan.mismatches import Mismatches
from ..record.model_record import ModelRecord
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage


class Completeness:
    """Which weights came, which layers they belong to, and which layers have everything.

    Args:
        loaded: what the stream has brought; written by whoever loads.
        problems: what does not fit.
        expected: what is known of the weights before they come.

    """

    def __init__(self, loaded: Loaded, mismatches: Mismatches, expected: KnownCheckpoint) -> None:
        self.loaded = loaded
        self.copy_plan = expected.copy_plan
        self._mismatches = mismatches
        self._planned = expected.planned
        self._expected = expected
        self._waiting = {group: set(names) for group, names in expected.names_of_group.items()}
        self._uncopied_of: dict[str, int] = defaultdict(int)
        self._copied: list[str] = []
        """Weights loaded by a route whose coverage has not been noted yet."""
        self._copied_names: set[str] = set()
        self._settled = 0
        """How many of the landings had their coverage noted."""
        self._staged_groups: dict[str, StagedGroup] = {}
        self._group_of_storage: dict[int, StagedGroup] = {}
        self._storages: dict[str, tuple[StagedStorage, StagedGroup]] = {}
        self._last_written: dict[int, StagedGroup] = {}

    def admit(self, staged: StagedGroup) -> None:
        """Keep the book of one more group, which was just put into load format."""
        self._staged_groups[staged.group.name] = staged
        for storage in staged.storages:
            self._storages[storage.primary.name] = (storage, staged)
            self._group_of_storage[storage.key] = staged

    def renewed(self, storage: StagedStorage) -> None:
        """A storage has new memory: find it by that from now on."""
        self._group_of_storage[storage.key] = self._storages[storage.primary.name][1]

    def storage_of(self, parameter: str) -> StagedStorage:
        return self._storages[parameter][0]

    def group_of(self, parameter: str) -> str:
        """The name of a parameter's group."""
        return self._storages[parameter][1].group.name

    @functools.cached_property
    def _groups_of(self) -> Mapping[str, Sequence[str]]:
        """Weight -> the groups it goes into, as expected."""
        found: dict[str, list[str]] = defaultdict(list)
        for group, names in self._expected.names_of_group.items():
            for name in names:
                found[name].append(group)
        return found

    # -- weights ----------------------------------------------------------------------------------

    def plan_for_tensor(self, name: str, tensor: torch.Tensor) -> TensorPlan | None:
        """The route of a weight, if it has one that fits and needs no loader."""
        tensor_plan = self.copy_plan.of.get(name) if self.copy_plan is not None else None
        return (
            tensor_plan
            if tensor_plan is not None and tensor_plan.copies is not None and tensor_plan.fits(tensor)
            else None
        )

    def without_overwritten_slots(self, name: str, tensor_plan: TensorPlan) -> TensorPlan:
        """A weight's route without the slots in which a cold start would overwrite it by one that came."""
        assert self.copy_plan is not None, "the route is one of these"
        if name not in self.copy_plan.contenders or tensor_plan.copies is None:
            return tensor_plan
        contested = self.copy_plan.contested
        left = [
            copy
            for copy in tensor_plan.copies
            if not any(
                self._expected.is_later(other, name) and self.loaded.has(other)
                for other in contested.get((copy.parameter, copy.target), ())
            )
        ]
        return dataclasses.replace(tensor_plan, copies=tuple(left))

    def note_copied(self, name: str, tensor_plan: TensorPlan) -> None:
        """A weight was loaded by its route."""
        self.loaded.tensor_plans[name] = tensor_plan
        self._copied.append(name)
        self._copied_names.add(name)

    def note_direct_read(self, direct_read: DirectRead) -> list[StagedGroup]:
        """Weights were read to where their routes lead. Returns the groups that have everything now."""
        assert self.copy_plan is not None, "only routes tell where weights go"
        touched: dict[str, StagedGroup] = {}
        for parameter, names in direct_read.parameters.items():
            staged = self._storages[parameter][1]
            if (waiting := self._waiting.get(staged.group.name)) is not None:
                waiting.difference_update(names)
                touched[staged.group.name] = staged
        arrived = [staged for group, staged in touched.items() if not self._waiting[group]]
        return [staged for staged in arrived if self._is_trusted(staged)]

    @property
    def has_unplanned_weights(self) -> bool:
        """Whether the model's loader took a weight and no route said so: then there is something to learn."""
        foreseen = self.copy_plan.of if self.copy_plan is not None else {}
        arrived = self.loaded.tensor_plans
        return any(
            name not in foreseen or foreseen[name] != arrived.get(name)
            for name in self.loaded.shapes.keys() - self._copied_names
        )

    @property
    def replayed(self) -> int:
        """How many weights were loaded by their routes."""
        return len(self._copied_names) + sum(
            len(direct_read.names) for direct_read in self.loaded.direct_read
        )

    @property
    def arrived(self) -> Mapping[str, TensorPlan]:
        """The routes of all weights that came."""
        of = self.copy_plan.of if self.copy_plan is not None else {}
        direct_read = {
            name: of[name] for direct_read in self.loaded.direct_read for name in direct_read.names
        }
        return direct_read | self.loaded.tensor_plans

    @property
    def computed(self) -> int:
        """How many weights the model's loader makes something else of, so that it takes them every time."""
        copy_plan = self.loaded.tensor_plans
        return sum(copy_plan[name].copies is None for name in copy_plan.keys() - self._copied_names)

    def was_complete_by_name(self, parameter: str) -> bool:
        """Whether a parameter's layer was complete by the names of its weights, as at the last reload."""
        found = self._storages.get(parameter)
        return found is not None and found[0].closed and not found[0].coverage.touched

    # -- layers -----------------------------------------------------------------------------------

    def complete_after(self, name: str, recent: set[int]) -> list[StagedGroup]:
        """Groups that have everything now that ``name`` came and the storages ``recent`` were written."""
        arrived = [group for group in self._groups_of.get(name, ()) if self._arrived(group, name)]
        complete = [staged for group in arrived if self._is_trusted(staged := self._staged_groups[group])]
        return complete + self._covered_before(recent) if recent else complete

    def _arrived(self, group: str, name: str) -> bool:
        self._uncopied_of[group] += name not in self._copied_names
        self._waiting[group].discard(name)
        return not self._waiting[group]

    def _is_trusted(self, staged: StagedGroup) -> bool:
        """Whether having all its weights by name means that a group is complete: when they are those that
        were planned, came by routes of the same shapes, or are seen to cover everything.
        """
        return self._planned or is_covered(staged) or self._uncopied_of[staged.group.name] == 0

    def _covered_before(self, recent: set[int]) -> list[StagedGroup]:
        """Groups nobody knows the weights of, which are covered and were left for another group.

        Left, because a fused layer may get one more weight after its last element (compressed-tensors
        sends ``weight_shape`` once for each part); where that has been seen the group waits for the end.
        """
        now = {id(staged): staged for key in recent if (staged := self._group_of_storage.get(key))}
        left = [staged for key, staged in self._last_written.items() if key not in now]
        self._last_written = now
        return [
            staged
            for staged in left
            if staged.group.name not in self._waiting
            and is_covered(staged)
            and not any(storage.coverage.overlaps for storage in staged.storages)
        ]

    # -- the account ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring coverage up to date, for the layers that are not complete yet."""
        for name, tensor_plan in self._unsettled():
            for copy in tensor_plan.copies or ():
                storage = self.storage_of(copy.parameter)
                if not storage.closed:
                    storage.coverage.add(copy.target)
                    self.loaded.note_written(name, copy.parameter)
        self._copied, self._settled = [], len(self.loaded.direct_read)
        for name in self._mismatches.misshapen:
            # It came and did not fit: not missing as well, where its place is known.
            known = self.copy_plan.of.get(name) if self.copy_plan is not None else None
            for copy in (known.copies or ()) if known is not None else ():
                self.storage_of(copy.parameter).coverage.add(copy.target)

    def _unsettled(self) -> Iterator[tuple[str, TensorPlan]]:
        """Weights that came by routes, and those routes; without most of which every layer is complete."""
        for name in self._copied:
            yield name, self.loaded.tensor_plans[name]
        for direct_read in self.loaded.direct_read[self._settled :]:
            assert self.copy_plan is not None, "only routes tell where weights land"
            if any(not self._storages[parameter][1].processed for parameter in direct_read.parameters):
                yield from ((name, self.copy_plan.of[name]) for name in direct_read.names)

    def names_of_group(self, record: ModelRecord) -> dict[str, frozenset[str]]:
        """Group name -> weights that went into it; empty for loaders that collect weights first."""
        if not self.loaded.repeatable:
            return {}
        found: dict[str, set[str]] = defaultdict(set)
        for name, parameter in self._destinations():
            found[record.group_with(parameter).name].add(name)
        return {group: frozenset(names) for group, names in found.items()}

    def _destinations(self) -> Iterator[tuple[str, str]]:
        for name, parameters in self.loaded.written.items():
            yield from ((name, parameter) for parameter in parameters)
        for name, tensor_plan in self.arrived.items():
            yield from ((name, copy.parameter) for copy in tensor_plan.copies or ())


def is_covered(staged: StagedGroup) -> bool:
    """Whether every element of every parameter of a group has been written."""
    parameters = [storage for storage in staged.storages if storage.primary.is_parameter]
    return bool(parameters) and all(storage.coverage.complete for storage in parameters)
