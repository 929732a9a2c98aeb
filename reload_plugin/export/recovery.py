"""The load format of layers that are served, recovered from their kernel format and proven.

Layers that processing leaves alone are read as they are. Of others a guess is made (``candidates``), then one
by where processing moves each element (``permutation``). A guess counts when processing it again gives, bit
for bit, what is served (``trial``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ..commit.group_commit import Commit
from ..errors import ReloadError
from ..record.model_record import Group, TensorRecord
from ..record.staged_group import StagedGroup
from ..tensors import storage_id
from ..transaction.engine_state import EngineState
from .candidates import as_load_format, candidates_of, places, standing
from .int8_linear import int8_candidates
from .native_twins import NativeTwins
from .permutation import Pair, put_back
from .trial import Trial, as_bits, difference, filling

logger = logging.getLogger("vllm.reload_plugin")

TRIAL_BYTES = 64 << 20
"""Load-format bytes of the layers that are tried together; a larger layer is tried alone."""

KEPT_BYTES = 256 << 20
"""Bytes of recovered values that are kept from the check to the writing; others are found out twice."""

Way = Literal["as it is", "guess", "permutation", "none"]
"""How the load format of a group is recovered."""


@dataclass(frozen=True)
class Recovery:
    """How the load format of some groups is recovered, all of them together."""

    groups: tuple[Group, ...]
    way: Way
    reason: str = ""
    """Why it cannot be, where it cannot."""
    lossy: frozenset[str] = frozenset()
    """Load-format tensors of which processing does not keep every bit: other values would be served the same
    way, so those that were loaded cannot be known."""


@dataclass
class LoadValues:
    """Load-format values of some groups. Views of served memory where the load format stands there."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """Load-format tensor -> values, of its shape and dtype."""
    inverted: set[str] = field(default_factory=set)
    """Those of them that are not served as they are: an inverse of processing gave them."""


class Recoveries:
    """Finds out how the load format of each group can be recovered, and recovers it.

    Args:
        model: recorded, and not being reloaded; nothing writes to its weights meanwhile.
        state: of the model.

    """

    def __init__(self, model: nn.Module, state: EngineState) -> None:
        self._model, self._state, self._record = model, state, state.record
        # After a foreign writer a new handle may lie where a known one was.
        self._twins = NativeTwins(state.handles if state.generation.known else {})
        self._found: dict[str, Recovery] = {}
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        """Recovery (by identity) -> values that were expensive to find out, up to ``KEPT_BYTES``."""

    def of(self, group: Group) -> Recovery:
        """How the load format of a group is recovered; found out before by ``find``."""
        return self._found[group.name]

    # -- finding out -------------------------------------------------------------------------------

    def find(self, groups: Iterable[Group]) -> Iterator[int]:
        """Find out for some groups; gives the load-format bytes done, batch by batch.

        Takes the memory of ``TRIAL_BYTES``, or of the largest group, three times.
        """
        waiting = [group for group in groups if group.name not in self._found]
        for group in [group for group in waiting if group.needs_no_processing]:
            self._note((group,), "as it is")
            yield group.nbytes
        processed = [group for group in waiting if not group.needs_no_processing]
        # Those that vLLM processes last make values of one another (MLA's of ``kv_b_proj``).
        if last := tuple(group for group in processed if group.late or group.deferred):
            self._try_together(last)
            yield sum(group.nbytes for group in last)
        for batch in _batches([group for group in processed if not (group.late or group.deferred)]):
            self._try_batch(batch)
            yield sum(group.nbytes for group in batch)

    def _note(
        self,
        groups: tuple[Group, ...],
        way: Way,
        reason: str = "",
        lossy: Iterable[str] = (),
        moved: dict[str, torch.Tensor] | None = None,
    ) -> None:
        recovery = Recovery(groups, way, reason, frozenset(lossy))
        if moved is not None and self._kept_bytes() + _bytes_of(moved) <= KEPT_BYTES:
            self._kept[id(recovery)] = moved
        self._found.update((group.name, recovery) for group in groups)

    def _try_batch(self, batch: Sequence[Group]) -> None:
        """Guess for several groups at once, and look for an inverse of each that differs."""
        values = self._guess(batch)
        try:
            differing = self._differing(batch, values)
            lossy = self._lossy([group for group in batch if group.name not in differing], values)
        except ReloadError as error:
            if len(batch) > 1:
                for group in batch:
                    self._try_batch([group])
                return
            logger.info("%s cannot be processed again: %s", batch[0].name, error)
            differing, lossy = {batch[0].name: str(error)}, set()
        for group in batch:
            if group.name in differing:
                self._invert((group,))
            else:
                self._note((group,), "guess", lossy=lossy & {record.name for record in group.tensors})

    def _try_together(self, groups: tuple[Group, ...]) -> None:
        values = self._guess(groups)
        try:
            differing = self._differing(groups, values)
            lossy = set() if differing else self._lossy(groups, values, together=True)
        except ReloadError as error:
            logger.info("Layers cannot be processed again: %s", error)
            differing, lossy = {groups[0].name: str(error)}, set()
        if differing:
            self._invert(groups)
        else:
            self._note(groups, "guess", lossy=lossy)

    def _invert(self, groups: tuple[Group, ...]) -> None:
        names = ", ".join(group.name for group in groups if any(t.is_parameter for t in group.tensors))
        reason = f"no inverse of what processing makes of {names} is known"
        moved: dict[str, torch.Tensor] | None = None
        try:
            moved = self._moved_back(groups)
            what = next(iter(self._differing(groups, self._guess(groups) | moved).values()), "")
        except (ReloadError, RuntimeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
        if what:
            logger.info("%s cannot be inverted: %s", names, what)
            self._note(groups, "none", reason)
        else:
            self._note(groups, "permutation", moved=moved)

    def _kept_bytes(self) -> int:
        return sum(map(_bytes_of, self._kept.values()))

    def _lossy(
        self, groups: Sequence[Group], values: Mapping[str, torch.Tensor], together: bool = False
    ) -> set[str]:
        """Load-format tensors of which processing does not keep every bit: with the lowest bit of the
        smallest element changed, what is served comes out all the same. Quantization does that, packing
        does not.

        Args:
            groups: that were proven.
            values: of them.
            together: a change in one of them may show in another.

        """
        lossy: set[str] = set()
        parameters = {
            group.name: [r.name for r in group.tensors if r.is_parameter and r.name in values]
            for group in groups
        }
        rounds = [
            [(name, names[index]) for name, names in parameters.items() if index < len(names)]
            for index in range(max(map(len, parameters.values()), default=0))
        ]
        if together:
            rounds = [[one] for some in rounds for one in some]
        for some in rounds:
            changed = {parameter: with_a_bit_changed(values[parameter]) for _, parameter in some}
            differing = self._differing(groups, {**values, **changed})
            seen = differing.keys() if not (together and differing) else {name for name, _ in some}
            lossy.update(parameter for name, parameter in some if name not in seen)
        return lossy

    def _differing(self, groups: Sequence[Group], values: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Group -> what processing its values again does not give as it is served."""
        differing: dict[str, str] = {}

        def see(staged: StagedGroup, commit: Commit) -> None:
            what = difference(commit, self._twins)
            if what is not None:
                differing[staged.group.name] = what

        Trial(self._model, self._state, frozenset(group.name for group in groups)).run(filling(values), see)
        return differing

    # -- recovering --------------------------------------------------------------------------------

    def values_of(self, groups: Iterable[Group]) -> LoadValues:
        """The load format of groups, as far as it can be recovered. The caller only reads the tensors."""
        recovered = LoadValues()
        for found in {id(found): found for found in (self._found[group.name] for group in groups)}.values():
            if found.way == "none":
                continue
            values = self._guess(found.groups)
            if found.way == "permutation":
                values |= self._kept.get(id(found)) or self._moved_back(found.groups)
            recovered.values |= values
            for module, name, record in (place for group in found.groups for place in places(group)):
                if (value := values.get(record.name)) is not None:
                    served = standing(module, name, record)
                    if served is None or storage_id(served) != storage_id(value):
                        recovered.inverted.add(record.name)
            _add_views(recovered, found.groups)
        return recovered

    def _guess(self, groups: Iterable[Group]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for group in groups:
            found |= int8_candidates(group) | candidates_of(group)
        return found

    def _moved_back(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        def process(values: Mapping[str, torch.Tensor]) -> list[Pair]:
            pairs: list[Pair] = []

            def see(_: StagedGroup, commit: Commit) -> None:
                pairs.extend((served, new.clone()) for served, new in commit.copies)

            Trial(self._model, self._state, frozenset(group.name for group in groups)).run(
                filling(values), see
            )
            return pairs

        return put_back([r for group in groups for r in group.tensors if r.is_parameter], process)


def with_a_bit_changed(values: torch.Tensor) -> torch.Tensor:
    """A copy with the lowest bit of the element changed that is closest to zero and not zero."""
    copied = values.detach().clone(memory_format=torch.contiguous_format)
    if not copied.numel():
        return copied
    sizes = copied.reshape(-1).to(torch.float64).abs()
    index = int(sizes.masked_fill((sizes == 0) | sizes.isnan(), torch.inf).argmin())
    bits = as_bits(copied).view(-1)
    bits[index] = bits[index] ^ 1
    return copied


def _bytes_of(values: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in values.values())


def _add_views(recovered: LoadValues, groups: Iterable[Group]) -> None:
    """Load-format tensors that are views of the memory of others which were recovered."""
    records = [record for group in groups for record in group.tensors]
    whole: dict[int, TensorRecord] = {}
    for record in records:
        if record.name in recovered.values and record.format.geometry.offset == 0:
            whole.setdefault(record.storage, record)
    for record in records:
        of = whole.get(record.storage)
        if record.name in recovered.values or of is None or record.format.end > of.format.nbytes:
            continue
        memory = as_load_format(recovered.values[of.name], of.format.geometry).untyped_storage()
        empty = torch.empty(0, dtype=record.format.dtype, device=memory.device)
        geometry = record.format.geometry
        recovered.values[record.name] = empty.set_(memory, geometry.offset, geometry.size, geometry.stride)
        if of.name in recovered.inverted:
            recovered.inverted.add(record.name)


def _batches(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups that are tried together: up to ``TRIAL_BYTES``, or a single one."""
    batch: list[Group] = []
    for group in groups:
        if batch and sum(one.nbytes for one in batch) + group.nbytes > TRIAL_BYTES:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch
