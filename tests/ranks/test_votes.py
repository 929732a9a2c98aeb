"""Several ranks hold one model: all of them commit a reload, or none does."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from reload_plugin import errors
from reload_plugin.ranks import votes as ranks
from tests import rank_scenarios

RANKS = 3

VOTER = """
import json, random, signal, sys, time
import torch.distributed as dist
from reload_plugin import errors
from reload_plugin.ranks import votes as ranks

rank, count, port, file = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
stores = {"tcp": dist.TCPStore("127.0.0.1", port), "file": dist.FileStore(file, count)}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background has none
reload_ids = {name: ranks.ReloadIds() for name in stores}

def vote(store, fails="", delay=0, vote_timeout=30, calls=0):
    for _ in range(calls):
        reload_ids[store].begin_call()
    vote = reload_ids[store].next(stores[store], ranks.RankPlace("model/0", rank, count))
    vote.vote_timeout = vote_timeout
    time.sleep(delay)
    try:
        vote(ValueError(fails) if fails else None)
    except errors.RanksDisagreeError as error:
        return {"reasons": error.reasons, "text": str(error)}
    except KeyboardInterrupt:
        return {"interrupted": True}
    return {"committed": vote.committed}

def race(store, rounds):
    dice = random.Random(rank)
    votes = [vote(store, vote_timeout=0.004, delay=dice.random() * 0.01) for _ in range(rounds)]
    return [found.get("committed", False) for found in votes]

print("ready", flush=True)
for line in sys.stdin:
    call = json.loads(line)
    print(json.dumps({"vote": vote, "race": race}[call.pop("do")](**call)), flush=True)
"""


class Voters:
    """Processes that vote, one for each rank."""

    def __init__(self, folder: Path) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        command = [sys.executable, "-c", VOTER]
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(RANKS), str(self.server.port), str(folder / "store")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        for process in self.processes:
            assert process.stdout.readline() == "ready\n"

    def ask(self, rank: int, do: str = "vote", **call: object) -> None:
        self.processes[rank].stdin.write(json.dumps({"do": do, **call}) + "\n")
        self.processes[rank].stdin.flush()

    def answer(self, rank: int) -> dict | list:
        return json.loads(self.processes[rank].stdout.readline())

    def round(self, store: str, *calls: dict, **common: object) -> list[dict]:
        """One vote of all ranks; what each found."""
        for rank, call in enumerate(calls):
            self.ask(rank, store=store, **(common | call))
        return [self.answer(rank) for rank in range(len(calls))]

    def stop(self) -> None:
        for process in self.processes:
            process.stdin.close()
            process.wait(20)


@pytest.fixture(scope="module")
def voters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Voters]:
    started = Voters(tmp_path_factory.mktemp("voters"))
    yield started
    started.stop()


@pytest.fixture(params=["tcp", "file"])
def store(request: pytest.FixtureRequest) -> str:
    """The stores of vLLM: on several nodes or with data parallelism, and on one."""
    return request.param


def all_commit(voters: Voters, store: str) -> bool:
    return voters.round(store, {}, {}, {}) == [{"committed": True}] * RANKS


def test_all_ready_commit(voters: Voters, store: str) -> None:
    assert all_commit(voters, store)


def test_one_that_fails_stops_all_at_once(voters: Voters, store: str) -> None:
    started = time.monotonic()
    first, second, third = voters.round(store, {}, {"fails": "no such file"}, {})
    assert time.monotonic() - started < 5
    assert first["reasons"] == third["reasons"] == {"1": "ValueError: no such file"}
    assert "rank 1: ValueError: no such file" in first["text"]
    assert "serves what it served before" in first["text"]
    assert second == {"committed": False}, "the rank that failed has an error of its own to raise"
    assert all_commit(voters, store)


def test_every_reason_known_by_then_is_told(voters: Voters, store: str) -> None:
    found = voters.round(store, {"fails": "one"}, {"delay": 0.5}, {"fails": "two"})
    assert found[1]["reasons"] == {"0": "ValueError: one", "2": "ValueError: two"}
    assert all_commit(voters, store)


def test_a_rank_that_does_not_answer_is_named_and_may_come_late(voters: Voters, store: str) -> None:
    started = time.monotonic()
    for rank in (0, 2):
        voters.ask(rank, store=store, vote_timeout=1)
    found = [voters.answer(rank) for rank in (0, 2)]
    assert 0.9 < time.monotonic() - started < 10
    assert all(list(each["reasons"]) == ["1"] for each in found)
    assert "rank 1: did not answer rank" in found[0]["text"]
    voters.ask(1, store=store)
    assert "did not answer rank" in voters.answer(1)["text"], "the late one must not commit alone"
    assert all_commit(voters, store)


def test_a_slow_rank_is_waited_for(voters: Voters, store: str) -> None:
    assert voters.round(store, {}, {"delay": 1}, {}, vote_timeout=20) == [{"committed": True}] * RANKS


def test_reloads_stay_in_step_when_a_rank_fails_early(voters: Voters, store: str) -> None:
    """It waits for nobody, and is two reloads ahead of the others before they have come to the first."""
    for fails in ("first", "second", ""):
        voters.ask(1, store=store, fails=fails)
    assert [voters.answer(1) for _ in range(2)] == [{"committed": False}] * 2
    for rank in (0, 2):
        voters.ask(rank, store=store, delay=0.2)
        voters.ask(rank, store=store)
        voters.ask(rank, store=store)
    for rank in (0, 2):
        first, second, third = [voters.answer(rank) for _ in range(3)]
        assert first["reasons"] == {"1": "ValueError: first"}
        assert second["reasons"] == {"1": "ValueError: second"}
        assert third == {"committed": True}
    assert voters.answer(1) == {"committed": True}


def test_a_reload_that_one_rank_never_began_costs_only_itself(voters: Voters, store: str) -> None:
    """Where calls are counted, as in vLLM's workers."""
    for rank in (0, 2):
        voters.ask(rank, store=store, vote_timeout=0.5, calls=1)
    assert all("1" in voters.answer(rank)["reasons"] for rank in (0, 2))
    assert voters.round(store, {}, {"calls": 2}, {}, calls=1) == [{"committed": True}] * RANKS
    assert all_commit(voters, store)


def test_a_rank_that_is_interrupted_stops_all(voters: Voters, store: str) -> None:
    for rank in (0, 2):
        voters.ask(rank, store=store)
    time.sleep(0.3)
    voters.processes[2].send_signal(signal.SIGINT)
    assert voters.answer(2) == {"interrupted": True}
    assert voters.answer(0)["reasons"] == {"2": "was interrupted"}
    voters.ask(1, store=store)
    assert voters.answer(1)["reasons"] == {"2": "was interrupted"}
    assert all_commit(voters, store)


def test_all_decide_alike_however_close_the_race(voters: Voters, store: str) -> None:
    """The timeout is as long as the others take: in each round some time out while the last gets ready."""
    for rank in range(RANKS):
        voters.ask(rank, "race", store=store, rounds=150)
    found = [voters.answer(rank) for rank in range(RANKS)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 2, "every race ended alike, so this could not fail"


def test_old_keys_are_deleted(voters: Voters) -> None:
    for _ in range(3):
        voters.round("tcp", {}, {"fails": "x"}, {})
        assert all_commit(voters, "tcp")
    before = voters.server.num_keys()
    for _ in range(5):
        voters.round("tcp", {}, {"fails": "x"}, {})
        assert all_commit(voters, "tcp")
    assert voters.server.num_keys() == before


# --- what one process can show ---

PLACE = ranks.RankPlace("model/0", 0, 2)


def config(**sizes: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(parallel_config=types.SimpleNamespace(**sizes))


def record(runner_type: str = "generate", **sizes: int) -> object:
    model_config = types.SimpleNamespace(runner_type=runner_type)
    return types.SimpleNamespace(vllm_config=config(**sizes), model_config=model_config)


def test_places_are_numbered_as_vllm_numbers_ranks() -> None:
    both = record(tensor_parallel_size=2, pipeline_parallel_size=2, prefill_context_parallel_size=1)
    assert [ranks.rank_place_of(both, rank) for rank in (0, 3, 4)] == [
        ranks.RankPlace("generate/0", 0, 4),
        ranks.RankPlace("generate/0", 3, 4),
        ranks.RankPlace("generate/1", 0, 4),
    ]
    draft = record("draft", tensor_parallel_size=2, pipeline_parallel_size=2)
    assert ranks.rank_place_of(draft, 3) == ranks.RankPlace("draft/1", 1, 2)


def test_one_rank_does_not_vote() -> None:
    assert ranks.vote_for(record(tensor_parallel_size=1, data_parallel_size=4)) is None
    assert ranks.vote_for(types.SimpleNamespace(vllm_config=None, model_config=None)) is None


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_the_timeout_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert ranks.vote_timeout() == 600
    monkeypatch.setenv(ranks.TIMEOUT, "2.5")
    assert ranks.vote_timeout() == 2.5
    monkeypatch.setenv(ranks.TIMEOUT, text)
    with pytest.raises(errors.ReloadError, match=ranks.TIMEOUT):
        ranks.vote_timeout()


def test_a_vote_counts_once() -> None:
    shared = dist.HashStore()
    mine = ranks.Vote(shared, PLACE, "1", [])
    mine(ValueError("first"))
    mine(None)
    mine(ValueError("second"))
    with pytest.raises(errors.RanksDisagreeError, match="rank 0: ValueError: first") as caught:
        ranks.Vote(shared, ranks.RankPlace("model/0", 1, 2), "1", [])(None)
    assert caught.value.reasons == {0: "ValueError: first"}


def test_an_interrupt_after_the_decision_waits_for_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = dist.HashStore()
    mine = ranks.Vote(shared, PLACE, "1", [])

    def other_gets_ready_and_then_ctrl_c(seconds: float) -> None:
        ranks.Vote(shared, ranks.RankPlace("model/0", 1, 2), "1", [])(None)
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks.time, "sleep", other_gets_ready_and_then_ctrl_c)
    mine(None)
    assert mine.committed
    assert isinstance(mine.postponed, KeyboardInterrupt)


class Overtaken:
    """A store in which the other rank gets ready just before this one writes its decision."""

    def __init__(self, store: dist.Store, other: ranks.Vote) -> None:
        self._store, self._other = store, other

    def __getattr__(self, name: str) -> object:
        plain = getattr(self._store, name)

        def call(*args: object) -> object:
            if name in ("set", "compare_set") and args[0].endswith("/decision"):
                self._other(None)
            return plain(*args)

        return call


def test_a_rank_that_times_out_too_late_commits_with_the_others() -> None:
    shared = dist.HashStore()
    other = ranks.Vote(shared, ranks.RankPlace("model/0", 1, 2), "1", [])
    mine = ranks.Vote(Overtaken(shared, other), PLACE, "1", [])
    mine.vote_timeout = 0.01
    mine(None)
    assert mine.committed
    assert other.committed


class Unreachable:
    def __getattr__(self, name: str) -> object:
        raise dist.DistNetworkError("connection lost")


def test_a_store_that_is_gone_is_a_refusal() -> None:
    with pytest.raises(errors.RanksDisagreeError, match="connection lost"):
        ranks.Vote(Unreachable(), PLACE, "1", [])(None)
    ranks.Vote(Unreachable(), PLACE, "1", [])(ValueError("its own error is raised by the caller"))


# --- engines on two ranks ---


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """What went wrong in each scenario of `rank_scenarios`, by model and name; all run in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.rank_scenarios", str(tmp_path_factory.mktemp("two_ranks"))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        # vLLM compiles small functions of its sampler in every new process, for longer than all else takes.
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    found = {(kind, name): error for kind, name, _, error in lines}
    assert done.returncode == 0, f"{list(found)}\n{done.stderr[-6000:]}"
    return found


EACH = [(kind, scenario.__name__) for kind, chosen in rank_scenarios.PROCESSES.items() for scenario in chosen]


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scenario"), EACH)
def test_on_two_ranks(scenarios: dict[tuple[str, str], str], kind: str, scenario: str) -> None:
    assert scenarios[kind, scenario] == ""
