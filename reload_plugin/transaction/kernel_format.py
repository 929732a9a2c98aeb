"""Weights that are sent in kernel format: copied by exact name, shape and dtype."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import nn

from .. import vllm_api
from ..commit.graph_guard import refuse_unmakeable
from ..device.ops import ops_for
from ..errors import SERVES_OLD, KernelFormatError, weights_error
from ..options import ReloadOptions
from ..record.late_bound import make_anew
from ..record.model_record import LayerRecord, ModelRecord
from ..record.module_state import owns_native, tensors_in
from ..record.snapshot import ABSENT
from ..report import ReloadReport
from .caches import CACHES
from .engine_state import state_of


def copy_kernel_format(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], source: str, chosen: ReloadOptions
) -> ReloadReport:
    """Copy tensors into the served parameters and buffers of the same names.

    Served memory is written only after every tensor was checked. Each tensor is copied when it arrives, so
    the caller may reuse its buffers.

    Raises:
        KernelFormatError: this model's kernel format is not made of tensors alone.
        RanksDisagreeError: another rank of the model failed.
        WeightsError: a name, shape or dtype differs.

    """
    started = time.perf_counter()
    state = state_of(model)
    _require_tensors_only(state.record)
    if vllm_api.captures_graphs(state.record.vllm_config):
        refuse_unmakeable(state.record.late_bound)
    served = _served(model)
    staged: dict[str, torch.Tensor] = {}
    offenders: dict[str, dict[str, str]] = {"unexpected": {}, "duplicate": {}, "misshapen": {}}
    for name, tensor in weights:
        if not _offends(name, tensor, served, staged, offenders):
            staged[name] = tensor.detach().clone()
    if any(offenders.values()) or not staged:
        if not staged and not any(offenders.values()):
            raise KernelFormatError(f"{source} holds no tensors. {SERVES_OLD}")
        raise weights_error(source, SERVES_OLD, **offenders)
    if state.vote is not None:
        state.vote(None)
    nbytes, names = sum(tensor.nbytes for tensor in staged.values()), list(staged)
    ops = ops_for(state.record.target_device)
    with state.record.changes.blocked(), torch.inference_mode(False), torch.no_grad():
        ops.fence()  # forward passes that were queued before read the old values
        _copy_all(staged, served)
        make_anew(state.record.late_bound)
        ops.fence()
        state.commit(chosen.weight_version, source, whole=False)
    state.replace_rollback_source(None)
    return ReloadReport(
        source=source,
        policy="staged",
        tensors=len(names),
        nbytes=nbytes,
        replayed=len(names),
        layers=len({name.rpartition(".")[0] for name in names}),
        staging_bytes=nbytes,
        seconds={"total": time.perf_counter() - started},
        version=state.generation.version,
        weight_version=chosen.weight_version,
        caches=CACHES,
        digest=state.served_digest() if chosen.digest is True else None,
    )


def _copy_all(staged: dict[str, torch.Tensor], served: dict[str, torch.Tensor]) -> None:
    """Copy all tensors, or on an error none. Takes memory for one more tensor: each one that was copied is
    dropped from ``staged``, and the old values are kept until the end.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name in list(staged):
            target = served[name]
            before.append((target, target.clone()))
            target.copy_(staged.pop(name))
    except BaseException:
        for target, values in reversed(before):  # in reverse order, because two names may share memory
            target.copy_(values)
        raise


def _served(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, also by its name without LoRA wrappers."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = tensor.data
        found.setdefault(name.replace(".base_layer.", "."), tensor.data)
    return found


def _offends(
    name: object,
    tensor: object,
    served: dict[str, torch.Tensor],
    staged: dict[str, torch.Tensor],
    offenders: dict[str, dict[str, str]],
) -> bool:
    label = str(name)
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
        offenders["misshapen"][label] = "not a tensor with values"
    elif label in staged:
        offenders["duplicate"][label] = "sent more than once"
    elif label not in served:
        offenders["unexpected"][label] = "no parameter or buffer of this name"
    elif tensor.shape != served[label].shape or tensor.dtype != served[label].dtype:
        have, want = (tensor.shape, tensor.dtype), (served[label].shape, served[label].dtype)
        offenders["misshapen"][label] = f"{list(have[0])} {have[1]} instead of {list(want[0])} {want[1]}"
    else:
        return False
    return True


def _require_tensors_only(record: ModelRecord) -> None:
    opaque = sorted(layer.name for layer in record.layers if _is_opaque(layer))
    if opaque:
        names = ", ".join(opaque[:4])
        raise KernelFormatError(
            f"The kernel format of {len(opaque)} layers is not made of tensors ({names}, ...): it lives in "
            f"closures or native handles. {SERVES_OLD} Send the weights in checkpoint format."
        )


def _is_opaque(layer: LayerRecord) -> bool:
    """Whether processing put tensors into closures, or made native resources."""
    module = layer.ref()
    for holder in layer.holders:
        held = holder.ref()
        if held is None or module is None:
            continue
        for key in holder.undo:
            value = getattr(held, str(key[1]), ABSENT) if key[0] == "attribute" else None
            if callable(value) and not isinstance(value, nn.Module) and any(True for _ in tensors_in(value)):
                return True
            if owns_native(value):
                return True
    return False
