"""What a tensor is, beside its values: which storage it lies in, and whether it only wraps others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

T = TypeVar("T")


def remembered(asked: Callable[[type], T]) -> Callable[[type], T]:
    """A question about a class, with the last few thousand answers kept."""
    answers: Callable[[type], T] = functools.lru_cache(4096)(asked)
    return answers


@remembered
def wraps_others(cls: type) -> bool:
    """Whether tensors of a class are made of others and have no memory of their own (torchao, DTensor).

    torch's own question (``is_traceable_wrapper_subclass``), asked of the class and once for each.
    """
    both = hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__")
    return both and cls is not torch.Tensor


@remembered
def _has_no_storage(cls: type) -> bool:
    return issubclass(cls, UninitializedTensorMixin) or wraps_others(cls)


def storage_id(tensor: torch.Tensor) -> int | None:
    """Identity of a tensor's storage, or None for tensors without one of their own."""
    if _has_no_storage(type(tensor)):
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
