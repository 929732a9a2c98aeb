"""What becomes of a reload when a rank fails beside it, hangs or dies."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.checkpoints import read_tensors
from tests.two_ranks import Engine, raising_at_once, unchanged

SECONDS = 10
"""A failure that is known has to be told within so many seconds, though ranks wait for 600."""


def raised(call: Callable[[], object], within: float = SECONDS) -> str:
    """What a call that has to fail says, which it has to do soon."""
    started = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - any error is looked at
        said = str(error)
    else:
        raise AssertionError("nothing was raised")
    seconds = time.monotonic() - started
    assert seconds < within, f"{seconds:.1f} s: {said}"
    return said


def assert_still_good(engine: Engine) -> None:
    """Nothing changed, and the next reload is in step."""
    engine.assert_is("A")
    assert engine.on(0, unchanged) == ["committed"] * 2
    engine.assert_is("B")
    engine.reload("A")


def a_rank_fails_before_its_reload(engine: Engine) -> None:
    """It never votes, and says so; the next reload finds all ranks in step."""

    def reload(worker: object, failing: int) -> None:
        if worker.rank == failing:
            raise ValueError("the trainer hung up")
        worker.model_runner.reload_weights(weights_path=folder)

    folder = engine.folders["B"]
    for failing in (0, 1):
        said = raised(lambda rank=failing: engine.llm.collective_rpc(reload, args=(rank,)))
        assert f"rank {failing}: the trainer hung up" in said, said
        assert_still_good(engine)


def its_last_chunk_fails(engine: Engine) -> None:
    """Through vLLM's start and finish; the caller goes on to finish all the same."""

    def start(worker: object) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(worker.get_model())

    def load(worker: object, part: int, failing: int) -> None:
        weights = iter(list(read_tensors(Path(folder)).items())[part::3])
        if worker.rank == failing and part == 2:
            weights = raising_at_once(weights)
        worker.get_model().load_weights(weights)

    def finish(worker: object) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(worker.get_model(), worker.model_config)

    folder = engine.folders["B"]
    for failing in (0, 1):
        engine.llm.collective_rpc(start)
        for part in (0, 1):
            engine.llm.collective_rpc(load, args=(part, failing))
        said = raised(lambda rank=failing: engine.llm.collective_rpc(load, args=(2, rank)))
        assert f"rank {failing}: " in said, said
        assert "the line went dead" in said
        said = raised(lambda: engine.llm.collective_rpc(finish))
        assert f"rank {failing}: " in said, said
        assert_still_good(engine)


def all_causes_are_told_by_rank(engine: Engine) -> None:
    """One error, whichever rank is read first."""

    def reload(worker: object, folders: list[str]) -> None:
        worker.model_runner.reload_weights(weights_path=folders[worker.rank])

    good = engine.folders["B"]
    for bad in (0, 1):
        folders = ["/nowhere" if rank == bad else good for rank in (0, 1)]
        said = raised(lambda f=folders: engine.llm.collective_rpc(reload, args=(f,)))
        assert f"rank {bad}: There is no folder" in said, said
        assert f"rank {1 - bad}" not in said, said
    said = raised(lambda: engine.llm.collective_rpc(reload, args=(["/nowhere", "/here"],)))
    assert "rank 0: There is no folder /nowhere" in said, said
    assert "rank 1: There is no folder /here" in said, said
    said = raised(lambda: engine.llm.collective_rpc(reload, args=(["/nowhere", "/nowhere"],)))
    assert "ranks 0, 1: There is no folder /nowhere" in said, said
    assert_still_good(engine)


def a_rank_never_answers(engine: Engine) -> None:
    """The others wait as long as they were told to; the caller hears of it though the first rank hangs."""

    def reload(worker: object, hanging: int) -> str:
        if worker.rank == hanging:
            time.sleep(6)
            return "woke up"
        os.environ["RELOAD_PLUGIN_TIMEOUT"] = "1"
        try:
            worker.model_runner.reload_weights(weights_path=folder)
        finally:
            os.environ["RELOAD_PLUGIN_TIMEOUT"] = "600"
        return "committed"

    folder = engine.folders["B"]
    said = raised(lambda: engine.llm.collective_rpc(reload, args=(0,)), within=5)
    assert "rank 0: did not answer rank 1 within 1 s" in said, said
    assert_still_good(engine)


SURVIVED = (
    a_rank_fails_before_its_reload,
    its_last_chunk_fails,
    all_causes_are_told_by_rank,
    a_rank_never_answers,
)


def is_running(process: int) -> bool:
    """Whether a process goes on; one that has ended stays listed until somebody asks for its exit code."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def a_rank_is_killed(engine: Engine) -> None:
    """While the other one waits for its vote. Such an engine is over: the last scenario that it sees."""

    def reload(worker: object) -> None:
        if worker.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        survivor.write_text(str(os.getpid()))
        worker.model_runner.reload_weights(weights_path=folder)
        committed.touch()

    folder = engine.folders["B"]
    survivor, committed = (Path(folder).parent / name for name in ("survivor", "committed"))
    said = raised(lambda: engine.llm.collective_rpc(reload))
    assert "rank 1 (" in said, said
    assert "rank 0" not in said, said
    said = raised(lambda: engine.reload("B"))
    assert "rank 1 (" in said, "later calls name it too: " + said
    deadline = time.monotonic() + 2 * SECONDS  # vLLM gives it nine to end by itself
    while survivor.exists() and is_running(int(survivor.read_text())):
        assert time.monotonic() < deadline, "the other rank is still waiting"
        time.sleep(0.1)
    assert not committed.exists(), "the other rank committed alone"
