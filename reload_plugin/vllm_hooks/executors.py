"""vLLM's executor with several worker processes: calls are counted, and each call reads its own answers."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

from ..ranks.votes import begin_call
from ..transaction.push_failures import current_call


def counting_calls(original: Callable[..., None]) -> Callable[..., None]:
    """A worker's ``_execute_worker_rpc`` that counts the calls it gets, and hears of pushes that fail in
    them.
    """

    def _execute_worker_rpc(self: Any, *args: Any, **kwargs: Any) -> None:
        begin_call()
        token = current_call.set([])
        try:
            original(self, *args, **kwargs)
        finally:
            current_call.reset(token)

    return _execute_worker_rpc


def counting_calls_of_a_loop(original: Callable[..., None]) -> Callable[..., None]:
    """A worker's ``worker_busy_loop`` that does the same, where the loop itself runs the calls: one ends when
    the loop asks its queue for the next.
    """

    def worker_busy_loop(self: Any) -> None:
        queue = self.rpc_broadcast_mq
        wait = queue.dequeue

        def dequeue(*args: Any, **kwargs: Any) -> Any:
            current_call.set(None)
            request = wait(*args, **kwargs)
            begin_call()
            current_call.set([])
            return request

        queue.dequeue = dequeue
        try:
            original(self)
        finally:
            del queue.dequeue
            current_call.set(None)

    return worker_busy_loop


class _Answers:
    """The answers of one rank: how many were asked for, and how many were read."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.asked = 0
        self.read = 0


class _Answer:
    """One answer of a rank; stands for the rank's queue in one call."""

    def __init__(self, answers: _Answers) -> None:
        self.awaited = False
        self._answers = answers
        self._number = answers.asked

    def dequeue(self, timeout: float | None = None) -> Any:
        self.awaited = True
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            found = self._answers.queue.dequeue(timeout=left)
            self._answers.read += 1
            if self._answers.read == self._number:
                return found


ANSWERS = "_reload_plugin_answers"
AGGREGATORS = ("kv_output_aggregator", "ec_output_aggregator")
"""With one of these, every rank answers whatever ``unique_reply_rank`` says."""


def reading_own_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    """The executor's ``collective_rpc``, where each call reads its own answers.

    vLLM's stops at the first rank that failed, and the answers of the ranks after it are read by the next
    call: after one failed reload, every later one would report what became of the one before.
    """
    signature = inspect.signature(original)

    def collective_rpc(self: Any, *args: Any, **kwargs: Any) -> Any:
        queues = self.response_mqs
        known: list[_Answers] = self.__dict__.setdefault(ANSWERS, [])
        if [answers.queue for answers in known] != queues:
            known[:] = [_Answers(queue) for queue in queues]
        given = signature.bind(self, *args, **kwargs).arguments
        only = None if any(given.get(name) for name in AGGREGATORS) else given.get("unique_reply_rank")
        asked = known if only is None else known[only : only + 1]
        for answers in asked:
            answers.asked += 1
        self.response_mqs = own = [_Answer(answers) for answers in known]
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            if not any(answer.awaited for answer in own):  # it was never sent
                for answers in asked:
                    answers.asked -= 1
            raise
        finally:
            self.response_mqs = queues

    return collective_rpc
