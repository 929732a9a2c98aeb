"""The objects that hold a layer's state, and reading and putting back what they hold.

A layer keeps what its kernels need in several places: parameters, buffers, plain attributes, and
helper objects of its own (quant method, scheme, kernel, experts) with attributes in turn. Each such
place is a *holder*; what it holds is read as a flat mapping, so that the effect of
``process_weights_after_loading`` is a difference of two mappings and undoing it is putting one back.
"""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
Key = tuple[str, Any]
Contents = dict[Key, Any]


class _Absent(enum.Enum):
    ABSENT = "absent"


ABSENT = _Absent.ABSENT
"""Stands for an attribute that is not there."""

_TABLES = ("_parameters", "_buffers", "_modules")
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
OUR_ATTRIBUTES = frozenset({"_reload_plugin_record", "load_weights"})
"""Instance attributes that this package sets on a model; never part of its state."""
_NOT_SAVED = "_non_persistent_buffers_set"
_PASSED_OVER = _MODULE_INTERNALS | OUR_ATTRIBUTES | {_NOT_SAVED}

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
"""Classes of values that are what they are and hold no others."""

_ATOMS = (*_HOLD_NOTHING, types.FunctionType, types.MethodType)


def remembered(asked: Callable[[type], T]) -> Callable[[type], T]:
    """A question about a class, with the last few thousand answers kept."""
    answers: Callable[[type], T] = functools.lru_cache(4096)(asked)
    return answers


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


def slots_of(value: object) -> Sequence[str]:
    """Names of the slots that a class without ``__dict__`` stores its attributes in."""
    return _slots_of(type(value))


@remembered
def _slots_of(cls: type) -> Sequence[str]:
    found: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def read(holder: object) -> Contents:
    """What ``holder`` holds now, one level deep, as key -> value. Copies no tensor."""
    if isinstance(holder, nn.Module):
        return _read_module(holder)
    if isinstance(holder, dict):
        return {("item", key): value for key, value in holder.items()}
    if isinstance(holder, list):
        return {("item", index): value for index, value in enumerate(holder)}
    held = getattr(holder, "__dict__", {})
    found: Contents = dict(zip(_keys("attribute", tuple(held)), held.values(), strict=True))
    for name in slots_of(holder):
        if hasattr(holder, name):
            found["attribute", name] = getattr(holder, name)
    return found


def _read_module(module: nn.Module) -> Contents:
    held = module.__dict__
    found: Contents = {}
    for table in _TABLES:
        if entries := held[table]:
            found.update(zip(_keys(table, tuple(entries)), entries.values(), strict=True))
    keys, chosen = _attributes_of_module(tuple(held))
    found.update(zip(keys, itertools.compress(held.values(), chosen), strict=True))
    if _NOT_SAVED in held:
        found["attribute", _NOT_SAVED] = frozenset(held[_NOT_SAVED])
    return found


@functools.lru_cache(4096)
def _keys(kind: str, names: tuple[str, ...]) -> tuple[Key, ...]:
    """The keys of a holder's entries: the same objects each time, so that they are quick to find again."""
    return tuple(_key(kind, name) for name in names)


@functools.lru_cache(4096)
def _attributes_of_module(names: tuple[str, ...]) -> tuple[tuple[Key, ...], tuple[bool, ...]]:
    """The same for all that a module's ``__dict__`` has, and which of it is not torch's own or ours."""
    chosen = tuple(name not in _PASSED_OVER for name in names)
    return _keys("attribute", tuple(itertools.compress(names, chosen))), chosen


@functools.lru_cache(1 << 16)
def _key(kind: str, name: str) -> Key:
    return kind, name


def write(holder: object, key: Key, value: Any) -> None:
    """Set one key, or delete it when ``value`` is ABSENT. Bypasses ``__setattr__`` on purpose:
    ``nn.Module`` would move the name between its tables, frozen dataclasses would refuse.
    """
    kind, name = key
    if kind == "item":
        _write_item(holder, name, value)
    elif kind in _TABLES:
        _write_table(holder.__dict__[kind], name, value)
    elif name == _NOT_SAVED and isinstance(holder, nn.Module):
        holder._non_persistent_buffers_set.clear()
        holder._non_persistent_buffers_set.update(value)
    elif value is ABSENT:
        _delete_attribute(holder, name)
    elif name in getattr(holder, "__dict__", ()) or not slots_of(holder):
        holder.__dict__[name] = value
    else:
        object.__setattr__(holder, name, value)


def _write_table(table: dict[str, Any], name: str, value: object) -> None:
    if value is ABSENT:
        table.pop(name, None)
    else:
        table[name] = value


def _write_item(holder: Any, name: Any, value: object) -> None:
    if value is ABSENT:
        if isinstance(holder, dict):
            holder.pop(name, None)
        elif name < len(holder):
            del holder[name:]
    elif isinstance(holder, list) and name >= len(holder):
        holder.append(value)
    else:
        holder[name] = value


def _delete_attribute(holder: object, name: str) -> None:
    if name in getattr(holder, "__dict__", ()):
        del holder.__dict__[name]
    elif hasattr(holder, name):
        object.__delattr__(holder, name)


def holds_same(now: Contents, before: Contents) -> bool:
    """Whether a holder holds the same objects, or equal plain values, under the same keys, in one order."""
    if list(now) != list(before):
        return False
    one_by_one = (now.values(), before.values())
    return all(map(operator.is_, *one_by_one)) or all(map(same, *one_by_one))


def put_back(holder: object, contents: Contents, now: Contents | None = None) -> None:
    """Make ``holder`` hold exactly ``contents`` again, in the same order. ``now``: what it holds."""
    now = read(holder) if now is None else now
    if holds_same(now, contents):
        return
    for key in reversed(list(now)):
        if key not in contents:
            write(holder, key, ABSENT)
    for key, value in contents.items():
        if now.get(key, ABSENT) is not value:
            write(holder, key, value)
    _reorder_tables(holder, contents)


def _reorder_tables(holder: object, contents: Contents) -> None:
    if isinstance(holder, dict) and list(holder) != [name for _, name in contents]:
        holder.clear()
        holder.update({name: value for (_, name), value in contents.items()})
    if not isinstance(holder, nn.Module):
        return
    for table in _TABLES:
        order = [name for kind, name in contents if kind == table]
        held = holder.__dict__[table]
        if list(held) != order:
            entries = {name: held[name] for name in order}
            held.clear()
            held.update(entries)


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
    """Whether values of a class hold no others, and nothing that is not Python's."""
    return issubclass(cls, _HOLD_NOTHING) and not hasattr(cls, "__del__")


def reachable(value: object, seen: set[int] | None = None) -> Iterator[object]:
    """A held value and all it holds; tensors as often as they are held, everything else once, but for plain
    values, which do not matter.
    """
    if holds_nothing(type(value)):
        return
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    for part in _parts(value):
        yield from reachable(part, seen)


def owns_native(value: object) -> bool:
    """Whether an object releases something that is not Python's when it goes away."""
    return hasattr(type(value), "__del__")


def cell_content(cell: types.CellType) -> object:
    """What a closure cell holds, or ABSENT when it is empty still."""
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
    return list(read(value).values()) if is_helper(value) else []


def equal(a: object, b: object) -> bool:
    """Equality that takes whatever a foreign ``__eq__`` does for an answer; doubt is a no."""
    try:
        return bool(a == b)
    except Exception:  # noqa: BLE001 - comparing containers of tensors raises, and means "do not know"
        return False


def same(before: object, after: object) -> bool:
    """Whether two held values are the same for our purpose: one object, or equal plain values."""
    if before is after:
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, (str, bytes, int, float, complex, bool, torch.dtype, torch.device, frozenset)):
        return bool(before == after)
    return isinstance(before, types.MethodType) and before == after
