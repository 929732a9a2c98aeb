"""The end of ``materialized``: values go back to where they were, and the hooks on top of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ..checkpoint.formats.offloading import is_cache
from ..errors import OffloadError, ReloadError
from ..interrupts import held
from .collected import Value, digest_of, moved_to, show
from .hooks import Dispatch
from .memory import needs_of, refuse_if_short
from .placement import Placement
from .stored import InMemory, StagedWrite, memory_key

Memory = torch.Tensor | None
"""New memory of a tensor that stays the same object."""
_STAYS = "The model stays an ordinary one, with all its values."


@dataclasses.dataclass
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
                if stored is None or place.name in self.devices:
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

    def _moved(self, current: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, Memory]]:
        """Name -> what a module shows on the device where its own tensor was; see ``moved_to``."""
        moved: dict[str, tuple[torch.Tensor, Memory]] = {}
        done: dict[int, tuple[torch.Tensor, Memory]] = {}
        for device in set(self.devices.values()):
            names = [name for name, at in self.devices.items() if at == device]
            away = {id(current[name]): current[name] for name in names if current[name].device != device}
            nbytes = sum(tensor.nbytes for tensor in away.values())
            refuse_if_short(needs_of(device, nbytes, 0), "Dispatching the model again")
            done.update({key: moved_to(tensor, tensor.detach(), device) for key, tensor in away.items()})
            moved.update({name: done.get(id(current[name]), (current[name], None)) for name in names})
        return moved

    def _commit(
        self,
        current: Mapping[str, torch.Tensor],
        staged: Sequence[StagedWrite],
        moved: Mapping[str, tuple[torch.Tensor, Memory]],
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
        for tensor, memory in moved.values():
            if memory is not None:
                tensor.data = memory
        self.dispatch.put_back()
        for place in self.places:
            tensor = current[place.name]
            if place.name in moved:
                show(place, moved[place.name][0])
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
    devices, digests, replaced = {}, {}, set()
    for value in values:
        for place in value.places:
            if place.where == "module":
                devices[place.name] = place.shown.device
                if place.shown is not value.tensor:
                    replaced.add(place.name)
            elif place.stored is not None and place.stored.file is not None:
                digests[place.name] = digest_of(value.tensor)
    kept = [_without_memory(place) if place.name in replaced else place for place in places]
    return PutBack(model, dispatch, kept, devices, digests)


def _without_memory(place: Placement) -> Placement:
    """A placement that does not hold the memory that its module had."""
    return dataclasses.replace(place, shown=torch.empty_like(place.shown, device="meta"), stored=None)


def _alike(tensor: torch.Tensor, shown: torch.Tensor) -> bool:
    return tensor.shape == shown.shape and tensor.dtype == shown.dtype


def _refuse_two_values(one: str, first: torch.Tensor, other: str, second: torch.Tensor) -> None:
    if first is not second and not torch.equal(first, second.to(first.device)):
        raise OffloadError(f"{one} and {other} are one value where they are kept, and got two in the block.")
