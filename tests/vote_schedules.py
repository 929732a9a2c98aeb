"""A vote under any order of its steps, and with any of them failing: no rank commits when another did not.

    python -m tests.vote_schedules 10000 [SEED]      # so many schedules; prints how they ended

Every operation of the store, and every look at the clock, is a step; a schedule says whose step is next, and
which of them fail. The ranks are threads of which one runs at a time.
"""

import random
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field

import torch.distributed as dist

from reload_plugin import errors
from reload_plugin.ranks import votes

COMMITS, REFUSES, DIES, LOSES_STORE = "commits", "refuses", "dies", "loses the store"


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


WISHES = (COMMITS, COMMITS, COMMITS, REFUSES, DIES, LOSES_STORE)
STEPS, PATIENCE = 16, 30


def check(ranks: list[Rank], seed: int) -> set[str]:
    """Run one schedule; what became of the ranks.

    Raises:
        AssertionError: they did not decide alike, or one of them does not say why it refused.

    """
    plain, votes.time = votes.time, Clock()
    try:
        Schedule(ranks, seed).run()
    finally:
        votes.time = plain
    outcomes = {rank.outcome for rank in ranks}
    assert outcomes <= {"committed", "refused", "died", "in doubt"}
    assert not {"committed", "refused"} <= outcomes, ranks
    for rank in ranks:
        if rank.wish == REFUSES:
            assert rank.outcome == "refused"
        if rank.outcome == "in doubt":
            assert rank.wish == LOSES_STORE, "only who loses the store does not know"
        if rank.outcome == "refused" and rank.wish == COMMITS:
            assert rank.reasons, "nobody is named"
    return outcomes


def drawn(dice: random.Random) -> list[Rank]:
    """Two to five ranks: what each wants, when it fails, and how long it waits."""
    count = dice.randint(2, 5)
    return [
        Rank(number, dice.choice(WISHES), dice.randint(1, STEPS), dice.randint(1, PATIENCE))
        for number in range(count)
    ]


def main(schedules: int, seed: int) -> Counter:
    """Run random schedules; how often each set of outcomes was seen."""
    dice = random.Random(seed)
    found = Counter()
    for _ in range(schedules):
        found[" and ".join(sorted(check(drawn(dice), dice.getrandbits(32))))] += 1
    return found


if __name__ == "__main__":
    wanted, chosen = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.getrandbits(32)
    print(f"{wanted:,} schedules of seed {chosen}: no rank committed when another did not")
    for outcomes, times in main(wanted, chosen).most_common():
        print(f"{times:7,}  {outcomes}")
