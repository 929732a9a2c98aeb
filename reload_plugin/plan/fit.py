"""Whether a weight fits the place that a loader writes it to, where torch itself would not complain."""

from __future__ import annotations

import math
import re

import torch

from .copy_plan import TensorPlan

_MAY_BE_BROADCAST = re.compile(r"scale|zero|alpha|shape")
"""Parameters that a loader fills with one number."""


def misfit(
    target: torch.Tensor, source: torch.Tensor, parameter: str, shape: tuple[int, ...] | None
) -> str | None:
    """Why a copy that torch would do is not what a checkpoint means; None where it is.

    Args:
        target: view of the parameter that is written.
        source: what is copied there.
        parameter: name of the parameter.
        shape: of the weight in the checkpoint, where it is known.

    """
    broadcast = source.numel() != target.numel()
    if broadcast and not (source.numel() == 1 and _MAY_BE_BROADCAST.search(parameter)):
        return (
            f"shape {list(source.shape if shape is None else shape)} would be broadcast from "
            f"{list(source.shape)} to {list(target.shape)} in {parameter}"
        )
    whole = not (target.dtype.is_floating_point or target.dtype.is_complex)
    cut = whole and source.dtype.is_floating_point and source.dtype.itemsize > 1
    if cut or (source.dtype.is_complex and not target.dtype.is_complex):
        return f"{source.dtype} cannot be loaded into {target.dtype} of {parameter}"
    return None


def left_over(tensor_plan: TensorPlan) -> str | None:
    """Why a weight is too large for the place it goes to: the loader takes only a part of it. None if it
    takes all, or nothing.
    """
    copies = tensor_plan.copies or ()
    used = sum(copy.source.numel for copy in copies if copy.source is not None)
    if 0 < used < math.prod(tensor_plan.shape):
        return f"shape {list(tensor_plan.shape)}, of which {copies[0].parameter} takes {used} elements only"
    return None
