"""Who ends the waiting at a meeting: ranks that are awaited there, and nobody else. Two pipeline stages of
two ranks each, as threads over a real store.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from reload_plugin.errors import RanksDisagreeError
from reload_plugin.ranks.meeting import Meetings
from reload_plugin.ranks.votes import RankPlace, Vote

STAGE, OTHER_STAGE = (0, 1), (2, 3)
SECONDS = 20.0


class Ranks:
    """Four ranks; each call runs in a thread of its own and knows its rank, as torch tells it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._here = threading.local()
        monkeypatch.setattr(dist, "get_rank", lambda: self._here.rank)
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.came_to: dict[int, str] = {}
        self._threads: list[threading.Thread] = []
        self.meetings = [self._of(rank) for rank in (*STAGE, *OTHER_STAGE)]

    def _of(self, rank: int) -> Meetings:
        limit = timedelta(seconds=2)  # of asking for a key that is not there
        store = dist.TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=limit)
        vote = Vote(store, RankPlace("model/0", rank, 4), "1", [])
        vote.vote_timeout = SECONDS
        return Meetings(vote)

    def begin(self, rank: int, call: Callable[[Meetings], None]) -> None:
        """Let a rank call this; ``join`` tells what it came to."""

        def run() -> None:
            self._here.rank = rank
            try:
                call(self.meetings[rank])
                self.came_to[rank] = "went in"
            except (RanksDisagreeError, dist.DistError) as error:
                self.came_to[rank] = f"{type(error).__name__}: {error}"

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self) -> dict[int, str]:
        for thread in self._threads:
            thread.join(2 * SECONDS)
        return self.came_to


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def meet(meetings: Meetings) -> None:
    meetings.meet(STAGE, "layer 1")


def test_a_rank_of_another_stage_that_leaves_ends_nobodys_waiting(ranks: Ranks) -> None:
    ranks.begin(0, meet)
    time.sleep(0.2)
    ranks.begin(2, Meetings.leave)
    time.sleep(0.5)
    assert 0 not in ranks.came_to, "it did not wait on for the rank of its stage"
    ranks.begin(1, meet)
    assert ranks.join() == {0: "went in", 1: "went in", 2: "went in"}


def test_a_rank_of_another_stage_that_has_left_before_ends_nobodys_waiting(ranks: Ranks) -> None:
    ranks.begin(3, Meetings.leave)
    ranks.join()
    ranks.begin(1, meet)
    time.sleep(0.5)
    ranks.begin(0, meet)
    assert ranks.join() == {0: "went in", 1: "went in", 3: "went in"}


def test_an_awaited_rank_that_leaves_ends_the_waiting_and_is_named(ranks: Ranks) -> None:
    started = time.monotonic()
    ranks.begin(0, meet)
    time.sleep(0.2)
    ranks.begin(1, Meetings.leave)
    said = ranks.join()[0]
    assert time.monotonic() - started < SECONDS / 2
    assert "rank 1: was done with this call, and did not come to layer 1" in said
