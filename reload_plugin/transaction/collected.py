"""Weights of an iterator that are collected first, and what a manifest says of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint import HostCopy, SpillFile, TensorInfo, spill_to_file
from ..errors import SERVES_OLD, SourceError, weights_error
from ..load.stream import WeightStream
from ..options import ReloadOptions
from ..plan.checkpoint_plan import Plan
from ..plan.mismatches import Mismatches
from ..plan.tracer import LoadTrace
from .engine_state import EngineState
from .known import plan_for

Weights = Iterable[tuple[str, torch.Tensor]]
Kept = HostCopy | SpillFile


def collected(weights: Weights, chosen: ReloadOptions, in_memory: int | None) -> Kept:
    """All weights of an iterator, in memory up to ``in_memory`` bytes, else in a file.

    Raises:
        WeightsError: some are no tensors with values, or come twice, or are not finite.

    """
    mismatches = Mismatches()
    trace = LoadTrace(mismatches)
    feed = WeightStream(weights, trace, lambda: None)
    kept: Kept = (
        SpillFile(chosen.spill_dir, "the iterator") if in_memory is None else HostCopy("the iterator")
    )
    try:
        for name, tensor in _items(feed):
            trace.note_arrival(name, tensor)
            if chosen.check_finite and (reason := not_finite(tensor)) is not None:
                mismatches.nonfinite[name] = reason
            kept.add(name, tensor)
            if isinstance(kept, HostCopy) and trace.loaded.nbytes > (in_memory or 0):
                in_file = spill_to_file(kept, chosen.spill_dir)
                kept.close()
                kept = in_file
        if mismatches:
            raise weights_error("the iterator", SERVES_OLD, **vars(mismatches))
        if not trace.loaded.shapes:
            raise SourceError(f"the iterator gave no weights. {SERVES_OLD}")
    except BaseException:
        kept.close()
        raise
    return kept


def _items(feed: WeightStream) -> Iterator[tuple[str, torch.Tensor]]:
    with contextlib.suppress(StopIteration):
        while True:
            name, tensor = feed.fetch()
            if tensor is not None:
                yield name, tensor


def plan_of_manifest(model: nn.Module, state: EngineState, chosen: ReloadOptions) -> Plan | None:
    """The manifest, checked like the headers of a folder, before a weight is asked for."""
    if chosen.manifest is None:
        return None
    infos = [TensorInfo(name, tuple(shape), dtype) for name, (shape, dtype) in chosen.manifest.items()]
    if chosen.partial:
        return None  # checked with the weights, before anything is touched
    plan = plan_for(model, state, _Manifest(infos))
    if plan is not None:
        plan.raise_mismatches("the manifest")
    return plan


class _Manifest:
    """What an iterator says it will bring."""

    description = "the manifest"

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        self._infos = infos

    def infos(self) -> Sequence[TensorInfo]:
        return self._infos

    def read(self, order: Any = None, pool: Any = None, destinations: Any = None) -> Any:
        raise NotImplementedError

    def unchanged(self) -> bool:
        return False


def held_to(weights: Weights, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, refused as soon as one is not what the manifest says."""
    for item in weights:
        name, tensor = item if isinstance(item, (tuple, list)) and len(item) == 2 else (None, None)
        if isinstance(name, str) and isinstance(tensor, torch.Tensor):
            info = plan.infos.get(name)
            here = f"{list(tensor.shape)} {tensor.dtype}"
            if info is None:
                raise SourceError(f"{name} ({here}) is not in the manifest. {SERVES_OLD}")
            if info.shape != tuple(tensor.shape) or info.dtype != tensor.dtype:
                says = f"{list(info.shape)} {info.dtype}"
                raise SourceError(f"{name} is {here} and the manifest says {says}. {SERVES_OLD}")
        yield item


def not_finite(tensor: torch.Tensor) -> str | None:
    """How many values of a weight are NaN or infinite, in words; None when all are finite."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return None
    values = tensor.detach()
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)
    wrong = values.numel() - int(torch.isfinite(values).sum())
    return f"{wrong} of {values.numel()} values are NaN or infinite" if wrong else None
