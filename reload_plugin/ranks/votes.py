"""Many ranks, one decision: every rank of a model commits a reload, or none does.

A rank that has prepared everything says so and waits; a rank that failed says why. The last one to get
ready decides to commit, the first one to fail or to time out decides against it, and all obey the decision
that came first: it is one key of the process group's store, set by compare-and-swap. No
collective is involved, so a rank that fails or is slow leaves nothing half-entered behind.

Each replica of the model (``data_parallel_size``) decides for itself. Where experts are spread over
replicas, take a failure of one for a failure of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RanksDisagreeError, ReloadError
from ..interrupts import deliver
from ..record.model_record import ModelRecord

logger = logging.getLogger("vllm.reload_plugin")

TIMEOUT = "RELOAD_PLUGIN_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others, once it is ready itself."""
VOTE_TIMEOUT = 600.0

READY, COMMIT = "ready", "commit"
NOT_EVERY_RANK = "Not every rank is ready"
"""How the error begins of a rank that did not commit because of others."""
TOLD = 16
"""Ranks that refuse and are named with their reasons; more of them say no more."""
LONGEST = 2000
"""Characters of a reason that travel to the other ranks."""
LOOKING_SECONDS = 1.0
"""The first rank that times out looks who is missing; the others give it so long before they look too."""
LOOKS = 1e-4
"""Seconds between two looks at the decision, for each rank: the store answers 10,000 of them a second."""


@dataclass(frozen=True)
class RankPlace:
    """A rank's place among the ``ranks`` that hold one model together; ``group`` is what they share."""

    group: str
    rank: int
    ranks: int
    names: tuple[str, ...] = ()
    """What to call each rank in messages, where numbers do not say enough."""

    def called(self, rank: int) -> str:
        """The name of a rank of this group."""
        return self.names[rank] if self.names else f"rank {rank}"


class Vote:
    """One rank's vote in one reload. Call it with None when ready, else with the error; once counts.

    A ready rank waits for the decision, and returns if that is to commit. From then on the other ranks
    commit too, so whatever can fail comes before. Should the commit itself fail on one rank, the others
    cannot know: that rank must not serve.

    Args:
        store: a store of torch.distributed that all the ranks share.
        place: the rank that votes.
        reload_id: the same on every rank, and never used again.
        past: keys of earlier reloads of this group, deleted once no rank can read them any more.

    Raises:
        RanksDisagreeError: another rank failed or did not answer; names each with its reason.

    """

    def __init__(self, store: Any, place: RankPlace, reload_id: str, past: list[str]) -> None:
        self.vote_timeout = VOTE_TIMEOUT
        """Seconds to wait for the others."""
        self.committed = False
        """Whether the ranks decided to commit."""
        self.postponed: BaseException | None = None
        """What interrupted the wait when commit was decided already; to be raised after the commit."""
        self.in_doubt = False
        """Whether this rank was ready and then lost the others: they may have committed, or not."""
        self._cast = False
        self.store = store
        self.place = place
        self.past = past
        self.prefix = f"reload_plugin/{place.group}/{reload_id}/"
        """Of its keys in the store."""

    def __call__(self, error: BaseException | None) -> None:
        if self._cast:
            return
        self._cast = True
        if error is None:
            self._agree()
        else:
            self._refuse(f"{type(error).__name__}: {error}"[:LONGEST])

    def following(self) -> Vote:
        """A second vote in the same reload, for ranks that agreed in this one."""
        vote = Vote(self.store, self.place, "", self.past)
        vote.prefix, vote.vote_timeout = self.prefix + "then/", self.vote_timeout
        return vote

    @property
    def ranks(self) -> int:
        """How many vote."""
        return self.place.ranks

    @property
    def missed(self) -> bool:
        """Whether the others timed out on this rank before it voted."""
        if not self.store.check([self.prefix + "decision"]):
            return False
        decision: str = self.store.get(self.prefix + "decision").decode()
        return decision != COMMIT and str(self.place.rank) in json.loads(decision)

    def note(self, text: str) -> None:
        """Leave a text for ``notes``; to be called before the vote."""
        self.store.set(self._note(self.place.rank), text)

    def notes(self) -> list[str]:
        """What every rank left, by rank; once all have decided to commit."""
        found = [self.store.get(self._note(rank)).decode() for rank in range(self.place.ranks)]
        self.past.append(self._note(self.place.rank))
        return found

    def _note(self, rank: int) -> str:
        return f"{self.prefix}note/{rank}"

    def _refuse(self, reason: str) -> None:
        try:
            self.store.set(self._key(self.place.rank), reason)
            number = self.store.add(self.prefix + "refusals", 1)
            if number <= TOLD:
                self.store.set(self._refusal(number), json.dumps([self.place.rank, reason]))
                self.past.append(self._refusal(number))
            self.decide({self.place.rank: reason})
        except Exception as error:  # noqa: BLE001 - the reload's own error is the one to raise
            logger.warning("The other ranks could not be told that this one failed: %s", error)
        self.past += self._keys()

    def _agree(self) -> None:
        try:
            decision = self._ready()
            self.in_doubt = False
            reasons = {} if decision == COMMIT else self.reasons(decision)
        except Exception as error:
            lost = (
                "lost the others, which may have committed" if self.in_doubt else "could not reach the others"
            )
            raise self.disagreement({self.place.rank: f"{lost}: {error}"}) from error
        self.committed = decision == COMMIT
        if self.committed:
            self._forget()
        self.past += self._keys()
        if not self.committed:
            raise self.disagreement(reasons)

    def _ready(self) -> str:
        """Be ready, and wait; returns the decision."""
        try:
            self.store.set(self._key(self.place.rank), READY)
            self.in_doubt = True
            if self.store.add(self.prefix + "ready", 1) == self.place.ranks:
                return self.decide(COMMIT)
            if self._decided(self.vote_timeout):
                return self.decide({})
            first = self.store.add(self.prefix + "late", 1) == 1
            known = not first and self._decided(LOOKING_SECONDS)
            return self.decide({} if known else self._silent())
        except KeyboardInterrupt as interrupt:
            decision = self.decide({self.place.rank: "was interrupted"})
            if decision != COMMIT:
                raise
            self.postponed = interrupt
            return decision

    def _decided(self, seconds: float) -> bool:
        """Wait for a decision by looking often: a wait inside the store would lock other threads out."""
        deadline = time.monotonic() + seconds
        pause, longest = 0.0005, max(0.02, LOOKS * self.place.ranks)
        while not self.store.check([self.prefix + "decision"]):
            if time.monotonic() > deadline:
                return False
            deliver()
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return True

    def decide(self, wish: str | dict[int, str]) -> str:
        """Decide, unless it has been decided; returns the decision that holds."""
        text = wish if isinstance(wish, str) else json.dumps(wish)
        held: bytes = self.store.compare_set(self.prefix + "decision", "", text)
        return held.decode()

    def _silent(self) -> dict[int, str]:
        ranks = self._missing(range(self.place.ranks))
        if not ranks:  # one of them is, or ended, between its key and its count
            mine = self.place.rank
            return {mine: f"waited {self.vote_timeout:g} s, and a rank was not counted though it was ready"}
        return dict.fromkeys(
            ranks, f"did not answer {self.place.called(self.place.rank)} within {self.vote_timeout:g} s"
        )

    def _missing(self, ranks: range) -> list[int]:
        """Those of these ranks that have not voted. Asks for many at once; halves where one is missing."""
        if self.store.check([self._key(rank) for rank in ranks]):
            return []
        if len(ranks) == 1:
            return list(ranks)
        half = len(ranks) // 2
        return self._missing(ranks[:half]) + self._missing(ranks[half:])

    def reasons(self, decision: str) -> dict[int, str]:
        """Rank -> why it refused: what was decided on, and whatever other ranks have said since."""
        reasons = {int(rank): str(reason) for rank, reason in json.loads(decision).items()}
        # One by one of those that refused: to ask for each rank would cost their square in all.
        for number in range(1, min(self.store.add(self.prefix + "refusals", 0), TOLD) + 1):
            if self.store.check([self._refusal(number)]):
                rank, reason = json.loads(self.store.get(self._refusal(number)))
                reasons[rank] = reason
        return reasons

    def _forget(self) -> None:
        """All ranks have come to this reload, so nobody is in an earlier one."""
        try:
            for key in self.past:
                self.store.delete_key(key)
        except Exception as error:  # noqa: BLE001 - commit is decided; a key that stays does no harm
            logger.warning("Keys of earlier reloads could not be deleted: %s", error)
        self.past.clear()

    def disagreement(self, reasons: dict[int, str]) -> RanksDisagreeError:
        lines = [f"  {self.place.called(rank)}: {reason}" for rank, reason in sorted(reasons.items())]
        text = "\n".join([f"{NOT_EVERY_RANK} to commit this reload, so none does.", *lines])
        return RanksDisagreeError(f"{text}\nEvery rank serves what it served before.", reasons)

    def _refusal(self, number: int) -> str:
        return f"{self.prefix}refusal/{number}"

    def _key(self, rank: int) -> str:
        return f"{self.prefix}{rank}"

    def _keys(self) -> list[str]:
        shared = [self.prefix + name for name in ("ready", "refusals", "late", "decision")]
        return [self._key(self.place.rank), *shared]


class ReloadIds:
    """Ids of reloads, counted by each rank alike and without communication.

    A worker counts the calls of its executor, which every rank gets in the same order: a rank that fails on
    its way to a reload, or begins one alone, is in step again at the next call. Outside of such a worker
    (Ray, external launchers) the reloads themselves are counted.
    """

    def __init__(self) -> None:
        self.call = 0
        """Calls of the executor so far; 0 outside of its workers."""
        self._numbers: dict[str, int] = defaultdict(int)
        self.past: dict[str, list[str]] = defaultdict(list)
        self._store: Callable[[], object] = lambda: None

    def begin_call(self) -> None:
        """The executor calls this worker."""
        self.call += 1
        self._numbers.clear()

    def next(self, store: Any, place: RankPlace) -> Vote:
        """The vote in the reload that begins now; to be called at its very beginning."""
        if self._store() is not store:
            self._store = weakref.ref(store)
            self._numbers.clear()
            self.past.clear()
        self._numbers[place.group] += 1
        reload_id = f"{self.call}.{self._numbers[place.group]}"
        return Vote(store, place, reload_id, self.past[place.group])


# One a process: it counts within the store of torch's default process group, of which a process has one.
_reload_ids = ReloadIds()


def begin_call() -> None:
    """The executor calls this process's worker; see ``ReloadIds``."""
    _reload_ids.begin_call()


def call_number() -> int:
    """Of the present call of the executor; 0 where calls are not counted."""
    return _reload_ids.call


def counts_calls() -> bool:
    """Whether reloads are counted within calls of an executor, which every rank gets alike."""
    return call_number() > 0


def past_keys(group: str) -> list[str]:
    """The list of keys that go when this group has decided to commit the next time."""
    return _reload_ids.past[group]


def vote_for(record: ModelRecord) -> Vote | None:
    """The vote of this rank in a reload that begins now; None where one rank holds the whole model.

    Raises:
        ReloadError: ``RELOAD_PLUGIN_TIMEOUT`` is not a number of seconds.

    """
    ranks = ranks_of(record)
    if ranks == 1:
        return None
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    vote = _reload_ids.next(store, rank_place_of(record, dist.get_rank()))
    try:
        vote.vote_timeout = vote_timeout()
    except ReloadError as error:
        vote(error)
        raise
    return vote


def refuse_next(records: Iterable[ModelRecord], error: BaseException) -> None:
    """A call of the executor raised on this rank. Others may wait in it for a vote to which this one does not
    come: it votes against the next one that would begin here. Costs two operations of the store.

    Does nothing where calls are not counted: there the next vote may be one of the next reload.
    """
    if not counts_calls():
        return
    for record in records:
        with contextlib.suppress(ReloadError):
            vote = vote_for(record)
            if vote is not None:
                vote(error)


def vote_among(purpose: str, ranks: Sequence[int], rank: int) -> Vote:
    """The vote of a rank in something that ``ranks`` do together, each in the same order.

    A rank that votes after the others have timed out takes part in their next attempt.

    Args:
        purpose: what they do; counted by itself.
        ranks: global ranks that take part.
        rank: this one's global rank.

    """
    import torch.distributed as dist

    group = f"{purpose}/{hashlib.sha256(repr(list(ranks)).encode()).hexdigest()[:16]}"
    store = dist.distributed_c10d._get_default_store()
    place = RankPlace(group, list(ranks).index(rank), len(ranks))
    vote = _reload_ids.next(store, place)
    while vote.missed:  # they may have begun anew since
        vote = _reload_ids.next(store, place)
    return vote


def ranks_of(record: ModelRecord) -> int:
    """How many ranks hold a model together. A draft model lives in the last pipeline stage only."""
    parallel = getattr(record.vllm_config, "parallel_config", None)
    sizes = ["tensor_parallel_size", "prefill_context_parallel_size"]
    if getattr(record.model_config, "runner_type", "") != "draft":
        sizes.append("pipeline_parallel_size")
    return math.prod(getattr(parallel, size, 1) for size in sizes)


def rank_place_of(record: ModelRecord, rank: int) -> RankPlace:
    """The place of a global rank; vLLM numbers ranks by replica, pipeline stage, then shard."""
    ranks = ranks_of(record)
    kind = getattr(record.model_config, "runner_type", "model")
    return RankPlace(f"{kind}/{rank // ranks}", rank % ranks, ranks)


def vote_timeout() -> float:
    """Seconds to wait for other ranks."""
    text = os.environ.get(TIMEOUT, str(VOTE_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ReloadError(f"{TIMEOUT} is {text!r} and not seconds. The engine serves what it served before.")
    return seconds
