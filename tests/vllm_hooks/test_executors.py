"""Workers of vLLM that take up calls inside of their loop (up to 0.28) count them all the same."""

from collections.abc import Callable
from typing import Any

import pytest

from reload_plugin.ranks import votes
from reload_plugin.transaction.push_failures import current_call
from reload_plugin.vllm_hooks import executors, live


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
