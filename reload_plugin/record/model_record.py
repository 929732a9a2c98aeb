"""The load format of a model, and what ``process_weights_after_loading`` does to it.

Three looks at a model while it starts give the record:

* *constructed*: right after ``initialize_model``; this is the load format,
* *loaded and processed*: after vLLM's whole-model ``process_weights_after_loading`` (PWAL),
* in between, when PWAL turns from quantization methods to attention layers and the model's own
  hook (its *tail*), because what the tail changes in other layers has to be taken last.

The record keeps descriptions and differences. Tensors are held weakly: whatever vLLM lets go of is
freed as before, and whatever somebody still holds is put back as the same object.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import vllm_api
from ..device.host_memory import HostPool
from ..tensors import storage_id
from .generation import Generation
from .module_state import ABSENT, Contents, Key, holders_of, read, same
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

SMALL_GROUP = 64 << 10
"""Bytes up to which a layer is joined with other small ones."""
JOINED_GROUP = 1 << 20
"""Bytes from which on a group of small layers is closed."""

_FEW_BYTES = 64
"""Bytes of a tensor that count as nothing beside the tensor itself."""

RECORD_ATTRIBUTE = "_reload_plugin_record"
"""Where a model keeps its record, so that both are freed together."""


class ConstructionTrace(TorchDispatchMode):
    """Notes what the constructor puts into each storage: nothing, one value, or computed values."""

    _EMPTY = ("empty", "new_empty")
    _FILLS: Mapping[str, float] = {"zeros": 0, "new_zeros": 0, "ones": 1, "new_ones": 1}

    def __init__(self) -> None:
        super().__init__()
        self.initial: dict[int, Initial] = {}
        self._noted: list[StorageWeakRef] = []
        """As long as somebody refers to them, even weakly, no other storage gets the identity of one that is
        gone: ``torch.tensor(1.0)``, which no mode sees being made, would have the values of that one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.endswith("_") and not name.startswith("_") and args and isinstance(args[0], torch.Tensor):
            self._note_written(name, args)
        else:
            inputs = {storage_id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and (key := storage_id(tensor)) not in inputs and key:
                    self.initial[key] = self._made_by(name, args)
                    self._noted.append(StorageWeakRef(tensor.untyped_storage()))
        return out

    def _made_by(self, name: str, args: tuple[Any, ...]) -> Initial:
        base = name.removesuffix("_like")
        if base.startswith(self._EMPTY):
            return Uninitialised()
        if base in self._FILLS:
            return Constant(self._FILLS[base])
        if base in ("full", "new_full") and isinstance(args[-1], (int, float, bool, complex)):
            return Constant(args[-1])
        if name in ("_to_copy", "clone") and isinstance(args[0], torch.Tensor):
            return self.initial.get(storage_id(args[0]) or 0, AsServed())
        return AsServed()

    def _note_written(self, name: str, args: tuple[Any, ...]) -> None:
        target = args[0]
        key = storage_id(target)
        if key is None:
            return
        whole = target.numel() * target.element_size() >= target.untyped_storage().nbytes()
        if whole and name == "zero_":
            self.initial[key] = Constant(0)
        elif whole and name == "fill_" and isinstance(args[1], (int, float, bool, complex)):
            self.initial[key] = Constant(args[1])
        else:
            self.initial[key] = AsServed()


@dataclass(eq=False)
class TensorRecord:
    """One load-format tensor: its format, its storage, and the object itself while it lives."""

    format: TensorFormat
    storage: int
    """Number of the storage; tensors with the same number are views of one memory."""
    ref: weakref.ref[torch.Tensor]
    is_parameter: bool
    layer: str
    traced: bool = True
    """Whether the construction was watched, so that what the constructor wrote is known."""

    @property
    def name(self) -> str:
        return self.format.name

    @functools.cached_property
    def scalars(self) -> torch.Tensor | None:
        """What the constructor left in a buffer of a few elements, laid out as in the load format: the scales
        that attention has, and that few checkpoints bring. None for parameters, whose weights may be read
        straight to where they are served.
        """
        initial = self.format.initial
        if self.is_parameter or not isinstance(initial, Values) or initial.tensor.nbytes > _FEW_BYTES:
            return None
        return initial.tensor if Geometry.of(initial.tensor) == self.format.geometry else None

    @property
    def expected(self) -> bool:
        """Whether a loader is expected to write every element: nobody else ever did."""
        return self.is_parameter and isinstance(self.format.initial, Uninitialised)

    @property
    def is_table(self) -> bool:
        """Whether it says where experts are. An engine that balances its load or gets more ranks writes to
        such tables, and new weights go by what they say then.
        """
        return not self.is_parameter and "expert" in self.name and not self.format.dtype.is_floating_point


@dataclass(eq=False)
class HolderRecord:
    """One holder of a layer and how PWAL changed it: ``undo`` maps a key to its load-format value.

    Values that are tensors are kept as their TensorRecord; ABSENT means PWAL added the key.
    """

    ref: Callable[[], object | None]
    path: str
    constructed: Contents
    undo: Contents = field(default_factory=dict)
    by_loader: frozenset[Key] = frozenset()
    """Keys in ``undo`` that loading changed and processing did not."""

    @functools.cached_property
    def keys(self) -> list[Key]:
        """All keys that were recorded, in an order of their own; to be asked when the record is complete."""
        return sorted(self.constructed.keys() | self.undo.keys(), key=str)


@dataclass(eq=False)
class LayerRecord:
    """A module that owns state directly."""

    name: str
    ref: weakref.ref[nn.Module]
    holders: list[HolderRecord]
    tensors: list[TensorRecord]
    children: dict[str, weakref.ref[nn.Module]]
    deferred: bool
    """Attention-like: vLLM processes it after all other layers."""
    online: bool
    """Its quant method creates weights on meta and is processed while the weights stream in."""
    late: bool = False
    """The tail of PWAL changes it once more, so its result is taken only after the tail."""
    passed_over: bool = False
    """PWAL has nothing to call for it."""
    grown: bool = False
    """A loader gave it a parameter that its constructor had not made."""

    @property
    def effect(self) -> bool:
        """Whether PWAL changed anything in it."""
        return any(holder.undo for holder in self.holders)

    @functools.cached_property
    def has_keys(self) -> bool:
        """Whether any of its holders has keys; to be asked when the record is complete."""
        return any(holder.keys for holder in self.holders)


@dataclass(eq=False)
class Group:
    """Layers that share load-format memory or what comes of it, so they are loaded and processed together.

    What it says of them all is asked when they are known to be all.
    """

    layers: list[LayerRecord]
    tensors: list[TensorRecord] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.layers[0].name

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of staging the group needs in load format."""
        by_storage: dict[int, int] = {}
        for record in self.tensors:
            end = record.format.geometry.offset * record.format.dtype.itemsize + record.format.nbytes
            by_storage[record.storage] = max(end, by_storage.get(record.storage, 0))
        return sum(by_storage.values())

    @functools.cached_property
    def deferred(self) -> bool:
        return any(layer.deferred for layer in self.layers)

    @functools.cached_property
    def late(self) -> bool:
        return any(layer.late for layer in self.layers)

    @functools.cached_property
    def effect(self) -> bool:
        """Whether processing changes anything in its layers."""
        return any(layer.effect for layer in self.layers)

    @functools.cached_property
    def passed_over(self) -> bool:
        """Whether processing neither does anything to its layers nor has anything to call for them."""
        return self.plain and all(layer.passed_over for layer in self.layers)

    @functools.cached_property
    def plain(self) -> bool:
        """Whether processing leaves its layers as they were loaded (embeddings, norms)."""
        return not any(layer.effect or layer.deferred or layer.online or layer.late for layer in self.layers)


@dataclass(eq=False)
class ModelRecord:
    """Everything needed to put a model back into load format and process it again."""

    layers: list[LayerRecord]
    vllm_config: Any
    model_config: Any = None
    target_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: list[Group] = field(default_factory=list)
    group_of: dict[str, int] = field(default_factory=dict)
    """Load-format tensor -> number of its group in ``groups``, which keep the model's order."""
    complete: bool = False
    deferred_groups: set[str] = field(default_factory=set)
    """Names of groups that are open until all weights have come: a loader made a parameter for one, of which
    its load format tells nothing, or comes back to its parameters when others have come."""
    generation: Generation = field(default_factory=Generation)
    """The generation of weights that the model answers with."""
    changes: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """Reloads that have begun and are not over; see ``digest.Change``."""
    last_report: Any = None
    """ReloadReport of the last good reload, without its long lists."""
    last_error: str | None = None
    """What the last reload that failed said; None once one succeeded."""
    handles: dict[int, bytes | None] = field(default_factory=dict)
    """Native handle -> digest of what it was made of; see ``native.Handles``."""
    native: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Group name -> memory that the group's native handles point into."""
    session: Any = None
    """The session that vLLM's layerwise calls have open."""
    rollback_source: Any = None
    """A Source that would give the served weights again, if there is one."""
    names_of_group: dict[str, frozenset[str]] | None = None
    """Group name -> weights that went into it at the last good reload."""
    copy_plan: Any = None
    """Routes of the last good reload."""
    last_infos: Any = None
    """What the last reload through the model's loader brought, as TensorInfo."""
    planned_for: Any = None
    """The placement and the listing that routes were last learnt from; they are not tried twice."""
    plan: Any = None
    """Plan of the last checkpoint that was read from files."""
    kept: dict[str, str] = field(default_factory=dict)
    """What the last good reload kept, as in its report."""
    start_stamps: dict[str, tuple[int, int, int]] | None = None
    """Weight file -> size, time and inode when the engine had just started from it."""
    start_config: dict[str, Any] | None = None
    """The config.json that the engine had just started with, as it was on disk."""
    start_shapes: dict[str, tuple[int, ...]] | None = None
    """Name -> shape in the checkpoint the engine started with."""
    start_coverage: dict[str, str] | None = None
    """Parameter -> how completely that checkpoint writes it."""
    has_cross_group_effects: bool = False
    """Whether processing some layers alone was seen to change others, so that all are reloaded always."""
    broken: str | None = None
    """Why the model holds a mixture of two generations, if it does."""
    pool: HostPool = field(default_factory=HostPool)
    """Memory for staging, kept from reload to reload."""
    vote: Any = None
    """This rank's vote in the reload that is under way, where several ranks hold the model."""

    @property
    def largest(self) -> int:
        """Bytes of staging that the largest group needs."""
        return max((group.nbytes for group in self.groups), default=0)

    def group_with(self, tensor: str) -> Group:
        """The group of a load-format tensor."""
        return self.groups[self.group_of[tensor]]

    def defer_groups_of(self, parameters: Iterable[str]) -> None:
        """A loader came back to these parameters: keep their groups open to the end from now on."""
        self.deferred_groups.update(self.group_with(parameter).name for parameter in parameters)


def record_of(model: nn.Module) -> ModelRecord | None:
    """The record of a model, or None when it was built without one."""
    found = model.__dict__.get(RECORD_ATTRIBUTE)
    return found if isinstance(found, ModelRecord) else None


def record_constructed(model: nn.Module, trace: ConstructionTrace | None, vllm_config: Any) -> ModelRecord:
    """Record the load format of a model that was just constructed; stored on the model itself."""
    recorder = _Recorder(trace)
    layers = [recorder.layer(name, module) for name, module in model.named_modules()]
    record = ModelRecord(layers, vllm_config)
    vllm_api.attach(model, RECORD_ATTRIBUTE, record)
    return record


class _Recorder:
    """Numbers storages and describes tensors while one model is recorded."""

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
            return Values(tensor.detach().clone())
        return AsServed()


def _reference(holder: object) -> Callable[[], object | None]:
    """A weak reference where the object allows one; containers are held strongly."""
    try:
        return weakref.ref(holder)
    except TypeError:
        return lambda: holder


@dataclass(frozen=True, eq=False)
class Seen:
    """A tensor at the time of a look, without keeping it alive."""

    ref: weakref.ref[torch.Tensor]
    address: int

    def unchanged(self, other: object) -> bool:
        return isinstance(other, Seen) and self.ref() is other.ref() and self.address == other.address


def look(record: ModelRecord) -> list[Contents]:
    """What every recorded holder holds now, in the record's order (tensors by identity)."""
    return [_contents(holder) for layer in record.layers for holder in layer.holders]


def _contents(holder: HolderRecord) -> Contents:
    target = holder.ref()
    return {} if target is None else {key: _seen(value) for key, value in read(target).items()}


def _seen(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return Seen(weakref.ref(value), 0 if storage_id(value) is None else value.data_ptr())


class TailWatch:
    """While vLLM processes a model, looks at it once: when attention layers or the hook begin."""

    _NAME = "process_weights_after_loading"

    def __init__(self, model: nn.Module, record: ModelRecord) -> None:
        self.before_tail: list[Contents] | None = None
        self._record = record
        layers = [module for layer in record.layers if layer.deferred and (module := layer.ref()) is not None]
        self._watched = layers + ([model] if hasattr(model, self._NAME) else [])

    def __enter__(self) -> TailWatch:
        for module in self._watched:
            vllm_api.attach(module, self._NAME, self._looking(getattr(module, self._NAME)))
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._watched:
            module.__dict__.pop(self._NAME, None)
        self._watched = []

    def _looking(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def looking(*args: Any, **kwargs: Any) -> Any:
            if self._watched:
                self.__exit__()
                self.before_tail = look(self._record)
            return method(*args, **kwargs)

        return looking


def finish_record(
    record: ModelRecord,
    loaded: list[Contents],
    before_tail: list[Contents] | None,
    model_config: Any,
    target_device: torch.device,
) -> None:
    """Complete the record after PWAL: keep what changed, and group layers that share memory.

    Args:
        record: the record made at construction.
        loaded: a ``look`` taken when the weights were loaded and PWAL was about to begin.
        before_tail: a ``look`` taken when PWAL's tail began, or None when it had none.
        model_config: vLLM's config of this model (a draft model has its own).
        target_device: the device PWAL ran on.

    """
    after = look(record)
    flat = [(layer, holder) for layer in record.layers for holder in layer.holders]
    for index, (layer, holder) in enumerate(flat):
        holder.undo = _difference(holder.constructed, after[index])
        if not layer.online:
            layer.grown |= _has_grown(holder.constructed, loaded[index])
            holder.by_loader = _settled(holder.undo, loaded[index], after[index])
        if before_tail is not None and not layer.deferred and _changed(before_tail[index], after[index]):
            layer.late = True
        if layer.name == "":
            layer.late = True  # what vLLM sets on the model itself comes with the tail
        holder.constructed = {
            key: value for key, value in holder.constructed.items() if isinstance(value, TensorRecord)
        }
    for tensor_record in {id(t): t for layer in record.layers for t in layer.tensors}.values():
        if tensor_record.is_table and _has_initial_values(tensor_record):
            tensor_record.format = dataclasses.replace(tensor_record.format, initial=AsServed())
    for layer in record.layers:
        module = layer.ref()
        layer.passed_over = module is not None and not vllm_api.is_processed(module)
    record.model_config = model_config
    record.target_device = target_device
    record.groups = _group(record.layers)
    record.group_of = {t.name: number for number, group in enumerate(record.groups) for t in group.tensors}
    record.deferred_groups = {
        group.name for group in record.groups if any(layer.grown for layer in group.layers)
    }
    record.complete = True


def _has_initial_values(record: TensorRecord) -> bool:
    """Whether PWAL left a tensor, and its values, as the constructor made them."""
    tensor, initial = record.ref(), record.format.initial
    same_shape = isinstance(initial, Values) and tensor is not None and tensor.shape == initial.tensor.shape
    return same_shape and torch.equal(tensor, initial.tensor)  # type: ignore[arg-type, union-attr]


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


def _has_grown(constructed: Contents, loaded: Contents) -> bool:
    """Whether a parameter is there that was none when the layer was constructed."""
    return any(
        key[0] == "_parameters"
        and isinstance(value, Seen)
        and not isinstance(constructed.get(key), TensorRecord)
        for key, value in loaded.items()
    )


def _settled(undo: Contents, loaded: Contents, after: Contents) -> frozenset[Key]:
    """Changed keys that had their final, plain value before processing began."""
    return frozenset(
        key
        for key in undo
        if key in loaded
        and key in after
        and not isinstance(after[key], Seen)
        and same(loaded[key], after[key])
    )


def _unchanged(before: object, now: object) -> bool:
    if isinstance(before, TensorRecord):
        return isinstance(now, Seen) and before.ref() is not None and now.ref() is before.ref()
    return same(before, now)


def _changed(before: Contents, after: Contents) -> bool:
    return before.keys() != after.keys() or not all(_still(before[key], after[key]) for key in before)


def _still(before: object, after: object) -> bool:
    return before.unchanged(after) if isinstance(before, Seen) else same(before, after)


def _group(layers: Sequence[LayerRecord]) -> list[Group]:
    """Join layers that are only whole together; keep the model's order."""
    group_of: dict[object, Group] = {}
    ties_of: dict[Group, set[object]] = {}
    for layer, ties in zip(layers, _ties(layers), strict=True):
        group = Group([layer])
        joined = {id(group_of[tie]): group_of[tie] for tie in ties if tie in group_of}
        for other in joined.values():
            group.layers = other.layers + group.layers
            ties |= ties_of.pop(other)
        ties_of[group] = ties
        group_of.update(dict.fromkeys(ties, group))
    groups = list(ties_of)
    for group in groups:
        group.tensors = list({id(t): t for layer in group.layers for t in layer.tensors}.values())
    return list(_joined(groups))


def _ties(layers: Sequence[LayerRecord]) -> list[set[object]]:
    """For each layer what it has in common with others: storages of what a checkpoint may have, and a
    quantization method that is a module of its own and processes one layer only, which keeps what comes of it
    there.
    """
    loadable = {storage for layer in layers for storage in _loadable(layer)}
    modules = [layer.ref() for layer in layers]
    methods = [id(getattr(module, "quant_method", None)) for module in modules]
    own = {method for method, count in Counter(methods).items() if count == 1} & set(map(id, modules))
    return [
        {t.storage for t in layer.tensors if t.storage in loadable}
        | {("method", number) for number in (id(module), method) if number in own}
        for layer, module, method in zip(layers, modules, methods, strict=True)
    ]


def _loadable(layer: LayerRecord) -> Iterator[int]:
    """Storages of a layer's parameters, and of its buffers that are saved (a router's bias, say); others are
    computed, like the table of a rotary embedding that all layers share.
    """
    yield from (t.storage for t in layer.tensors if t.is_parameter)
    for holder in layer.holders:
        not_saved = getattr(holder.ref(), "_non_persistent_buffers_set", ())
        for (kind, name), record in holder.constructed.items():
            if kind == "_buffers" and name not in not_saved and isinstance(record, TensorRecord):
                yield record.storage


def _joined(groups: Iterable[Group]) -> Iterator[Group]:
    """Small layers together, since a stage costs more than they do: those that processing leaves as they are
    (norms), and attention that no checkpoint has anything of, which vLLM processes after all others anyway.
    """
    waiting: dict[bool, Group] = {}
    for group in groups:
        if group.nbytes > SMALL_GROUP or not (group.plain or _is_bare(group)):
            yield group
            continue
        small = waiting.setdefault(group.deferred, Group([]))
        small.layers += group.layers
        small.tensors += group.tensors
        if sum(member.format.nbytes for member in small.tensors) > JOINED_GROUP:
            yield waiting.pop(group.deferred)
    yield from waiting.values()


def _is_bare(group: Group) -> bool:
    """Whether its layers are processed last and have no parameters."""
    last = all(layer.deferred and not layer.late and not layer.online for layer in group.layers)
    return last and not any(tensor.is_parameter for tensor in group.tensors)
