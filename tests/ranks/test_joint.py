"""Engines that reload together: their ranks vote in one store, and those of one engine never differ."""

import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist

from reload_plugin import errors
from reload_plugin.options import Together
from reload_plugin.ranks import joint
from reload_plugin.ranks.votes import RankPlace, Vote

NAMES = ("a rank 0", "a rank 1", "b rank 0", "b rank 1")


class Losing:
    """A store that is gone once this rank is ready."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        if name in ("check", "compare_set"):
            raise dist.DistNetworkError("connection lost")
        return getattr(self._store, name)


def vote_of_all(
    fails: dict[int, BaseException] | None = None, loses: int | None = None, absent: tuple[int, ...] = ()
) -> list[str]:
    """Two engines of two ranks each, in threads; what each rank's vote came to."""
    pushing = dist.HashStore()
    inside = [dist.HashStore(), dist.HashStore()]
    found = [""] * 4

    def rank(number: int) -> None:
        engine, mine = divmod(number, 2)
        local = Vote(inside[engine], RankPlace("model/0", mine, 2), "1", [])
        store = Losing(pushing) if number == loses else pushing
        vote = joint.JointVote(store, RankPlace("together", number, 4, NAMES), "x", local)
        vote.vote_timeout = local.vote_timeout = 2.0
        try:
            vote((fails or {}).get(number))
            found[number] = "committed" if vote.committed else "refused"
        except errors.RanksDisagreeError as error:
            found[number] = f"{'in doubt' if vote.in_doubt else 'refused'}: {error}"

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(4) if n not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_all_commit() -> None:
    assert vote_of_all() == ["committed"] * 4


def test_one_rank_of_one_engine_that_fails_stops_all() -> None:
    found = vote_of_all(fails={3: ValueError("no such file")})
    assert found[3] == "refused"
    assert all("b rank 1: ValueError: no such file" in text for text in found[:3]), found
    assert not any(text == "committed" or "in doubt" in text for text in found)


def test_a_rank_that_never_comes_is_named() -> None:
    found = vote_of_all(absent=(2,))
    assert all("b rank 0: did not answer" in found[number] for number in (0, 1, 3)), found


@pytest.mark.parametrize("number", range(4))
def test_ranks_of_an_engine_agree_when_one_loses_whoever_pushes(number: int) -> None:
    found = vote_of_all(loses=number)
    same = [text.split(":")[0] for text in found]
    assert same[0] == same[1], found
    assert same[2] == same[3], found
    assert same[number] == "refused"
    assert "may have committed" in found[number]


def test_whoever_pushes_refuses_for_an_engine_that_is_not_there() -> None:
    whole = joint.JointReload({"a": 1, "b": 2}, 5.0)
    option = Together.model_validate(whole.option("a", "127.0.0.1"))
    assert option.names == ("a rank 0", "b rank 0", "b rank 1")
    assert Together.model_validate(whole.option("b", "127.0.0.1", replica=3)).first == 1
    whole.refuse("b", ValueError("no server"))
    vote = joint.joint_vote(Record(), option)
    with pytest.raises(errors.RanksDisagreeError, match="b rank 0: ValueError: no server"):
        vote(None)


def test_replicas_number_themselves() -> None:
    whole = joint.JointReload({"a": 1, "b": 4}, 5.0)  # the store is there as long as this is
    option = whole.option("b", "127.0.0.1", replica=2)
    vote = joint.joint_vote(Record(data_parallel_index=3, tensor_parallel_size=2), Together(**option))
    assert vote.place.rank == 1 + 2


@pytest.mark.parametrize(
    "make", [lambda: joint.together_in({"store": "x"}), lambda: joint.joint_vote(Record(), GONE)]
)
def test_what_cannot_be_used_is_told(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "CONNECT_SECONDS", 0.5)
    with pytest.raises(errors.ReloadError, match="serves what it served before"):
        make()


GONE = Together(store="127.0.0.1:9", reload_id="x", first=0, names=("a",), seconds=1)


class Record:
    """What a vote asks a record for."""

    model_config = None

    def __init__(self, **sizes: int) -> None:
        self.vllm_config = type("Config", (), {"parallel_config": type("Sizes", (), sizes)})
