"""What a reload of a dispatched model will write, and all that does not fit, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import OffloadError, weights_error
from ..plan.fit import misfit
from ..plan.mismatches import Mismatches
from ..plan.source import TensorInfo
from .conversions import LoadGroup, ignored_by_rule, load_groups
from .placement import Placement, placements
from .ties import tie_groups

UNCHANGED = "The model is as it was."


@dataclass(frozen=True)
class ReloadPlan:
    """Groups in the order in which they are read, and where their results go."""

    places: Sequence[Placement]
    groups: Sequence[LoadGroup]
    order: Sequence[str]
    """Names of the checkpoint, in the order in which the groups ask for them."""
    targets: Mapping[str, Sequence[Placement]]
    """Name in the model -> every place that gets its value: those of tied names too."""
    group_bytes: int
    """Of the largest group, what it reads and what it makes."""
    kept: Mapping[str, str]
    ignored: Mapping[str, str]


@dataclass
class _Checked:
    """The dry run's findings."""

    order: list[str] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    """Name in the model -> names it is made of."""
    largest: int = 0
    wrong: Mismatches = field(default_factory=Mismatches)


def plan_reload(model: nn.Module, infos: Iterable[TensorInfo], source: str) -> ReloadPlan:
    """Plan a reload.

    Args:
        model: dispatched or not.
        infos: what the source holds.
        source: its description, for messages.

    Raises:
        WeightsError: weights are missing, unexpected, duplicate or misshapen; all of them are named.
        OffloadError: the model has tensors without a value.
        UnsupportedError: see ``load_groups``.

    """
    places = placements(model)
    lost = [place.name for place in places if place.stored is None]
    if lost:
        raise OffloadError(
            f"On meta, with no hook or cache that holds the values: {', '.join(lost[:8])}. There is no place "
            "to write new ones to. Nothing was changed. Load the model anew."
        )
    own = {place.name: place.shown for place in places if place.persistent}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    groups, unexpected, duplicate = load_groups(model, meta, infos)
    checked = _dry_run(model, groups, meta)
    targets = _targets(model, places)
    absent = {name for name in own if not any(place.name in checked.made for place in targets[name])}
    ignored = _ignored(model, places, unexpected)
    kept = ignored_by_rule(absent, tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()))
    wrong = checked.wrong
    wrong.unexpected = {name: why for name, why in unexpected.items() if name not in ignored}
    wrong.duplicate = duplicate
    covered = wrong.misshapen.keys() | wrong.missing.keys()
    spoken_for = {place.name for name in covered if name in targets for place in targets[name]}
    wrong.missing.update(dict.fromkeys(absent - kept.keys() - spoken_for, ""))
    if wrong:
        raise weights_error(source, UNCHANGED, **vars(wrong))
    return ReloadPlan(places, groups, checked.order, targets, checked.largest, kept, ignored)


def _dry_run(model: nn.Module, groups: Sequence[LoadGroup], meta: Mapping[str, torch.Tensor]) -> _Checked:
    checked = _Checked()

    def fetch(info: TensorInfo) -> torch.Tensor:
        checked.order.append(info.name)
        return info.meta()

    for group in groups:
        for info, _ in group.sources:
            if why := misfit(_scalar(group.dtype), _scalar(info.dtype), group.first, None):
                checked.wrong.misshapen[info.name] = why
        try:
            with torch.no_grad():
                made = group.convert(model, fetch)
        except Exception as error:  # noqa: BLE001 - of any operation of transformers
            checked.wrong.misshapen[group.first] = f"made of {group.names}: {type(error).__name__}: {error}"
            continue
        for name, value in made.items():
            _check(checked, group, name, value, meta)
        nbytes = sum(value.nbytes for value in made.values())
        checked.largest = max(checked.largest, group.nbytes + nbytes)
    return checked


def _scalar(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((), dtype=dtype, device="meta")


def _check(
    checked: _Checked, group: LoadGroup, name: str, value: torch.Tensor, meta: Mapping[str, torch.Tensor]
) -> None:
    if name not in meta:
        checked.wrong.unexpected[group.names] = f"the model has no {name}"
    elif value.shape != meta[name].shape:
        found, wanted = list(value.shape), list(meta[name].shape)
        if group.converter is not None and value.numel() < meta[name].numel():
            checked.wrong.missing[name] = f"{found} of {wanted} came, in {group.names}"
        elif group.converter is not None:
            checked.wrong.misshapen[name] = f"{found} in place of {wanted}, made of {group.names}"
        else:
            checked.wrong.misshapen[group.names] = f"{found} in place of {wanted} of {name}"
            checked.made[name] = group.names
    else:
        checked.made[name] = group.names


def _targets(model: nn.Module, places: Sequence[Placement]) -> dict[str, Sequence[Placement]]:
    """Name -> the placements that are one tensor with it."""
    found: dict[str, Sequence[Placement]] = {}
    for group in tie_groups(model, places, trust_declared=True):
        found.update(dict.fromkeys((place.name for place in group), group))
    return found


def _ignored(model: nn.Module, places: Sequence[Placement], unexpected: Mapping[str, str]) -> dict[str, str]:
    """Names of the checkpoint that the model does not use -> rule."""
    rules = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    passing = {place.name for place in places if not place.persistent}
    found = ignored_by_rule(unexpected, rules)
    found.update({name: "a buffer that is not persistent" for name in unexpected if name in passing})
    return found
