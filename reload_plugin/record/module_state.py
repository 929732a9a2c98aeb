"""The objects that hold a layer's state, and what is reachable from them.

A layer keeps what its kernels need in several places: parameters, buffers, plain attributes, and
helper objects of its own (quant method, scheme, kernel, experts) with attributes in turn. Each such
place is a *holder*; what it holds is read as a flat mapping, so that the effect of
``process_weights_after_loading`` is a difference of two mappings and undoing it is putting one back.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..tensors import remembered
from .snapshot import ABSENT, read, slots_of

_FOREIGN = (
    "torch",
    "numpy",
    "transformers",
    "builtins",
    "logging",
    "threading",
    "asyncio",
    "weakref",
    "vllm.config",
    "vllm.compilation",
    "vllm.distributed",
    "vllm.platforms",
    "vllm.utils",
    "vllm.transformers_utils",
)
"""Packages whose objects are shared infrastructure and not part of any layer's state."""


_HOLD_NOTHING = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    enum.Enum,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
    weakref.ref,
)
"""Classes of values that hold no other values."""


_ATOMS = (*_HOLD_NOTHING, types.FunctionType, types.MethodType)


def is_helper(value: object) -> bool:
    """Whether ``value`` is an object or container whose attributes belong to the layer's state."""
    return _makes_helpers(type(value)) and (isinstance(value, (dict, list)) or has_attributes(value))


@remembered
def _makes_helpers(cls: type) -> bool:
    if issubclass(cls, (dict, list)):
        return True
    return not issubclass(cls, (nn.Module, torch.Tensor, *_ATOMS)) and not is_foreign(cls)


def has_attributes(value: object) -> bool:
    """Whether an object can have attributes of its own."""
    return hasattr(value, "__dict__") or bool(slots_of(value))


@remembered
def is_foreign(cls: type) -> bool:
    """Whether a class belongs to shared infrastructure (configs, process groups, torch itself)."""
    module = cls.__module__ or ""
    return any(module == name or module.startswith(name + ".") for name in _FOREIGN)


def holders_of(layer: nn.Module) -> Iterator[tuple[str, object]]:
    """``layer`` itself and every helper object it owns, each once, with a readable path."""
    seen: set[int] = set()
    stack: list[tuple[str, object]] = [("", layer)]
    while stack:
        path, holder = stack.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        yield path, holder
        for (_, name), value in read(holder).items():
            if is_helper(value):
                stack.append((f"{path}.{name}" if path else str(name), value))


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor reachable from a held value: through helpers, containers, closures and partials."""
    return (found for found in reachable(value) if isinstance(found, torch.Tensor))


@remembered
def holds_nothing(cls: type) -> bool:
    """Whether values of a class hold no other values and no native resource."""
    return issubclass(cls, _HOLD_NOTHING) and not hasattr(cls, "__del__")


def reachable(value: object, seen: set[int] | None = None) -> Iterator[object]:
    """A held value and everything reachable from it. Tensors are yielded each time they are held, other
    objects once, plain values never.

    Args:
        value: where to begin.
        seen: identities of objects to skip; extended by those that are yielded.

    """
    seen = set() if seen is None else seen
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if holds_nothing(type(value)):
            continue
        if isinstance(value, torch.Tensor):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting += reversed(_parts(value))


def owns_native(value: object) -> bool:
    """Whether an object releases a native resource when it is freed: its class has ``__del__``."""
    return hasattr(type(value), "__del__")


def cell_content(cell: types.CellType) -> object:
    """What a closure cell holds, or ABSENT when it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _parts(value: Any) -> list[object]:
    if isinstance(value, types.FunctionType):
        cells = [content for cell in value.__closure__ or () if (content := cell_content(cell)) is not ABSENT]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, types.MethodType):
        return [] if isinstance(value.__self__, nn.Module) else [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    return values_of(value) if is_helper(value) else []


def values_of(holder: Any) -> list[object]:
    """The values that ``holder``, which is not a module, holds now."""
    if isinstance(holder, dict):
        return list(holder.values())
    if isinstance(holder, list):
        return holder[:]
    own = list(getattr(holder, "__dict__", {}).values())
    return own + [getattr(holder, name) for name in slots_of(holder) if hasattr(holder, name)]
