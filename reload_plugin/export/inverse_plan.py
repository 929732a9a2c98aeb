"""The copy plan inverted: checkpoint tensors put together from the regions of parameters that hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..plan.copy_plan import CopyPlan, StridedCopy, TensorPlan
from ..record.tensor_layout import Geometry, TensorFormat
from .candidates import as_load_format
from .trial import same_bits


@dataclass(frozen=True)
class InvertedTensor:
    """One checkpoint tensor as the regions that hold it."""

    name: str
    plan: TensorPlan
    regions: tuple[StridedCopy, ...]
    """The copies of the plan that come from the tensor, to be done backwards."""
    lost: str | None
    """Why no region tells its values, if none does."""

    @property
    def parameters(self) -> frozenset[str]:
        """Load-format tensors that hold it."""
        return frozenset(region.parameter for region in self.regions)

    @property
    def unused(self) -> bool:
        """Whether the model's loader passes it over, so that nothing holds it and nothing asks for it."""
        return self.plan.copies is not None and not self.regions


class Unfit(Exception):  # noqa: N818 - an answer, and no error of anybody
    """Why a checkpoint tensor cannot be put together."""


def inverted(
    names: Iterable[str], copy_plan: CopyPlan, is_later: Mapping[str, int]
) -> dict[str, InvertedTensor]:
    """The inverse of the copy plan for some checkpoint tensors.

    Args:
        names: of tensors that the plan has.
        copy_plan: how they are loaded.
        is_later: name -> place in the order of a cold start: of several tensors that are written to one slot
            it leaves the last.

    """
    overwritten: dict[str, str] = {}
    for slot_names in copy_plan.contested.values():
        ordered = sorted(slot_names, key=lambda name: (is_later.get(name, len(is_later)), name))
        overwritten.update(dict.fromkeys(ordered[:-1], ordered[-1]))
    found = {}
    for name in names:
        plan = copy_plan.of[name]
        regions = tuple(copy for copy in plan.copies or () if copy.source is not None)
        lost = None
        if plan.copies is None:
            lost = "the model's loader computes other values from it"
        elif name in overwritten:
            lost = f"its place holds {overwritten[name]}, which is loaded after it"
        found[name] = InvertedTensor(name, plan, regions, lost)
    return found


def assembled(
    one: InvertedTensor,
    values: Mapping[str, torch.Tensor],
    formats: Mapping[str, TensorFormat],
    parts: bool = False,
) -> torch.Tensor:
    """A checkpoint tensor in the dtype in which the plan has it. The caller owns it.

    Args:
        one: the tensor.
        values: load-format tensor -> values, of its shape and dtype.
        formats: load-format tensor -> its format.
        parts: elements that are in no region stay without values.

    Raises:
        Unfit: some element is in no region, or regions disagree, or its dtype cannot hold what is served.

    """
    if one.lost is not None:
        raise Unfit(one.lost)
    if missing := sorted(one.parameters - values.keys()):
        raise Unfit(f"the values of {missing[0]} cannot be recovered")
    shape, dtype = one.plan.shape, one.plan.dtype
    device = next(iter(values[region.parameter].device for region in one.regions), torch.device("cpu"))
    made = torch.empty(shape, dtype=dtype, device=device)
    known = None if _is_whole(one.regions, shape) else torch.zeros(made.shape, dtype=torch.bool, device="cpu")
    for region in one.regions:
        assert region.source is not None
        held = _region_of(region, values[region.parameter], formats[region.parameter])
        target = region.source.view(_as(made, region.source_dtype))
        flags = None if known is None else region.source.view(known)
        cast = held.to(target.dtype)
        if not same_bits(cast.to(held.dtype), held):
            raise Unfit(f"{dtype} cannot hold what {region.parameter} serves as {held.dtype}")
        if flags is not None and bool(flags.any()):
            _check_agreement(target, flags, cast, region)
        target.copy_(cast)
        if flags is not None:
            flags.fill_(True)
    if not parts and known is not None and not bool(known.all()):
        gone = math.prod(shape) - int(known.sum())
        raise Unfit(f"{gone:,} of its {math.prod(shape):,} elements are not loaded by the model")
    return made


def _check_agreement(
    target: torch.Tensor, known: torch.Tensor, held: torch.Tensor, region: StridedCopy
) -> None:
    where = known.to(target.device)
    if not same_bits(target[where], held[where]):
        raise Unfit(f"parameters that are copies of it, such as {region.parameter}, serve different values")


def _is_whole(regions: Sequence[StridedCopy], shape: tuple[int, ...]) -> bool:
    """Whether one region holds all of a tensor."""
    source = regions[0].source if len(regions) == 1 else None
    return (
        source is not None and source.offset == 0 and source.numel == math.prod(shape) and _is_dense(source)
    )


def _is_dense(geometry: Geometry) -> bool:
    """Whether its elements lie one behind the other, in whatever order of dimensions."""
    expected = 1
    steps = zip(geometry.stride, geometry.size, strict=True)
    for step, count in sorted((step, count) for step, count in steps if count > 1):
        if step != expected:
            return False
        expected *= count
    return True


def _as(made: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return made if made.dtype == dtype else made.view(dtype)


def _region_of(region: StridedCopy, values: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """The region of a parameter that a copy writes to, in its values."""
    like = values.stride() == fmt.geometry.stride
    shift = (values.storage_offset() - fmt.geometry.offset) * fmt.dtype.itemsize if like else 0
    if not like or shift % region.target_dtype.itemsize:
        values, shift = as_load_format(values, fmt.geometry), 0
    start = region.target.offset + shift // region.target_dtype.itemsize
    empty = torch.empty(0, dtype=region.target_dtype, device=values.device)
    return empty.set_(values.untyped_storage(), start, region.target.size, region.target.stride)
