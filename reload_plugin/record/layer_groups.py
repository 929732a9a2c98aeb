"""Which layers are loaded and processed together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from .model_record import Group, LayerRecord, ModelRecord, TensorRecord

SMALL_GROUP = 64 << 10
"""A layer of at most so many bytes is joined with other small layers."""


JOINED_GROUP = 1 << 20
"""A group of small layers takes no more layers once it has more bytes than this."""


def _group(layers: Sequence[LayerRecord]) -> list[Group]:
    """Groups of layers that share memory or a quantization method, in the model's order."""
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
    """What each layer may share with others: the storages a checkpoint may fill, and a quantization method
    that is a module of its own, processes this layer only and keeps the results of processing as its state.
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
    """Storages of a layer's parameters and of its persistent buffers (a router's bias). Other buffers are
    computed by the constructor, like the rotary table that all layers share.
    """
    yield from (t.storage for t in layer.tensors if t.is_parameter)
    for holder in layer.holders:
        not_saved = getattr(holder.ref(), "_non_persistent_buffers_set", ())
        for (kind, name), record in holder.constructed.items():
            if kind == "_buffers" and name not in not_saved and isinstance(record, TensorRecord):
                yield record.storage


def _joined(groups: Iterable[Group]) -> Iterator[Group]:
    """Join small layers, because a group costs more time than their bytes: those that processing leaves as
    they are (norms), and attention that no checkpoint has anything of, which vLLM processes after all others
    anyway.
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
    """Tensors (by identity of their record) that several groups hold. A reload leaves them as they are."""
    seen: set[int] = set()
    shared: set[int] = set()
    for group in record.groups:
        own = {id(t) for t in group.tensors}
        shared |= own & seen
        seen |= own
    return frozenset(shared)
