"""Which parts of a checkpoint's tensors each rank serves, and who writes which of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ..device.hashing import Hash
from ..errors import export_error
from ..plan.source import TensorInfo
from ..record.tensor_layout import Geometry
from ..report import Tier
from .inverse_plan import InvertedTensor, Unfit
from .planned_files import Box, why_incomplete

_ORDER: tuple[Tier, ...] = ("source", "kept", "plan", "inverse", "dequantized")
_FILES = ("source", "kept")


class OfferedPart(BaseModel):
    """One part of a tensor that a rank can write."""

    model_config = ConfigDict(frozen=True)

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    digest: str
    """Hash of its values, by which replicas are compared; empty where they come from files."""

    @property
    def box(self) -> Box:
        return Box(self.starts, self.sizes)


class OfferedTensor(BaseModel):
    """What a rank can write of one tensor."""

    model_config = ConfigDict(frozen=True)

    shape: tuple[int, ...]
    dtype: str
    tier: Tier
    parts: tuple[OfferedPart, ...]


class RankOffer(BaseModel):
    """What a rank can write."""

    model_config = ConfigDict(frozen=True)

    tensors: dict[str, OfferedTensor] = {}
    omitted: dict[str, str] = {}
    """Tensors of which this rank holds nothing -> why."""


class SharedOut(BaseModel):
    """Who writes what. The same on every rank, since each makes it of the same offers."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    infos: dict[str, TensorInfo]
    tiers: dict[str, Tier]
    owned: tuple[dict[str, tuple[Box, ...]], ...]
    """For each rank: tensor -> the parts that it writes."""
    omitted: dict[str, str]


def offered(info: TensorInfo, tier: Tier, boxes: Iterable[Box], values: torch.Tensor | None) -> OfferedTensor:
    """What this rank can write of a tensor.

    Args:
        info: of the whole tensor.
        tier: where its values come from.
        boxes: the parts.
        values: of the shape of the whole; only the parts have values. None where a file has them.

    """
    parts = []
    for box in dict.fromkeys(boxes):
        digest = "" if values is None else _digest(values[slices(box)])
        parts.append(OfferedPart(starts=box.starts, sizes=box.sizes, digest=digest))
    dtype = str(info.dtype).removeprefix("torch.")
    return OfferedTensor(shape=info.shape, dtype=dtype, tier=tier, parts=tuple(parts))


def share_out(offers: Sequence[RankOffer]) -> SharedOut:
    """Give each part to the first rank that has it, so that each is written once.

    Args:
        offers: of the ranks, in their order.

    Raises:
        ExportError: it lists every tensor of which a part is missing, or of which ranks hold different
            values.

    """
    infos: dict[str, TensorInfo] = {}
    tiers: dict[str, Tier] = {}
    owned: list[dict[str, tuple[Box, ...]]] = [{} for _ in offers]
    refused: dict[str, str] = {}
    for name in dict.fromkeys(name for offer in offers for name in offer.tensors):
        of_ranks = [(rank, offer.tensors[name]) for rank, offer in enumerate(offers) if name in offer.tensors]
        from_files = [pair for pair in of_ranks if pair[1].tier in _FILES]
        of_ranks = from_files[:1] or of_ranks
        first = of_ranks[0][1]
        infos[name] = TensorInfo(name, first.shape, getattr(torch, first.dtype))
        tiers[name] = max((one.tier for _, one in of_ranks), key=_ORDER.index)
        why = _share_one(name, infos[name], of_ranks, owned)
        if why is not None:
            refused[name] = why
    if refused:
        raise export_error(
            "cannot be put together from what the ranks serve",
            "Nothing was written. Reload with keep_load_format='host', or from files that stay where they "
            "are, and export then.",
            refused,
        )
    gone = {n: why for offer in offers for n, why in offer.omitted.items() if n not in infos}
    return SharedOut(infos=infos, tiers=tiers, owned=tuple(owned), omitted=gone)


def _share_one(
    name: str,
    info: TensorInfo,
    of_ranks: Sequence[tuple[int, OfferedTensor]],
    owned: Sequence[dict[str, tuple[Box, ...]]],
) -> str | None:
    """Share out one tensor; why that is impossible, if it is."""
    taken: dict[Box, str] = {}
    wanted = str(info.dtype).removeprefix("torch.")
    for rank, one in of_ranks:
        if (one.shape, one.dtype) != (info.shape, wanted):
            return f"rank {rank} serves it as {list(one.shape)} {one.dtype}"
        mine = []
        for part in one.parts:
            if taken.setdefault(part.box, part.digest) != part.digest:
                return f"the ranks serve different values from {list(part.starts)} on"
            if all(part.box not in other.get(name, ()) for other in owned):
                mine.append(part.box)
        if mine:
            owned[rank][name] = tuple(mine)
    return why_incomplete(info, list(taken))


def boxes_of(one: InvertedTensor) -> tuple[Box, ...]:
    """The parts of a checkpoint tensor that this rank's parameters hold.

    Raises:
        Unfit: a region is no box.

    """
    found = []
    for region in one.regions:
        assert region.source is not None, "regions come from the tensor"
        box = _box(region.source, one.plan.shape)
        if box is None or region.source_dtype.itemsize != one.plan.dtype.itemsize:
            raise Unfit(f"the part that {region.parameter} holds is no box, so that ranks cannot share it")
        found.append(box)
    return tuple(dict.fromkeys(found))


def _box(geometry: Geometry, shape: tuple[int, ...]) -> Box | None:
    """A view of a contiguous tensor as a part of it; None if it is none. Its dimensions may be in any order,
    and several may be one.
    """
    strides = Geometry.contiguous(shape).stride
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    starts = [
        geometry.offset // strides[dim] % shape[dim] if shape[dim] > 1 else 0 for dim in range(len(shape))
    ]
    sizes = [1] * len(shape)
    if not geometry.numel:
        return Box(tuple(starts), tuple(0 for _ in shape))
    for size, stride in zip(geometry.size, geometry.stride, strict=True):
        if size == 1:
            continue
        at = next((index for index, dim in enumerate(wide) if strides[dim] == stride), None)
        while at is not None and at >= 0 and size > shape[wide[at]]:  # several dimensions in one
            if size % shape[wide[at]]:
                return None
            sizes[wide[at]], size = shape[wide[at]], size // shape[wide[at]]
            at -= 1
        if at is None or at < 0:
            return None
        sizes[wide[at]] *= size
    fits = all(start + size <= full for start, size, full in zip(starts, sizes, shape, strict=True))
    return Box(tuple(starts), tuple(sizes)) if fits and math.prod(sizes) == geometry.numel else None


def slices(box: Box) -> tuple[slice, ...]:
    """The index of a part."""
    return tuple(slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))


def _digest(values: torch.Tensor) -> str:
    total = Hash()
    total.add_tensor(values.contiguous())
    return total.digest().hex()


def as_json(owned: Mapping[str, Sequence[Box]]) -> dict[str, Any]:
    """Parts, for other ranks."""
    return {name: [[box.starts, box.sizes] for box in boxes] for name, boxes in owned.items()}


def from_json(found: Mapping[str, Any]) -> dict[str, list[Box]]:
    """The inverse of ``as_json``."""
    return {name: [Box(tuple(a), tuple(b)) for a, b in boxes] for name, boxes in found.items()}
