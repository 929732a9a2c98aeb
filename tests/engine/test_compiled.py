"""Compiled engines: the graph has captured tensors and native handles, so a reload may not move them.

python -m tests.test_compiled mixtral     # the endurance run of one case, in this process
"""

import functools
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import oracle
from tests.oracle import Result
from tests.processor import packs_bf16, packs_with_amx
from tests.zoo import RIGHT, case_named

NAMES = ("llama", "llama_tied", "mixtral", "w8a8_dynamic")
EAGER_NAMES = ("llama", "w8a8_dynamic")
COMPILED = (*oracle.THIS, "--compiled")
ENDURANCE = (sys.executable, "-m", "tests.engine.test_compiled")
BF16 = ("llama", "llama_tied", "mixtral")
"""Cases whose handles, if they have any, are of bf16 weights."""
RELOADS = 20
WARM_UP = 4
GROWTH = 8 << 20  # bytes; twenty leaked copies of the smallest of these models are more

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[dict[str, Result]]]:
    """Results by case, for each kind of run; a kind's cases share one process, and two kinds run at once."""
    root = tmp_path_factory.mktemp("zoo")
    kinds = {
        "oracle": (NAMES, COMPILED),
        "endurance": (NAMES, ENDURANCE),
        "eager endurance": (EAGER_NAMES, (*ENDURANCE, "--eager")),
    }

    def run(kind: str) -> dict[str, Result]:
        names, command = kinds[kind]
        results = oracle.run_in_subprocesses(list(names), root / kind.replace(" ", "_"), command=command)
        return {result.case: result for result in results}

    pool = ThreadPoolExecutor(2)
    return {kind: pool.submit(run, kind) for kind in kinds}


@pytest.mark.parametrize("name", NAMES)
def test_compiled_warm_equals_cold(batches: dict[str, Future[dict[str, Result]]], name: str) -> None:
    """The whole oracle under torch.compile."""
    result = batches["oracle"].result()[name]
    assert result.verdict == RIGHT, result.summary(limit=40)
    assert result.reload_from.startswith("reload_plugin"), "the plugin was not in use"


@pytest.mark.parametrize("name", NAMES)
def test_twenty_reloads(batches: dict[str, Future[dict[str, Result]]], name: str) -> None:
    """The same answers every time, no memory lost, and each native handle freed once."""
    result = batches["endurance"].result()[name]
    assert result.verdict == RIGHT, result.summary(limit=40)


@pytest.mark.parametrize("name", EAGER_NAMES)
def test_every_handle_is_freed_in_the_end(batches: dict[str, Future[dict[str, Result]]], name: str) -> None:
    """Twenty eager reloads, and when the engine is stopped no native handle is left."""
    result = batches["eager endurance"].result()[name]
    assert result.verdict == RIGHT, result.summary(limit=40)


class Handles:
    """Counts native matmul handles: those alive, and releases of pointers that were not."""

    def __init__(self) -> None:
        self.alive: set[int] = set()
        self.wrong_releases = 0
        self.created = 0

    def watch(self, handle: object) -> object:
        """Note a new handle, and put a counter before its destructor."""
        self.created += 1
        self.alive.add(handle.handler_tensor.item())
        handle.dtor = functools.partial(self.release, handle.dtor)
        return handle

    def release(self, destroy: Callable[[int], None], pointer: int) -> None:
        """Note that a handle was freed, and free it."""
        self.wrong_releases += pointer not in self.alive
        self.alive.discard(pointer)
        destroy(pointer)


@contextmanager
def counted_handles() -> Iterator[Handles]:
    """Every oneDNN handle that is made inside the block is counted.

    The Python makers are wrapped and not the operators below them: those are looked up by name again when a
    function mode is active, and would then no longer be recognised as operators.
    """
    from vllm import _custom_ops

    handles = Handles()
    makers = {name: getattr(_custom_ops, name) for name in ("create_onednn_mm", "create_onednn_scaled_mm")}
    for name, maker in makers.items():
        setattr(_custom_ops, name, lambda *args, maker=maker: handles.watch(maker(*args)))
    try:
        yield handles
    finally:
        for name, maker in makers.items():
            setattr(_custom_ops, name, maker)


def reload_often(llm: object, folders: dict[str, Path], handles: Handles) -> Iterator[str]:
    """B, A, B, A, ...: a complaint for each wrong answer, and for memory or handles that became more."""
    process = psutil.Process()
    expected, alive = {"A": oracle.answer(llm)}, len(handles.alive)
    for count in range(1, RELOADS + 1):
        letter = "AB"[count % 2]
        oracle.reload_from_folder(llm, folders[letter])
        answers = oracle.answer(llm)
        if answers != expected.setdefault(letter, answers):
            yield f"after reload {count} it does not answer as {letter}"
        if count == WARM_UP:
            resident = process.memory_info().rss
    if expected["A"] == expected["B"]:
        yield "A and B give the same answers"
    growth = process.memory_info().rss - resident
    if growth > GROWTH:
        yield f"resident memory grew by {growth} bytes"
    if len(handles.alive) != alive:
        yield f"{alive} native handles became {len(handles.alive)}"


def endure(name: str, root: Path, eager: bool) -> list[str]:
    """Reload one engine again and again, and stop it; the complaints, none if all is well.

    Only an eager engine is expected to free all it had: torch.compile keeps the model it has traced.
    """
    case = case_named(name)
    folders = oracle.write(case, root)
    with counted_handles() as handles:
        with oracle.running(case, folders["A"], enforce_eager=eager) as llm:
            complaints = list(reload_often(llm, folders, handles))
        del llm
        gc.collect()
        if handles.wrong_releases:
            complaints.append(f"{handles.wrong_releases} releases of a handle that was not alive")
        if handles.alive and eager:
            complaints.append(f"{len(handles.alive)} of {handles.created} handles were never freed")
        has_handles = not packs_with_amx() and (packs_bf16() or name not in BF16)
        if not handles.created and has_handles:
            complaints.append("no native handle was ever made: nothing was counted")
    return complaints


def main() -> None:
    """One JSON line for each case named on the command line, as `tests.oracle` prints them."""
    names = [word for word in sys.argv[1:] if word in NAMES]
    root = Path(sys.argv[sys.argv.index("--root") + 1] if "--root" in sys.argv else tempfile.mkdtemp())
    for name in names:
        complaints = endure(name, root, "--eager" in sys.argv)
        differences = [{"leg": "", "kind": complaint, "path": ""} for complaint in complaints]
        print(json.dumps({"case": name, "differences": differences}), flush=True)


if __name__ == "__main__":
    main()
