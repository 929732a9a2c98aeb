"""What makes a group's served values equal to the result of processing.

Served and new values are walked in parallel. New tensors are copied into the served ones, objects that own
native resources exchange their contents with the new object, plain values are replaced.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from ..record.group_state import GroupState
from ..record.late_bound import LateBound
from ..record.module_state import cell_content, has_attributes, is_foreign, owns_native, reachable
from ..record.snapshot import ABSENT, Snapshot, equal, read
from ..record.staged_group import StagedGroup
from ..tensors import storage_id, wraps_others
from .group_commit import Commit, _fits_in_place


def plan_commit(staged: StagedGroup, late: LateBound) -> Commit:
    """Compare a group's served state with its result. The group has to show its served state; nothing is
    written.

    Args:
        staged: processed.
        late: attributes that the first forward pass sets; an object that was just made has none of them.

    """
    assert staged.result is not None, "a commit needs the result of processing"
    commit = Commit(staged.group.name)
    comparison = _Comparison(staged.served, staged.result, commit, staged.overwritten, late)
    for (holder, served), (_, result) in zip(staged.served.contents, staged.result.contents, strict=True):
        comparison.contents(staged.group.name, holder, served, result)
    commit.native = _still_reachable(staged)
    return commit


def _still_reachable(staged: StagedGroup) -> list[torch.Tensor]:
    """Tensors that native handles point into and that the result holds, as it would after a cold start."""
    assert staged.result is not None
    if not staged.captured:
        return []
    sought = {storage_id(tensor) for tensor in staged.captured}
    held: set[int | None] = set()
    # One set for all values: helpers hold one another, and a large config.
    seen: set[int] = set()
    for _, contents in staged.result.contents:
        for value in contents.values():
            if sought <= held:  # usually early: the layer's own scales are captured
                break
            tensors = (found for found in reachable(value, seen) if isinstance(found, torch.Tensor))
            held |= {storage_id(staged.result.data_of(tensor)) for tensor in tensors}
    return [tensor for tensor in staged.captured if storage_id(tensor) in held]


class _Comparison:
    """Walks served and new values in parallel and collects the changes that make them equal."""

    def __init__(
        self,
        served: GroupState,
        result: GroupState,
        commit: Commit,
        overwritten: Collection[int],
        late: LateBound,
    ) -> None:
        self._late = late
        self._overwritten = overwritten
        self._served = served
        self._result = result
        self._commit = commit
        self._restaged = served.tensors.keys()
        """Tensors (by identity) whose values may differ although the object is the same."""
        self._done: dict[tuple[int, int], object] = {}
        self._sources: dict[int, int] = {}
        self._alive: list[object] = []

    def contents(self, path: str, holder: object, served: Snapshot, result: Snapshot) -> None:
        """Make ``holder``, which holds ``served``, hold the values of ``result``."""
        if result is served and not self._restaged:
            return
        for key, old, new in served.changes_to(result, self._restaged):
            if new is None and self._late.is_late(holder, key[1]):
                continue  # set by the first forward pass, and the runtime's
            value = new if old is ABSENT else self.value(f"{path}.{key[1]}", old, new)
            if value is not old:
                self._commit.writes.append((holder, key, value))
        for key in served.keys_missing_in(result):
            self._commit.writes.append((holder, key, ABSENT))

    def value(self, path: str, old: object, new: object) -> object:
        """The value to hold instead of ``old``: ``old`` itself if it can be made equal to ``new``."""
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
            return self._tensor(path, old, new)
        if old is new:
            return old
        known = (id(old), id(new))
        if known not in self._done:
            self._done[known] = old
            self._alive += [old, new]
            self._done[known] = self._other(path, old, new)
        return self._done[known]

    def _other(self, path: str, old: Any, new: Any) -> object:
        if type(old) is not type(new):
            return new
        if isinstance(old, types.FunctionType):
            return self._function(path, old, new)
        if isinstance(old, types.MethodType):
            owner = self.value(path, old.__self__, new.__self__)
            same = owner is old.__self__ and old.__func__ is new.__func__
            return old if same else types.MethodType(new.__func__, owner)
        if isinstance(old, functools.partial):
            return self._partial(path, old, new)
        if isinstance(old, tuple):
            return self._tuple(path, old, new)
        if isinstance(old, (list, dict)):
            self.contents(path, old, read(old), read(new))
            return old
        if owns_native(old):
            self._commit.exchanges.append((old, new))
            return old
        if isinstance(old, nn.Module) or _is_plain_object(old):
            self.contents(path, old, read(old), read(new))
            return old
        return old if equal(old, new) else new

    def _tensor(self, path: str, old: torch.Tensor, new: torch.Tensor) -> object:
        if wraps_others(type(new)) or wraps_others(type(old)):
            return self._wrapper(path, old, new)
        if self._sources.setdefault(id(old), id(new)) != id(new):
            return new
        target, source = self._served.data_of(old), self._result.data_of(new)
        if storage_id(source) in self._overwritten and not _same_memory(target, source):
            source = source.clone()  # its memory serves another tensor, which the commit overwrites
        if _same_memory(target, source):
            pass
        elif _fits_in_place(target, source):
            self._commit.copies.append((target, source))
        else:
            self._commit.moves.append((old, source, path))
        self._compare_attributes(old, new)
        self._alive.append(new)
        return old

    def _compare_attributes(self, old: torch.Tensor, new: torch.Tensor) -> None:
        state = self._result.tensors.get(id(new))
        cls = type(new) if state is None else state.cls
        attributes = dict(new.__dict__ if state is None else state.attributes)
        if cls is not type(old) or attributes.keys() != old.__dict__.keys() or old is not new:
            if cls is not type(old) and not _can_become(old, cls):
                cls = type(old)
            merged = {
                name: self.value(name, old.__dict__[name], value) if name in old.__dict__ else value
                for name, value in attributes.items()
            }
            kept = old.__dict__
            differs = merged.keys() != kept.keys() or any(merged[k] is not kept[k] for k in merged)
            if cls is not type(old) or differs:
                self._commit.tensor_attributes.append((old, cls, merged))

    def _wrapper(self, path: str, old: Any, new: Any) -> object:
        if old is new:
            return old
        if not (wraps_others(type(old)) and wraps_others(type(new))):
            return new
        names, context = old.__tensor_flatten__()
        new_names, new_context = new.__tensor_flatten__()
        if names != new_names or not equal(context, new_context):
            return new
        for name in names:
            if self._tensor(f"{path}.{name}", getattr(old, name), getattr(new, name)) is not getattr(
                old, name
            ):
                return new
        return old

    def _function(self, path: str, old: types.FunctionType, new: types.FunctionType) -> object:
        if old.__code__ is not new.__code__:
            return new
        for name, cell, twin in zip(
            old.__code__.co_freevars, old.__closure__ or (), new.__closure__ or (), strict=True
        ):
            held, new_held = cell_content(cell), cell_content(twin)
            value = self.value(f"{path}.{name}", held, new_held)
            if value is not held:
                self._commit.cells.append((cell, value))
        for defaults in ("__defaults__", "__kwdefaults__"):
            before, after = getattr(old, defaults), getattr(new, defaults)
            value = self.value(path, before, after)
            if value is not before:
                return new
        return old

    def _partial(self, path: str, old: functools.partial[Any], new: functools.partial[Any]) -> object:
        func: Callable[..., Any] = self.value(path, old.func, new.func)  # type: ignore[assignment]
        args = self._tuple(path, old.args, new.args)
        keywords = {
            k: self.value(f"{path}.{k}", old.keywords[k], v) if k in old.keywords else v
            for k, v in new.keywords.items()
        }
        same = func is old.func and args is old.args and keywords.keys() == old.keywords.keys()
        if same and all(keywords[k] is old.keywords[k] for k in keywords):
            return old
        return functools.partial(func, *args, **keywords)

    def _tuple(self, path: str, old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(old) != len(new):
            return new
        values = [self.value(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
        if all(value is kept for value, kept in zip(values, old, strict=True)):
            return old
        make: Callable[..., tuple[Any, ...]] = type(old)
        return make(*values) if hasattr(old, "_fields") else make(values)


def _is_plain_object(value: object) -> bool:
    """Whether a value is an object whose whole state is its attributes, and not shared infrastructure."""
    if is_foreign(type(value)) or isinstance(value, type):
        return False
    return has_attributes(value)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.device != b.device or a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype:
        return False
    if a.numel() == 0:
        return True
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()
    )


def _can_become(tensor: torch.Tensor, cls: type) -> bool:
    return issubclass(cls, nn.Parameter) == isinstance(tensor, nn.Parameter) and not issubclass(
        cls, UninitializedTensorMixin
    )
