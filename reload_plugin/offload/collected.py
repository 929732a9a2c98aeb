"""Values brought to a device, one by one, and put into modules afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..device.hashing import Hash
from ..errors import OffloadError
from .memory import Needs, needs_of
from .placement import Placement
from .stored import InMemory


@dataclass
class Value:
    """One tensor of the model, and every place that shows it."""

    places: Sequence[Placement]
    tensor: torch.Tensor
    """What the modules will show: a parameter, or a buffer."""
    moved: torch.Tensor | None = None
    """New memory for ``tensor``, which stays the same object; None where its memory stays too."""


def needed_for(groups: Iterable[Sequence[Placement]], target: torch.device) -> Needs:
    """What it takes to bring tied groups to a device.

    Raises:
        OffloadError: a value is nowhere.

    """
    sources = [_source(group, target) for group in groups]
    lost = [place.name for place in sources if place.stored is None]
    if lost:
        raise OffloadError(
            f"On meta, with no hook or cache that holds the values: {', '.join(lost[:8])}. They were lost "
            "before. Nothing was changed. Load the model again."
        )
    sizes = [place.nbytes for place in sources if _device_of(place) != target]
    return needs_of(target, sum(sizes), max(sizes, default=0))


def collected(groups: Iterable[Sequence[Placement]], target: torch.device) -> list[Value]:
    """The values of tied groups on a device. Nothing of the model is changed.

    Raises:
        SourceError: a value cannot be read.
        OffloadError: the device has no more memory.

    """
    try:
        with torch.no_grad():
            return [_value(group, target) for group in groups]
    except torch.OutOfMemoryError as error:
        raise OffloadError(
            f"{target} has no more memory: {error} Nothing was changed. Free memory there, or name another "
            "device."
        ) from error


def place_value(value: Value) -> None:
    """Let the modules show a value. The modules' dictionaries have to be plain ones."""
    if value.moved is not None:
        value.tensor.data = value.moved
        value.moved = None
    for place in value.places:
        show(place, value.tensor)


def show(place: Placement, tensor: torch.Tensor) -> None:
    """Let a module show a tensor under the name of a placement."""
    held: dict[str, Any] = place.module._buffers if place.is_buffer else place.module._parameters
    held[place.attribute] = tensor


def _value(group: Sequence[Placement], target: torch.device) -> Value:
    source = _source(group, target)
    own = next((place for place in group if place.where == "module"), None)
    if own is not None:
        if own.shown.device == target:
            return Value(group, own.shown)
        return Value(group, *moved_to(own.shown, source.read(), target))
    return Value(group, built_like(source, source.read(), target))


def moved_to(
    tensor: torch.Tensor, value: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What takes the place of a tensor that moves to another device.

    Args:
        tensor: what a module shows.
        value: its value, anywhere.
        device: where it goes.

    Returns:
        The same object and its new memory; a new object and None where memory of the device cannot belong to
        the same object (backends that are registered with torch from outside).

    """
    memory = value.to(device)
    if torch._has_compatible_shallow_copy_type(tensor, memory):
        return tensor, memory
    return like(tensor, memory), None


def _source(group: Sequence[Placement], target: torch.device) -> Placement:
    """The member of a tied group whose value costs least to bring to a device."""
    return min(group, key=lambda place: _device_of(place) != target)


def _device_of(place: Placement) -> torch.device | None:
    """The device that holds a value; None for files, and where a value is cast."""
    stored = place.stored
    return stored.device if isinstance(stored, InMemory) else None


def built_like(place: Placement, value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the class and with the attributes of a placeholder, over a value.

    Args:
        place: what it is for.
        value: of the right shape and dtype; its memory is used where it is on the device already.
        device: where the result is.

    """
    scales = None if place.statistics is None else place.statistics.read()
    return like(place.shown, value.to(device), scales)


def like(tensor: torch.Tensor, memory: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor over some memory, of the class and with the attributes of another.

    Args:
        tensor: a parameter or a buffer; its values do not matter.
        memory: of the same shape and dtype, where the result is to be.
        scales: of an int8 weight of bitsandbytes.

    """
    if type(tensor) is torch.Tensor:
        return memory
    if type(tensor) is not nn.Parameter or scales is not None:
        return _built_by_accelerate(tensor, memory, scales)
    made = nn.Parameter(memory, requires_grad=tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    return made


def _built_by_accelerate(
    tensor: torch.Tensor, memory: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    """As a hook would make it before a forward pass: parameters of quantized models."""
    from accelerate.utils import set_module_tensor_to_device

    holder = nn.Module()
    holder._parameters["weight"] = tensor  # type: ignore[assignment]
    scales = getattr(tensor, "SCB", None) if scales is None else scales
    set_module_tensor_to_device(holder, "weight", memory.device, value=memory, fp16_statistics=scales)
    made = holder._parameters["weight"]
    assert made is not None, "it was set"
    return made


def digest_of(tensor: torch.Tensor) -> bytes:
    """The digest of a tensor's values, with the scales of an int8 parameter."""
    hashed = Hash()
    hashed.add_tensor(tensor.detach().contiguous())
    scales = getattr(tensor, "SCB", None)
    if scales is not None:
        hashed.add_tensor(scales)
    return hashed.digest()
