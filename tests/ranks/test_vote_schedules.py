"""Votes under random orders of their steps: see `vote_schedules`."""

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from reload_plugin import errors
from reload_plugin.ranks import votes
from tests.vote_schedules import PATIENCE, STEPS, WISHES, Rank, check

SCHEDULES = 700


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Rank], int]:
    count, wishes = draw(st.integers(2, 4)), st.sampled_from(WISHES)
    steps, patience = st.integers(1, STEPS), st.integers(1, PATIENCE)
    ranks = [Rank(number, draw(wishes), draw(steps), draw(patience)) for number in range(count)]
    return ranks, draw(st.integers(0, 2**32))


@given(schedules())
@settings(max_examples=SCHEDULES, deadline=None, derandomize=False)
def test_no_rank_commits_when_another_did_not(drawn: tuple[list[Rank], int]) -> None:
    check(*drawn)


class Counting:
    """A store that counts its operations."""

    def __init__(self) -> None:
        self.store, self.done = dist.HashStore(), 0

    def __getattr__(self, name: str) -> object:
        self.done += 1
        return getattr(self.store, name)


@pytest.mark.parametrize("missing", [1, 100])
def test_ranks_that_time_out_together_are_told_by_one_of_them_who_is_missing(missing: int) -> None:
    """A rank that asked for each rank would make their square in all: 1,048,576 operations of 1,024."""
    store, count = Counting(), 1024
    there = range(missing, count)
    for rank in there:
        store.set(f"reload_plugin/model/0/1/{rank}", votes.READY)
    before, operations = store.done, []
    for rank in there[-20:]:  # as if they all had waited
        mine = votes.Vote(store, votes.RankPlace("model/0", rank, count), "1", [])
        mine.vote_timeout = 1e-9
        with pytest.raises(errors.RanksDisagreeError) as caught:
            mine(None)
        assert list(caught.value.reasons) == list(range(missing))
        operations.append(store.done - before)
        before = store.done
    assert operations[0] < 30 + 4 * missing
    assert max(operations[1:]) < 10


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
