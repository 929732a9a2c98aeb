"""Live pushes: the guard on ``load_weights`` of a served model, its two other ends, and errors that are
swallowed inside an RPC.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from ..record.model_record import record_of
from ..transaction.live_push import GUARD_ATTRIBUTE, LoadWeights, live_push_of
from ..transaction.push_failures import PushFailures, current_call
from .patches import patched
from .transfer_backends import foreign_caller

LIVE_SWITCH = "RELOAD_PLUGIN_LIVE"
"""Environment variable: ``0`` leaves ``model.load_weights`` of a served model as vLLM has it."""


def is_on() -> bool:
    """Whether pushes through ``model.load_weights`` are gathered into one update."""
    return os.environ.get(LIVE_SWITCH) != "0" and bool(patched())


def guard(model: nn.Module) -> None:
    """From now on ``model.load_weights`` is ours; the model is served.

    On a device each call works on the current stream of its thread, after the work of the calls before. When
    it returns, its tensors may be overwritten from any stream. Before the first write to served memory and
    after the last one the device is synchronized.
    """
    live = LoadWeights(model)
    _guarded.add(model)
    vllm_api.attach(model, GUARD_ATTRIBUTE, live)
    vllm_api.attach(model, "load_weights", functools.partial(_load_weights, live))


def owner_of(part: nn.Module) -> nn.Module | None:
    """The served model that a module is a part of, if there is one."""
    for model in list(_guarded):
        if model is not part and any(module is part for module in model.modules()):
            return model
    return None


# Which models of this process are served; says nothing of any engine.
_guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _load_weights(
    live: LoadWeights, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any
) -> Any:
    if not args and not kwargs and (loaded := live.load_one(weights)) is not None:
        return loaded
    backend = foreign_caller()
    if backend is not None:
        return live.pass_through(weights, f"written by {backend.name}", args, kwargs)
    if not is_on():
        return live.pass_through(weights, f"written by model.load_weights ({LIVE_SWITCH}=0)", args, kwargs)
    return live(weights, *args, **kwargs)


def processed_again(original: Callable[..., None], model: nn.Module, *args: Any) -> None:
    """Whole-model ``process_weights_after_loading`` of a model that is served already."""
    live = live_push_of(model)
    backend = foreign_caller()
    if live is None or backend is not None or not is_on():
        original(model, *args)
        if live is not None:
            live.note_written(f"processed by {backend.name if backend else 'vLLM'}")
        return
    live.finish()


def before_forward_pass(model: nn.Module) -> None:
    """End the push that is under way, unless more of it has to come."""
    live = live_push_of(model) if record_of(model) is not None else None
    if live is not None:
        live.before_forward_pass()


def hearing(original: Callable[..., Any]) -> Callable[..., Any]:
    """``run_method``, by which an executor calls its worker: a push that fails in a call which returns as if
    it had not, with no word of the error, is told at the next forward pass.
    """

    def run_method(*args: Any, **kwargs: Any) -> Any:
        failed: list[tuple[PushFailures, BaseException]] = []
        token = current_call.set(failed)
        try:
            returned = original(*args, **kwargs)
        finally:
            current_call.reset(token)
        for failures, error in failed:
            if not says(returned, error):
                failures.note_swallowed(error)
        return returned

    return run_method


def says(answer: object, error: BaseException) -> bool:
    """Whether what a call returned has the text of an error in it, as ``(False, "failed: ...")`` has."""
    if isinstance(answer, str):
        first = str(error).partition("\n")[0]
        return bool(first) and first in answer
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    return isinstance(answer, (list, tuple)) and any(says(one, error) for one in answer)


def hearing_answers(original: Callable[..., Any]) -> Callable[..., Any]:
    """``WorkerProc.handle_output``, which gets what a call of the worker returned, or its error."""

    def handle_output(self: Any, output: Any) -> Any:
        if not isinstance(output, BaseException):
            for failures, error in current_call.get() or ():
                if not says(output, error):
                    failures.note_swallowed(error)
        return original(self, output)

    return handle_output
