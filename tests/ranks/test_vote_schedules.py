"""A vote under any order of its steps, and with any of them failing: no rank commits when another did not.

Every operation of the store, and every look at the clock, is a step; a schedule says whose step is next, and
which of them fail. The ranks are threads of which one runs at a time.
"""

import random
import threading
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from reload_plugin import errors
from reload_plugin.ranks import votes

COMMITS, REFUSES, DIES, LOSES_STORE = "commits", "refuses", "dies", "loses the store"
SCHEDULES = 1500


class DeadError(BaseException):
    """The process of a rank ended here."""


@dataclass
class Rank:
    """What a rank is going to do, and what became of it."""

    number: int
    wish: str
    at_step: int
    """The step at which it dies or loses the store."""
    patience: int
    """Looks at the clock until it times out."""
    outcome: str = "running"
    steps: int = 0
    reasons: dict[int, str] = field(default_factory=dict)


class Schedule:
    """Runs ranks in threads, one step at a time, in an order that a seed gives."""

    def __init__(self, ranks: list[Rank], seed: int) -> None:
        self.ranks, self.dice = ranks, random.Random(seed)
        self.store = dist.HashStore()
        self.turn = {rank.number: threading.Semaphore(0) for rank in ranks}
        self.back = threading.Semaphore(0)

    def run(self) -> None:
        threads = [threading.Thread(target=self.vote, args=(rank,), daemon=True) for rank in self.ranks]
        for thread in threads:
            thread.start()
        running = list(self.ranks)
        while running:
            rank = self.dice.choice(running)
            self.turn[rank.number].release()
            assert self.back.acquire(timeout=20), "a rank did not come back"
            running = [rank for rank in running if rank.outcome == "running"]
        for thread in threads:
            thread.join(20)

    def step(self, rank: Rank) -> None:
        """Give the turn back and wait for the next."""
        self.back.release()
        assert self.turn[rank.number].acquire(timeout=20)
        rank.steps += 1
        if rank.steps >= rank.at_step:
            if rank.wish == DIES:
                raise DeadError
            if rank.wish == LOSES_STORE:
                raise dist.DistNetworkError("connection lost")

    def vote(self, rank: Rank) -> None:
        self.turn[rank.number].acquire(timeout=20)
        place = votes.RankPlace("model/0", rank.number, len(self.ranks))
        vote = votes.Vote(Stepwise(self, rank), place, "1", [])
        vote.vote_timeout = rank.patience
        _here.rank, _here.schedule, _here.now = rank, self, 0
        try:
            vote(ValueError("no") if rank.wish == REFUSES else None)
            rank.outcome = "committed" if vote.committed else "refused"
        except errors.RanksDisagreeError as error:
            rank.outcome = "in doubt" if vote.in_doubt else "refused"
            rank.reasons = error.reasons
        except DeadError:
            rank.outcome = "died"
        finally:
            self.back.release()


_here = threading.local()


class Stepwise:
    """The store as one rank sees it."""

    def __init__(self, schedule: Schedule, rank: Rank) -> None:
        self._schedule, self._rank = schedule, rank

    def __getattr__(self, name: str) -> object:
        plain = getattr(self._schedule.store, name)

        def call(*args: object) -> object:
            self._schedule.step(self._rank)
            return plain(*args)

        return call


class Clock:
    """Time passes by looking at it."""

    def monotonic(self) -> float:
        _here.now += 1
        return _here.now

    def sleep(self, seconds: float) -> None:
        _here.schedule.step(_here.rank)


def ranks_of(draw: st.DrawFn) -> list[Rank]:
    count = draw(st.integers(2, 4))
    wishes = st.sampled_from([COMMITS, COMMITS, COMMITS, REFUSES, DIES, LOSES_STORE])
    return [Rank(i, draw(wishes), draw(st.integers(1, 8)), draw(st.integers(1, 30))) for i in range(count)]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Rank], int]:
    return ranks_of(draw), draw(st.integers(0, 2**32))


@given(schedules())
@settings(max_examples=SCHEDULES, deadline=None, derandomize=False)
def test_no_rank_commits_when_another_did_not(drawn: tuple[list[Rank], int]) -> None:
    ranks, seed = drawn
    plain, votes.time = votes.time, Clock()
    try:
        Schedule(ranks, seed).run()
    finally:
        votes.time = plain
    outcomes = {rank.outcome for rank in ranks}
    assert outcomes <= {"committed", "refused", "died", "in doubt"}
    assert not {"committed", "refused"} <= outcomes, ranks
    if all(rank.wish == COMMITS and rank.patience == 30 for rank in ranks) and "refused" not in outcomes:
        assert outcomes == {"committed"}
    for rank in ranks:
        if rank.wish == REFUSES:
            assert rank.outcome == "refused"
        if rank.outcome == "in doubt":
            assert rank.wish == LOSES_STORE, "only who loses the store does not know"
        if rank.outcome == "refused" and rank.wish == COMMITS:
            assert rank.reasons, "nobody is named"


@pytest.mark.parametrize("lost", [True, False])
def test_a_rank_that_lost_the_others_after_it_was_ready_is_in_doubt(lost: bool) -> None:
    shared = dist.HashStore()

    class Losing:
        def __getattr__(self, name: str) -> object:
            if lost and name in ("check", "compare_set"):
                raise dist.DistNetworkError("connection lost")
            return getattr(shared, name)

    mine = votes.Vote(Losing(), votes.RankPlace("model/0", 0, 2), "1", [])
    mine.vote_timeout = 0.01
    with pytest.raises(errors.RanksDisagreeError, match="may have committed" if lost else "did not answer"):
        mine(None)
    assert mine.in_doubt is lost
