"""What one operator call does with memory, as a value: which tensors it reads and which it writes.

Pure functions of an operator and its arguments. Nothing here needs a dispatch mode or a model.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..tensors import storage_id

_ATEN = torch.ops.aten

VIEWS = frozenset(
    getattr(getattr(_ATEN, name), overload)
    for name, overload in (
        ("alias", "default"),
        ("detach", "default"),
        ("narrow", "default"),
        ("permute", "default"),
        ("select", "int"),
        ("slice", "Tensor"),
        ("split", "Tensor"),
        ("squeeze", "dim"),
        ("t", "default"),
        ("transpose", "int"),
        ("unbind", "int"),
        ("unsqueeze", "default"),
        ("view", "default"),
    )
)
"""Operators that return views of their first argument and neither read nor write elements: nearly all that a
loader calls beside copies."""


class Kind(enum.Enum):
    """What can be learnt from an operator beside the memory that it reads and writes."""

    COPY = "copy"
    """``copy_``: the elements of ``Access.source`` are written to the only target."""
    ZERO = "zero"
    """``zero_``: zeros are written to the only target."""
    FILL = "fill"
    """``fill_``: ``Access.value`` is written to the only target. It may have been read from the weight."""
    SCALAR = "scalar"
    """``item``: an element becomes a Python number, and what follows may depend on it."""
    OTHER = "other"


_KINDS = {
    _ATEN.copy_.default: Kind.COPY,
    _ATEN.zero_.default: Kind.ZERO,
    _ATEN.fill_.Scalar: Kind.FILL,
    _ATEN._local_scalar_dense.default: Kind.SCALAR,
}


class Operand(NamedTuple):
    """A tensor argument, and the memory that it is a view of."""

    tensor: torch.Tensor
    key: int
    """Identity of its storage; 0 for a tensor without a storage of its own (torchao, DTensor)."""


class Access(NamedTuple):
    """One operator call. Refers to the tensors of the call, so it is not to be kept beyond it."""

    kind: Kind
    reads: tuple[Operand, ...]
    """Tensor arguments that are not written to."""
    writes: tuple[Operand, ...] = ()
    """Tensor arguments that are written to; an operator that adds in place reads them as well."""
    source: Operand | None = None
    """What a ``COPY`` copies, with as many elements as the target or broadcast to it."""
    value: Any = 0
    """What a ``FILL`` writes, a Python number."""
    result: Any = None
    """What the call returns where it is not carried out: its first written argument."""


def operand(tensor: torch.Tensor) -> Operand:
    """A tensor with the identity of its storage."""
    return Operand(tensor, storage_id(tensor) or 0)


def access_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Access:
    """What an operator call reads and writes.

    Args:
        func: an overload of an operator (``torch.ops.aten.copy_.default``).
        args: positional arguments, as a dispatch mode gets them. Tensors are found among them and in lists.
        kwargs: keyword arguments.

    """
    kind = _KINDS.get(func, Kind.OTHER)
    written = _written_arguments(func)
    if not written:
        return Access(kind, tuple(operand(tensor) for tensor in _tensors(args, kwargs)))
    values = [args[place] if place < len(args) else kwargs.get(name) for place, name in written]
    writes = tuple(operand(tensor) for tensor in _tensors(values, {}))
    targets = {id(target.tensor) for target in writes}
    reads = tuple(operand(tensor) for tensor in _tensors(args, kwargs) if id(tensor) not in targets)
    result = values[0] if func._schema.returns else None
    if kind is Kind.COPY:
        source = reads[0] if reads else writes[0]  # a tensor may be copied to itself
        return Access(kind, reads, writes, source, 0, result)
    value = args[1] if kind is Kind.FILL else 0
    return Access(kind, reads, writes, None, value, result)


def on_meta(access: Access, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call that moves or makes a tensor like a meta one: the result stays on meta.

    Weights of a dry run have no values, so ``weight.to("cpu")`` cannot copy them.
    """
    moves = not access.writes and kwargs.get("device") is not None
    if moves and any(tensor.is_meta for tensor, _ in access.reads):
        return {**kwargs, "device": torch.device("meta")}
    return kwargs


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, torch.Tensor))
    for value in kwargs.values():
        if isinstance(value, torch.Tensor):
            yield value
