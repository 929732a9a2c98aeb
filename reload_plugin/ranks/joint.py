"""Engines that reload together: all ranks of several engines commit, or none does.

Whoever pushes to all of them (the command line, the front end of vLLM's replicas) holds a store of
torch.distributed, and every rank of every engine votes there instead of among the ranks of its own engine.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ..errors import SERVES_OLD, ReloadError
from ..options import Together
from ..record.model_record import ModelRecord
from .votes import RankPlace, Vote, rank_place_of, vote_for, vote_timeout

CONNECT_SECONDS = 10.0
"""An engine that cannot reach the store within so many seconds refuses."""


class JointReload:
    """One reload of several engines, on the side of whoever pushes.

    Args:
        engines: name of each engine -> how many ranks vote there; in the order of their numbers.
        seconds: how long a rank waits for the others, once it is ready.

    """

    def __init__(self, engines: Mapping[str, int], seconds: float) -> None:
        import torch.distributed as dist

        store: Any = dist.TCPStore  # type: ignore[attr-defined]
        self._store = store("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self._id = uuid.uuid4().hex
        self._seconds = seconds
        self._names = [f"{name} rank {rank}" for name, ranks in engines.items() for rank in range(ranks)]
        ends = itertools.accumulate(engines.values())
        self._first = {name: end - engines[name] for name, end in zip(engines, ends, strict=True)}

    def option(self, engine: str, host: str, replica: int = 0) -> dict[str, Any]:
        """The option ``together`` of an engine's ``reload_weights``, as JSON.

        Args:
            engine: its name.
            host: the address of this machine, as that engine sees it.
            replica: the number of its first replica (``data_parallel_index``).

        """
        return Together(
            store=f"{host}:{self._store.port}",
            reload_id=self._id,
            first=self._first[engine],
            replica=replica,
            names=tuple(self._names),
            seconds=self._seconds,
        ).model_dump(mode="json")

    def refuse(self, engine: str, error: BaseException) -> None:
        """An engine failed on its way to the vote, or before: the others need not wait for it. Harmless once
        the engines have decided.
        """
        place = RankPlace("together", self._first[engine], len(self._names), tuple(self._names))
        Vote(self._store, place, self._id, [])(error)


def together_in(given: Any) -> Together | None:
    """The option ``together`` of a call, checked.

    Raises:
        ReloadError: it is not valid.

    """
    if given is None:
        return None
    try:
        return Together.model_validate(given)
    except ValueError as error:
        raise ReloadError(f"The option together is not valid: {error}. {SERVES_OLD}") from error


class JointVote(Vote):
    """The vote of a rank in a reload of several engines: first among all ranks of all engines, then among
    those of its own, so that these never differ, whatever becomes of the store of whoever pushes.

    Args:
        store: of whoever pushes.
        place: among the ranks of all engines.
        reload_id: never used again.
        local: the vote among the ranks of this engine, if it has several.

    """

    def __init__(self, store: Any, place: RankPlace, reload_id: str, local: Vote | None) -> None:
        super().__init__(store, place, reload_id, [])
        self._local = local

    def __call__(self, error: BaseException | None) -> None:
        if self._cast:
            return
        try:
            super().__call__(error)
        except BaseException as refused:
            self.in_doubt = False  # the engines may differ now, which its error says; the ranks of one do not
            self._tell_local(refused)
            raise
        self._tell_local(error)

    def _tell_local(self, error: BaseException | None) -> None:
        if self._local is None:
            return
        self.committed = False
        try:
            self._local(error)
        finally:
            self.committed, self.in_doubt = self._local.committed, self._local.in_doubt
            self.postponed = self.postponed or self._local.postponed


def joint_vote(record: ModelRecord, together: Together) -> Vote:
    """The vote of this rank in a reload of several engines.

    Raises:
        ReloadError: the store of whoever pushes cannot be reached.

    """
    import torch.distributed as dist

    local = vote_for(record)
    host, _, port = together.store.rpartition(":")
    try:
        limit = timedelta(seconds=CONNECT_SECONDS)
        store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError) as error:
        unreachable = ReloadError(
            f"The engines that reload together vote at {together.store}, which cannot be reached from here: "
            f"{error}. {SERVES_OLD}"
        )
        if local is not None:
            local(unreachable)
        raise unreachable from error
    vote = JointVote(store, _place(record, together), together.reload_id, local)
    vote.vote_timeout = min(together.seconds, vote_timeout())
    return vote


def _place(record: ModelRecord, together: Together) -> RankPlace:
    """vLLM's dense replicas are engines by themselves; their number is the index."""
    import torch.distributed as dist

    mine = 0
    if dist.is_available() and dist.is_initialized():
        mine = rank_place_of(record, dist.get_rank()).rank
    here = rank_place_of(record, mine)
    replica = getattr(getattr(record.vllm_config, "parallel_config", None), "data_parallel_index", 0)
    number = together.first + (replica - together.replica) * here.ranks + mine
    return RankPlace("together", number, len(together.names), together.names)
