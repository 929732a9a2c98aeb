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
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

import torch
from torch import nn

from ..tensors import remembered

Key = tuple[str, Any]
Contents = Mapping[Key, Any]


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


class Snapshot(Mapping[Key, Any]):
    """What a holder held at one moment, one level deep, as key -> value. Immutable; copies no tensor.

    Nearly all are only asked whether they hold what another one does. So they are copies of the holder's own
    tables, and the keys of all that is in them are made when somebody wants them.
    """

    __slots__ = ("_entries", "kinds", "tables")

    def __init__(self, kinds: tuple[str, ...], tables: tuple[dict[Any, Any], ...]) -> None:
        self.kinds = kinds
        self.tables = tables
        self._entries: dict[Key, Any] | None = None

    @property
    def entries(self) -> dict[Key, Any]:
        """All of it; not to be written to."""
        if self._entries is None:
            self._entries = {}
            for kind, table in zip(self.kinds, self.tables, strict=True):
                if kind == _MODULE:
                    keys, chosen = _attributes_of_module(tuple(table))
                    self._entries.update(zip(keys, itertools.compress(table.values(), chosen), strict=True))
                elif kind == "item":
                    self._entries.update((("item", name), value) for name, value in table.items())
                elif table:
                    self._entries.update(zip(_keys(kind, tuple(table)), table.values(), strict=True))
        return self._entries

    def is_same_as(self, other: Snapshot) -> bool:
        """Whether both hold the same objects under the same keys, in one order; a module's own attributes of
        torch's count as well.
        """
        return self is other or all(map(_same_objects, self.tables, other.tables))

    def changes_to(self, after: Snapshot, besides: Set[int]) -> Iterator[tuple[Key, Any, Any]]:
        """(key, value here or ABSENT, value there) of all that ``after``, of a holder like this one's, holds
        another object of, and of the objects ``besides``, which are given by their identities.
        """
        for kind, ours, theirs in zip(self.kinds, self.tables, after.tables, strict=True):
            same = _same_objects(ours, theirs)
            if same and (not besides or besides.isdisjoint(map(id, theirs.values()))):
                continue
            for name, new in theirs.items():
                if ((old := ours.get(name, ABSENT)) is not new or id(new) in besides) and _counts(kind, name):
                    yield (_kind_of_key(kind), name), old, new

    def gone_from(self, after: Snapshot) -> Iterator[Key]:
        """Keys that ``after``, of a holder like this one's, does not hold."""
        for kind, ours, theirs in zip(self.kinds, self.tables, after.tables, strict=True):
            if ours is theirs or ours.keys() <= theirs.keys():
                continue
            missing = (name for name in ours if name not in theirs)
            yield from ((_kind_of_key(kind), name) for name in missing if _counts(kind, name))

    def put_on(self, holder: Any, now: Snapshot) -> None:
        """Make ``holder``, which holds what ``now`` says, hold exactly this, in the same order."""
        for kind, ours, theirs in zip(self.kinds, self.tables, now.tables, strict=True):
            if _same_objects(ours, theirs):
                continue
            in_order = isinstance(holder, dict) or kind in _TABLES
            if in_order and list(ours) != list(theirs):
                table = holder if kind == "item" else holder.__dict__[kind]
                table.clear()
                table.update(ours)
                continue
            own = _kind_of_key(kind)
            for name in theirs:
                if name not in ours and _counts(kind, name):
                    write(holder, (own, name), ABSENT)
            for name, value in ours.items():
                if theirs.get(name, ABSENT) is not value and _counts(kind, name):
                    write(holder, (own, name), value)

    def get(self, key: Key, default: Any = None) -> Any:
        """What it holds under a key, without making all keys."""
        kind, name = key
        for own, table in zip(reversed(self.kinds), reversed(self.tables), strict=True):
            if name in table and _kind_of_key(own) == kind:
                return table[name]
        return default

    def keys(self) -> KeysView[Key]:
        return self.entries.keys()

    def values(self) -> ValuesView[Any]:
        return self.entries.values()

    def items(self) -> ItemsView[Key, Any]:
        return self.entries.items()

    def __getitem__(self, key: Key) -> Any:
        return self.entries[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


_MODULE = "module"
"""Kind of the table that is a module's ``__dict__``."""
_OF_A_MODULE = (*_TABLES, _MODULE, "attribute")


def _same_objects(ours: dict[Any, Any], theirs: dict[Any, Any]) -> bool:
    """Whether two tables hold the same objects under the same keys in the same order."""
    if ours is theirs or not (ours or theirs):
        return True
    if len(ours) != len(theirs):
        return False
    return all(map(operator.is_, ours.values(), theirs.values())) and list(ours) == list(theirs)


def _kind_of_key(table: str) -> str:
    """The kind that the keys in a table of some kind have."""
    return "attribute" if table == _MODULE else table


def _counts(kind: str, name: object) -> bool:
    """Whether an entry of a table belongs to the state of what holds it."""
    return kind != _MODULE or name not in _PASSED_OVER


def read(holder: object, before: Snapshot | None = None) -> Snapshot:
    """What ``holder`` holds now. Tables that are as in ``before``, if that is given, are that one's, and if
    all are, so is the answer.
    """
    if isinstance(holder, nn.Module):
        held = holder.__dict__
        kinds: tuple[str, ...] = _OF_A_MODULE
        unsaved = _unsaved(frozenset(held.get(_NOT_SAVED, ())))
        live: tuple[dict[Any, Any], ...] = (*(held[table] for table in _TABLES), held, unsaved)
    else:
        kinds, live = _kinds_and_table(holder)
    if before is None:
        return Snapshot(kinds, tuple([dict(table) for table in live]))
    changed = [not _same_objects(old, new) for old, new in zip(before.tables, live, strict=True)]
    if not any(changed):
        return before
    kept = zip(changed, before.tables, live, strict=True)
    return Snapshot(kinds, tuple([dict(new) if other else old for other, old, new in kept]))


def _kinds_and_table(holder: object) -> tuple[tuple[str, ...], tuple[dict[Any, Any], ...]]:
    if isinstance(holder, dict):
        return ("item",), (holder,)
    if isinstance(holder, list):
        return ("item",), (dict(enumerate(holder)),)
    attributes = getattr(holder, "__dict__", {})
    if slots := slots_of(holder):
        own = {name: getattr(holder, name) for name in slots if hasattr(holder, name)}
        attributes = {**attributes, **own}
    return ("attribute",), (attributes,)


@functools.lru_cache(4096)
def _unsaved(names: frozenset[str]) -> dict[str, frozenset[str]]:
    """A module's buffers that are not saved, as a table: the same object for equal sets."""
    return {_NOT_SAVED: names}


def tables_of(holder: object) -> Mapping[str, Mapping[Any, Any]]:
    """What ``holder`` holds now, as kind of key -> name -> value, where it is; not to be written to.

    Asked for the names that ``read`` gives: a module's own dictionary has more.
    """
    if isinstance(holder, nn.Module):
        held = holder.__dict__
        return {table: held[table] for table in _TABLES} | {"attribute": held}
    (kind,), (table,) = _kinds_and_table(holder)
    return {kind: table}


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


def holds_same(now: Snapshot, before: Snapshot) -> bool:
    """Whether a holder holds the same objects, or equal plain values, under the same keys, in one order."""
    if now.is_same_as(before):
        return True
    if list(now) != list(before):
        return False
    return all(map(same, now.entries.values(), before.entries.values()))


def put_back(holder: object, before: Snapshot, now: Snapshot | None = None) -> None:
    """Make ``holder`` hold exactly what it held ``before``, in the same order. ``now``: what it holds."""
    now = read(holder) if now is None else now
    if not now.is_same_as(before):
        before.put_on(holder, now)


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
    return values_of(value) if is_helper(value) else []


def values_of(holder: Any) -> list[object]:
    """What ``holder``, which is no module, holds now, without its keys."""
    if isinstance(holder, dict):
        return list(holder.values())
    if isinstance(holder, list):
        return holder[:]
    own = list(getattr(holder, "__dict__", {}).values())
    return own + [getattr(holder, name) for name in slots_of(holder) if hasattr(holder, name)]


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
