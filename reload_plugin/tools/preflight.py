"""Would this checkpoint fit that model? Found out on meta tensors, without an engine and without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from .. import vllm_api
from ..checkpoint import open_source
from ..checkpoint.config import check_config, start_config
from ..errors import ReloadError, SourceError, UnsupportedError
from ..record.construction_trace import ConstructionTrace
from ..record.recorder import finish_record, observe, record_constructed
from ..transaction.engine_state import begin_state
from ..transaction.known import plan_for


class Preflight(BaseModel):
    """Whether a checkpoint fits a model, and what would become of it."""

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    model: str
    architecture: str
    fits: bool
    tensors: int
    nbytes: int
    config: str | None
    """Why the checkpoint's config.json says another model; None when it does not."""
    missing: dict[str, str]
    unexpected: dict[str, str]
    duplicate: dict[str, str]
    misshapen: dict[str, str]
    kept: dict[str, str]
    """Parameter -> why it may keep its value although no weight comes for it."""
    ignored: dict[str, str]
    """Weight -> the rule by which it may be passed over."""


def preflight(checkpoint: str | Path, model: str, engine: Mapping[str, Any] | None = None) -> Preflight:
    """Try a checkpoint on a model that has no memory, by the model's own loader, as a reload does first.

    One process stands for one rank that holds all of the model.

    Args:
        checkpoint: what ``open_source`` reads. Only names, shapes and dtypes of it are read.
        model: folder with config.json, or a repository in the local cache. Its weights need not be there; if
            they are, they tell which parameters a checkpoint may leave out.
        engine: arguments of ``vllm.LLM`` that change the model (``quantization``, ``hf_overrides``).

    Raises:
        SourceError: the checkpoint cannot be read.
        UnsupportedError: vLLM is not here, cannot make the model, or its loader cannot be tried.

    """
    source = open_source(checkpoint)
    config, state, built = _on_meta(model, dict(engine or {}))
    reason = _another_model(str(checkpoint), config.model_config, state.start.config)
    try:
        plan = plan_for(built, state, source)
    except SourceError:
        raise
    except ReloadError as error:
        raise UnsupportedError(f"{checkpoint} could not be tried on {model}: {error}") from error
    if plan is None:
        raise UnsupportedError(
            f"The loader of {type(built).__name__} looks at values, so it cannot be tried without them. "
            "Reload a running engine: it refuses what does not fit before it changes anything."
        )
    return Preflight(
        checkpoint=str(checkpoint),
        model=model,
        architecture=type(built).__name__,
        fits=not plan.mismatches and reason is None,
        tensors=len(plan.infos),
        nbytes=sum(info.meta().nbytes for info in plan.infos.values()),
        config=reason,
        kept=plan.kept,
        ignored=plan.ignored,
        **{
            kind: getattr(plan.mismatches, kind)
            for kind in ("missing", "unexpected", "duplicate", "misshapen")
        },
    )


def _on_meta(model: str, engine: dict[str, Any]) -> tuple[Any, Any, torch.nn.Module]:
    """The engine's config, the state of the model, and the model."""
    if vllm_api.version() is None:
        raise UnsupportedError(
            "vLLM is not installed here. Install it beside this package (pip install vllm)."
        )
    trace = ConstructionTrace()
    try:
        with vllm_api.one_rank(model, engine) as config:
            built = vllm_api.construct_on_meta(config, trace)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedError(
            f"vLLM {vllm_api.version()} could not make the model of {model}: {reason}. Check its config.json."
        ) from error
    record = record_constructed(built, trace, config)
    record = finish_record(built, record, observe(record), None, config.model_config, torch.device("cpu"))
    state = begin_state(built, record)
    state.start.config = start_config(config.model_config)
    return config, state, built


def _another_model(checkpoint: str, model_config: Any, start: Any) -> str | None:
    if not Path(checkpoint).is_dir():
        return None
    try:
        check_config(checkpoint, model_config, start)
    except SourceError as error:
        return str(error)
    return None
