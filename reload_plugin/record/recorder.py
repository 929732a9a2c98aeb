"""Recording a model while it starts.

Three observations of a model give its record:

* *constructed*: right after ``initialize_model``; this is the load format,
* *loaded and processed*: after vLLM's whole-model ``process_weights_after_loading`` (PWAL),
* in between, when the *tail* of PWAL begins. The tail is what vLLM processes last: attention layers and the
  model's own hook. What it changes in other layers has to be captured after it.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from .. import vllm_api
from ..tensors import storage_id
from .construction_trace import ConstructionTrace
from .late_bound import LateBound
from .layer_groups import _group
from .model_record import RECORD_ATTRIBUTE, HolderRecord, LayerRecord, ModelRecord, TensorRecord
from .module_state import holders_of
from .snapshot import ABSENT, Contents, Key, read, same
from .tensor_layout import (
    SMALL_BYTES,
    AsServed,
    Constant,
    Geometry,
    Initial,
    TensorFormat,
    Uninitialised,
    Values,
)
from .write_watch import WriteWatch


def record_constructed(model: nn.Module, trace: ConstructionTrace | None, vllm_config: Any) -> ModelRecord:
    """Record the load format of a model that was just constructed; stored on the model itself."""
    recorder = _Recorder(trace)
    layers = [recorder.layer(name, module) for name, module in model.named_modules()]
    record = ModelRecord(layers, vllm_config)
    vllm_api.attach(model, RECORD_ATTRIBUTE, record)
    return record


class _Recorder:
    """Numbers the storages of one model and describes its tensors."""

    def __init__(self, trace: ConstructionTrace | None) -> None:
        self._trace = trace
        self._storages: dict[int, int] = {}
        self._tensors: dict[int, TensorRecord] = {}
        self._seen: set[int] = set()

    def layer(self, name: str, module: nn.Module) -> LayerRecord:
        own: list[TensorRecord] = []
        holders = []
        for path, holder in holders_of(module):
            if id(holder) in self._seen:
                continue
            self._seen.add(id(holder))
            prefix = ".".join(part for part in (name, path) if part)
            constructed = {
                key: self._value(value, prefix, key, name, own) for key, value in read(holder).items()
            }
            holders.append(HolderRecord(_reference(holder), path, constructed))
        children = {n: weakref.ref(m) for n, m in module._modules.items() if m is not None}
        method = getattr(module, "quant_method", None)
        return LayerRecord(
            name,
            weakref.ref(module),
            holders,
            own,
            children,
            deferred=vllm_api.is_deferred_attention_layer(module),
            online=bool(getattr(method, "uses_meta_device", False)),
        )

    def _value(self, value: object, prefix: str, key: Key, layer: str, own: list[TensorRecord]) -> object:
        if not isinstance(value, torch.Tensor) or isinstance(value, UninitializedTensorMixin):
            return value
        record = self._tensors.get(id(value))
        if record is None or record.ref() is not value:
            record = self._describe(value, f"{prefix}.{key[1]}" if prefix else str(key[1]), key, layer)
            self._tensors[id(value)] = record
        if record not in own:
            own.append(record)
        return record

    def _describe(self, tensor: torch.Tensor, name: str, key: Key, layer: str) -> TensorRecord:
        storage = storage_id(tensor)
        number = self._storages.setdefault(
            storage if storage is not None else -id(tensor), len(self._storages)
        )
        attributes = {k: vllm_api.unwrap_weight_loader(v) for k, v in tensor.__dict__.items()}
        plain = storage is not None
        geometry = Geometry.of(tensor) if plain else Geometry(0, tuple(tensor.shape), (0,) * tensor.dim())
        fmt = TensorFormat(
            name,
            geometry,
            tensor.dtype,
            tensor.device,
            type(tensor),
            tensor.requires_grad,
            attributes,
            self._initial(tensor, storage),
        )
        traced = self._trace is not None
        return TensorRecord(fmt, number, weakref.ref(tensor), key[0] == "_parameters", layer, traced)

    def _initial(self, tensor: torch.Tensor, storage: int | None) -> Initial:
        noted = self._trace.initial.get(storage) if self._trace is not None and storage else None
        if isinstance(noted, (Uninitialised, Constant)):
            return noted
        if storage is None or tensor.is_meta:
            return noted or AsServed()
        if tensor.numel() * tensor.element_size() <= SMALL_BYTES:
            # On the host: while a model starts, its device's memory may belong to a pool that sleep discards.
            return Values(tensor.detach().to("cpu", copy=True))
        return AsServed()


def _reference(holder: object) -> Callable[[], object | None]:
    """A weak reference where the object allows one; containers are held strongly."""
    try:
        return weakref.ref(holder)
    except TypeError:
        return lambda: holder


@dataclass(frozen=True, eq=False)
class ObservedTensor:
    """Identity, memory and layout of a tensor when it was observed. Does not keep the tensor alive."""

    ref: weakref.ref[torch.Tensor]
    address: int
    storage: int | None
    """Identity of its storage; None for a tensor that wraps others."""
    layout: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
    """Its dtype, shape and strides."""
    version: int
    """How often it was written to, as far as torch counts that: not through ``tensor.data``."""

    def unchanged(self, other: object) -> bool:
        return (
            isinstance(other, ObservedTensor)
            and self.ref() is other.ref()
            and (self.address, self.layout, self.version) == (other.address, other.layout, other.version)
        )


def observe(record: ModelRecord) -> list[Contents]:
    """What every recorded holder holds now, in the record's order (tensors by identity)."""
    return [_contents(holder) for layer in record.layers for holder in layer.holders]


def _contents(holder: HolderRecord) -> Contents:
    target = holder.ref()
    return {} if target is None else {key: _observed(value) for key, value in read(target).items()}


def _observed(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    storage = storage_id(value)
    layout = (value.dtype, tuple(value.shape), () if storage is None else tuple(value.stride()))
    version = 0 if value.is_inference() else value._version
    return ObservedTensor(
        weakref.ref(value), 0 if storage is None else value.data_ptr(), storage, layout, version
    )


class TailWatch:
    """Observes a model once while vLLM processes it: when the tail of PWAL begins."""

    _NAME = "process_weights_after_loading"

    def __init__(self, model: nn.Module, record: ModelRecord, writes: WriteWatch | None = None) -> None:
        self.before_tail: list[Contents] | None = None
        self._record = record
        self._writes = writes
        layers = [module for layer in record.layers if layer.deferred and (module := layer.ref()) is not None]
        self._watched = layers + ([model] if hasattr(model, self._NAME) else [])

    def __enter__(self) -> TailWatch:
        for module in self._watched:
            vllm_api.attach(module, self._NAME, self._observing(getattr(module, self._NAME)))
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._watched:
            module.__dict__.pop(self._NAME, None)
        self._watched = []

    def _observing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def observing(*args: Any, **kwargs: Any) -> Any:
            if self._watched:
                self.__exit__()
                self.before_tail = observe(self._record)
                if self._writes is not None:
                    self._writes.begin_tail()
            return method(*args, **kwargs)

        return observing


def finish_record(
    model: nn.Module,
    record: ModelRecord,
    loaded: list[Contents],
    before_tail: list[Contents] | None,
    model_config: Any,
    target_device: torch.device,
    writes: WriteWatch | None = None,
) -> ModelRecord:
    """Complete the record after PWAL: keep what changed, and group layers that share memory.

    Args:
        model: keeps the complete record in place of the one made at construction.
        record: the record made at construction.
        loaded: the answer of ``observe`` when the weights were loaded and PWAL was about to begin.
        before_tail: the answer of ``observe`` when the tail of PWAL began; None without a tail.
        model_config: vLLM's config of this model (a draft model has its own).
        target_device: the device PWAL ran on.
        writes: what PWAL wrote to, where it was watched.

    """
    after = observe(record)
    written = frozenset[int]() if writes is None else frozenset(writes.written | writes.written_by_tail)
    by_tail = frozenset[int]() if writes is None else frozenset(writes.written_by_tail)
    flat = [(layer, holder) for layer in record.layers for holder in layer.holders]
    for index, (layer, holder) in enumerate(flat):
        holder.undo = _difference(holder.constructed, after[index])
        if not layer.online:
            layer.has_added_parameters |= _has_added_parameters(holder.constructed, loaded[index])
            holder.by_loader = _settled(holder.undo, loaded[index], after[index])
        if before_tail is not None and not layer.deferred:
            layer.late |= _changed(before_tail[index], after[index]) or _are_in(by_tail, after[index])
        _note_kept_but_changed(holder, loaded[index], after[index], written)
        if layer.name == "":
            layer.late = True  # vLLM sets attributes of the model itself in the tail
        holder.constructed = {
            key: value for key, value in holder.constructed.items() if isinstance(value, TensorRecord)
        }
    for tensor_record in {id(t): t for layer in record.layers for t in layer.tensors}.values():
        if writes is not None and (values := writes.initial.get(id(tensor_record))) is not None:
            tensor_record.format = dataclasses.replace(tensor_record.format, initial=values)
        if tensor_record.is_table and _has_initial_values(tensor_record):
            tensor_record.format = dataclasses.replace(tensor_record.format, initial=AsServed())
    for layer in record.layers:
        module = layer.ref()
        layer.needs_no_processing = module is not None and not vllm_api.is_processed(module)
    groups = _group(record.layers)
    finished = dataclasses.replace(
        record,
        model_config=model_config,
        target_device=target_device,
        groups=groups,
        group_of={t.name: number for number, group in enumerate(groups) for t in group.tensors},
        late_bound=LateBound(module for layer in record.layers if (module := layer.ref()) is not None),
        complete=True,
    )
    vllm_api.attach(model, RECORD_ATTRIBUTE, finished)
    return finished


def _note_kept_but_changed(
    holder: HolderRecord, loaded: Contents, after: Contents, written: frozenset[int]
) -> None:
    """Note the constructor's tensors that are still in their places, with other memory, layout or values."""
    kept = {
        key: value
        for key, value in holder.constructed.items()
        if isinstance(value, TensorRecord) and key not in holder.undo
    }
    holder.rewritten = frozenset(
        key
        for key in kept
        if key in loaded and not (_still(loaded[key], after[key]) and not _are_in(written, {key: after[key]}))
    )
    for key in holder.rewritten:
        kept[key].rewritten = True


def _are_in(storages: frozenset[int], contents: Contents) -> bool:
    """Whether any tensor of a holder is in one of these storages."""
    return bool(storages) and any(
        isinstance(value, ObservedTensor) and value.storage in storages for value in contents.values()
    )


def _has_initial_values(record: TensorRecord) -> bool:
    """Whether a tensor still has the constructor's shape and values after PWAL."""
    tensor, initial = record.ref(), record.format.initial
    same_shape = isinstance(initial, Values) and tensor is not None and tensor.shape == initial.tensor.shape
    return same_shape and torch.equal(tensor.cpu(), initial.tensor)  # type: ignore[union-attr]


def _difference(constructed: Contents, after: Contents) -> Contents:
    undo: dict[Key, Any] = {}
    for key, before in constructed.items():
        now = after.get(key, ABSENT)
        if not _unchanged(before, now):
            undo[key] = before
    for key in after:
        if key not in constructed:
            undo[key] = ABSENT
    return undo


def _has_added_parameters(constructed: Contents, loaded: Contents) -> bool:
    """Whether the loaded layer has a parameter that the constructed layer had not."""
    return any(
        key[0] == "_parameters"
        and isinstance(value, ObservedTensor)
        and not isinstance(constructed.get(key), TensorRecord)
        for key, value in loaded.items()
    )


def _settled(undo: Contents, loaded: Contents, after: Contents) -> frozenset[Key]:
    """Changed keys whose value, not a tensor, was already final when PWAL began: the loader set it."""
    return frozenset(
        key
        for key in undo
        if key in loaded
        and key in after
        and not isinstance(after[key], ObservedTensor)
        and same(loaded[key], after[key])
    )


def _unchanged(before: object, now: object) -> bool:
    if isinstance(before, TensorRecord):
        return isinstance(now, ObservedTensor) and before.ref() is not None and now.ref() is before.ref()
    return same(before, now)


def _changed(before: Contents, after: Contents) -> bool:
    return before.keys() != after.keys() or not all(_still(before[key], after[key]) for key in before)


def _still(before: object, after: object) -> bool:
    return before.unchanged(after) if isinstance(before, ObservedTensor) else same(before, after)
