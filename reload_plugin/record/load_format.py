"""What a group needs in load format: which holders take which tensors, and the storages of those."""

from __future__ import annotations

import torch
from torch import nn

from ..device.host_memory import MemoryGauge
from ..errors import UnsupportedError
from ..tensors import wraps_others
from .model_record import Group, HolderRecord, TensorRecord
from .snapshot import Key, tables_of
from .staged_storage import StagedStorage


def alive_holders(group: Group) -> list[tuple[HolderRecord, object]]:
    """The holders of a group's layers that still exist, each with its record."""
    found = []
    for layer in group.layers:
        if layer.ref() is None:
            continue
        for holder in layer.holders:
            held = holder.ref()
            if held is not None:
                found.append((holder, held))
    return found


def load_format_places(
    holders: list[tuple[HolderRecord, object]], shared: frozenset[int]
) -> list[tuple[object, Key, TensorRecord]]:
    """(holder, key, record) of each load-format tensor: those that PWAL replaced, and those still in place
    unless other groups hold them as well (``shared``).
    """
    places = []
    for holder, held in holders:
        tables = tables_of(held) if holder.constructed else {}
        for key, record in holder.constructed.items():
            if key in holder.undo:
                places.append((held, key, record))
                continue
            kind, name = key
            tensor = record.ref()
            in_place = tensor is not None and tables[kind].get(name) is tensor
            if in_place and id(record) not in shared:
                places.append((held, key, record))
    return places


def staged_storages(
    records: list[TensorRecord],
    target_device: torch.device,
    gauge: MemoryGauge,
    *,
    from_served: bool,
    aliases_served: bool,
) -> list[StagedStorage]:
    """One staged storage for all records that are views of one storage."""
    by_storage: dict[tuple[int, torch.device], list[TensorRecord]] = {}
    for record in records:
        device = target_device if record.format.device.type == "meta" else record.format.device
        by_storage.setdefault((record.storage, device), []).append(record)
    return [
        StagedStorage(found, device, gauge, from_served=from_served, aliases_served=aliases_served)
        for (_, device), found in by_storage.items()
    ]


def is_wrapper(record: TensorRecord) -> bool:
    """Whether a record describes a tensor subclass that wraps other tensors (torchao)."""
    return wraps_others(record.format.cls)


def copy_of_wrapper(record: TensorRecord) -> torch.Tensor:
    """A wrapper subclass has no storage to describe: its load-format tensor is a copy of the recorded object.

    Raises:
        UnsupportedError: the recorded object no longer exists.

    """
    tensor = record.ref()
    if tensor is None:
        raise UnsupportedError(
            f"{record.name} is a {record.format.cls.__name__} that no longer exists, and its load format "
            "cannot be rebuilt from a description. The engine serves what it served before."
        )
    copy = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
    copy.__dict__.update(record.format.attributes)
    return copy
