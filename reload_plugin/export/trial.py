"""Processing candidate values of some groups once more, to see whether what is served comes out.

The proof behind every value that is not read from a file: what a cold start would make of it is made, by
vLLM's own ``process_weights_after_loading``, and compared bit for bit with what is served.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ..commit.group_commit import Commit
from ..interrupts import held
from ..plan.known_checkpoint import KnownCheckpoint
from ..process.native_handles import Handles
from ..record.module_state import reachable
from ..record.staged_group import StagedGroup
from ..transaction.engine_state import EngineState
from ..transaction.session_parts import SessionOptions, wire
from .native_twins import NativeTwins

See = Callable[[StagedGroup, Commit], None]
"""Gets a group that was processed, and what its commit would change."""


Fill = Callable[[Sequence[StagedGroup]], None]
"""Writes values into the load format of groups, which has its memory and the constructor's values."""


class Trial:
    """Loads values into some groups and processes them. Nothing is committed and the live model serves what
    it served. Takes the load format and the kernel format of these groups, once each.

    Args:
        model: a recorded model that is not being reloaded.
        state: of the model.
        groups: names of the groups.
        from_served: load-format tensors start as they are served, where they have the load format; else as
            the constructor made them.

    """

    def __init__(
        self, model: nn.Module, state: EngineState, groups: frozenset[str], from_served: bool = True
    ) -> None:
        options = SessionOptions(known=KnownCheckpoint(groups=groups), from_served=from_served)
        self._parts = wire(model, state, options)

    def run(self, fill: Fill, see: See) -> None:
        """Process the groups.

        Args:
            fill: writes the values that are tried.
            see: called for each group, while the values it was made of and its result exist.

        Raises:
            ProcessingError: processing refused the values.
            CrossGroupEffectError: processing changed other groups, which were put back.

        """
        parts = self._parts
        with held(), parts.state.in_a_call(), handles_forgotten(parts.state.handles):
            try:
                with parts.processing.context():
                    parts.load_format.enter(self)
                    for staged in parts.view.groups:
                        staged.materialise()
                    fill(parts.view.groups)
                    parts.pipeline.process_all()
                    parts.pipeline.process_tail()
                parts.load_format.check_untouched("an export")
                for staged, commit in parts.strategy.waiting:
                    see(staged, commit)
            finally:
                parts.load_format.put_back()
                parts.load_format.leave(self)
                parts.state.pool.settle()

    def show_served_if_idle(self) -> bool:
        """Whether all that is served is in its place: not while this runs."""
        return False


def filling(values: Mapping[str, torch.Tensor]) -> Fill:
    """Fills in whole load-format tensors: name -> values, of its shape and dtype."""

    def fill(groups: Sequence[StagedGroup]) -> None:
        for staged in groups:
            for storage in staged.storages:  # wrappers of other tensors have none and stay as they were built
                for record in storage.records:
                    if (found := values.get(record.name)) is not None:
                        storage.views[id(record)].copy_(found)

    return fill


@contextlib.contextmanager
def handles_forgotten(handles: Handles) -> Iterator[None]:
    """Native handles that are made inside are gone when it ends, and another may lie where they were."""
    before = set(handles)
    try:
        yield
    finally:
        for handle in handles.keys() - before:
            del handles[handle]


def difference(commit: Commit, twins: NativeTwins) -> str | None:
    """What a commit would change in the served weights, in words; None if nothing.

    Args:
        commit: of a group that was processed again.
        twins: compares native handles.

    """
    for served, new in commit.copies:
        if not same_bits(served, new):
            return "a tensor of its kernel format"
    if commit.moves:
        return f"the layout of {commit.moves[0][2]}"
    for owner, other in commit.exchanges:
        if not twins.equal(owner, other):
            return "a packed weight"
    values = [value for _, _, value in commit.writes] + [value for _, value in commit.cells]
    values += [attributes for _, _, attributes in commit.tensor_attributes]
    if any(isinstance(found, torch.Tensor) for value in values for found in reachable(value)):
        return "a tensor that processing makes"
    return None


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaN equals itself."""
    return torch.equal(as_bits(a), as_bits(b))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers of their size, so that NaN and the sign of zero count. A view if possible."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    size = plain.element_size()
    return plain.view(kinds[size]) if size in kinds else torch.view_as_real(plain).view(torch.int64)
