"""The worker of vLLM: what RPC calls reach in it, and the guard before each forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .patches import add_method


def add_worker_calls(worker: type) -> None:
    """What ``collective_rpc`` reaches by name: the state of a worker's model, what became of the engine's
    caches, and the end of an update.
    """
    from ..transaction.rollback import abandon_all_updates, note_caches
    from ..transaction.session import complete_record_of
    from ..transaction.status import status_of

    def reload_status(self: Any, digest: bool = True) -> dict[str, Any]:
        """The state of this worker's model, as JSON; see ``monitor.ReloadStatus``."""
        answer = status_of(self.model_runner.get_model(), digest, int(getattr(self, "rank", 0)))
        return answer.model_dump(mode="json")

    def note_reset_caches(self: Any, outcomes: dict[str, str]) -> None:
        """Put into the last report what became of caches (by name) that only the engine can reset."""
        note_caches(complete_record_of(self.model_runner.get_model()), outcomes)

    def abort_weight_update(self: Any) -> bool:
        """End the open weight update; says whether one was open."""
        engine = getattr(self, "weight_transfer_engine", None)
        if engine is not None:
            engine.reset_weight_update_target()
        self._weight_update_active = False
        return abandon_all_updates()

    for function in (reload_status, note_reset_caches, abort_weight_update):
        add_method(worker, function)


def ending(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``update_weights``: a chunk that fails ends the update, whoever raised it."""
    from ..transaction.rollback import abandon_all_updates

    def update_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            abandon_all_updates()
            raise

    return update_weights


def hashing_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``sleep``, which gives the memory of the weights away: their digest is made before it."""
    from ..record.model_record import record_of
    from ..verify.digest import served_digest

    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        draft = getattr(self, "get_draft_model", lambda: None)()
        for model in (self.model_runner.get_model(), draft):
            record = record_of(model) if model is not None else None
            if record is not None and record.complete and record.broken is None:
                served_digest(record)
        return original(self, *args, **kwargs)

    return sleep


def guarding(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's forward pass, which never runs on half-loaded weights."""
    from ..transaction.rollback import before_forward_pass

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        before_forward_pass()
        return original(self, *args, **kwargs)

    return execute_model
