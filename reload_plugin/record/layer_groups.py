"""Which layers are loaded and processed together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from .model_record import Group, LayerRecord, ModelRecord, TensorRecord

SMALL_GROUP = 64 << 10
"""Bytes up to which a layer is joined with other small ones."""


JOINED_GROUP = 1 << 20
"""Bytes from which on a group of small layers is closed."""


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


def shared_tensors(record: ModelRecord) -> frozenset[int]:
    """Tensors (by record) that several groups hold and that are nobody's parameter: left alone."""
    seen: set[int] = set()
    shared: set[int] = set()
    for group in record.groups:
        own = {id(t) for t in group.tensors}
        shared |= own & seen
        seen |= own
    return frozenset(shared)
