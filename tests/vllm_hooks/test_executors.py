"""The front end's executor and the loop of its workers, of several versions of vLLM, without processes."""

import inspect
import time
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from reload_plugin import vllm_api
from reload_plugin.ranks import votes
from reload_plugin.transaction.push_failures import current_call
from reload_plugin.vllm_hooks import answers, executors, live


class StoppedError(Exception):
    """The queue is closed, which ends the loop."""


class Queue:
    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls = calls
        self.asked: list[bool] = []

    def dequeue(self, indefinite: bool = False) -> Callable[[], object]:
        self.asked.append(indefinite)
        assert current_call.get() is None, "the call before has not ended"
        if not self.calls:
            raise StoppedError
        return self.calls.pop(0)


class Swallowing:
    """A push whose error a call swallows."""

    def __init__(self) -> None:
        self.told: list[BaseException] = []

    def note_swallowed(self, error: BaseException) -> None:
        self.told.append(error)


class Worker:
    """The loop, as it was."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.rpc_broadcast_mq = Queue(calls)
        self.answers: list[object] = []

    def worker_busy_loop(self) -> None:
        while True:
            call = self.rpc_broadcast_mq.dequeue(indefinite=True)
            try:
                self.handle_output(call())
            except StoppedError:
                raise
            except Exception as error:  # noqa: BLE001 - as vLLM does
                self.handle_output(error)

    def handle_output(self, output: Any) -> None:
        live.hearing_answers(lambda self, output: self.answers.append(output))(self, output)


def test_each_call_is_counted_and_has_its_own_swallowed_errors() -> None:
    push, error = Swallowing(), ValueError("swallowed")

    def swallows() -> str:
        current_call.get().append((push, error))
        return "fine"

    def raises() -> str:
        current_call.get().append((push, error))
        raise error

    numbers: list[int] = []
    worker = Worker([swallows, raises, lambda: numbers.append(votes._reload_ids.call)])
    before = votes._reload_ids.call
    with pytest.raises(StoppedError):
        executors.counting_calls_of_a_loop(Worker.worker_busy_loop)(worker)
    assert numbers == [before + 3]
    assert worker.answers == ["fine", error, None]
    assert push.told == [error], "told once: the call that raised tells its caller by itself"
    assert worker.rpc_broadcast_mq.asked == [True] * 4
    assert "dequeue" not in vars(worker.rpc_broadcast_mq)
    assert current_call.get() is None


# --- the executor ---


class Silence:
    """The answers of a rank that is at work for ever."""

    def dequeue(self, timeout: float | None = None) -> tuple[Any, Any]:
        assert timeout is not None, "nobody waits so long for a rank while others may have failed"
        time.sleep(timeout)
        raise TimeoutError


class Said:
    """One answer of a rank, by the name of its status."""

    def __init__(self, status: str, result: object) -> None:
        statuses = vllm_api.get(*vllm_api.WORKER_PROCESS).ResponseStatus
        if not hasattr(statuses, status):
            pytest.skip(f"this vLLM has no {status}")
        self.answers = [(getattr(statuses, status), result)]

    def dequeue(self, timeout: float | None = None) -> tuple[Any, Any]:
        if not self.answers:
            raise TimeoutError
        return self.answers.pop()


def kv_output() -> object:
    return vllm_api.get("vllm.v1.outputs", "KVConnectorOutput")()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """vLLM's own ``collective_rpc`` with our reading of answers, over queues that the test fills."""
    cls = vllm_api.get(*vllm_api.EXECUTOR)
    own = inspect.unwrap(cls.collective_rpc)
    monkeypatch.setattr(answers, "PATIENCE", 0.2)
    monkeypatch.setattr(answers, "GLANCE", 0.05)
    monkeypatch.setattr(answers, "replace_own_method", lambda *_: None)

    def ask(ranks: list[object], tolerant: bool = False, **how: Any) -> Any:
        executor = cls.__new__(cls)
        config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(enable_fault_tolerance=tolerant))
        vars(executor).update(
            response_mqs=ranks,
            rpc_broadcast_mq=types.SimpleNamespace(enqueue=lambda _: None),
            is_failed=False,
            futures_queue=deque(),
            vllm_config=config,
            shutdown_event=types.SimpleNamespace(is_set=lambda: False),
        )
        return answers.reading_own_answers(own)(executor, "step", timeout=3.0, **how)

    return ask


@pytest.mark.parametrize("status", ["FAILURE", "FAILURE_WITH_KV_OUTPUT"])
def test_nobody_waits_for_a_rank_once_another_has_failed(ask: Callable[..., Any], status: str) -> None:
    """From 0.33 on a rank that fails may tell what a KV connector has to know, and no text."""
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"out of memory|rank 1 failed in a forward pass"):
        ask([Silence(), Said(status, "out of memory" if status == "FAILURE" else kv_output())])
    assert time.monotonic() - started < 2


def test_the_connectors_output_of_a_rank_that_failed_reaches_vllm(ask: Callable[..., Any]) -> None:
    """Once, as the rank sent it: requests whose blocks it has loaded are counted by it."""
    output, deferred = kv_output(), []
    ranks = [Said("FAILURE_WITH_KV_OUTPUT", output), Said("SUCCESS", None)]
    aggregator = types.SimpleNamespace(ft_defer_kv_connector_outputs=deferred.extend)
    with pytest.raises(RuntimeError):
        ask(ranks, tolerant=True, kv_output_aggregator=aggregator)
    assert [id(one) for one in deferred] == [id(output)]


def test_an_error_of_a_tolerant_executor_names_rank_and_cause(ask: Callable[..., Any]) -> None:
    Said("FAILURE_WITH_KV_OUTPUT", None)  # skips where vLLM has no such executor
    with pytest.raises(RuntimeError, match="rank 1: the disk is full"):
        ask([Said("SUCCESS", None), Said("FAILURE", "the disk is full")], tolerant=True)
