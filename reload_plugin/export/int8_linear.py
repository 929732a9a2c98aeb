"""Reading back the matrix of a linear layer whose INT8 weights are packed in a native handle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..record.model_record import Group, TensorRecord
from .candidates import multiplied_by_identity, places, record_device, standing

_STEPS = 100
"""Quantization steps of the input that the kernel is asked with: many, for precision, and not clipped."""


@torch.no_grad()
def int8_candidates(group: Group) -> dict[str, torch.Tensor]:
    """Load-format tensor -> INT8 values, for layers that have scales and whose values no tensor shows.

    The layer multiplies an identity matrix: each answer is value * scale of its channel, in a floating dtype
    of at least 8 bits of precision, so that dividing by the scale and rounding gives the value.
    """
    found = {}
    for module, name, record in places(group):
        fmt = record.format
        if name != "weight" or fmt.dtype != torch.int8 or len(fmt.shape) != 2:
            continue
        if standing(module, name, record) is None and (values := _read_back(module, record)) is not None:
            found[record.name] = values
    return found


def _read_back(module: nn.Module, record: TensorRecord) -> torch.Tensor | None:
    scale = getattr(module, "weight_scale", None)
    dtype = getattr(module, "params_dtype", torch.bfloat16)
    if not isinstance(scale, torch.Tensor) or not hasattr(getattr(module, "quant_method", None), "apply"):
        return None
    if scale.numel() not in (1, record.format.shape[0]):
        return None
    asked, counted = _input(module)
    answer = multiplied_by_identity(module, record.format.shape, dtype, record_device(module), asked)
    if answer is None:
        return None
    values = (answer.double() / (scale.double().reshape(-1, 1) * counted)).round()
    return values.to(torch.int8) if bool((values.abs() <= 128).all()) else None


def _input(module: Any) -> tuple[float, float]:
    """The number to ask with in place of one, and what the kernel makes of it by quantizing it."""
    scale, zero_point = getattr(module, "input_scale", None), getattr(module, "input_zero_point", None)
    if not isinstance(scale, torch.Tensor) or scale.numel() != 1:
        return 1.0, 1.0
    step = float(scale)
    zero = int(zero_point) if isinstance(zero_point, torch.Tensor) and zero_point.numel() == 1 else 0
    return _STEPS * step, min(_STEPS, 127 - zero) * step
