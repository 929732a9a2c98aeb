"""Accounting by slots: every parameter and every weight, by identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from ..tensors import storage_id
from .arrivals import Loaded
from .mismatches import Mismatches


def check_slots(
    stages: Iterable[StagedGroup],
    loaded: Loaded,
    mismatches: Mismatches,
    rule_of: Callable[[str, tuple[int, ...]], str | None],
    was_written: Callable[[str], str | None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Account for every parameter and every weight; offenders go into ``mismatches``.

    Args:
        stages: all groups, loaded.
        loaded: what the stream brought.
        mismatches: receives missing and unexpected weights.
        rule_of: the rule by which a weight nobody used may be ignored.
        was_written: how completely the checkpoint that the engine started with writes a parameter:
            ``whole``, ``part`` or ``none``; None when nothing is known.

    Returns:
        (kept, ignored), both name -> rule, as in the report.

    """
    kept: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for stage in stages:
        for storage in stage.storages:
            if storage.primary.is_parameter and not storage.coverage.complete:
                _check_parameter(stage, storage, mismatches, kept, was_written)
    rejected = mismatches.unexpected.keys() | mismatches.misshapen.keys()
    # Direct reads are not in shapes: files are read straight to parameters that use them.
    used = (
        loaded.written.keys()
        | loaded.in_new_parameters
        | {name for name, tensor_plan in loaded.tensor_plans.items() if tensor_plan.copies != ()}
    )
    for name, shape in loaded.shapes.items():
        if name not in used and name not in rejected:
            rule = rule_of(name, shape)
            if rule is None:
                mismatches.unexpected[name] = "the model's loader has no place for it"
            else:
                ignored[name] = rule
    return kept, ignored


def coverage_of(stages: Iterable[StagedGroup]) -> dict[str, str]:
    """Parameter -> ``whole``, ``part`` or ``none``: how much of it was written."""
    found = {}
    for stage in stages:
        for storage in stage.storages:
            if storage.primary.is_parameter:
                part = "part" if storage.coverage.touched else "none"
                found[storage.primary.name] = "whole" if storage.coverage.complete else part
    return found


def _check_parameter(
    stage: StagedGroup,
    storage: StagedStorage,
    mismatches: Mismatches,
    kept: dict[str, str],
    was_written: Callable[[str], str | None],
) -> None:
    record = storage.primary
    if replaced_by_loader(stage, storage):
        return
    touched = storage.coverage.touched
    if touched and not record.expected:
        return  # the rest of it is the constructor's: padding
    known = was_written(record.name)
    as_at_start = known == ("part" if touched else "none")
    unknown = known is None and not touched and not record.expected and _has_method(stage, record.layer)
    optional = unknown and (record.traced or record.name.endswith(("scale", "zero_point")))
    if as_at_start or optional:
        kept[record.name] = "not in the engine's own checkpoint" if as_at_start else "the constructor's value"
    else:
        mismatches.missing[record.name] = storage.coverage.describe_gap()


def replaced_by_loader(stage: StagedGroup, storage: StagedStorage) -> bool:
    """Whether a loader put a tensor of its own in a parameter's place (GGUF does)."""
    data = stage.loaded_data(storage.primary)
    return data is not None and data.numel() > 0 and storage_id(data) != storage.key


def _has_method(stage: StagedGroup, layer: str) -> bool:
    module = next((layer_.ref() for layer_ in stage.group.layers if layer_.name == layer), None)
    return getattr(module, "quant_method", None) is not None
