"""What captured graphs have baked in: addresses and numbers, which a commit must leave as they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .. import vllm_api
from ..errors import SERVES_OLD, UnsupportedError
from ..record.late_bound import LateBound
from ..record.module_state import cell_content, tensors_in
from ..record.snapshot import ABSENT, Snapshot, equal, read
from .group_commit import Commit

_SHOWN = 4
_NUMBERS = (bool, int, float, complex)
_OF_THE_RUN = frozenset({"online_quantization_time"})
"""Numbers that processing notes and no kernel is given: seconds."""


def refuse_stale_graphs(commit: Commit) -> None:
    """Raises UnsupportedError where graphs that were captured before would not see what a commit changes.

    Nothing of the commit is applied then. ``commit`` is of one group.
    """
    found = sorted(set(_baked(commit)))
    if found:
        _refuse(found)


def _refuse(found: list[str]) -> None:
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    raise UnsupportedError(
        f"CUDA graphs were captured, and new weights would change what they have baked in: {shown}. "
        f"{SERVES_OLD} Start a new engine on these weights, or start with enforce_eager=True to reload."
    )


def refuse_unmakeable(late: LateBound) -> None:
    """Raises UnsupportedError for tensors that the first forward pass made of weights, where no method makes
    them anew: graphs would go on reading the old ones. See ``record.late_bound``.
    """
    makers = vllm_api.LATE_VALUES
    found = sorted(
        f"{type(holder).__name__}.{name}"
        for holder, name, value in late.set_since(makers)
        if isinstance(value, torch.Tensor) and makers[name] is None
    )
    if found:
        _refuse(found)


def _baked(commit: Commit) -> Iterator[str]:
    yield from (f"{path} (address)" for _, _, path in commit.moves)
    before: dict[int, Snapshot] = {}
    for holder, key, value in commit.writes:
        if id(holder) not in before:
            before[id(holder)] = read(holder)
        if key[1] not in _OF_THE_RUN and (what := _change(before[id(holder)].get(key, ABSENT), value)):
            yield f"{commit.name}.{key[1]} ({what})"
    for cell, value in commit.cells:
        if what := _change(cell_content(cell), value):
            yield f"a closure of {commit.name} ({what})"
    # Handles that are known are the host's, which no graph calls.
    yield from (f"{commit.name}: {type(served).__name__} (native memory)" for served, _ in commit.exchanges)


def _change(old: object, new: object) -> str | None:
    """How a value changes that a graph may have baked in; None if it does not."""
    if old is ABSENT:
        return None  # a graph that was captured before cannot know it
    if {id(tensor) for tensor in tensors_in(old)} - {id(tensor) for tensor in tensors_in(new)}:
        return "address"
    if isinstance(old, _NUMBERS) and not equal(old, new):
        return "number"
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        pairs = itertools.zip_longest(old, new, fillvalue=ABSENT)
        return next((what for pair in pairs if (what := _change(*pair))), None)
    return None
