"""Watching a model's own ``load_weights``: which staging a weight is written to, and which elements of it.

The model's own loader does the loading. A dispatch mode watches it. That gives memory on first touch,
completeness by identity, and a guard over the served tensors in one place.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import LateReadError, LateWriteError
from ..record.staged_storage import StagedStorage
from ..record.tensor_layout import SMALL_BYTES, Geometry, shared
from ..tensors import storage_id
from .arrivals import Loaded
from .copy_plan import Slot, StridedCopy, TensorPlan
from .mismatches import Mismatches, RejectedWeightError
from .source import DirectRead

_SCALE = re.compile(r"scale|zero|alpha|shape")


_MANY = 4000
"""Storages of weights that may be written late, before those that are gone are looked for among them."""


Touching = Callable[[StagedStorage], None]
"""Told of staging that lies in served memory before somebody may write there."""


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage; 0 for those without one."""
    return storage_id(tensor) or 0


_VIEWS = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("alias", "default"),
        ("detach", "default"),
        ("narrow", "default"),
        ("permute", "default"),
        ("select", "int"),
        ("slice", "Tensor"),
        ("split", "Tensor"),
        ("squeeze", "dim"),
        ("t", "default"),
        ("transpose", "int"),
        ("unbind", "int"),
        ("unsqueeze", "default"),
        ("view", "default"),
    )
)
"""Operators that only look at memory from another side: nearly all that a loader does beside copies."""


@dataclass(slots=True)
class _Incoming:
    """The weight that is being loaded, as it came: its loader may give the tensor other memory."""

    key: int
    """Identity of its storage."""
    offset: int
    contiguous: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    changed: bool = False
    """Its values are others than those that came."""

    @property
    def as_it_came(self) -> bool:
        """Whether a copy of a part of its memory is a copy of a part of the weight."""
        return self.contiguous and not self.changed


class LoadTrace(TorchDispatchMode):
    """Watches loaders while active: allocates staging, notes slots, protects served tensors.

    In ``dry`` mode sources are meta tensors and nothing is written: only the slots are noted.
    """

    def __init__(
        self,
        mismatches: Mismatches,
        dry: bool = False,
        known: Mapping[str, tuple[int, ...]] | None = None,
        sharded: bool = False,
        later: Callable[[str, str], bool] = operator.gt,
    ) -> None:
        """Args beyond the class's: ``known`` shapes of the engine's own checkpoint, which a loader may
        use in part as a cold start does; ``sharded`` when every rank uses its own part only; ``later``,
        whether a cold start loads the first of two weights after the second.
        """
        super().__init__()
        self.dry = dry
        self._known = {} if known is None else known
        self._sharded = sharded
        self._later = later
        self._written_by: dict[Slot, str] = {}
        """The first weight that was written to a slot, of those that may be contested."""
        self.touching: Touching | None = None
        """Called where a loader finds the served tensor itself."""
        self.mismatches = mismatches
        self.loaded = Loaded()
        self.storages: dict[int, StagedStorage] = {}
        self.find_protected: Callable[[], Mapping[int, str]] = dict
        """Storages that no loader may write to, and what to call them; asked once, if one writes elsewhere
        than to staging.
        """
        self.complete: dict[int, tuple[str, str]] = {}
        """Storage -> parameter of a complete layer, where what is there now is not what was loaded, and one
        of the tensors that its group has in load format."""
        self.current = ""
        self._sources: dict[int, tuple[str, ...]] = {}
        """Storage -> the weights whose values are in it, or come into it; "" for what is not known."""
        self._revisiting: set[int] = set()
        """Those of them with values of parameters that the loader came back to."""
        self._noted: dict[int, StorageWeakRef] = {}
        """Storages that ``_sources`` names: none that comes later gets the identity of one that is gone."""
        self._of_current: list[int] = []
        """Those of the weight that is loaded now."""
        self._late = False
        """Whether that one may be written when others have come; else nothing more is expected of it then."""
        self._many = _MANY
        """So many of them are looked through for those that are gone."""
        self._writers: dict[int, str] = {}
        """Storage of a parameter -> the one weight that was written to it so far, or "" for several."""
        self._touched: list[StagedStorage] = []
        self._recent: set[int] = set()
        self._incoming: _Incoming | None = None
        self._copies: list[StridedCopy | None] = []
        self._computed: list[Slot] = []
        self._looked = False
        """The loader read a value, so what it writes next may depend on it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper of torch's around ``__torch_dispatch__``, which would cost more than what is in it."""
        return False

    @functools.cached_property
    def _protected(self) -> Mapping[int, str]:
        return self.find_protected()

    def take_recent(self) -> set[int]:
        """Storages written to since this was last asked."""
        recent = self._recent
        if recent:
            self._recent = set()
        return recent

    def watch(self, storages: Iterable[StagedStorage]) -> None:
        self.storages.update({storage.key: storage for storage in storages})

    def weights_in(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """The weights whose values are in memory of the loader's own, as far as that is known."""
        return self._sources.get(_key(tensor), ())

    # -- one weight at a time ---------------------------------------------------------------------

    def begin(self, name: str, tensor: torch.Tensor, late: bool = False) -> None:
        """The stream hands ``tensor`` to the loader now. ``late``: which may write it when others have come,
        and whose memory nobody else has.
        """
        if not self._late and self.current in self.loaded.written:
            self._forget([key for key in self._of_current if self._sources.get(key) == (self.current,)])
        elif len(self._noted) > self._many:
            self._forget([key for key, storage in self._noted.items() if storage.expired()])
            self._many = 2 * len(self._noted) + _MANY
        self._of_current.clear()
        self._late = late
        self.current = name
        self.note_arrival(name, tensor)
        self._note_source(tensor, (name,))
        offset, shape = int(tensor.storage_offset()), self.loaded.shapes[name]
        self._incoming = _Incoming(_key(tensor), offset, tensor.is_contiguous(), shape, tensor.dtype)

    def note_arrival(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
        """Account for a weight, however it is loaded. ``shape``: of it, if that is at hand."""
        self.loaded.shapes[name] = shared(tuple(tensor.shape)) if shape is None else shape
        self.loaded.nbytes += tensor.numel() * tensor.element_size()

    def note_direct_read(self, direct_read: DirectRead) -> None:
        """Account for weights that were read to where they go."""
        self.loaded.direct_read.append(direct_read)
        self.loaded.nbytes += direct_read.nbytes
        self.current = direct_read.names[-1]

    def end(self) -> None:
        """The loader is done with the current weight; nothing of the caller's is kept.

        What a dry run touched is given back.
        """
        if (incoming := self._incoming) is not None:
            copies = None if self._computed else tuple(copy for copy in self._copies if copy is not None)
            if self._computed:
                self.loaded.computed[self.current] = tuple(self._computed)
            if copies and not self._sharded and self._known.get(self.current) != incoming.shape:
                self._check_used_up(incoming, copies)
            self.loaded.tensor_plans[self.current] = TensorPlan(incoming.shape, incoming.dtype, copies)
        self._incoming = None
        self._copies, self._computed = [], []
        self._looked = False
        if self.dry:
            for storage in self._touched:
                storage.release()
        self._touched.clear()

    # -- watching ---------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.dry and func in _VIEWS:
            self._touch(args[0])
            return func(*args, **kwargs)
        written = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
        targets = list(_tensors(written, {})) if written else []
        sources: tuple[str, ...] = ()
        revisits = False
        for tensor in _tensors(args, kwargs):
            key = self._touch(tensor)
            found = self._sources.get(key)
            revisits |= key in self._revisiting
            if found is None and self._reads(func, tensor, key, targets):
                found = (self._writers.get(key, ""),)
                revisits |= self._revisits(self.storages[key].primary.name)
            if found is not None and found != sources:
                sources = tuple(dict.fromkeys((*sources, *found)))
        if revisits:
            self.loaded.read_back.update(
                storage.primary.name for target in targets if (storage := self.storages.get(_key(target)))
            )
        overwritten_later = False
        for target in targets:
            overwritten_later |= self._note_write(func, target, args, sources)
        if overwritten_later:
            return written[0]
        if self.dry and any(_key(target) in self.storages for target in targets):
            return written[0] if func._schema.returns else None
        elsewhere = self.dry and not written and kwargs.get("device") is not None
        if elsewhere and any(tensor.is_meta for tensor in _tensors(args, kwargs)):
            kwargs = {**kwargs, "device": torch.device("meta")}
        if func is torch.ops.aten._local_scalar_dense.default:
            self._looked = True
        out = func(*args, **kwargs)
        if sources and not written:
            self._follow(out, sources, revisits)
        return out

    def _reads(self, func: Any, tensor: torch.Tensor, key: int, targets: list[torch.Tensor]) -> bool:
        """Whether an operator takes values from a parameter that is being loaded."""
        storage = self.storages.get(key)
        known = key in self.complete if storage is None else storage.primary.is_parameter
        if not known or func in _VIEWS or any(tensor is target for target in targets):
            return False
        if storage is None:
            raise self.late_read(*self.complete[key])
        return True

    def _revisits(self, parameter: str) -> bool:
        """Note that the loader takes values from a parameter. Whether they are those of other weights."""
        own = self._incoming is not None and parameter in self.loaded.written.get(self.current, ())
        if not own:
            self.loaded.read_back.add(parameter)
        return not own

    def _touch(self, tensor: torch.Tensor) -> int:
        """Give a placeholder memory. Returns the identity of the tensor's storage."""
        key = _key(tensor)
        storage = self.storages.get(key)
        if storage is not None and not storage.materialised:
            self._materialise(storage)
        return key

    def _materialise(self, storage: StagedStorage) -> None:
        if storage.closed:
            raise self.late(storage.primary.name)
        if storage.aliases_served and self.touching is not None:
            self.touching(storage)
        read_only = not storage.primary.is_parameter and storage.nbytes <= SMALL_BYTES
        storage.materialise(initialise=not self.dry or read_only)
        if not read_only:  # loaders ask tables where a weight goes, so these have values in a dry run too
            self._touched.append(storage)

    def _follow(self, out: Any, sources: tuple[str, ...], revisits: bool) -> None:
        """What is computed from weights still belongs to those weights, and what is computed from parameters
        that the loader came back to, to these.
        """
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                key = _key(tensor)
                if key not in self._sources and key not in self.storages:
                    self._note_source(tensor, sources)
                    if revisits and key:
                        self._revisiting.add(key)

    def _note_source(self, tensor: torch.Tensor, names: tuple[str, ...]) -> None:
        if key := _key(tensor):
            self._sources[key] = names
            self._noted[key] = StorageWeakRef(tensor.untyped_storage())
            self._of_current.append(key)

    def _forget(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._noted.pop(key, None)
            self._sources.pop(key, None)
            self._revisiting.discard(key)

    def _note_write(
        self, func: Any, target: torch.Tensor, args: tuple[Any, ...], sources: tuple[str, ...]
    ) -> bool:
        """Account for a write. Says whether it may not be done, since a cold start would overwrite it."""
        key = _key(target)
        storage = self.storages.get(key)
        if storage is None:
            if key in self._protected:
                raise self.late(self._protected[key])
            if self._incoming is not None and key == self._incoming.key:
                self._incoming.changed = True
            if sources:  # memory of the loader's own, where it may be putting several together
                self._note_source(target, sources)
            return False
        if storage.closed:
            raise self.late(storage.primary.name)
        name = sources[0] if sources and sources[0] else self.current
        if func is torch.ops.aten.copy_.default and (reason := self._misfit(name, target, args[1], storage)):
            storage.coverage.add(_in_elements_of(target, storage))  # it came: not missing as well
            self.reject(name, reason)
        if target.numel() == 0:
            return False  # padding of which there is none
        if self._incoming is None or (sources and sources != (self.current,)):
            self.loaded.repeatable = False
        copy = self._copy_of(func, target, args, storage)
        self._copies.append(copy)
        if copy is None:
            self._computed.append((storage.primary.name, Geometry.of(target)))
        self._recent.add(key)
        self._writers[key] = self.current if self._writers.get(key, self.current) == self.current else ""
        covered = storage.coverage.volume
        storage.coverage.add(_in_elements_of(target, storage))
        for name in sources or (self.current,):
            self.loaded.note_written(name or self.current or storage.primary.name, storage.primary.name)
        again = storage.coverage.volume == covered
        return (
            copy is not None and copy.source is not None and self._is_overwritten_at_cold_start(copy, again)
        )

    def _is_overwritten_at_cold_start(self, copy: StridedCopy, again: bool) -> bool:
        """Whether a weight that a cold start loads after the current one was written to the slot already.

        ``again``: its elements had been written before. Matrices are looked up only then, which is rare; that
        fused layers share vectors and numbers (scales, zero points, permutations) is not.
        """
        slot = copy.parameter, copy.target
        if len(copy.target.size) < 2:
            first = self._written_by.setdefault(slot, self.current)
        elif again:
            first = self._first_at(slot)
        else:
            return False
        if first == self.current and slot not in self.loaded.contested:
            return False
        contenders = self.loaded.contested.setdefault(slot, {first: None})
        contenders[self.current] = None
        return any(self._later(name, self.current) for name in contenders)

    def _first_at(self, slot: Slot) -> str:
        """The first weight that was written to a slot; the current one if no other was."""
        for name, tensor_plan in self.loaded.tensor_plans.items():
            if any((copy.parameter, copy.target) == slot for copy in tensor_plan.copies or ()):
                return name
        return self.current

    def _misfit(
        self, name: str, target: torch.Tensor, source: torch.Tensor, storage: StagedStorage
    ) -> str | None:
        """Why a copy that torch would do is not what a checkpoint means."""
        parameter = storage.primary.name
        if source.numel() != target.numel() and not (source.numel() == 1 and _SCALE.search(parameter)):
            return (
                f"shape {list(self.loaded.shapes.get(name, source.shape))} would be broadcast from "
                f"{list(source.shape)} to {list(target.shape)} in {parameter}"
            )
        whole = not (target.dtype.is_floating_point or target.dtype.is_complex)
        cut = whole and source.dtype.is_floating_point and source.dtype.itemsize > 1
        if cut or (source.dtype.is_complex and not target.dtype.is_complex):
            return f"{source.dtype} cannot be loaded into {target.dtype} of {parameter}"
        return None

    def _check_used_up(self, incoming: _Incoming, copies: tuple[StridedCopy, ...]) -> None:
        """A weight of which the loader takes only a part is too large for the place it goes to."""
        used = sum(copy.source.numel for copy in copies if copy.source is not None)
        if 0 < used < math.prod(incoming.shape):
            self.mismatches.misshapen[self.current] = (
                f"shape {list(incoming.shape)}, of which {copies[0].parameter} takes {used} elements only"
            )

    def _copy_of(
        self, func: Any, target: torch.Tensor, args: tuple[Any, ...], storage: StagedStorage
    ) -> StridedCopy | None:
        """The write as something that can be repeated, or None when it was computed from the weight."""
        parameter, where = storage.primary.name, Geometry.of(target)
        incoming = self._incoming
        if func is torch.ops.aten.zero_.default:
            return StridedCopy(parameter, where, target.dtype, None, target.dtype, 0)
        if func is torch.ops.aten.fill_.Scalar and incoming is not None and not self._looked:
            return StridedCopy(parameter, where, target.dtype, None, target.dtype, args[1])
        if func is not torch.ops.aten.copy_.default or incoming is None:
            return None
        source = args[1]
        same = _key(source) == incoming.key and source.element_size() == incoming.dtype.itemsize
        if not same or not incoming.as_it_came or _key(source) == 0 or source.shape != target.shape:
            return None
        start = source.storage_offset() - incoming.offset
        view = Geometry(start, where.size, shared(tuple(source.stride())))
        plain = Geometry.contiguous(where.size)  # nearly always, and then the same object
        return StridedCopy(parameter, where, target.dtype, plain if view == plain else view, source.dtype)

    def reject(self, name: str, reason: str) -> None:
        """Note that a weight does not fit and stop its loader."""
        self.mismatches.misshapen[name] = reason
        raise RejectedWeightError(reason)

    def late(self, target: str) -> LateWriteError:
        """The error for a write to what is complete or served already."""
        return LateWriteError(
            f"While {self.current!r} was loaded, the model's loader wrote to {target}, which is complete or "
            "served already. The engine serves what it served before. Send each weight once; if this model's "
            "loader revisits layers on purpose, reload it with whole_model=True."
        )

    def late_read(self, parameter: str, of_group: str) -> LateReadError:
        """The error for a look at what is complete already. Its group is open to the end from now on."""
        self.loaded.read_back.add(of_group)
        return LateReadError(
            f"While {self.current!r} was loaded, the model's loader looked at {parameter}, which is complete "
            "already, so that its new values are not there. The engine serves what it served before. Reload "
            "again: from now on that layer waits for the end. Or reload with whole_model=True."
        )


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))
    for value in kwargs.values():
        if isinstance(value, torch.Tensor):
            yield value


def _in_elements_of(target: torch.Tensor, storage: StagedStorage) -> Geometry:
    """The written view in elements of the storage's primary tensor (which may have another dtype)."""
    view = Geometry.of(target)
    here, there = target.element_size(), storage.primary.format.dtype.itemsize
    if here == there:
        return view
    start = view.offset * here // there
    return Geometry(start, (max(1, view.numel * here // there),), (1,))
