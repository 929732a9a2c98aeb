"""Two replicas behind one `AsyncLLM`: warm equals cold on both, and one that fails leaves both as they were.

    python -m tests.replicas FOLDER [CASE]

Prints what was served after each step. Both replicas have to answer as the checkpoint of the step, under one
version and digest; a step that fails has to name its replica and leave both as they were.
"""

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import reload_plugin
from tests import oracle, two_ranks
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
    print(json.dumps(asyncio.run(run(case, folders, cold))), flush=True)


if __name__ == "__main__":
    main()
