"""Values of checkpoint tensors that nobody can read any more, from what the engine serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..record.model_record import Group
from ..record.tensor_layout import TensorFormat
from ..report import Tier
from ..transaction.engine_state import EngineState
from .candidates import places, read_back
from .components import Component
from .inverse_plan import InvertedTensor, Unfit, assembled
from .parts import boxes_of
from .recovery import Recoveries


@dataclass
class _Held:
    """What is known of the load format of a component."""

    values: dict[str, torch.Tensor]
    tier: dict[str, Tier]
    reason: dict[str, str]
    """Load-format tensor whose values are not known -> why."""


class ServedTensors:
    """Puts checkpoint tensors together from what is served.

    Args:
        model: recorded, and not being reloaded.
        state: of the model.
        dequantize: take what kernels compute with for what was quantized, where that is gone.
        parts: this rank holds parts of tensors: they are made in the shape of the whole, and the other parts
            have no values.

    """

    def __init__(
        self, model: nn.Module, state: EngineState, dequantize: bool = False, parts: bool = False
    ) -> None:
        self.recoveries = Recoveries(model, state)
        self._dequantize = dequantize
        self._parts = parts
        self._formats: Mapping[str, TensorFormat] = {
            record.name: record.format for group in state.record.groups for record in group.tensors
        }

    def of(
        self, component: Component, dtypes: Mapping[str, Iterable[torch.dtype]]
    ) -> Iterator[tuple[InvertedTensor, torch.Tensor | str, Tier]]:
        """The tensors of a component, one by one; in place of one that is not known, why.

        Args:
            component: tensors, and the layers that hold them.
            dtypes: name -> dtypes to write it in, the wanted ones first. The first that holds the served
                values exactly is taken.

        """
        held = self._held(component.groups)
        for one in component.tensors:
            made = self._made(one, held, dtypes[one.name])
            yield one, made, _worst(held.tier[name] for name in one.parameters if name in held.tier)

    def _made(self, one: InvertedTensor, held: _Held, dtypes: Iterable[torch.dtype]) -> torch.Tensor | str:
        if one.lost is not None:
            return one.lost
        for name in sorted(one.parameters):
            if name not in held.values:
                return held.reason.get(name, f"processing keeps nothing of {name}")
        reason = ""
        for dtype in dict.fromkeys([*dtypes, one.plan.dtype, *_served_dtypes(one)]):
            try:
                if self._parts:
                    boxes_of(one)
                return assembled(_in_dtype(one, dtype), held.values, self._formats, self._parts)
            except Unfit as error:
                reason = reason or str(error)
        return reason

    def _held(self, groups: Iterable[Group]) -> _Held:
        recovered = self.recoveries.values_of(groups)
        held = _Held(recovered.values, {}, {})
        for name in recovered.values:
            held.tier[name] = "inverse" if name in recovered.inverted else "plan"
        for group in groups:
            found = self.recoveries.of(group)
            parameters = [record.name for record in group.tensors if record.is_parameter]
            if found.way == "none":
                held.reason.update(dict.fromkeys(parameters, found.reason))
            for name in found.lossy.intersection(parameters):
                if self._dequantize:
                    held.tier[name] = "dequantized"
                else:
                    held.values.pop(name, None)
                    held.reason[name] = "it was quantized, and what it was quantized from is gone"
            if self._dequantize and found.way == "none":
                _dequantize(group, held)
        return held


def _dequantize(group: Group, held: _Held) -> None:
    for module, name, record in places(group):
        if name == "weight" and record.name not in held.values:
            values = read_back(module, record)
            if values is not None:
                held.values[record.name] = values
                held.tier[record.name] = "dequantized"


def _worst(tiers: Iterable[Tier]) -> Tier:
    order: tuple[Tier, ...] = ("plan", "inverse", "dequantized")
    return max(tiers, key=order.index, default="plan")


def _served_dtypes(one: InvertedTensor) -> list[torch.dtype]:
    found = {region.target_dtype for region in one.regions}
    return sorted(found, key=lambda dtype: -dtype.itemsize)


def _in_dtype(one: InvertedTensor, dtype: torch.dtype) -> InvertedTensor:
    """The same tensor in another dtype, where its regions are cast as a whole."""
    if dtype == one.plan.dtype:
        return one
    if any(region.source_dtype != one.plan.dtype for region in one.regions):
        raise Unfit(f"it is read as another dtype than {one.plan.dtype}")
    regions = tuple(dataclasses.replace(region, source_dtype=dtype) for region in one.regions)
    return dataclasses.replace(one, plan=dataclasses.replace(one.plan, dtype=dtype), regions=regions)


def half_a_step(values: torch.Tensor) -> float:
    """Half of the largest step between neighbouring values of a row, for values that were quantized.

    A row has as many different values as its quantization has steps, or fewer; the smallest distance between
    two of them is taken for its step.
    """
    largest = 0.0
    rows = values.detach().float().reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
    for row in rows:
        distances = row.unique().diff()
        if len(distances):
            largest = max(largest, float(distances.min()) / 2)
    return largest
