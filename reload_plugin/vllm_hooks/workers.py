"""vLLM's worker: the guard before each forward pass, calls that RPC reaches, the end of updates, sleep.

Every hook concerns the models of its own worker: another engine of the same process has a worker of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import vllm_api
from ..record.model_record import record_of
from ..record.unloaded_values import UnloadedValues
from ..transaction.engine_state import EngineState, state_of
from . import live
from .patches import add_method
from .transfer_backends import engine_backend


def states_of(worker: object) -> list[EngineState]:
    """States of the worker's model and of its draft model, as far as they are recorded."""
    records = [(model, record_of(model)) for model in vllm_api.models_of(worker)]
    return [state_of(model) for model, record in records if record is not None and record.complete]


def guarding(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``execute_model``, which never runs on half-loaded weights.

    Raises:
        EngineBrokenError: a model of this worker does not serve.

    """

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = states_of(self)
        for state in states:
            state.refuse_inside_a_call()
        for model in vllm_api.models_of(self):
            live.before_forward_pass(model)
        for state in states:
            state.before_forward_pass()
        return original(self, *args, **kwargs)

    return execute_model


def add_worker_calls(worker: type) -> None:
    """Add what ``collective_rpc`` reaches by name: ``reload_status``, ``note_reset_caches``,
    ``finish_together``, ``abort_weight_update``, ``export_checkpoint`` and ``verify_checkpoint``.
    """
    from ..export.answers import told
    from ..export.served import export_rank
    from ..export.verify import verify_model
    from ..transaction.chunked_update import abandon_updates, finishing_together
    from ..transaction.status import status_of

    def reload_status(self: Any, digest: bool = True) -> dict[str, Any]:
        """The state of this worker's model, as JSON; see ``status.ReloadStatus``."""
        model = vllm_api.unwrapped(self.model_runner.get_model())
        replica = getattr(getattr(self, "parallel_config", None), "data_parallel_index", 0)
        return status_of(model, digest, int(getattr(self, "rank", 0)), replica).model_dump(mode="json")

    def note_reset_caches(self: Any, outcomes: dict[str, str]) -> None:
        """Put into the last report what became of caches (by name) that only the engine can reset."""
        state_of(vllm_api.unwrapped(self.model_runner.get_model())).outcome.note_caches(outcomes)

    def finish_together(self: Any, together: dict[str, Any]) -> None:
        """vLLM's ``finish_weight_update``: all of several engines commit their updates, or none does. After
        an error the update is open: abort it on every engine.
        """
        with finishing_together(together):
            self.finish_weight_update()

    def abort_weight_update(self: Any) -> bool:
        """End the open weight update of this worker; says whether one was open."""
        engine = getattr(self, "weight_transfer_engine", None)
        if engine is not None:
            vllm_api.reset_update_target(engine)
        self._weight_update_active = False
        for model in vllm_api.models_of(self):
            vllm_api.put_back_copied_heads(model)
        return abandon_updates(states_of(self))

    def export_checkpoint(
        self: Any, directory: str, max_shard_size: int | str | None = "5GB", lossy: Any = None
    ) -> dict[str, Any] | None:
        """Write what this engine serves; see ``export.served``. Ranks but the first answer None."""
        model = vllm_api.unwrapped(self.model_runner.get_model())
        rank = int(getattr(self, "rank", 0))
        return told(lambda: export_rank(model, directory, rank, max_shard_size=max_shard_size, lossy=lossy))

    def verify_checkpoint(self: Any, path: str) -> dict[str, Any] | None:
        """Whether this rank serves a checkpoint; see ``export.verify``."""
        model = vllm_api.unwrapped(self.model_runner.get_model())
        return told(lambda: verify_model(model, path, rank=int(getattr(self, "rank", 0))))

    added = (reload_status, note_reset_caches, finish_together, abort_weight_update)
    for function in (*added, export_checkpoint, verify_checkpoint):
        add_method(worker, function)


def ending(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``update_weights``: a chunk that fails ends the worker's update, whatever raised."""
    from ..transaction.chunked_update import abandon_updates

    def update_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            abandon_updates(states_of(self))
            raise
        finally:
            _note_foreign_writer(self)

    return update_weights


def finishing(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``finish_weight_update``: an engine that writes by itself has written all it has."""

    def finish_weight_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = vllm_api.unwrapped(getattr(getattr(self, "weight_transfer_engine", None), "model", None))
        returned = original(self, *args, **kwargs)
        _note_foreign_writer(self, model, finished=True)
        return returned

    return finish_weight_update


def _note_foreign_writer(worker: Any, model: Any = None, finished: bool = False) -> None:
    """Where the worker's transfer engine writes into served weights by itself, nobody knows them any more."""
    engine = getattr(worker, "weight_transfer_engine", None)
    backend = None if engine is None else engine_backend(engine)
    if backend is None or backend.treatment == "ours":
        return
    target = vllm_api.unwrapped(getattr(engine, "model", None)) if model is None else model
    record = record_of(target) if isinstance(target, nn.Module) else None
    if record is not None and record.complete:
        heals = finished and backend.whole
        state_of(target).mark_unknown(f"written by the transfer engine {backend.name}", heals)


def resetting(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``reset_weights``, which writes zeros: nothing is served until a reload."""

    def reset_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            for state in states_of(self):
                state.mark_unknown("zeros, by reset_weights")
                state.mark_lost("its weights were set to zero by reset_weights")

    return reset_weights


# -- sleep ----------------------------------------------------------------------------------------


def sleeping(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``sleep``. Level 1 keeps the weights on the host, level 2 discards them."""

    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        level = args[0] if args else kwargs.get("level", 1)
        if level >= 2:
            _save_unloaded_values(self)
        try:
            returned = original(self, *args, **kwargs)
        except BaseException:
            if vllm_api.is_suspended(self):  # vLLM looks at the free memory last, and may raise then
                _note_sleep(self, discarded=level >= 2)
            else:
                vars(self).pop(_SAVED, None)
            raise
        _note_sleep(self, discarded=level >= 2)
        return returned

    return sleep


def discarding(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``discard``, which gives memory away for good."""

    def discard(self: Any, tags: tuple[str, ...]) -> Any:
        if "weights" not in tags:
            return original(self, tags)
        _save_unloaded_values(self)
        returned = original(self, tags)
        _note_sleep(self, discarded=True)
        return returned

    return discard


_SAVED = "_reload_plugin_unloaded_values"
"""Where a worker keeps them while its weights are away, as vLLM's keeps the buffers."""


def _save_unloaded_values(worker: Any) -> None:
    """Of a worker that is awake: what is discarded twice was saved before."""
    if vars(worker).get(_SAVED) is None:
        setattr(worker, _SAVED, [UnloadedValues(state.record) for state in states_of(worker)])


def _note_sleep(worker: object, discarded: bool) -> None:
    for state in states_of(worker):
        if state.update is not None and state.update.gives_way:
            state.abandon_update()
        state.fall_asleep()
        if discarded and state.parked is None:
            state.mark_lost("its weights were discarded when it was put to sleep")


def waking(original: Callable[..., Any]) -> Callable[..., Any]:
    """The worker's ``wake_up``: from then on the memory of the weights can be read again."""

    def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        returned = original(self, *args, **kwargs)
        tags = args[0] if args else kwargs.get("tags")
        if tags is None or "weights" in tags:
            for values in vars(self).pop(_SAVED, None) or ():
                values.put_back()
            for state in states_of(self):
                state.wake_up()
        return returned

    return wake_up
