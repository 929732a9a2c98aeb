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
    """Which weights arrived, which groups they belong to, and which groups are complete.

    Args:
        loaded: the weights that arrived; written by the code that loads them.
        mismatches: weights that do not fit.
        expected: what is known of the weights before the first arrives.

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
        """Weights copied by the plan whose coverage has not been noted yet."""
        self._copied_names: set[str] = set()
        self._settled = 0
        """How many of the direct reads had their coverage noted."""
        self._staged_groups: dict[str, StagedGroup] = {}
        self._group_of_storage: dict[int, StagedGroup] = {}
        self._storages: dict[str, tuple[StagedStorage, StagedGroup]] = {}
        self._last_written: dict[int, StagedGroup] = {}

    def admit(self, staged: StagedGroup) -> None:
        """Track one more group, which was just put into load format."""
        self._staged_groups[staged.group.name] = staged
        for storage in staged.storages:
            self._storages[storage.primary.name] = (storage, staged)
            self._group_of_storage[storage.key] = staged

    def renewed(self, storage: StagedStorage) -> None:
        """Track a storage under the identity of its new memory."""
        self._group_of_storage[storage.key] = self._storages[storage.primary.name][1]

    def storage_of(self, parameter: str) -> StagedStorage:
        return self._storages[parameter][0]

    def group_of(self, parameter: str) -> str:
        """The name of a parameter's group."""
        return self._storages[parameter][1].group.name

    @functools.cached_property
    def _groups_of(self) -> Mapping[str, Sequence[str]]:
        """Weight -> the groups it is expected to be written to."""
        found: dict[str, list[str]] = defaultdict(list)
        for group, names in self._expected.names_of_group.items():
            for name in names:
                found[name].append(group)
        return found

    # -- weights ----------------------------------------------------------------------------------

    def plan_for_tensor(self, name: str, tensor: torch.Tensor) -> TensorPlan | None:
        """The copy plan of one tensor; None if it has none, does not fit it, or needs the model's loader."""
        tensor_plan = self.copy_plan.of.get(name) if self.copy_plan is not None else None
        return (
            tensor_plan
            if tensor_plan is not None and tensor_plan.copies is not None and tensor_plan.fits(tensor)
            else None
        )

    def without_overwritten_slots(self, name: str, tensor_plan: TensorPlan) -> TensorPlan:
        """A tensor's copy plan without the slots that a later weight, which arrived already, overwrites in a
        cold start.
        """
        assert self.copy_plan is not None, "a tensor plan is part of a copy plan"
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
        """Note that a weight was copied by its plan."""
        self.loaded.tensor_plans[name] = tensor_plan
        self._copied.append(name)
        self._copied_names.add(name)

    def note_direct_read(self, direct_read: DirectRead) -> list[StagedGroup]:
        """Note weights that were read directly into place. Returns the groups that became complete."""
        assert self.copy_plan is not None, "a direct read needs a copy plan"
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
        """Whether the model's loader loaded a weight that the copy plan does not have, or has otherwise: then
        the copy plan can be learnt anew.
        """
        foreseen = self.copy_plan.of if self.copy_plan is not None else {}
        arrived = self.loaded.tensor_plans
        return any(
            name not in foreseen or foreseen[name] != arrived.get(name)
            for name in self.loaded.shapes.keys() - self._copied_names
        )

    @property
    def replayed(self) -> int:
        """How many weights were copied by the plan or read directly into place."""
        return len(self._copied_names) + sum(
            len(direct_read.names) for direct_read in self.loaded.direct_read
        )

    @property
    def arrived(self) -> Mapping[str, TensorPlan]:
        """The tensor plans of all weights that arrived."""
        of = self.copy_plan.of if self.copy_plan is not None else {}
        direct_read = {
            name: of[name] for direct_read in self.loaded.direct_read for name in direct_read.names
        }
        return direct_read | self.loaded.tensor_plans

    @property
    def computed(self) -> int:
        """How many weights the loader computes other values from, so that every reload needs the loader."""
        copy_plan = self.loaded.tensor_plans
        return sum(copy_plan[name].copies is None for name in copy_plan.keys() - self._copied_names)

    def was_complete_by_name(self, parameter: str) -> bool:
        """Whether a parameter's layer is complete by the names of its weights, without noted coverage."""
        found = self._storages.get(parameter)
        return found is not None and found[0].closed and not found[0].coverage.touched

    # -- layers -----------------------------------------------------------------------------------

    def complete_after(self, name: str, recent: set[int]) -> list[StagedGroup]:
        """Groups that became complete when ``name`` arrived and the storages ``recent`` were written."""
        arrived = [group for group in self._groups_of.get(name, ()) if self._arrived(group, name)]
        complete = [staged for group in arrived if self._is_trusted(staged := self._staged_groups[group])]
        return complete + self._covered_before(recent) if recent else complete

    def _arrived(self, group: str, name: str) -> bool:
        self._uncopied_of[group] += name not in self._copied_names
        self._waiting[group].discard(name)
        return not self._waiting[group]

    def _is_trusted(self, staged: StagedGroup) -> bool:
        """Whether a group with all its weights by name is complete: they were planned, or were all copied by
        the plan, or cover every element.
        """
        return self._planned or is_covered(staged) or self._uncopied_of[staged.group.name] == 0

    def _covered_before(self, recent: set[int]) -> list[StagedGroup]:
        """Covered groups without known names that the stream wrote before it went on to another group.

        Not as soon as they are covered: a fused layer may get one more weight after its last element
        (compressed-tensors sends ``weight_shape`` once for each part). A group with overlaps waits for the
        end.
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
        """Note the coverage of all weights that arrived, for layers that are not closed."""
        for name, tensor_plan in self._unsettled():
            for copy in tensor_plan.copies or ():
                storage = self.storage_of(copy.parameter)
                if not storage.closed:
                    storage.coverage.add(copy.target)
                    self.loaded.note_written(name, copy.parameter)
        self._copied, self._settled = [], len(self.loaded.direct_read)
        for name in self._mismatches.misshapen:
            # Reported as misshapen, so it must not be reported as missing as well.
            known = self.copy_plan.of.get(name) if self.copy_plan is not None else None
            for copy in (known.copies or ()) if known is not None else ():
                self.storage_of(copy.parameter).coverage.add(copy.target)

    def _unsettled(self) -> Iterator[tuple[str, TensorPlan]]:
        """Tensor plans whose coverage is not noted; none of direct reads into groups that are all
        processed.
        """
        for name in self._copied:
            yield name, self.loaded.tensor_plans[name]
        for direct_read in self.loaded.direct_read[self._settled :]:
            assert self.copy_plan is not None, "a direct read needs a copy plan"
            if any(not self._storages[parameter][1].processed for parameter in direct_read.parameters):
                yield from ((name, self.copy_plan.of[name]) for name in direct_read.names)

    def names_of_group(self, record: ModelRecord) -> dict[str, frozenset[str]]:
        """Group name -> weights that were written to it; empty for loaders that collect weights first."""
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
