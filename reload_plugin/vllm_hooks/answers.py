"""The driver's side of vLLM's executors with several worker processes: each call reads its own answers, and
fails with one error that names ranks and causes.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from ..errors import WorkerDiedError, describe_ranks
from ..ranks.votes import NOT_EVERY_RANK
from .patches import replace_own_method

logger = logging.getLogger("vllm.reload_plugin")

PATIENCE = 2.0
"""Seconds that a call waits for the other ranks once one of them has failed."""
GLANCE = 0.5
"""Seconds between two looks at the other ranks and at the workers' health."""

REAPED = 1.0
"""Seconds until a process that has ended has an exit code."""

ANSWERS = "_reload_plugin_answers"
DEAD = "_reload_plugin_dead"
AGGREGATORS = ("kv_output_aggregator", "ec_output_aggregator")
"""With one of these, every rank answers whatever ``unique_reply_rank`` says."""

Answered = tuple[Any, Any]
"""What a rank sends: vLLM's ``ResponseStatus``, and the result or the text of the error."""


class _Answers:
    """The answers of one rank, numbered from 1."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.asked = 0
        self._read = 0
        self._last: Answered | None = None

    def take(self, number: int, timeout: float | None) -> Answered:
        """An answer, which may be taken more than once until the next is. Earlier ones are dropped: the calls
        that asked for them have failed.

        Raises:
            TimeoutError: it has not come within ``timeout`` seconds.

        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._read < number:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._last = self.queue.dequeue(timeout=left)
            self._read += 1
        assert self._last is not None, "answers are numbered from 1"
        return self._last


class _Call:
    """One call: the ranks that answer it, and the number of its answer at each.

    Args:
        ranks: rank -> its answers.
        check: raises if a worker is dead.

    """

    def __init__(self, ranks: dict[int, _Answers], check: Callable[[], None]) -> None:
        self.sent = False
        self._numbers = {rank: answers.asked for rank, answers in ranks.items()}
        self._ranks = ranks
        self._check = check
        self._failed_at: float | None = None
        self._failures: dict[int, str] = {}

    def wait_for(self, rank: int, timeout: float | None) -> Answered:
        """The answer of a rank; or, where one has failed, a failure with the text of all that have.

        Raises:
            TimeoutError: it has not come within ``timeout`` seconds.
            WorkerDiedError: a worker is dead.

        """
        self.sent = True
        if len(self._ranks) == 1:
            return self._taken(rank, timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = GLANCE if deadline is None else min(GLANCE, max(0.0, deadline - time.monotonic()))
            try:
                answer: Answered | None = self._taken(rank, left)
            except TimeoutError:
                self._check()
                if left < GLANCE:
                    raise
                answer = self._failure_elsewhere(rank)
                if not self._is_out_of_patience():
                    continue
            assert answer is not None, "patience begins with a failure"
            return answer if not _has_text(answer) else (answer[0], self._all_failures(answer))

    def all_failures(self) -> str:
        """The causes by rank, as far as they have come; empty where no rank has failed."""
        come = (self._come(rank) for rank in self._ranks)
        first = next((answer for answer in come if answer and _has_text(answer)), None)
        return "" if first is None else self._all_failures(first)

    def _taken(self, rank: int, timeout: float | None) -> Answered:
        return self._ranks[rank].take(self._numbers[rank], timeout)

    def _failure_elsewhere(self, waiting_for: int) -> Answered | None:
        for rank in self._ranks:
            if rank != waiting_for and (answer := self._come(rank)) and _is_failure(answer):
                self._failed_at = self._failed_at or time.monotonic()
                return answer if _has_text(answer) else _as_text(rank, answer)
        return None

    def _come(self, rank: int, timeout: float = 0.0) -> Answered | None:
        try:
            return self._taken(rank, timeout)
        except TimeoutError:
            return None

    def _is_out_of_patience(self) -> bool:
        return self._failed_at is not None and time.monotonic() - self._failed_at > PATIENCE

    def _all_failures(self, first: Answered) -> str:
        """The causes by rank. One that only names other ranks counts where there is nothing else."""
        began = self._failed_at or time.monotonic()
        texts: dict[int, str] = {}
        silent: list[int] = []
        for rank in self._ranks:
            answer = self._come(rank, max(0.0, began + PATIENCE - time.monotonic()))
            if answer is None:
                silent.append(rank)
            elif _is_failure(answer):
                texts[rank] = str((answer if _has_text(answer) else _as_text(rank, answer))[1])
        causes = {rank: text for rank, text in texts.items() if not text.startswith(NOT_EVERY_RANK)}
        if not causes:
            return str(first[1])
        causes |= dict.fromkeys(silent, "has not answered yet")
        return describe_ranks(causes)


def _is_failure(answer: Answered) -> bool:
    return getattr(answer[0], "name", "").startswith("FAILURE")


def _has_text(answer: Answered) -> bool:
    """Whether it is a failure with the text of its error; in newer versions some bring what a KV connector
    has to be told instead.
    """
    return getattr(answer[0], "name", "") == "FAILURE"


def _as_text(rank: int, answer: Answered) -> Answered:
    """A failure of the other kind as one with a text, for a rank that has not answered."""
    return type(answer[0]).FAILURE, f"rank {rank} failed in a forward pass; its log says why"


class _Answer:
    """One answer of a rank; stands for the rank's queue in one call."""

    def __init__(self, call: _Call, rank: int, queue: Any) -> None:
        self._call, self._rank, self._queue = call, rank, queue

    def dequeue(self, timeout: float | None = None) -> Answered:
        return self._call.wait_for(self._rank, timeout)

    def shutdown(self) -> None:
        """vLLM's monitor shuts down what it finds in the queues' place."""
        self._queue.shutdown()


def reading_own_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    """The executor's ``collective_rpc``, where each call reads its own answers, and all of them.

    vLLM's stops at the first rank that failed, and the answers of the ranks after it are read by the next
    call: after one failed reload, every later one would report what became of the one before. And it waits
    for the ranks in their order: for a rank that never answers, though a later one has failed.

    Raises:
        WorkerDiedError: a worker process has died, instead of vLLM's error, which does not say which.

    """
    signature = inspect.signature(original)

    def collective_rpc(self: Any, *args: Any, **kwargs: Any) -> Any:
        queues = self.response_mqs
        known: list[_Answers] = self.__dict__.setdefault(ANSWERS, [])
        if [answers.queue for answers in known] != queues:
            known[:] = [_Answers(queue) for queue in queues]
            replace_own_method(type(self), "shutdown", noting_dead_workers)
        given = signature.bind(self, *args, **kwargs).arguments
        only = None if any(given.get(name) for name in AGGREGATORS) else given.get("unique_reply_rank")
        asked = dict(enumerate(known)) if only is None else {only: known[only]}
        for answers in asked.values():
            answers.asked += 1
        call = _Call(asked, lambda: _raise_if_dead(self, given.get("method")))
        self.response_mqs = [_Answer(call, rank, queue) for rank, queue in enumerate(queues)]
        try:
            return original(self, *args, **kwargs)
        except BaseException as error:
            if isinstance(error, Exception):
                _raise_if_dead(self, given.get("method"))
                _raise_if_nameless(error, call)
            if not call.sent:
                for answers in asked.values():
                    answers.asked -= 1
            raise
        finally:
            if not self.__dict__.get(DEAD):  # else vLLM has dropped its queues
                self.response_mqs = queues

    return collective_rpc


def _raise_if_nameless(error: Exception, call: _Call) -> None:
    """vLLM's fault tolerance hears all ranks and says that some failed, not which and why."""
    if type(error) is RuntimeError and (causes := call.all_failures()) and causes not in str(error):
        raise RuntimeError(f"{error}: {causes}") from error


# -- dead workers -----------------------------------------------------------------------------------


def noting_dead_workers(original: Callable[..., None]) -> Callable[..., None]:
    """The executor's ``shutdown``, which its monitor calls when a worker has died, and which ends the
    others.
    """

    def shutdown(self: Any) -> None:
        if getattr(self, "is_failed", False):
            self.__dict__.setdefault(DEAD, _dead_workers(self))
        original(self)

    return shutdown


def _dead_workers(executor: Any) -> dict[int, str]:
    """Rank -> how it ended, of the workers that are dead now."""
    found = {}
    for handle in getattr(executor, "ray_worker_handles", None) or ():
        if handle.run_ref is not None and (how := _end_of_actor(handle.run_ref)):
            found[handle.rank] = how
    for handle in getattr(executor, "workers", None) or ():
        if wait([handle.proc.sentinel], timeout=0):
            handle.proc.join(REAPED)  # its exit code comes a moment after its end
            code = handle.proc.exitcode or 0
            found[handle.rank] = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return found


def _end_of_actor(run: Any) -> str:
    """How Ray's actor ended whose loop ``run`` stands for; empty while it goes on."""
    import ray

    done, _ = ray.wait([run], timeout=0)
    if not done:
        return ""
    try:
        ray.get(run)
    except Exception as error:  # noqa: BLE001 - of Ray: all that it says is wanted
        return str(error).partition("\n")[0]
    return "its loop has ended"


def _raise_if_dead(executor: Any, method: object) -> None:
    dead: dict[int, str] = executor.__dict__.get(DEAD, {})
    if dead:
        name = method if isinstance(method, str) else getattr(method, "__name__", "a call")
        who: Sequence[str] = [f"rank {rank} ({how})" for rank, how in dead.items()]
        raise WorkerDiedError(
            f"A worker process died: {', '.join(who)}. {name} was not carried out, and vLLM has ended this "
            "engine. Start it again.",
            dead,
        )
