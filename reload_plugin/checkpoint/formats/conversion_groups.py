"""Which weights of a transformers model belong together when its conversions are undone, and what comes out.

transformers 5 renames, fuses, splits and stacks weights while it loads them, by tables of its own
(``core_model_loading``). ``revert_weight_conversion`` undoes that for a state dict, and takes what it is
given for all there is: of a fused weight it would make parts that are too small from one of its sources. So
it is first run on meta tensors of the whole model, which shows which sources each output is made of; sources
that share an output form a group, and groups are undone one by one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import ExportError, export_error
from ...plan.source import TensorInfo
from .exact_conversions import exact_conversions

Tensors = dict[str, torch.Tensor]
_NOTHING = "Nothing was written."


@dataclass(frozen=True)
class ConversionGroup:
    """Weights of the model that are converted together, and the tensors of the checkpoint they become."""

    sources: tuple[str, ...]
    outputs: tuple[TensorInfo, ...]
    renamed: bool
    """Whether the one source becomes the one output as it is."""
    in_context: bool = False
    """Whether the conversion has to see the names of all other weights too."""


@dataclass(frozen=True)
class Conversions:
    """How a model becomes its checkpoint."""

    groups: tuple[ConversionGroup, ...]
    _model: Any = field(repr=False)
    _meta: Mapping[str, torch.Tensor] = field(repr=False)

    def convert(self, group: ConversionGroup, fetch: Callable[[str], torch.Tensor]) -> Tensors:
        """The outputs of a group.

        Sources are fetched when the first operation wants them, and freed when it is done with them.

        Args:
            group: one of ``groups``.
            fetch: gives the value of a source by its name in the model.

        """
        if group.renamed:
            return {group.outputs[0].name: fetch(group.sources[0])}
        given: dict[str, Any] = {name: functools.partial(fetch, name) for name in group.sources}
        if group.in_context:
            given = {name: functools.partial(_itself, tensor) for name, tensor in self._meta.items()} | given
        wanted = {info.name for info in group.outputs}
        made = _reverted(self._model, given)
        return {name: tensor for name, tensor in made.items() if name in wanted}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def unconverted(infos: Sequence[TensorInfo]) -> Conversions:
    """Every weight under its name in the model."""
    groups = tuple(ConversionGroup((info.name,), (info,), renamed=True) for info in infos)
    return Conversions(groups, None, {})


def conversions_of(model: Any, infos: Sequence[TensorInfo]) -> Conversions:
    """Undo a transformers model's conversions on meta tensors, whole and group by group.

    Args:
        model: a ``PreTrainedModel``; not changed.
        infos: the weights that are saved: names in the model, shapes, dtypes.

    Raises:
        ExportError: an operation cannot be undone, a source of it is missing, or a weight would be lost.

    """
    meta = {info.name: info.meta() for info in infos}
    if not meta:
        return Conversions((), model, {})
    together: list[frozenset[str]] = []
    ancestry = _Ancestry(meta)
    shown = copy.copy(model)  # the same modules and config, with a table of its own
    shown._weight_conversions = exact_conversions(model, lambda t: together.append(ancestry.sources_of(*t)))
    with ancestry:
        whole = _reverted(shown, meta)
    made_of = {name: ancestry.sources_of(tensor) for name, tensor in whole.items()}
    lost = meta.keys() - set().union(*made_of.values())
    if lost:
        raise export_error(
            f"of {type(model).__name__} would be lost by transformers' conversions",
            f"{_NOTHING} Save with save_original_format=False.",
            dict.fromkeys(lost, "no tensor of the checkpoint is made of it"),
        )
    found = Conversions((), shown, meta)
    groups = [_group(found, sources, names, whole) for sources, names in _connected(made_of, together)]
    return Conversions(tuple(groups), shown, meta)


def _group(found: Conversions, sources: list[str], names: list[str], whole: Tensors) -> ConversionGroup:
    """A group, tried alone."""
    outputs = tuple(_info(name, whole[name]) for name in names)
    if len(sources) == len(names) == 1 and whole[names[0]] is found._meta[sources[0]]:
        return ConversionGroup(tuple(sources), outputs, renamed=True)
    for in_context in (False, True):
        group = ConversionGroup(tuple(sources), outputs, renamed=False, in_context=in_context)
        made = found.convert(group, found._meta.__getitem__)
        if made.keys() == set(names) and all(_info(n, t) in outputs for n, t in made.items()):
            return group
    raise ExportError(
        f"{', '.join(sources)} cannot be converted apart from other weights. {_NOTHING} Save with "
        "save_original_format=False.",
        dict.fromkeys(sources, "is converted otherwise when it is alone"),
    )


def _info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), tensor.dtype)


def _connected(
    made_of: Mapping[str, frozenset[str]], together: Sequence[frozenset[str]]
) -> list[tuple[list[str], list[str]]]:
    """Sources and outputs in groups, in the order of the outputs.

    Args:
        made_of: output -> its sources, which come into one group.
        together: sets of sources that come into one group.

    """
    root = {source: source for sources in made_of.values() for source in sources}

    def found(name: str) -> str:
        while root[name] != name:
            root[name] = name = root[root[name]]
        return name

    for sources in (*made_of.values(), *(some & root.keys() for some in together)):
        first = found(min(sources)) if sources else ""
        for source in sources:
            root[found(source)] = first
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for output, sources in made_of.items():
        groups.setdefault(found(min(sources)), ([], []))[1].append(output)
    for source in sorted(root):
        groups[found(source)][0].append(source)
    return list(groups.values())


def _reverted(model: Any, tensors: Mapping[str, Any]) -> Tensors:
    """What transformers makes of some weights; an operation that fails is named with its tensors.

    Args:
        model: as for ``conversions_of``.
        tensors: name in the model -> value, or what gives the value when it is called.

    """
    from transformers.core_model_loading import ConversionOps, revert_weight_conversion

    try:
        with torch.no_grad():
            found: Tensors = revert_weight_conversion(model, dict(tensors))
    except (ExportError, MemoryError):
        raise
    except Exception as error:
        operation, patterns = _failing(error, ConversionOps)
        named = {name: operation for name in tensors if any(p in name for p in patterns)} or dict.fromkeys(
            patterns, operation
        )
        raise export_error(
            f"of {type(model).__name__} cannot be converted back by transformers",
            f"{type(error).__name__}: {error}. {_NOTHING} Save with save_original_format=False, or with "
            "another transformers.",
            named,
        ) from error
    return found


def _failing(error: BaseException, operations: type) -> tuple[str, list[str]]:
    """The operation that raised, and patterns of the names it was for, from the frames of a traceback."""
    operation, patterns = "an unknown operation", list[str]()
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame.f_locals
        own: Any = frame.get("self")
        if isinstance(own, operations):
            operation = repr(own)
        if hasattr(own, "operations") and hasattr(own, "target_patterns"):
            reverting = trace.tb_frame.f_code.co_name == "reverse_transform"
            patterns = list(own.target_patterns if reverting else own.source_patterns)
        trace = trace.tb_next
    return operation, [pattern.strip("^$").replace("\\", "") for pattern in patterns]


class _Ancestry(TorchDispatchMode):
    """Notes of every tensor that is made while entered which of the given ones it is made of."""

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._of = {id(tensor): frozenset([name]) for name, tensor in sources.items()}
        self._alive: list[torch.Tensor] = []
        """Tensors are told apart by address, so none may be freed."""

    def sources_of(self, *tensors: torch.Tensor) -> frozenset[str]:
        """Names of the given ones that some tensors are made of."""
        return frozenset().union(*(self._of.get(id(tensor), ()) for tensor in tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        names = self.sources_of(*_tensors((args, kwargs)))
        for tensor in _tensors(result):
            self._alive.append(tensor)
            self._of[id(tensor)] = self.sources_of(tensor) | names
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
