"""Watches a model's own ``load_weights``: one dispatch mode, and consumers of what it sees.

The model's own loader does the loading. Every operator that it calls becomes an ``Access``, which each
consumer is asked about in turn: memory on first touch, a guard over served memory, where values come from,
which slots were written, what can be repeated without the loader, and which of several weights for one slot
stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import LateWriteError
from ..record.staged_group import StagedGroup
from ..record.staged_storage import StagedStorage
from ..record.tensor_layout import shared
from ..tensors import storage_id
from .access import VIEWS, Access, Kind, Operand, access_of, on_meta
from .arrivals import Loaded
from .contention import SlotContention
from .fit import left_over, misfit
from .materialisation import Materialisation, Touching
from .mismatches import Mismatches, RejectedWeightError
from .plan_recorder import PlanRecorder
from .provenance import Provenance, Values
from .served_guard import Named, ServedGuard, late_write
from .slot_log import SlotLog, in_elements_of
from .source import DirectRead


class LoadTrace(TorchDispatchMode):
    """Watches loaders while active.

    Args:
        mismatches: receives weights that do not fit.
        dry: weights are meta tensors and nothing is written to staging; only what the loader does is noted.
        known: shapes of the engine's own checkpoint; of those weights a loader may use a part, as at a cold
            start.
        sharded: whether several ranks share the model, so that each uses its own part of a weight only.
        is_later: whether a cold start loads the first of two weights after the second.

    """

    def __init__(
        self,
        mismatches: Mismatches,
        dry: bool = False,
        known: Mapping[str, tuple[int, ...]] | None = None,
        sharded: bool = False,
        is_later: Callable[[str, str], bool] = operator.gt,
    ) -> None:
        super().__init__()
        self.dry = dry
        self.mismatches = mismatches
        self.loaded = Loaded()
        self.current = ""
        """The weight that came last."""
        self._known = {} if known is None else known
        self._sharded = sharded
        self._storages: dict[int, StagedStorage] = {}
        self._memory = Materialisation(dry)
        self._guard = ServedGuard(self._storages, self.loaded)
        self._provenance = Provenance(self._storages, self.loaded)
        self._recorder = PlanRecorder(self.loaded)
        self._slots = SlotLog(self.loaded)
        self._contention = SlotContention(self.loaded, is_later)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper of torch's around ``__torch_dispatch__``, which would cost more than what is in it."""
        return False

    # -- what is watched --------------------------------------------------------------------------

    @property
    def storages(self) -> Mapping[int, StagedStorage]:
        """Identity of a storage -> staging that is watched, under every identity that it has had."""
        return self._storages

    def watch(self, storages: Iterable[StagedStorage]) -> None:
        """From now on loaders may write to these, as long as their groups are open."""
        self._storages.update({storage.key: storage for storage in storages})

    def unwatch(self, storage: StagedStorage) -> None:
        """Staging is about to lose its memory, which may be another's then."""
        self._storages.pop(storage.key, None)

    def protect(self, find: Callable[[], Named], touching: Touching | None = None) -> None:
        """Keep loaders away from served memory.

        Args:
            find: everything that is served, and what to call it. Asked once, if a loader writes elsewhere
                than to staging; what is staging as well is not protected.
            touching: called before a loader is given staging that lies in served memory.

        """
        self._guard.protect(find)
        self._memory.touching = touching

    def note_complete(self, tensor: torch.Tensor, parameter: str, of_group: str) -> None:
        """A layer is complete, and ``tensor``, its ``parameter``, does not hold what was loaded.

        A loader that reads it stops the reload; ``of_group`` is any load-format tensor of the layer's group.
        """
        self._guard.note_complete(tensor, parameter, of_group)

    def forget_model(self) -> None:
        """Refer to nothing of the model any more. What was loaded stays known."""
        self._storages.clear()
        self._guard.forget()
        self._memory.touching = None

    def take_recent(self) -> set[int]:
        """Identities of the storages that were written to since this was last asked."""
        return self._slots.take_recent()

    def note_new_parameters(self, groups: Iterable[StagedGroup]) -> None:
        """Note the weights from which a loader made parameters that the load format does not have."""
        for group in groups:
            for tensor in group.new_parameters():
                self.loaded.in_new_parameters.update(self._provenance.weights_in(tensor))

    def late(self, target: str) -> LateWriteError:
        """The error for a write to what is complete or served already."""
        return late_write(self.current, target)

    # -- one weight at a time ---------------------------------------------------------------------

    def begin(self, name: str, tensor: torch.Tensor, late: bool = False) -> None:
        """The stream hands ``tensor`` to the loader now. ``late``: the loader may write it when others have
        come, and nobody else has its memory.
        """
        self.current = name
        self.note_arrival(name, tensor)
        self._provenance.begin(name, tensor, late)
        self._recorder.begin(name, tensor, self.loaded.shapes[name])

    def end(self) -> None:
        """The loader is done with the current weight; nothing of the caller's is kept.

        What a dry run allocated is given back.
        """
        made = self._recorder.end()
        if made is not None and not self._sharded:
            name, tensor_plan = made
            reason = left_over(tensor_plan) if self._known.get(name) != tensor_plan.shape else None
            if reason is not None:
                self.mismatches.misshapen[name] = reason
        self._provenance.end()
        self._memory.give_back()

    def note_arrival(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
        """Account for a weight, however it is loaded. ``shape``: of it, if that is at hand."""
        self.loaded.shapes[name] = shared(tuple(tensor.shape)) if shape is None else shape
        self.loaded.nbytes += tensor.numel() * tensor.element_size()

    def note_direct_read(self, direct_read: DirectRead) -> None:
        """Account for weights that were read to where they go."""
        self.loaded.direct_read.append(direct_read)
        self.loaded.nbytes += direct_read.nbytes
        self.current = direct_read.names[-1]

    # -- watching ---------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in VIEWS:
            self._touch(storage_id(args[0]))
            return func(*args, **kwargs)
        access = access_of(func, args, kwargs)
        for _, key in access.writes:
            self._touch(key)
        for _, key in access.reads:
            self._touch(key)
        self._guard.check(access, self.current)
        values = self._provenance.read(access)
        if access.writes and not self._note_writes(access, values):
            return access.result
        if access.kind is Kind.SCALAR:
            self._recorder.note_scalar_read()
        out = func(*args, **(on_meta(access, kwargs) if self.dry else kwargs))
        if not access.writes:
            self._provenance.follow(out, values)
        return out

    def _touch(self, key: int | None) -> None:
        """Staging that an operator is given has memory."""
        storage = self._storages.get(key or 0)
        if storage is not None and not storage.materialised:
            self._guard.check_open(storage, self.current)
            self._memory.allocate(storage)

    def _note_writes(self, access: Access, values: Values) -> bool:
        """Note what an operator writes. Returns whether it is to be run."""
        run = True
        for target in access.writes:
            storage = self._storages.get(target.key)
            if storage is None:
                self._recorder.note_write_elsewhere(target)
                self._provenance.note_write_elsewhere(target, values)
            elif self._note_write(access, target, storage, values) or self.dry:
                run = False
        return run

    def _note_write(self, access: Access, target: Operand, storage: StagedStorage, values: Values) -> bool:
        """Note a write to staging. Returns whether a cold start would overwrite it by a weight that came."""
        if access.source is not None:
            self._check_fit(target, access.source, storage, values)
        if target.tensor.numel() == 0:
            return False  # padding of which there is none
        current, parameter = self.current, storage.primary.name
        copy = self._recorder.note_write(access, target, parameter, values)
        self._provenance.note_write(parameter, current, values)
        again = self._slots.note(target, storage, values.weights or (current,), current)
        if copy is None or copy.source is None:
            return False
        return self._contention.is_overwritten(copy, current, again)

    def _check_fit(self, target: Operand, source: Operand, storage: StagedStorage, values: Values) -> None:
        """Reject a weight that does not fit; its slot does not count as missing as well."""
        name = values.weights[0] if values.weights and values.weights[0] else self.current
        shape = self.loaded.shapes.get(name)
        reason = misfit(target.tensor, source.tensor, storage.primary.name, shape)
        if reason is not None:
            storage.coverage.add(in_elements_of(target.tensor, storage))
            self.mismatches.misshapen[name] = reason
            raise RejectedWeightError(reason)
