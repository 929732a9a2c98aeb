"""What an object holds at one moment, one level deep: reading it, comparing it, putting it back."""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import types
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
"""Marks a key that does not exist."""


_TABLES = ("_parameters", "_buffers", "_modules")


_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}


OUR_ATTRIBUTES = frozenset(
    {"_reload_plugin_record", "_reload_plugin_state", "_reload_plugin_live", "load_weights"}
)
"""Instance attributes that this package sets on a model; never part of its state."""


_NOT_SAVED = "_non_persistent_buffers_set"


_PASSED_OVER = _MODULE_INTERNALS | OUR_ATTRIBUTES | {_NOT_SAVED}


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

    It is a copy of the holder's own tables. Nearly all snapshots are only compared with another one, so the
    keys of ``entries`` are made on first use.
    """

    __slots__ = ("_entries", "kinds", "tables")

    def __init__(self, kinds: tuple[str, ...], tables: tuple[dict[Any, Any], ...]) -> None:
        self.kinds = kinds
        self.tables = tables
        self._entries: dict[Key, Any] | None = None

    @property
    def entries(self) -> dict[Key, Any]:
        """All keys and values. Read only."""
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
        """Whether both hold the same objects under the same keys in the same order. Attributes that torch
        keeps on a module are compared too.
        """
        return self is other or all(map(_same_objects, self.tables, other.tables))

    def changes_to(self, after: Snapshot, besides: Set[int]) -> Iterator[tuple[Key, Any, Any]]:
        """(key, value in this snapshot or ABSENT, value in ``after``) for each key under which ``after``
        holds another object, and for each object whose identity is in ``besides``. ``after`` is of the same
        kind of holder.
        """
        for kind, ours, theirs in zip(self.kinds, self.tables, after.tables, strict=True):
            same = _same_objects(ours, theirs)
            if same and (not besides or besides.isdisjoint(map(id, theirs.values()))):
                continue
            for name, new in theirs.items():
                if ((old := ours.get(name, ABSENT)) is not new or id(new) in besides) and _counts(kind, name):
                    yield (_kind_of_key(kind), name), old, new

    def keys_missing_in(self, after: Snapshot) -> Iterator[Key]:
        """Keys of this snapshot that ``after``, of the same kind of holder, does not have."""
        for kind, ours, theirs in zip(self.kinds, self.tables, after.tables, strict=True):
            if ours is theirs or ours.keys() <= theirs.keys():
                continue
            missing = (name for name in ours if name not in theirs)
            yield from ((_kind_of_key(kind), name) for name in missing if _counts(kind, name))

    def apply_to(self, holder: Any, now: Snapshot) -> None:
        """Make ``holder``, whose present snapshot is ``now``, hold exactly this, in the same order."""
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
        """The value of one key; does not make all keys."""
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
    """The kind of key of the entries in a table."""
    return "attribute" if table == _MODULE else table


def _counts(kind: str, name: object) -> bool:
    """Whether an entry of a table belongs to its holder's state."""
    return kind != _MODULE or name not in _PASSED_OVER


def read(holder: object, before: Snapshot | None = None) -> Snapshot:
    """A snapshot of what ``holder`` holds now. It reuses the unchanged tables of ``before``, and is
    ``before`` itself if none has changed.
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
    """The names of a module's non-persistent buffers as a table; the same object for equal sets."""
    return {_NOT_SAVED: names}


def tables_of(holder: object) -> Mapping[str, Mapping[Any, Any]]:
    """The live tables of ``holder``: kind of key -> name -> value. Read only.

    Use only names that ``read`` gives: a module's ``__dict__`` has more than its state.
    """
    if isinstance(holder, nn.Module):
        held = holder.__dict__
        return {table: held[table] for table in _TABLES} | {"attribute": held}
    (kind,), (table,) = _kinds_and_table(holder)
    return {kind: table}


@functools.lru_cache(4096)
def _keys(kind: str, names: tuple[str, ...]) -> tuple[Key, ...]:
    """The keys of a holder's entries. Cached, because comparing identical key objects is fast."""
    return tuple(_key(kind, name) for name in names)


@functools.lru_cache(4096)
def _attributes_of_module(names: tuple[str, ...]) -> tuple[tuple[Key, ...], tuple[bool, ...]]:
    """The keys of a module's attributes, and for each name of its ``__dict__`` whether it is one of them (and
    not torch's own or this package's).
    """
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
    """Whether two snapshots hold the same objects or equal plain values, under the same keys in the same
    order.
    """
    if now.is_same_as(before):
        return True
    if list(now) != list(before):
        return False
    return all(map(same, now.entries.values(), before.entries.values()))


def put_back(holder: object, before: Snapshot, now: Snapshot | None = None) -> None:
    """Make ``holder`` hold exactly what it held ``before``, in the same order. ``now``: its present snapshot,
    if known.
    """
    now = read(holder) if now is None else now
    if not now.is_same_as(before):
        before.apply_to(holder, now)


def equal(a: object, b: object) -> bool:
    """Whether ``a == b`` is true. False where a foreign ``__eq__`` raises or its answer has no truth
    value.
    """
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
