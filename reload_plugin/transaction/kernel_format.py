"""Weights that are sent in kernel format: copied by exact name, shape and dtype."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable

import torch
from torch import nn

from .. import vllm_api
from ..commit.graph_guard import refuse_unmakeable
from ..commit.undo_log import UndoLog
from ..device.ops import ops_for
from ..device.stream_order import SourceReads
from ..errors import SERVES_OLD, KernelFormatError, weights_error
from ..options import ReloadOptions
from ..record.late_bound import make_anew
from ..record.model_record import LayerRecord, ModelRecord
from ..record.module_state import owns_native, tensors_in
from ..record.snapshot import ABSENT
from ..report import ReloadReport
from .caches import CACHES
from .copied_heads import refresh_copied_heads
from .engine_state import EngineState, state_of

Weights = Iterable[tuple[str, torch.Tensor]]


def copy_kernel_format(
    model: nn.Module, weights: Weights, source: str, chosen: ReloadOptions
) -> ReloadReport:
    """Copy tensors into the served parameters and buffers of the same names.

    Each tensor is copied when it arrives, so the caller may reuse its buffers: on a CPU beside the served
    memory, which is written when every tensor was checked; on a device to where it is served, after the old
    values were saved in host memory, from where a failure brings them back.

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
    ops = ops_for(state.record.target_device)
    sent = _Sent(source, served)
    copied = _copy_at_the_end if ops.on_host else _copy_at_once
    with state.record.changes.blocked(), torch.inference_mode(False), torch.no_grad():
        copied(state, weights, sent)
        make_anew(state.record.late_bound)
        ops.fence()
        state.commit(chosen.weight_version, source, whole=False)
    state.replace_rollback_source(None)
    refresh_copied_heads(state)
    nbytes, names = sent.nbytes, list(sent.names)
    return ReloadReport(
        source=source,
        policy="staged" if ops.on_host else "undo",
        tensors=len(names),
        nbytes=nbytes,
        replayed=len(names),
        layers=len({name.rpartition(".")[0] for name in names}),
        staging_bytes=nbytes if ops.on_host else 0,
        seconds={"total": time.perf_counter() - started},
        version=state.generation.version,
        weight_version=chosen.weight_version,
        caches=CACHES,
        digest=state.served_digest() if chosen.digest is True else None,
    )


class _Sent:
    """What came: names, bytes, and what does not fit.

    Args:
        source: what to call it in errors.
        served: tensors by name.

    """

    def __init__(self, source: str, served: dict[str, torch.Tensor]) -> None:
        self.names: dict[str, None] = {}
        self.nbytes = 0
        self.served = served
        self._source = source
        self._offenders: dict[str, dict[str, str]] = {"unexpected": {}, "duplicate": {}, "misshapen": {}}

    def fits(self, name: str, tensor: torch.Tensor) -> bool:
        """Note a tensor. Returns whether it fits and everything before it did."""
        if not _offends(name, tensor, self.served, self.names, self._offenders):
            self.names[name] = None
            self.nbytes += tensor.nbytes
        return not any(self._offenders.values())

    def check(self) -> None:
        """Raises KernelFormatError where nothing came, WeightsError for what does not fit."""
        if any(self._offenders.values()):
            raise weights_error(self._source, SERVES_OLD, **self._offenders)
        if not self.names:
            raise KernelFormatError(f"{self._source} holds no tensors. {SERVES_OLD}")


def _copy_at_the_end(state: EngineState, weights: Weights, sent: _Sent) -> None:
    staged: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if sent.fits(name, tensor):
            staged[name] = tensor.detach().clone()
    sent.check()
    if state.vote is not None:
        state.vote(None)
    _copy_all(staged, sent.served)


def _copy_at_once(state: EngineState, weights: Weights, sent: _Sent) -> None:
    ops = ops_for(state.record.target_device)
    undo = UndoLog(state.record.target_device, state.pool.pinned)
    copier = ops.copier(state.pool.pinned)
    reads = SourceReads(ops, copier)
    ops.fence()  # forward passes that were queued before read the old values
    try:
        for name, tensor in weights:
            if sent.fits(name, tensor):
                undo.save(sent.served[name].untyped_storage())
                copier.copy(sent.served[name].detach(), tensor.detach())
                reads.note(tensor)
                reads.wait()
        sent.check()
        ops.fence()
        if state.vote is not None:
            state.vote(None)
        copier.finish()
    except BaseException as error:
        try:
            copier.finish()
            undo.roll_back()
            ops.fence()
        except RuntimeError as failed:  # of the device
            raise state.break_(f"the old values could not be put back: {failed}") from error
        raise
    undo.keep()


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
    sent: Container[str],
    offenders: dict[str, dict[str, str]],
) -> bool:
    label = str(name)
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
        offenders["misshapen"][label] = "not a tensor with values"
    elif label in sent:
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
