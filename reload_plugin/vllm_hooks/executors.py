"""vLLM's worker processes: calls are counted, and a call that raises leaves no other rank waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ranks.collectives import leave_collectives, refuse_collectives
from ..ranks.votes import begin_call, refuse_next
from ..transaction.push_failures import current_call
from .workers import states_of


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


def telling_other_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    """``WorkerProc.handle_output``, which gets what a call of the worker returned, or its error: a rank whose
    call raised takes part in no vote of this call any more, so it refuses the one that others may wait in.
    One whose call brought weights of an update comes to no collective of that call any more.
    """

    def handle_output(self: Any, output: Any) -> Any:
        if isinstance(output, BaseException):
            records = [state.record for state in states_of(self.worker)]
            refuse_next(records, output)
            refuse_collectives(records, output)
        else:
            loading = [one for one in states_of(self.worker) if one.update is not None]
            leave_collectives(one.record for one in loading if one.enters_collectives)
        return original(self, output)

    return handle_output
