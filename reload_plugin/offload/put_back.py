"""The end of ``materialized``: values go back to where they were, and the hooks on top of them."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import OffloadError, ReloadError
from ..interrupts import held
from .collected import Value, digest_of, show
from .hooks import Dispatch
from .memory import needs_of, refuse_if_short
from .placement import Placement, is_cache
from .stored import InMemory, StagedWrite, memory_key

_STAYS = "The model stays an ordinary one, with all its values."


@dataclass
class PutBack:
    """What is to be put back after a block.

    Args:
        model: the model.
        dispatch: its hooks.
        places: where everything was. Placeholders are kept; memory that was moved away is not.
        devices: name -> the device that a module's own tensor was on, where it was moved.
        digests: name -> digest of a value that is in a file.

    """

    model: nn.Module
    dispatch: Dispatch
    places: Sequence[Placement]
    devices: Mapping[str, torch.device]
    digests: Mapping[str, bytes]

    def run(self) -> None:
        """Write what changed, and put the hooks back.

        Raises:
            OffloadError: see ``materialized``. The model stays an ordinary one.

        """
        current = self._current()
        staged: list[StagedWrite] = []
        try:
            try:
                staged = self._staged(current)
                moved = self._moved(current)
            except (ReloadError, OSError, RuntimeError) as error:
                raise OffloadError(f"The model could not be dispatched again: {error} {_STAYS}") from error
            with held():
                self._commit(current, staged, moved)
        finally:
            for write in staged:
                write.close()

    def _current(self) -> dict[str, torch.Tensor]:
        """Name -> what its module shows now.

        Raises:
            OffloadError: modules or tensors are other ones than before.

        """
        found: dict[str, torch.Tensor] = {}
        changed = self.dispatch.missing_modules()
        for place in self.places:
            held_by = place.module._buffers if place.is_buffer else place.module._parameters
            tensor = held_by.get(place.attribute)
            if tensor is None or tensor.is_meta or not _alike(tensor, place.shown):
                changed.append(place.name)
            else:
                found[place.name] = tensor
        if changed:
            raise OffloadError(
                "The model cannot be dispatched as before: another module, shape or dtype came in the block "
                f"for {', '.join(changed[:8])}. {_STAYS} Call dispatch() with a device map for it."
            )
        return found

    def _staged(self, current: Mapping[str, torch.Tensor]) -> list[StagedWrite]:
        """New files for the values that changed. Mappings are written in place: no hook reads them now."""
        staged: list[StagedWrite] = []
        written: dict[Hashable, str] = {}
        try:
            for place in self.places:
                stored = place.stored
                if stored is None or place.where == "module":
                    continue
                tensor = current[place.name]
                before = written.setdefault(stored.key, place.name)
                if before != place.name:
                    _refuse_two_values(before, current[before], place.name, tensor)
                else:
                    staged.extend(self._written(place, tensor))
        except BaseException:
            for write in staged:
                write.close()
            raise
        return staged

    def _written(self, place: Placement, tensor: torch.Tensor) -> Iterator[StagedWrite]:
        """Write one value to its mapping, or stage the file; likewise the scales of an int8 weight."""
        scales = getattr(tensor, "SCB", None)
        for stored, value in ((place.stored, tensor), (place.statistics, scales)):
            if isinstance(stored, InMemory):
                if value is not None and memory_key(value) != stored.key:
                    stored.write(value)
            elif stored is not None and value is not None and digest_of(tensor) != self.digests[place.name]:
                yield stored.stage(value.detach())

    def _moved(self, current: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Name -> memory on the device where a module's own tensor was."""
        moved: dict[str, torch.Tensor] = {}
        done: dict[int, torch.Tensor] = {}
        for device in set(self.devices.values()):
            tensors = {id(current[n]): current[n] for n, at in self.devices.items() if at == device}
            sizes = [tensor.nbytes for tensor in tensors.values() if tensor.device != device]
            refuse_if_short(needs_of(device, sum(sizes), 0), "Dispatching the model again")
            done.update({key: tensor.detach().to(device) for key, tensor in tensors.items()})
            moved.update({n: done[id(current[n])] for n, at in self.devices.items() if at == device})
        return moved

    def _commit(
        self,
        current: Mapping[str, torch.Tensor],
        staged: Sequence[StagedWrite],
        moved: Mapping[str, torch.Tensor],
    ) -> None:
        committed = []
        try:
            for write in staged:
                committed.append(write)
                write.commit()
        except BaseException as error:
            for write in reversed(committed):
                with contextlib.suppress(OSError):
                    write.undo()
            raise OffloadError(f"The model could not be dispatched again: {error} {_STAYS}") from error
        for name, memory in moved.items():
            current[name].data = memory
        self.dispatch.put_back()
        for place in self.places:
            tensor = current[place.name]
            if place.where == "module":
                show(place, tensor)
            elif not is_cache(place.module._parameters):
                if not place.shown.is_meta and place.shown is not tensor:
                    place.shown.data.copy_(
                        tensor
                    )  # shown beside the hook's value until the next forward pass
                show(place, place.shown)


def put_back_of(
    model: nn.Module, dispatch: Dispatch, places: Sequence[Placement], values: Sequence[Value]
) -> PutBack:
    """What it takes to undo ``materialize``, noted before it changes anything."""
    devices, digests = {}, {}
    for value in values:
        for place in value.places:
            if place.where == "module":
                devices[place.name] = place.shown.device
            elif place.stored is not None and place.stored.file is not None:
                digests[place.name] = digest_of(value.tensor)
    return PutBack(model, dispatch, places, devices, digests)


def _alike(tensor: torch.Tensor, shown: torch.Tensor) -> bool:
    return tensor.shape == shown.shape and tensor.dtype == shown.dtype


def _refuse_two_values(one: str, first: torch.Tensor, other: str, second: torch.Tensor) -> None:
    if first is not second and not torch.equal(first, second.to(first.device)):
        raise OffloadError(f"{one} and {other} are one value where they are kept, and got two in the block.")
