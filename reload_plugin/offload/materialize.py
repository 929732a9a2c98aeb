"""A dispatched or offloaded model becomes an ordinary one, and goes back.

All values are collected before anything of the model is touched; then a few assignments follow that cannot
fail. So a file that is missing or truncated leaves the model dispatched, as it was.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..interrupts import held
from .collected import Value, collected, needed_for, place_value
from .hooks import Dispatch
from .memory import Needs, refuse_if_short
from .placement import Placement, placements
from .put_back import PutBack, put_back_of
from .ties import tie_groups


class MaterializeReport(BaseModel):
    """What ``materialize`` did."""

    model_config = ConfigDict(frozen=True)

    device: str
    """Where all tensors are now."""
    tensors: int
    """Parameters and buffers; tied ones count once."""
    nbytes: int
    """Their bytes."""
    needed: dict[str, int]
    """Device -> bytes that were allocated there."""
    available: dict[str, int]
    """Device -> bytes that could be allocated there before."""
    where: dict[str, int]
    """Where the values were (``module``, ``memory``, ``dat``, ``safetensors``) -> how many."""
    ties: tuple[tuple[str, ...], ...] = ()
    """Names that are one tensor."""
    hooks: int
    """Modules whose hook or cache was taken off."""
    seconds: float


def materialize(model: nn.Module, device: str | torch.device = "cpu") -> MaterializeReport:
    """Make an ordinary model of one that Accelerate, or a cache of compressed-tensors, has offloaded.

    Values come from wherever they are: modules, a mapping, ``.dat`` files, safetensors files. Tied weights
    are one parameter again. Hooks, the wrapped ``to`` and ``cuda``, and ``hf_device_map`` are gone. Tensors
    that were in their modules stay the same objects; values of a mapping become the parameters' memory
    without a copy where they are on ``device`` already.

    Args:
        model: any module; one that is not offloaded is moved to ``device``.
        device: where all tensors will be.

    Memory: what is not on ``device`` yet, and one tensor.

    Raises:
        OffloadError: memory does not suffice, or a value is nowhere. The model is as before.
        SourceError: a file is missing, truncated or has changed. The model is as before.

    """
    return _materialize(model, device).report


@contextlib.contextmanager
def materialized(model: nn.Module, device: str | torch.device = "cpu") -> Iterator[MaterializeReport]:
    """``materialize`` for the length of a block; then the same dispatch again, with the values as they are
    then.

    Values that changed are written to where they were: mappings in place, ``.dat`` files and files of the
    offload folder replaced whole, and the index pointed at new files where the old ones are a checkpoint,
    which is never written. After an exception in the block the same happens.

    Args:
        model: as for ``materialize``.
        device: as there.

    Raises:
        OffloadError: as ``materialize``; at the end, the block changed the model's modules or shapes, or a
            changed value could not be written. Then the model stays an ordinary one with all its values.
        SourceError: as ``materialize``.

    """
    state = _materialize(model, device, keep=True)
    try:
        yield state.report
    finally:
        assert state.put_back is not None, "it was asked for"
        state.put_back.run()


@dataclass(frozen=True)
class _Done:
    report: MaterializeReport
    put_back: PutBack | None


def _materialize(model: nn.Module, device: str | torch.device, keep: bool = False) -> _Done:
    started = time.perf_counter()
    target = torch.empty(0, device=device).device
    places = placements(model)
    dispatch = Dispatch(model)
    groups = tie_groups(model, places)
    needs = needed_for(groups, target)
    available = refuse_if_short(needs, f"Bringing the model's weights to {target}")
    values = collected(groups, target)
    put_back = put_back_of(model, dispatch, places, values) if keep else None
    with held():
        dispatch.take_off()
        for value in values:
            place_value(value)
    return _Done(_report(places, values, needs, available, dispatch, target, started), put_back)


def _report(
    places: Sequence[Placement],
    values: Sequence[Value],
    needs: Needs,
    available: Mapping[str, int],
    dispatch: Dispatch,
    target: torch.device,
    started: float,
) -> MaterializeReport:
    return MaterializeReport(
        device=str(target),
        tensors=len(values),
        nbytes=sum(value.tensor.nbytes for value in values),
        needed={str(device): nbytes for device, nbytes in needs.items()},
        available=dict(available),
        where=dict(Counter(place.where for place in places)),
        ties=tuple(tuple(place.name for place in value.places) for value in values if len(value.places) > 1),
        hooks=dispatch.hooks,
        seconds=time.perf_counter() - started,
    )
