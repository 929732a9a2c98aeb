"""Which tensor of a layer makes the difference, where the layer's processing has no inverse.

Each tensor is changed in all its elements and the layer processed: what comes out otherwise depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..commit.group_commit import Commit
from ..device.ops import ops_for
from ..plan.copy_plan import CopyPlan, copy_by_plan
from ..record.model_record import Group
from ..record.staged_group import StagedGroup
from ..transaction.engine_state import EngineState
from .trial import Fill, Trial, as_bits

MOST = 64
"""Tensors of a layer up to which each of them is changed by itself."""

Masks = list[torch.Tensor]
"""For each tensor of the kernel format, which of its elements are meant."""


def differing_tensors(
    model: nn.Module,
    state: EngineState,
    groups: Sequence[Group],
    tensors: Mapping[str, torch.Tensor],
    suspects: Sequence[str],
    copy_plan: CopyPlan,
) -> set[str] | None:
    """The suspects that make the difference between what is served and what the tensors give.

    Args:
        model: recorded, and not being reloaded.
        state: of the model.
        groups: layers that differ.
        tensors: everything that is loaded into them.
        suspects: names of tensors that may be the reason.
        copy_plan: how all of them are loaded.

    Returns:
        None where it cannot be told.

    """
    if len(suspects) > MOST:
        return None
    served, made = _processed(model, state, groups, tensors, copy_plan)
    differs = [as_bits(a) != as_bits(b) for a, b in zip(served, made, strict=True)]
    covered = [torch.zeros_like(mask) for mask in differs]
    found: dict[str, Masks] = {}
    for name in suspects:
        reach = [torch.zeros_like(mask) for mask in differs]
        for changed in _changed(tensors[name]):
            _, other = _processed(model, state, groups, {**tensors, name: changed}, copy_plan)
            for mask, a, b in zip(reach, made, other, strict=True):
                mask |= as_bits(a) != as_bits(b)
        found[name] = reach
        for mask, more in zip(covered, reach, strict=True):
            mask |= more
    if any(bool((mask & ~all_).any()) for mask, all_ in zip(differs, covered, strict=True)):
        return None
    guilty = {name for name, reach in found.items() if _meets(differs, reach)}
    for name in guilty:
        others = [torch.zeros_like(mask) for mask in differs]
        for second in guilty - {name}:
            for mask, more in zip(others, found[second], strict=True):
                mask |= more
        alone = [mask & ~rest for mask, rest in zip(found[name], others, strict=True)]
        if not _meets(differs, alone):
            return None
    return guilty


def _meets(one: Masks, other: Masks) -> bool:
    return any(bool((a & b).any()) for a, b in zip(one, other, strict=True))


def _changed(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor with all elements changed, in two ways: by chance one may come out as before."""
    if tensor.is_floating_point():
        return [-tensor, torch.roll(tensor, 1).mul(0.5)]
    if tensor.dtype == torch.bool:
        return [~tensor]
    return [~tensor, tensor ^ 0x55]


def _processed(
    model: nn.Module,
    state: EngineState,
    groups: Sequence[Group],
    tensors: Mapping[str, torch.Tensor],
    copy_plan: CopyPlan,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Served tensors of the kernel format, and those that processing makes of checkpoint tensors."""
    served: list[torch.Tensor] = []
    made: list[torch.Tensor] = []

    def see(_: StagedGroup, commit: Commit) -> None:
        for old, new in commit.copies:
            served.append(old)
            made.append(new.clone())

    trial = Trial(model, state, frozenset(group.name for group in groups), from_served=False)
    trial.run(_loading(tensors, copy_plan), see)
    return served, made


def _loading(tensors: Mapping[str, torch.Tensor], copy_plan: CopyPlan) -> Fill:
    """Fills in checkpoint tensors by the copy plan, as far as the groups have places for them."""

    def fill(groups: Sequence[StagedGroup]) -> None:
        storages = {r.name: s.storage for staged in groups for s in staged.storages for r in s.records}
        for name, tensor in tensors.items():
            plan = copy_plan.of[name]
            here = [copy for copy in plan.copies or () if copy.parameter in storages]
            if here and len(here) == len(plan.copies or ()):
                device = storages[here[0].parameter].device
                copy_by_plan(plan, tensor, storages.__getitem__, ops_for(device))

    return fill
