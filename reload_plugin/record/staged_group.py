"""One group of layers between the state it serves and its load format, and back.

A staged group holds up to three states of the same objects: *served* (what the engine answers with),
*load format* (what loaders write into) and *result* (what processing made of it). Showing one of
them puts it on the live objects; nothing is copied. Load-format tensors begin as placeholders: they have the
load format's shape and device, and no memory until the first write.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..device.host_memory import MemoryGauge
from ..tensors import storage_id, wraps_others
from .group_state import GroupState, TensorState
from .load_format import alive_holders, copy_of_wrapper, is_wrapper, load_format_places, staged_storages
from .model_record import Group, HolderRecord, TensorRecord
from .snapshot import ABSENT, Key, Snapshot, equal, read, same, write
from .staged_storage import StagedStorage


class StagedGroup:
    """A group while it is being reloaded. ``enter`` first; ``served.show()`` undoes everything."""

    def __init__(
        self, group: Group, target_device: torch.device, shared: frozenset[int], gauge: MemoryGauge
    ) -> None:
        self.group = group
        self._gauge = gauge
        self.storages: list[StagedStorage] = []
        self._device = target_device
        self._shared = shared
        self._objects: dict[int, torch.Tensor] = {}
        self._hidden_state: GroupState | None = None
        self._entered: list[tuple[object, Snapshot]] = []
        self.served = GroupState([], {})
        self.result: GroupState | None = None
        self.processed = False
        self.overwritten: set[int] = set()
        """Identities of served storages that processing may have written its results to."""
        self.captured: list[torch.Tensor] = []
        """Tensors that native handles point into since the group was processed; see ``NativeWatch``."""

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        alive = [(layer.name, layer.ref()) for layer in self.group.layers]
        return [(name, module) for name, module in alive if module is not None]

    # -- entering ---------------------------------------------------------------------------------

    def enter(
        self,
        by_copy_plan: bool = False,
        noting: bool = False,
        from_served: bool = False,
        write_to_served: bool = False,
        alias_served: bool = False,
    ) -> None:
        """Put the group's layers into load format, without memory. Undone by ``served.show()``.

        Args:
            by_copy_plan: no loader will run, so attributes that only loaders change keep their served values.
            noting: keep what ``loader_left_traces`` compares with.
            from_served: values start as the ones that are served, where they have the load format.
            write_to_served: weights may be written to served memory before the group is complete.
            alias_served: no loader will read the tensors, so in a group that needs no processing the served
                tensors themselves are loaded.

        """
        holders = alive_holders(self.group)
        self.served = GroupState([], {})
        places = load_format_places(holders, self._shared)
        records = list({id(record): record for _, _, record in places}.values())
        for record in records:
            if is_wrapper(record):
                self._objects[id(record)] = copy_of_wrapper(record)
        staged = [record for record in records if not is_wrapper(record)]
        alias_served &= self.group.needs_no_processing
        self.storages = staged_storages(
            staged, self._device, self._gauge, from_served=from_served, aliases_served=alias_served
        )
        if alias_served and not self._objects and all(storage.aliases_served for storage in self.storages):
            return  # nothing on the live model changes, so there is nothing to restore or compare
        self.served.contents = [(held, read(held)) for _, held in holders]
        for storage in self.storages:
            if not storage.aliases_served:
                for record in storage.records:
                    self._resolve(record, storage)
        if write_to_served and not any(
            layer.deferred or layer.late or layer.online for layer in self.group.layers
        ):
            self._use_served_memory(holders)
        self._show_load_format(holders, places, by_copy_plan)
        self._entered = [(held, read(held)) for _, held in holders] if noting else []

    def _show_load_format(
        self,
        holders: list[tuple[HolderRecord, object]],
        places: list[tuple[object, Key, TensorRecord]],
        by_copy_plan: bool,
    ) -> None:
        """Put the load-format values and tensors on the holders."""
        for holder, held in holders:
            for key, before in holder.undo.items():
                if not isinstance(before, TensorRecord) and not (by_copy_plan and key in holder.by_loader):
                    write(held, key, before)
        for held, key, record in places:
            if (tensor := self._objects.get(id(record))) is not None:
                write(held, key, tensor)

    def served_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Path and data of each served tensor, before ``enter``, while staged and after ``drop``."""
        contents = self.served.contents or [(held, read(held)) for _, held in alive_holders(self.group)]
        for state in self.served.tensors.values():
            yield self.group.name, state.data
        for _, held in contents:
            for key, value in held.items():
                if isinstance(value, torch.Tensor):
                    yield f"{self.group.name}.{key[1]}", value

    def _use_served_memory(self, holders: list[tuple[HolderRecord, object]]) -> None:
        """Use served memory for the storages whose tensors PWAL does not replace."""
        replaced = {id(holder.constructed.get(key)) for holder, _ in holders for key in holder.undo}
        for storage in self.storages:
            if not storage.aliases_served and not any(id(record) in replaced for record in storage.records):
                storage.use_served_memory()

    def loader_left_traces(self) -> bool:
        """Whether a loader changed more than values: attributes of a layer or of a parameter.

        A copy plan alone would not reproduce that. Valid after loading and before processing.
        """
        state = self._hidden_state if self._hidden_state is not None else self.capture()
        states = zip(
            alive_holders(self.group), self._entered, self.served.contents, state.contents, strict=True
        )
        for (holder, _), (_, entered), (_, served), (_, now) in states:
            for key in entered.keys() | now.keys():
                value = now.get(key, ABSENT)
                kept = key in holder.by_loader and equal(served.get(key, ABSENT), value)
                if not kept and not same(entered.get(key, ABSENT), value):
                    return True
        for record in self.group.tensors:
            tensor = self._objects.get(id(record))
            if tensor is None:
                continue
            attributes, expected = state.tensors[id(tensor)].attributes, record.format.attributes
            if attributes.keys() != expected.keys() or any(
                attributes[k] is not expected[k] for k in expected
            ):
                return True
        return False

    def new_parameters(self) -> Iterator[torch.Tensor]:
        """The data of parameters that a loader registered: the load format does not have them."""
        state = self._hidden_state if self._hidden_state is not None else self.capture()
        for _, contents in state.contents:
            for (kind, _), value in contents.items():
                if kind == "_parameters" and value is not None and id(value) not in state.tensors:
                    yield state.data_of(value)

    def _resolve(self, record: TensorRecord, storage: StagedStorage) -> None:
        """Find or make the object of a load-format tensor and give it its placeholder's data."""
        view, fmt = storage.views[id(record)], record.format
        tensor = record.ref()
        if tensor is not None and tensor.device == view.device and not wraps_others(type(tensor)):
            state = TensorState.of(tensor)
            self.served.tensors[id(tensor)] = state
            storage.served[id(record)] = state.data
            tensor.data = view
        else:
            if tensor is not None and not tensor.is_meta and not wraps_others(type(tensor)):
                storage.served[id(record)] = tensor.data  # parked: its values are in host memory
            is_parameter = issubclass(fmt.cls, nn.Parameter)
            tensor = nn.Parameter(view, requires_grad=fmt.requires_grad) if is_parameter else view
        tensor.__class__ = fmt.cls
        tensor.__dict__ = dict(fmt.attributes)
        self._objects[id(record)] = storage.objects[id(record)] = tensor

    def load_targets(self) -> Iterator[tuple[TensorRecord, torch.Tensor, torch.Tensor]]:
        """(record, served parameter, load-format tensor) for each parameter of both formats. The group has to
        be hidden.
        """
        for holder, held in alive_holders(self.group):
            if not isinstance(held, nn.Module):
                continue
            for (kind, name), record in holder.constructed.items():
                served = held._parameters.get(name) if kind == "_parameters" else None
                if served is not None and (target := self._objects.get(id(record))) is not None:
                    yield record, served, target

    def set_served_attribute(self, tensor: torch.Tensor, name: str, value: object) -> None:
        """Set an attribute of a served tensor while the group is hidden, or delete it (``ABSENT``), so that
        it lasts when the group is shown and hidden again.
        """
        state = self.served.tensors.get(id(tensor))
        for attributes in (tensor.__dict__, *([state.attributes] if state is not None else [])):
            if value is ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value

    def made_by_processing(self) -> list[object]:
        """Served values that PWAL made; processing makes new ones."""
        holders = zip(alive_holders(self.group), self.served.contents, strict=True)
        return [contents.get(key) for (holder, _), (_, contents) in holders for key in holder.undo]

    def replaceable(self) -> list[torch.Tensor]:
        """Served tensors that processing does not read, so that it may write results to them."""
        shown = self.written_served_storages()
        made = [value.data for value in self.made_by_processing() if isinstance(value, torch.Tensor)]
        restaged = [state.data for state in self.served.tensors.values()]
        found = {storage_id(tensor): tensor for tensor in (*made, *restaged)}
        return [tensor for key, tensor in found.items() if key not in shown]

    def written_served_storages(self) -> set[int]:
        """Identities of the served storages that weights were loaded into."""
        return {storage.key for storage in self.storages if storage.is_served_memory}

    def aliased_memory(self) -> list[torch.UntypedStorage]:
        """Served storages that are loaded into from the beginning."""
        return [storage.storage for storage in self.storages if storage.aliases_served]

    # -- moving between states --------------------------------------------------------------------

    def loaded_data(self, record: TensorRecord) -> torch.Tensor | None:
        """The data of a load-format tensor, also while the group is hidden; None for an unknown record."""
        tensor = self._objects.get(id(record))
        if tensor is None:
            return None
        return tensor.data if self._hidden_state is None else self._hidden_state.data_of(tensor)

    def capture(self) -> GroupState:
        """The state that the live objects have now."""
        contents = [(held, read(held, before)) for held, before in self.served.contents]
        return GroupState(contents, {id(t): TensorState.of(t) for t in self._objects.values()})

    def hide(self) -> None:
        """Show the served state. Inverse: ``unhide``."""
        self._hidden_state = self.capture()
        self.served.show(self._hidden_state)
        for storage in self.storages:
            storage.hidden_states = self._hidden_state.tensors

    def unhide(self) -> None:
        """Show the state again that ``hide`` replaced."""
        assert self._hidden_state is not None, "only a hidden group can be shown again"
        self._hidden_state.show()
        self._hidden_state = None
        for storage in self.storages:
            storage.hidden_states = None

    @property
    def hidden(self) -> bool:
        return self._hidden_state is not None

    def take_result(self) -> None:
        """Capture the present state as the result of processing and show the served one."""
        self.result = self.capture()
        self.served.show(self.result)

    def release(self, keep: set[int]) -> None:
        """Free all staging except the storages whose identity is in ``keep``."""
        for storage in self.storages:
            if storage.key not in keep:
                storage.release()

    def remove_staging(self, keep: set[int]) -> list[StagedStorage]:
        """Remove and return all staging except the storages whose identity is in ``keep``, which the result
        needs. The caller owns what is returned.
        """
        gone = [storage for storage in self.storages if storage.key not in keep]
        keys = {storage.key for storage in gone}
        self.storages = [storage for storage in self.storages if storage.key in keep]
        self._objects = {key: t for key, t in self._objects.items() if storage_id(t) not in keys}
        if self.result is not None:
            states = self.result.tensors
            self.result.tensors = {key: s for key, s in states.items() if storage_id(s.data) not in keys}
        return gone

    def drop(self) -> None:
        """Drop all state that is not served."""
        self.result = self._hidden_state = None
        self._objects = {}
        self.storages = []
        self.captured = []
        self._entered = []
        self.served = GroupState([], {})

    def materialise(self) -> None:
        """Give every load-format tensor its memory and initial values."""
        for storage in self.storages:
            if not storage.has_values:
                storage.materialise(unwritten=True)

    @property
    def touched(self) -> bool:
        return any(storage.coverage.touched for storage in self.storages)
