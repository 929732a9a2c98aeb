"""Everything a built model holds, by path: tensors with their bytes, plain values, and what is one object.

The walk starts at the model and follows `__dict__`, `__slots__`, containers, closures, partials and bound
methods, so it also sees what no `named_parameters` lists: quant methods, schemes, kernels, experts and their
scales as floats.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
    slice,
    range,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
)

# Attributes that tell of the run and not of the weights.
RUN_ONLY = {
    "online_quantization_time": "seconds spent",
    "instance_id": "drawn anew for each engine configuration",
    "model": "path of the folder with config.json, a new one for each model",
    "tokenizer": "the same",
    "served_model_name": "the same",
    "_name_or_path": "the same",
    "_dynamo_static_input_type": "torch's mark on what a compiled function has met, at its first run only",
    "model_weights": "the same",
}

# Hook dictionaries of torch modules, and the notes that reload_plugin keeps on a model.
_SKIPPED_PREFIXES = (
    "_backward_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_state_dict_",
    "_load_state_dict_",
    "_reload_plugin",
)


@dataclass(frozen=True)
class TensorState:
    """What a kernel could notice about a tensor but its address. `first` is the first path in its storage."""

    type_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: str
    offset: int
    content: torch.Tensor | None = field(compare=False)

    def differs(self, other: TensorState) -> str | None:
        """The first difference in words, or None."""
        for name in ("type_name", "dtype", "shape", "stride", "first", "offset"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                return f"{name} {mine!r} is not {its!r}"
        if (self.content is None) != (other.content is None):
            return "one of the two has no storage"
        if self.content is None or torch.equal(self.content, other.content):
            return None
        wrong = (self.content != other.content).sum().item()
        return f"{wrong} of {self.content.numel()} bytes differ ({self.dtype}, {self.shape})"


@dataclass
class Picture:
    """States by path, and the live tensors with their storages, which stay alive as long as the picture."""

    states: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    storages: dict[str, tuple[Any, int]] = field(default_factory=dict)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Named parts of an object that is no leaf."""
    if isinstance(value, dict):
        yield from ((f"[{_key(key)}]", item) for key, item in list(value.items()))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{i}}}", item) for i, item in enumerate(sorted(value, key=repr)))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("__self__", value.__self__), ("__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _closure(value)
    yield from _attributes(value)


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, tuple):
        return ",".join(_key(item) for item in key)
    return f"{key}" if isinstance(key, _PLAIN) else type(key).__qualname__


def _closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"<{name}>", cell.cell_contents
        except ValueError:  # a cell nothing was stored in
            yield f"<{name}>", None
    yield from ((f"<default {i}>", item) for i, item in enumerate(function.__defaults__ or ()))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                yield f".{slot}", getattr(value, slot)
    namespace = getattr(value, "__dict__", None)
    if isinstance(namespace, dict):
        for name, item in list(namespace.items()):
            if name not in RUN_ONLY and not name.startswith(_SKIPPED_PREFIXES):
                yield f".{name}", item


def _name(value: Any) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} {value.__qualname__}" if isinstance(value, types.FunctionType) else name


def _tensor_state(tensor: torch.Tensor, path: str, first_by_storage: dict[Any, str]) -> TensorState:
    content, first, offset = None, path, 0
    if tensor.device.type != "meta":
        detached = tensor.detach()
        first = (
            first_by_storage.setdefault(detached.untyped_storage()._cdata, path) if detached.numel() else path
        )
        offset = detached.storage_offset()
        content = (
            detached.contiguous().view(-1).view(torch.uint8).clone() if detached.numel() else torch.empty(0)
        )
    return TensorState(
        type(tensor).__name__,
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        first,
        offset,
        content,
    )


def take_picture(model: nn.Module) -> Picture:
    """Walk modules first, under their own names, and from there breadth first: paths stay short."""
    picture, seen, first_by_storage = Picture(), {}, {}
    queue: list[tuple[str, Any]] = [(name or "model", module) for name, module in model.named_modules()]
    for path, value in queue:  # grows while it is walked
        if isinstance(value, _PLAIN):
            picture.states[path] = value
            continue
        if id(value) in seen:
            picture.states[path] = f"is {seen[id(value)][0]}"
            continue
        seen[id(value)] = (path, value)
        if isinstance(value, torch.Tensor):
            picture.states[path] = _tensor_state(value, path, first_by_storage)
            picture.tensors[path] = value
            if value.device.type != "meta":
                picture.storages[path] = (value.untyped_storage(), value.data_ptr())
        else:
            picture.states[path] = _name(value)
        queue.extend((path + step, item) for step, item in _children(value))
    return picture


def differences(cold: Picture, warm: Picture) -> list[str]:
    """One line for each path whose state is not the same in both, sorted."""
    lines = [f"{path}: only in the cold model" for path in cold.states.keys() - warm.states.keys()]
    lines += [f"{path}: only in the warm model" for path in warm.states.keys() - cold.states.keys()]
    for path in cold.states.keys() & warm.states.keys():
        lines += _difference(path, cold.states[path], warm.states[path])
    return sorted(lines)


def _difference(path: str, cold: Any, warm: Any) -> list[str]:
    if isinstance(cold, TensorState) and isinstance(warm, TensorState):
        text = warm.differs(cold)
        return [f"{path}: {text}"] if text else []
    same = type(cold) is type(warm) and (cold == warm or (cold != cold and warm != warm))
    return [] if same else [f"{path}: {_short(warm)} is not {_short(cold)}"]


def _short(state: Any) -> str:
    return repr(state)[:120]


def moved(before: Picture, after: Picture) -> list[str]:
    """Tensors of `before` that are gone, are another object, or stand at another address in `after`."""
    lines = []
    for path, tensor in before.tensors.items():
        now = after.tensors.get(path)
        if now is None:
            lines.append(f"{path}: no longer reachable there")
        elif now is not tensor:
            lines.append(f"{path}: another tensor object")
        elif path in before.storages and now.data_ptr() != before.storages[path][1]:
            lines.append(f"{path}: another address")
    return sorted(lines)


def unchanged(one: Picture, other: Picture) -> set[str]:
    """Paths of non-empty tensors with the same bytes in both pictures."""
    pairs = ((path, state, other.states.get(path)) for path, state in one.states.items())
    return {
        path
        for path, a, b in pairs
        if isinstance(a, TensorState) and isinstance(b, TensorState) and a.content is not None
        if a.content.numel() and b.content is not None and torch.equal(a.content, b.content)
    }
