"""Ranks that are about to enter a collective meet at the store first: all of them enter it, or none does."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence

from ..errors import RanksDisagreeError
from ..interrupts import deliver
from .votes import COMMIT, Vote


class Meetings:
    """Where a rank meets others in one reload, or in one call of the executor.

    Args:
        vote: of this rank. A rank that fails votes against, which ends the waiting of all others.

    """

    def __init__(self, vote: Vote) -> None:
        self.vote = vote
        self._met: dict[str, int] = defaultdict(int)
        """Set of ranks -> how often this rank has met them."""

    def meet(self, ranks: Sequence[int], where: str) -> None:
        """Wait until all of some ranks are about to do the same. Costs each rank some store operations
        and a look at it now and then.

        Args:
            ranks: global ranks, this one among them. Where some are not among those that vote (experts spread
                over replicas), nobody waits: their failures are not told here.
            where: what it is; the same on all of them.

        Raises:
            RanksDisagreeError: a rank voted against, is at another place, has left, or did not come.

        """
        numbers = self._numbers(ranks)
        if numbers is None:
            return
        vote = self.vote
        who = hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]
        self._met[who] += 1
        prefix = f"{vote.prefix}meet/{who}/{self._met[who]}/"
        here, count, go = prefix + "at/" + where, prefix + "count", prefix + "go"
        vote.past += [here, count, go]
        vote.store.add(here, 1)
        mine = vote.place.rank
        if vote.store.add(count, 1) == len(numbers):  # the last one to come: all have said where they are
            if vote.store.add(here, 0) == len(numbers):
                vote.store.set(go, "")
            else:
                vote.decide({mine: f"was at {where} when another rank was elsewhere"})
        if not self._ended(go, numbers):
            vote.decide({mine: f"waited {vote.vote_timeout:g} s for the others at {where}"})
        elif vote.store.check([go]):
            return
        elif gone := self._gone(numbers):
            vote.decide(dict.fromkeys(gone, f"was done with this call, and did not come to {where}"))
        raise self._disagree()

    def leave(self) -> None:
        """The rank is done with what the vote is about, and comes to no other meeting of it."""
        keys = [self._left(self.vote.place.rank), self._left("any")]
        self.vote.past += keys
        for key in keys:
            self.vote.store.set(key, "")

    def _left(self, number: int | str) -> str:
        return f"{self.vote.prefix}left/{number}"

    def _numbers(self, ranks: Sequence[int]) -> list[int] | None:
        """The numbers that ranks have in the vote; None where one has none."""
        import torch.distributed as dist

        place = self.vote.place
        numbers = [place.rank - dist.get_rank() + rank for rank in ranks]
        return numbers if all(0 <= number < place.ranks for number in numbers) else None

    def _ended(self, go: str, numbers: Sequence[int]) -> bool:
        """Wait for the word of the last one to come, for a decision, or until one of those awaited has left;
        says whether one of these was there in time.
        """
        store, deadline = self.vote.store, time.monotonic() + self.vote.vote_timeout
        pause = 0.0002
        while not any(store.check([key]) for key in (go, self.vote.prefix + "decision")):
            # Others than those awaited may leave: ranks of another pipeline stage.
            if store.check([self._left("any")]) and self._gone(numbers):
                break
            if time.monotonic() > deadline:
                return False
            deliver()
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return True

    def _gone(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if self.vote.store.check([self._left(number)])]

    def _disagree(self) -> RanksDisagreeError:
        decision: str = self.vote.store.get(self.vote.prefix + "decision").decode()
        assert decision != COMMIT, "no rank is ready to commit while one processes"
        return self.vote.disagreement(self.vote.reasons(decision))
