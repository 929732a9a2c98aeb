"""What one process of a benchmark does: answers of cold starts, timed reloads, the floor."""

import cProfile
import gc
import io
import json
import os
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests/

import engine
import floor
import machine
import on_the_device

OPTIONS = {"max_num_seqs": 4}
TOP = 25
"""Functions that a profile lists."""

Folders = Mapping[str, str]
"""Name of a checkpoint -> its folder; engines start on A."""


# -- in the process that measures -----------------------------------------------------------------


def work(task: str, **arguments: Any) -> Any:
    """What a process that `in_child` started does."""
    return {"cold": ask_cold, "reloads": time_reloads}[task](**arguments)


def ask_cold(folders: Folders, options: Mapping[str, Any]) -> dict[str, Any]:
    """Answers of engines started on each checkpoint: name -> answer."""
    answers = {}
    for name, folder in folders.items():
        with start(folder, options) as llm:
            answers[name] = engine.answer(llm)
    return answers


def time_reloads(
    folders: Folders,
    options: Mapping[str, Any],
    steps: list[dict[str, Any]],
    started: float | None = None,
    floor_of: str | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Start an engine on A and reload it step by step; seconds, peak memory, stages and answer of each.

    Args:
        folders: name -> folder of the checkpoints.
        options: options of the engine.
        steps: one for each reload: ``to`` (the checkpoint whose answer is expected), ``folder`` (what is
            read), ``comes``, ``disk``, ``by_loader``, ``spare``, ``asleep`` and ``options`` (see
            ``tables.Way``).
        started: monotonic time at which this process was requested; None if it was running before.
        floor_of: the checkpoint whose floor is measured afterwards; none if None.
        profile: whether to do the last step again under a profiler, after the one before it.

    """
    result: dict[str, Any] = {"reloads": [], "error": None}
    with start(folders["A"], options) as llm:
        result["ready"] = None if started is None else time.monotonic() - started
        engine.answer(llm)
        result["graphs"] = [captured_graphs()]
        try:
            for number, step in enumerate(steps):
                result["reloads"].append(time_reload(llm, number, step))
        except Exception as error:  # noqa: BLE001  a reload may fail in any way, and that is its figure
            result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        result["graphs"].append(captured_graphs())
        if profile and result["error"] is None:
            result["profile"] = profile_reload(llm, steps)
    if floor_of is not None and result["error"] is None:
        result["floor"] = time_floor(folders[floor_of], options)
    return result


def time_reload(llm: Any, number: int, step: Mapping[str, Any]) -> dict[str, Any]:
    """One reload and the answer afterwards. The clock runs during the reload only."""
    (machine.evict if step["disk"] == "cold" else machine.warm_up)(step["folder"])
    call = prepare(llm, number, step)
    if step["asleep"]:
        llm.sleep(level=step["asleep"])
        llm.wake_up()
    with on_the_device.card_with(llm, step["spare"]), machine.Peak() as peak:
        fetched = machine.read_from_disk()
        began = time.perf_counter()
        call()
        machine.synchronize()
        seconds = time.perf_counter() - began
    return {
        "to": step["to"],
        "seconds": seconds,
        "extra": peak.extra,
        "device_extra": peak.device_extra,
        "resident": machine.resident(),
        "from_disk": machine.read_from_disk() - fetched,
        "answer": engine.answer(llm),
    } | account_of(llm)


def captured_graphs() -> int:
    """Number of CUDA graphs that this process has captured so far."""
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_cudagraph_captured


def prepare(llm: Any, number: int, step: Mapping[str, Any]) -> Any:
    """Returns the call that reloads, with its arguments prepared."""
    asked = dict(step["options"])
    if step["comes"] == "folder":
        asked["weights_path"] = step["folder"]
        return lambda: llm.collective_rpc("reload_weights", kwargs=asked)
    weights = stream(step["folder"], step["comes"] == "shuffled", number)
    if step["comes"] == "streams":
        return lambda: llm.collective_rpc(on_the_device.push_on_two_streams, args=(list(weights),))
    if step["comes"] == "device":
        weights = on_the_device.through_one_buffer(list(weights))
    if step["comes"] == "pushed":
        pairs = list(weights)
        return lambda: llm.collective_rpc(push_in_worker, args=(pairs,))
    if step["by_loader"]:
        return lambda: llm.collective_rpc(load_in_worker, args=(weights,))
    return lambda: llm.collective_rpc(reload_in_worker, args=(asked, weights))


def reload_in_worker(worker: Any, options: dict[str, Any], weights: Any) -> None:
    """Reload through the runner in the worker, which takes an iterator."""
    worker.model_runner.reload_weights(weights_iterator=weights, **options)


def push_in_worker(worker: Any, pairs: list[tuple[str, Any]]) -> None:
    """A live push, one call a tensor, as TRL and OpenRLHF do."""
    load_weights = worker.get_model().load_weights
    for pair in pairs:
        load_weights([pair])


def load_in_worker(worker: Any, weights: Any) -> None:
    """Reload by the model's own loader: a session without a copy plan."""
    from reload_plugin import ReloadSession
    from reload_plugin.transaction.engine_state import state_of

    model = worker.get_model()
    with ReloadSession(model) as session:
        session.digest = "later"  # as vLLM's runners do
        session.load(weights)
        state_of(model).outcome.succeeded(session.finish())


def stream(folder: str, shuffled: bool, seed: int) -> Iterator[tuple[str, Any]]:
    """The checkpoint one tensor at a time, each in memory of its own, as a trainer has them."""
    from safetensors.torch import load_file

    from reload_plugin.device.host_memory import allocator

    files = [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    weights = [(name, tensor.clone()) for file in files for name, tensor in file.items()]
    weights.sort(key=lambda weight: [int(part) for part in weight[0].split(".") if part.isdigit()])
    if shuffled:
        random.Random(seed).shuffle(weights)
    del files
    if (heap := allocator()) is not None:
        heap.release(machine.resident())  # what was freed here is not at hand for the reload
    return iter(weights)


def is_ours() -> bool:
    """Whether this package is on in this process."""
    return os.environ.get("RELOAD_PLUGIN") != "0"


def account_of(llm: Any) -> dict[str, Any]:
    """From the report of the last reload: seconds of each stage, the rollback source, bytes through a file
    and weights by the copy plan. Also the seconds of the first call of ``status``, which makes the digest.
    """
    if not is_ours():
        return {"stages": {}}
    began = time.perf_counter()
    report = llm.collective_rpc("reload_status")[0]["report"]
    asked = time.perf_counter() - began
    return {
        "stages": report["seconds"] | {"digest, asked for": asked},
        "old_generation": report["old_generation"],
        "spilled": report["spilled_bytes"],
        "replayed": report["replayed"],
    }


def profile_reload(llm: Any, steps: list[dict[str, Any]]) -> str:
    """The functions in which the last step spends most time; the step before it is repeated first."""
    prepare(llm, len(steps), steps[-2])()
    machine.warm_up(steps[-1]["folder"])
    call = prepare(llm, len(steps) + 1, steps[-1])
    profiler = cProfile.Profile()
    profiler.runcall(call)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(TOP)
    return text.getvalue().strip()


def time_floor(folder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each part of the floor, and the answer of the engine whose layers were processed."""
    if is_ours():
        from reload_plugin.vllm_hooks import plugin

        plugin.unregister()  # PWAL without our recorder
    machine.keep_memory()
    machine.warm_up(folder)
    parts = {
        "copy": floor.copy_seconds(folder),
        "read": floor.read_seconds(folder),
        "hash": floor.hash_seconds(folder),
    }
    with floor.TimedProcessing() as processing, start(folder, options) as llm:
        answer = engine.answer(llm)
    if is_ours():
        plugin.register()  # for the next job of this process
    parts |= {"process": processing.seconds, "once": processing.once}
    return parts | {"layers": processing.layers, "answer": answer}


def start(folder: str, options: Mapping[str, Any]) -> Any:
    """Start an engine; registers the quantization method of the tests first, if it needs one."""
    if str(options.get("quantization", "")).startswith("test_"):
        from tests import online_methods  # noqa: F401  registers them
    return engine.engine(folder, **OPTIONS | dict(options))


# -- in the process that asks ---------------------------------------------------------------------


class Processes:
    """Runs jobs: each in a fresh process, or ``together``: one process for each side does all of them.

    ``together`` is for smoke tests: its figures are not those of an engine's first reload.
    """

    def __init__(self, script: str, together: bool = False) -> None:
        self._script, self._together = script, together
        self._pools: dict[bool, ProcessPoolExecutor] = {}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)

    def do(self, job: dict[str, Any], plugin: bool) -> Any:
        """Run ``work(**job)`` in a process; returns its result as JSON values.

        Raises:
            RuntimeError: the process died.

        """
        if not self._together:
            clock = {"started": time.monotonic()} if job["task"] == "reloads" else {}
            return engine.in_child(self._script, job | clock, plugin)
        if plugin not in self._pools:
            self._pools[plugin] = ProcessPoolExecutor(1, get_context("spawn"), _begin, (plugin,))
        try:
            return json.loads(json.dumps(self._pools[plugin].submit(work, **job).result()))
        except RuntimeError:  # BrokenProcessPool is one
            self._pools.pop(plugin).shutdown()
            raise


def _begin(plugin: bool) -> None:
    """Set up a process that does many jobs: environment, imports, and a log in place of the terminal."""
    engine.prepare(plugin)
    from vllm import LLM  # noqa: F401  imported before gc.freeze

    gc.freeze()  # vLLM collects ten times at each start and end of an engine, and imports are most of it
    gc.freeze = gc.unfreeze = lambda: None
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
