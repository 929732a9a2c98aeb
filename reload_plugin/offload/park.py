"""Parking a vLLM engine: its weights in host memory as real tensors, its device memory given back, and back.

Parked weights are kernel format: what the kernels read, as tensors of the CPU. They may be read and written,
and reloads go on as ever.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from .. import vllm_api
from ..device.ops import ops_for
from ..errors import EngineBrokenError, ReloadError, SessionError, UnsupportedError
from ..export.answers import reports_in
from ..export.served import end_push
from ..transaction.copied_heads import refresh_copied_heads
from ..transaction.engine_state import PARKED, EngineState, state_of
from ..transaction.misplaced_weights import refuse_others_memory
from .parked_weights import ParkedWeights, packed_parameters


class ParkReport(BaseModel):
    """Where the weights of one model on one rank are after ``park`` or ``unpark``."""

    model_config = ConfigDict(frozen=True)

    state: Literal["parked", "serving"]
    device: str
    """Where the model runs."""
    tensors: int
    """Tensors that moved; those that are in host memory anyway do not."""
    nbytes: int
    """Their bytes."""
    sleeps: bool
    """Whether vLLM's sleep mode owns the memory, and so gives it back and keeps its addresses."""
    packed: tuple[str, ...] = ()
    """Parameters that are empty: kernels of a CPU have packed their values, and no tensor shows them. A
    reload reaches them."""
    written: bool = False
    """Whether the weights were written to while they were parked, other than by a reload."""
    seconds: float
    rank: int = 0


def park(engine: Any) -> list[ParkReport]:
    """Put the weights of an engine into host memory and give its device memory back.

    Every weight is then a real tensor on the CPU: the same object, with its class, attributes and place in
    its module. Reading and writing it is allowed; what is written counts after ``unpark``. So does a reload
    by any road, which takes device memory for a layer at a time; for one copy of the model where attention
    reads weights of other layers when it is processed (MLA). Requests are refused until
    then. Calling it again changes nothing.

    Where vLLM's sleep mode is on (``enable_sleep_mode``), the engine is also put to sleep (level 1), which
    keeps the addresses of the weights and gives back the KV cache too. Without it the memory is freed and
    allocated anew, so an engine with CUDA graphs, which hold addresses, is refused.

    Args:
        engine: a ``vllm.LLM`` without running requests, or a recorded model of this process.

    Returns:
        One report for each rank.

    Raises:
        UnsupportedError: CUDA graphs were captured and there is no sleep mode; or a weight cannot be moved.
        OffloadError: host memory does not suffice.
        SessionError: an update is open. After any of these the engine serves as before, on every rank.

    """
    if isinstance(engine, nn.Module):
        return [park_model(engine)]
    try:
        reports = _reports(engine.collective_rpc("park_weights"))
    except ReloadError:
        engine.collective_rpc("unpark_weights")
        raise
    if any(report.sleeps for report in reports):
        engine.sleep(level=1)
    _refuse_requests(engine)
    return reports


def unpark(engine: Any) -> list[ParkReport]:
    """Bring the weights of a parked engine back to its device, with the values that they have now.

    The tensors are the same objects. Where they were written to (other than by a reload), the version that
    is served is a new one and its source unknown. Calling it for an engine that is not parked changes
    nothing.

    Args:
        engine: as for ``park``.

    Returns:
        One report for each rank.

    Raises:
        OffloadError: device memory does not suffice, or a parked tensor was replaced in place of being
            written to. The weights stay parked; ranks that have theirs back keep them.

    """
    if isinstance(engine, nn.Module):
        return [unpark_model(engine)]
    if any(report.sleeps for report in _reports(engine.collective_rpc("parked_weights"))):
        engine.wake_up()
    reports = _reports(engine.collective_rpc("unpark_weights"))
    vars(getattr(engine, "llm_engine", engine)).pop("add_request", None)
    return reports


def _refuse_requests(engine: Any) -> None:
    """Refuse requests of a ``vllm.LLM`` before it takes them, so that none is left half begun."""

    def add_request(*args: Any, **kwargs: Any) -> None:  # noqa: ARG001
        raise SessionError(f"The engine does not serve: {PARKED}")

    front = getattr(engine, "llm_engine", None)
    if front is not None:
        vars(front)["add_request"] = add_request


@contextlib.contextmanager
def parked(engine: Any) -> Iterator[list[ParkReport]]:
    """``park`` for the length of a block; ``unpark`` at its end, after an exception too.

    Args:
        engine: as for ``park``.

    """
    reports = park(engine)
    try:
        yield reports
    finally:
        unpark(engine)


def _reports(answers: Any) -> list[ParkReport]:
    return [ParkReport.model_validate(report) for report in reports_in(answers)]


# -- one worker -----------------------------------------------------------------------------------


def park_models(models: Sequence[nn.Module], sleeps: bool, rank: int) -> ParkReport:
    """Park the models of a worker (its model, and its draft model if there is one), all or none.

    Returns:
        The report of the first, with tensors and bytes of all.

    """
    done: list[ParkReport] = []
    try:
        done.extend(park_model(model, sleeps, rank) for model in models)
    except BaseException:
        unpark_models(models, rank)
        raise
    return _together(done)


def unpark_models(models: Sequence[nn.Module], rank: int) -> ParkReport:
    """Bring the weights of a worker's models back, in the other order: they may share some."""
    return _together([unpark_model(model, rank) for model in reversed(models)][::-1])


def where_models_are(models: Sequence[nn.Module], rank: int) -> ParkReport:
    """A report on weights as they are. Changes nothing."""
    found = [state_of(model) for model in models]
    return _together([_report(state, _parked_of(state), time.perf_counter(), rank) for state in found])


def _together(reports: Sequence[ParkReport]) -> ParkReport:
    return reports[0].model_copy(
        update={
            "tensors": sum(report.tensors for report in reports),
            "nbytes": sum(report.nbytes for report in reports),
            "written": any(report.written for report in reports),
            "packed": tuple(name for report in reports for name in report.packed),
            "seconds": sum(report.seconds for report in reports),
        }
    )


# -- one model ------------------------------------------------------------------------------------


def park_model(model: nn.Module, sleeps: bool = False, rank: int = 0) -> ParkReport:
    """Park one model of this process.

    Args:
        model: recorded.
        sleeps: the caller gives its memory back through vLLM's sleep mode afterwards.
        rank: for the report.

    """
    started = time.perf_counter()
    end_push(model)
    state = state_of(model)
    with state.in_a_call():
        if isinstance(state.parked, ParkedWeights):
            return _report(state, state.parked, started, rank)
        _refuse(state, sleeps)
        weights = ParkedWeights(state.record, sleeps)
        with torch.inference_mode(False), torch.no_grad():
            weights.park()
        state.park(weights)
        return _report(state, weights, started, rank)


def unpark_model(model: nn.Module, rank: int = 0) -> ParkReport:
    """Bring the weights of one model of this process back; nothing where it is not parked."""
    started = time.perf_counter()
    end_push(model)
    state = state_of(model)
    with state.in_a_call():
        weights = state.parked
        if not isinstance(weights, ParkedWeights):
            return _report(state, _parked_of(state), started, rank)
        state.refuse_while_update_open()
        with torch.inference_mode(False), torch.no_grad():
            written = weights.written()
            report = _report(state, weights, started, rank)
            weights.bring_back()
        state.unpark()
        if written:
            state.mark_unknown("written while the weights were parked")
        refresh_copied_heads(state)
    seconds = time.perf_counter() - started
    return report.model_copy(update={"state": "serving", "written": written, "seconds": seconds})


def _refuse(state: EngineState, sleeps: bool) -> None:
    refuse_others_memory(state)
    state.refuse_while_update_open()
    if state.broken is not None:
        raise EngineBrokenError(
            f"The engine does not serve: {state.broken}. Reload a complete checkpoint, then park."
        )
    if state.asleep:
        raise SessionError("The engine sleeps, and its weights are not in memory. Wake it up, then park.")
    moves = not ops_for(state.record.target_device).on_host
    if not sleeps and moves and vllm_api.captures_graphs(state.record.vllm_config):
        raise UnsupportedError(
            "This engine has captured CUDA graphs, which hold the addresses of its weights, and they would "
            "come back elsewhere. Nothing was changed. Start the engine with enable_sleep_mode=True, whose "
            "memory keeps its addresses (and park the engine, not its model), or with enforce_eager=True."
        )


def _report(state: EngineState, weights: ParkedWeights, started: float, rank: int) -> ParkReport:
    return ParkReport(
        state="serving" if state.parked is None else "parked",
        device=str(state.record.target_device),
        tensors=weights.tensors,
        nbytes=weights.nbytes,
        sleeps=weights.keeps_addresses,
        packed=packed_parameters(state.record),
        seconds=time.perf_counter() - started,
        rank=rank,
    )


def _parked_of(state: EngineState) -> ParkedWeights:
    """The parked weights of a model; none where it is not parked."""
    found = state.parked
    return found if isinstance(found, ParkedWeights) else ParkedWeights(state.record, keeps_addresses=False)
