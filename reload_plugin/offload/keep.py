"""Offloading to the CPU with the weights inside the modules, where everybody looks for them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..errors import OffloadError
from ..interrupts import held
from .collected import collected, needed_for, place_value, show
from .hooks import Dispatch, drop_stale_ties
from .kept_hook import replace_hooks
from .memory import refuse_if_short
from .placement import Placement, placements
from .stored import memory_key
from .ties import tie_groups

_HOST = torch.device("cpu")


class KeepReport(BaseModel):
    """What ``keep_weights_in_module`` did."""

    model_config = ConfigDict(frozen=True)

    kept: int
    """Parameters and buffers that are real tensors on the CPU now; tied ones count once."""
    nbytes: int
    """Their bytes."""
    read_bytes: int
    """Those of them that were read from files, into new memory."""
    on_disk: tuple[str, ...]
    """Names of what stayed on disk."""
    hooks: int
    """Hooks that were replaced."""
    seconds: float


def keep_weights_in_module(model: nn.Module, *, disk: bool = False) -> KeepReport:
    """Put the CPU-offloaded weights of a model that Accelerate has dispatched into its modules.

    Afterwards they are real parameters on the CPU: ``state_dict()`` is whole, and edits in place count, such
    as adapter merges and reloads. For a forward pass a copy goes to the execution device and is dropped
    afterwards; it is not copied back. Where gradients are recorded, they reach the parameters.

    Args:
        model: dispatched by ``dispatch_model``, ``load_checkpoint_and_dispatch``, ``from_pretrained`` or
            ``cpu_offload``. Calling it again changes nothing.
        disk: also weights that are on disk, which are read into memory. Otherwise they stay there.

    Memory: none for weights in memory (the parameters are the memory that the hooks had); those from disk,
    and one tensor.

    Raises:
        OffloadError: there is not enough memory; nothing was changed.
        SourceError: a file cannot be read; nothing was changed.

    """
    started = time.perf_counter()
    places = placements(model)
    files = [place for place in places if place.hooks and place.where in ("dat", "safetensors")]
    chosen = [place for place in places if place.hooks and place.where == "memory"] + (files if disk else [])
    wanted = {place.name for place in chosen}
    groups = [group for group in tie_groups(model, places) if wanted & {place.name for place in group}]
    kept = [[p for p in group if p.name in wanted or _is_on_host(p)] for group in groups]
    available_for = needed_for([group for group in kept if group[0].where != "memory"], _HOST)
    refuse_if_short(available_for, "Keeping the weights in their modules")
    values = collected(kept, _HOST)
    with held():
        for value in values:
            place_value(value)
        hooks = replace_hooks(model, wanted, places)
        drop_stale_ties(model)
    return KeepReport(
        kept=len(values),
        nbytes=sum(value.tensor.nbytes for value in values),
        read_bytes=sum(value.tensor.nbytes for value in values if value.places[0].where != "memory"),
        on_disk=() if disk else tuple(place.name for place in files),
        hooks=hooks,
        seconds=time.perf_counter() - started,
    )


def dispatch(
    model: nn.Module,
    device_map: Mapping[str, str | int | torch.device],
    main_device: str | int | torch.device | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: dict[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Accelerate's ``dispatch_model``, with CPU-offloaded weights kept in their modules.

    The arguments are those of ``dispatch_model``. Parameters stay the same objects with their attributes
    (``weight_loader``), except for those on disk, which are placeholders. ``{"": "disk"}`` works.

    Returns:
        The model.

    Raises:
        OffloadError: the model is dispatched already, or dispatching failed; the model is as before.

    """
    if Dispatch(model).hooks:
        raise OffloadError("The model is dispatched already. Call materialize() first.")
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    originals = {place.name: place.shown for place in placements(model)}
    try:
        dispatch_model(
            model,
            _named_modules(model, device_map),
            main_device=main_device,
            state_dict=state_dict,
            offload_dir=offload_dir,
            offload_index=offload_index,
            offload_buffers=offload_buffers,
            skip_keys=skip_keys,
            preload_module_classes=preload_module_classes,
            force_hooks=force_hooks,
        )
        keep_weights_in_module(model)
    except BaseException as error:
        Dispatch(model).take_off()
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        if isinstance(error, Exception):
            raise OffloadError(f"Dispatching failed: {error}. The model is as it was.") from error
        raise
    _restore_objects(model, originals)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


def _is_on_host(place: Placement) -> bool:
    """Whether a module has the value on the CPU itself: then a kept weight that is tied to it is the same."""
    return place.where == "module" and place.shown.device == _HOST


def _named_modules(model: nn.Module, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """A device map that names modules in place of the whole model, for which Accelerate offloads nothing."""
    if set(device_map) != {""} or device_map[""] not in ("cpu", "disk"):
        return dict(device_map)
    names = [name for name, _ in model.named_children()]
    names += [name for name, _ in model.named_parameters(recurse=False)]
    names += [name for name, _ in model.named_buffers(recurse=False)]
    return dict.fromkeys(names, device_map[""])


def _restore_objects(model: nn.Module, originals: Mapping[str, torch.Tensor]) -> None:
    """Put the parameters and buffers back that were there before, with their present memory."""
    for place in placements(model):
        original = originals[place.name]
        if place.where != "module" or place.shown is original or type(original) is not type(place.shown):
            continue
        if memory_key(original) != memory_key(place.shown):
            if not torch._has_compatible_shallow_copy_type(original, place.shown):
                place.shown.__dict__.update(original.__dict__)
                continue
            original.data = place.shown.data
        show(place, original)
