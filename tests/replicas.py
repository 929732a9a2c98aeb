"""Two replicas behind one `AsyncLLM`: warm equals cold on both, and one that fails leaves both as they were.

    python -m tests.replicas FOLDER [CASE]

Prints what was served after each step, and ``right`` at the end. Both replicas have to answer as the
checkpoint of the step, under one version and digest; a step that fails has to name its replica and leave
both as they were; and half of a live push to one replica leaves it, like the idle one, on the old weights.
"""

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import reload_plugin
from tests import oracle, two_ranks
from tests.checkpoints import read_tensors
from tests.zoo import case_named

REPLICAS = 2


class Steps(dict[str, Any]):
    """What was served after each step; told as it comes, for who waits."""

    def __setitem__(self, step: str, served: Any) -> None:
        print(f"{step}: {served}", file=sys.stderr, flush=True)
        super().__setitem__(step, served)


async def answers(engine: Any, replica: int) -> list[dict]:
    """As `oracle.answer`, by one replica."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=oracle.TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=5,
        prompt_logprobs=5,
    )
    found = []
    for prompt in oracle.PROMPTS:
        name = uuid.uuid4().hex
        request = engine.generate({"prompt_token_ids": prompt}, params, name, data_parallel_rank=replica)
        async for output in request:
            last = output
        found.append(
            {
                "tokens": list(last.outputs[0].token_ids),
                "logprobs": [oracle.plain(position) for position in last.outputs[0].logprobs],
                "prompt_logprobs": [oracle.plain(position) for position in last.prompt_logprobs],
            }
        )
    return found


async def served(engine: Any, cold: dict[str, list]) -> list[str]:
    """Which checkpoint each replica answers as, by letter."""
    found = []
    for replica in range(REPLICAS):
        said = await answers(engine, replica)
        found.append("".join(key for key in cold if not oracle.differing_answers(said, cold[key])) or "?")
    return found


def fail_once(worker: Any, replica: int) -> None:
    """The next reload of one replica finds no checkpoint."""
    if worker.parallel_config.data_parallel_index == replica:
        two_ranks.failing_in("reload_plugin.transaction.reload", "_opened", OSError("the disk is gone"))(None)


def push_all(worker: Any, folder: str) -> None:
    """A live push to every replica: from then on a part of its names waits for the rest."""
    worker.get_model().load_weights(iter(read_tensors(Path(folder)).items()))


def push_half(worker: Any, replica: int, folder: str, half: int) -> None:
    """Half of a live push to one replica, while the other is idle."""
    if worker.parallel_config.data_parallel_index == replica:
        worker.get_model().load_weights(iter(list(read_tensors(Path(folder)).items())[half::2]))


class Worker:
    """The same, as calls that a server's workers have (`--worker-extension-cls`)."""

    def fail_once(self, replica: int) -> None:
        """See `fail_once`."""
        fail_once(self, replica)

    def push_all(self, folder: str) -> None:
        """See `push_all`."""
        push_all(self, folder)

    def push_half(self, replica: int, folder: str, half: int) -> None:
        """See `push_half`."""
        push_half(self, replica, folder, half)


def check(found: dict[str, Any]) -> None:
    """Raises AssertionError where a step did not come to what it should."""
    assert found["start"] == ["A", "A"]
    for step, letter in (("reload 0", "B"), ("reload 1", "A"), ("reload 2", "B"), ("afterwards", "A")):
        assert found[step][:2] == [letter, [letter] * 2], step
    digests = {}
    for step, (letter, _, states) in ((s, f) for s, f in found.items() if s.startswith("reload")):
        assert [state[:2] for state in states] == [(0, states[0][1]), (1, states[0][1])], step
        assert digests.setdefault(letter, states[0][2]) == states[0][2] == states[1][2], step
    assert digests["A"] != digests["B"]
    for replica in range(REPLICAS):
        error, letters, states = found[f"replica {replica} fails"]
        assert f"replica {replica}" in error
        assert "the disk is gone" in error
        assert letters == ["B", "B"]
        assert states == found["reload 2"][2], "a failed reload changed what is said to be served"
    assert found["pushed to both"] == [["A", "A"]]
    assert found["half 0 pushed to replica 0"] == [["A", "A"]], "half of an update answers"
    assert found["half 1 pushed to replica 0"] == [["B", "A"]]
    assert found["together again"][1] == ["B", "B"]
    assert {state[2] for state in found["together again"][2]} == {digests["B"]}


async def run(case: oracle.Case, folders: dict[str, Path], cold: dict[str, list]) -> dict[str, Any]:
    """Start on A, and reload; what was served after each step."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    how = oracle.ENGINE_KWARGS | dict(case.engine_kwargs) | {"data_parallel_size": REPLICAS}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folders["A"]), **how))
    found = Steps()
    try:
        found["start"] = await served(engine, cold)
        for step, letter in enumerate("BAB"):
            states = await reload_plugin.reload_engine_async(engine, str(folders[letter]))
            found[f"reload {step}"] = [letter, await served(engine, cold), told(states)]
        for replica in range(REPLICAS):
            await engine.collective_rpc(fail_once, args=(replica,))
            error = ""
            try:
                await reload_plugin.reload_engine_async(engine, str(folders["A"]))
            except Exception as raised:  # noqa: BLE001 - it is looked at by the test
                error = str(raised)
            states = await reload_plugin.status_async(engine)
            found[f"replica {replica} fails"] = [error, await served(engine, cold), told(states)]
        states = await reload_plugin.reload_engine_async(engine, str(folders["A"]))
        found["afterwards"] = ["A", await served(engine, cold), told(states)]
        await engine.collective_rpc(push_all, args=(str(folders["A"]),))
        found["pushed to both"] = [await served(engine, cold)]
        for half in range(2):
            await engine.collective_rpc(push_half, args=(0, str(folders["B"]), half))
            found[f"half {half} pushed to replica 0"] = [await served(engine, cold)]
        states = await reload_plugin.reload_engine_async(engine, str(folders["B"]))
        found["together again"] = ["B", await served(engine, cold), told(states)]
    finally:
        engine.shutdown()
    return found


def told(states: list[reload_plugin.ReloadStatus]) -> list[tuple[int, int, str | None]]:
    """Replica, version and digest of each rank."""
    return [(state.replica, state.version, state.digest) for state in states]


def main() -> None:
    """See the module's docstring."""
    root, name = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "llama_tied"
    case = case_named(name)
    folders = oracle.write(case, root)
    cold = {}
    for letter in "AB":
        with oracle.running(case, folders[letter]) as llm:
            cold[letter] = oracle.answer(llm)
    found = asyncio.run(run(case, folders, cold))
    print(json.dumps(found), flush=True)
    check(found)
    print("right", flush=True)


if __name__ == "__main__":
    main()
