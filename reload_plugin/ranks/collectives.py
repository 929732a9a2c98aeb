"""Collectives that processing enters: all ranks of one are ready for it, for the same layer, or none enters.

Quantization of weights that are split over ranks reduces their largest value over these ranks. A rank that
failed before its share would leave the others waiting inside, and a rank that is at another layer would give
them that layer's value.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .. import vllm_api
from ..device.shared_setting import SharedSetting
from ..record.model_record import ModelRecord
from . import votes
from .meeting import Meetings
from .votes import RankPlace, Vote

_FUNCTIONS = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
_METHODS = ("all_reduce", "all_gather", "all_gatherv", "reduce_scatter", "broadcast", "gather")


class CollectiveGate:
    """Lets this thread into a collective when the other ranks of it are there as well.

    Args:
        meetings: of this rank; None where it is let in at once, and what it enters is only noted.

    """

    def __init__(self, meetings: Meetings | None = None) -> None:
        self.entered = False
        """Whether a collective of several ranks was entered, or tried."""
        self._meetings = meetings
        self._at = ""

    @contextlib.contextmanager
    def around(self, group: str) -> Iterator[None]:
        """Within, this thread processes a group of layers.

        Raises:
            RanksDisagreeError: in place of the collective: another rank failed, or is at another layer.

        """
        self._at = group
        gates = _of_thread.__dict__.setdefault("gates", [])
        with _wrapped.wanted():
            gates.append(self)
            try:
                yield
            finally:
                gates.remove(self)

    def enter(self, ranks: list[int]) -> None:
        """Wait for the other ``ranks`` (global) of a collective."""
        self.entered = True
        if self._meetings is not None:
            self._meetings.meet(ranks, self._at or "the model")


_of_thread = threading.local()
"""``gates``: what this thread is inside of, the innermost last. ``inside``: whether a collective runs."""


def _wrap() -> Callable[[], object]:
    import torch.distributed as dist

    coordinator = vllm_api.get(*vllm_api.GROUP_COORDINATOR)
    places: list[tuple[Any, str, Callable[..., list[int]]]] = [
        (dist, name, _ranks_of_argument) for name in _FUNCTIONS
    ]
    places += [(coordinator, name, _ranks_of_coordinator) for name in _METHODS if hasattr(coordinator, name)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, ranks_of in places:
        setattr(owner, name, _gated(getattr(owner, name), ranks_of))

    def undo() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)

    return undo


_wrapped = SharedSetting(_wrap)


def _gated(collective: Callable[..., Any], ranks_of: Callable[..., list[int]]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def gated(*args: Any, **kwargs: Any) -> Any:
        gates: list[CollectiveGate] = getattr(_of_thread, "gates", [])
        if not gates or getattr(_of_thread, "inside", False):
            return collective(*args, **kwargs)
        ranks = ranks_of(*args, **kwargs)
        if len(ranks) > 1:
            gates[-1].enter(ranks)
        _of_thread.inside = True  # a coordinator's method calls the function
        try:
            return collective(*args, **kwargs)
        finally:
            _of_thread.inside = False

    return gated


def _ranks_of_argument(*args: Any, group: Any = None, **_: Any) -> list[int]:
    import torch.distributed as dist

    given = [value for value in args if isinstance(value, dist.ProcessGroup)]
    return dist.get_process_group_ranks(given[0] if given else group)


def _ranks_of_coordinator(coordinator: Any, *_: Any, **__: Any) -> list[int]:
    return list(coordinator.ranks)


# -- where no vote of a reload is under way ------------------------------------------------------------


class _VotesOfCall:
    """The votes of this rank in the present call of the executor, one for each model.

    An update in several calls votes when it is finished; layers are processed in each. Nobody is ever ready
    in such a vote: it only tells those that wait for a collective that another rank has failed.
    """

    def __init__(self) -> None:
        self._call = 0
        self._votes: dict[str, Vote] = {}

    def vote(self, record: ModelRecord) -> Vote | None:
        """None where one rank holds the model, or where calls are not counted."""
        import torch.distributed as dist

        if not votes.counts_calls() or votes.ranks_of(record) == 1 or not dist.is_initialized():
            return None
        if self._call != votes.call_number():
            self._call, self._votes = votes.call_number(), {}
        place = votes.rank_place_of(record, dist.get_rank())
        if place.group not in self._votes:
            of_call = RankPlace(f"collectives/{place.group}", place.rank, place.ranks)
            store = dist.distributed_c10d._get_default_store()
            vote = Vote(store, of_call, str(self._call), votes.past_keys(place.group))
            vote.vote_timeout = votes.vote_timeout()
            self._votes[place.group] = vote
        return self._votes[place.group]


_votes_of_call = _VotesOfCall()


def vote_of_call(record: ModelRecord) -> Vote | None:
    """See ``_VotesOfCall``."""
    return _votes_of_call.vote(record)


def leave_collectives(records: Iterable[ModelRecord]) -> None:
    """A call of the executor is over on this rank: others may wait in it for a collective."""
    for record in records:
        vote = _votes_of_call.vote(record)
        if vote is not None:
            Meetings(vote).leave()


def refuse_collectives(records: Iterable[ModelRecord], error: BaseException) -> None:
    """A call of the executor raised on this rank: others may wait in it for a collective."""
    for record in records:
        vote = _votes_of_call.vote(record)
        if vote is not None:
            vote(error)
