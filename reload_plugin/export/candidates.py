"""Values that the load format of a layer may have had, guessed from what the layer serves.

Guesses only: each is proven, or not, by processing it again (``trial``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..record.load_format import alive_holders
from ..record.model_record import Group, TensorRecord
from ..record.snapshot import tables_of
from ..record.tensor_layout import Geometry
from ..tensors import wraps_others

_ROWS = 512
"""Rows of the identity matrix that are multiplied at one time."""


def candidates_of(group: Group) -> dict[str, torch.Tensor]:
    """Load-format tensor -> values of its shape and dtype, for each that a guess can be made of.

    A tensor of the same shape in its place is taken for it, whatever processing did to it. A floating-point
    matrix that a kernel has packed is read back through the layer: fed an identity matrix, its kernel answers
    with the weight (but for the sign of zeros, and for values that it takes for zero).
    """
    found: dict[str, torch.Tensor] = {}
    for module, name, record in places(group):
        served = standing(module, name, record)
        if served is None:
            served = cast_back(module, name, record)
        if served is None and name == "weight":
            served = read_back(module, record)
        if served is not None:
            found[record.name] = served
    return found


def places(group: Group) -> Iterator[tuple[nn.Module, str, TensorRecord]]:
    """(module, name in it, record) of each load-format tensor that a module of the group holds."""
    for holder, held in alive_holders(group):
        if not isinstance(held, nn.Module):
            continue
        for (kind, name), record in holder.constructed.items():
            if kind in ("_parameters", "_buffers") and isinstance(record, TensorRecord):
                yield held, str(name), record


def standing(module: nn.Module, name: str, record: TensorRecord) -> torch.Tensor | None:
    """The tensor that is served in the place of a load-format tensor, if it has its shape and dtype."""
    found = (served for served in _in_place(module, name) if has_load_format(served, record))
    return next(found, None)


def cast_back(module: nn.Module, name: str, record: TensorRecord) -> torch.Tensor | None:
    """The tensor in the place of a load-format tensor, if processing only gave it another floating dtype."""
    shape, dtype = record.format.shape, record.format.dtype
    for served in _in_place(module, name):
        if served.shape == shape and served.is_floating_point() and dtype.is_floating_point:
            return served.to(dtype)
    return None


def _in_place(module: nn.Module, name: str) -> Iterator[torch.Tensor]:
    tables = tables_of(module)
    for kind in ("_parameters", "_buffers", "attribute"):
        served = tables[kind].get(name)
        if isinstance(served, torch.Tensor) and not wraps_others(type(served)) and not served.is_meta:
            yield served.detach()


def has_load_format(served: torch.Tensor, record: TensorRecord) -> bool:
    """Whether a served tensor has the shape, the dtype and the device of a load-format tensor, and values."""
    same = served.shape == record.format.shape and served.dtype == record.format.dtype
    return same and not served.is_meta and served.untyped_storage().nbytes() >= served.nbytes


@torch.no_grad()
def read_back(module: nn.Module, record: TensorRecord) -> torch.Tensor | None:
    """The matrix of a linear layer, by multiplying an identity matrix with it; None for other layers.

    The result has the shape and the dtype of ``record``: [outputs, inputs].
    """
    method: Any = getattr(module, "quant_method", None)
    shape, dtype = record.format.shape, record.format.dtype
    if len(shape) != 2 or not dtype.is_floating_point or not hasattr(method, "apply"):
        return None
    return multiplied_by_identity(module, shape, dtype, record_device(module))


def multiplied_by_identity(
    module: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | None,
    one: float = 1.0,
) -> torch.Tensor | None:
    """What a linear layer of [outputs, inputs] computes for an identity matrix, transposed: its weight, as
    its kernel has it. None where its kernel cannot be called so. ``one``: the number in place of the ones.
    """
    method: Any = module.quant_method
    weight = torch.empty(shape, dtype=dtype, device=device)
    for start in range(0, shape[1], _ROWS):
        rows = min(_ROWS, shape[1] - start)
        some = torch.zeros(rows, shape[1], dtype=dtype, device=device)
        some[torch.arange(rows), torch.arange(start, start + rows)] = one
        try:
            answer = method.apply(module, some)
        except Exception:  # noqa: BLE001 - a kernel of any kind; without an answer there is no guess
            return None
        if not isinstance(answer, torch.Tensor) or answer.shape != (rows, shape[0]) or answer.dtype != dtype:
            return None
        weight[:, start : start + rows] = answer.t()
    return weight


def record_device(module: nn.Module) -> torch.device | None:
    """Where a module's tensors are; None for torch's default."""
    return next((parameter.device for parameter in module.parameters()), None)


def as_load_format(values: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """A copy of values with exactly the layout of the load format, so that regions of it can be cut out."""
    storage = torch.empty(0, dtype=values.dtype, device=values.device).untyped_storage()
    end = geometry.offset + 1 + sum((n - 1) * s for n, s in zip(geometry.size, geometry.stride, strict=True))
    storage.resize_((end if geometry.numel else 0) * values.dtype.itemsize)
    empty = torch.empty(0, dtype=values.dtype, device=values.device)
    made = empty.set_(storage, geometry.offset, geometry.size, geometry.stride)
    return made.copy_(values)
