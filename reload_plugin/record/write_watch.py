"""What ``process_weights_after_loading`` (PWAL) writes to while a model starts, seen operator by operator.

A parameter that keeps its object, and even its memory, may hold other values after PWAL. Nothing that can be
looked at afterwards shows that: ``tensor.data`` has a version counter of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..tensors import storage_id
from .model_record import ModelRecord, TensorRecord
from .tensor_layout import Values
from .unloaded_values import computed_by_constructor


class WriteWatch(TorchDispatchMode):
    """Notes the storages that operators write to, by what their schemas say.

    Values that only the constructor made and of which nobody keeps a copy are copied to the host just before
    they are written to.

    Args:
        record: of the model, as it was constructed. The watch keeps the storages of such values alive while
            PWAL runs.

    """

    supports_higher_order_operators = True

    def __init__(self, record: ModelRecord) -> None:
        super().__init__()
        self.written: set[int] = set()
        """Identities of storages, before the tail of PWAL."""
        self.written_by_tail: set[int] = set()
        self.initial: dict[int, Values] = {}
        """Tensor record (by identity) -> what the constructor put into it, where PWAL wrote to it."""
        self._in_tail = False
        self._unkept: dict[int, list[tuple[TensorRecord, torch.Tensor]]] = {}
        for tensor in computed_by_constructor(record):
            if (live := tensor.ref()) is not None and (storage := storage_id(live)) is not None:
                self._unkept.setdefault(storage, []).append((tensor, live.data))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled: run eagerly, they might give other bits than in a reload."""
        return True

    def begin_tail(self) -> None:
        """The tail of PWAL begins."""
        self._in_tail = True

    def keep_if_rebound(self) -> None:
        """Copy values of the constructor whose tensors got other memory; their old memory is still there."""
        for entries in list(self._unkept.values()):
            for tensor, before in entries:
                live = tensor.ref()
                if live is not None and (live.data_ptr(), live.shape) != (before.data_ptr(), before.shape):
                    self._keep(tensor, before)
        self._unkept = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        for tensor in _written_by(func, args, given):
            if (storage := storage_id(tensor)) is not None:
                (self.written_by_tail if self._in_tail else self.written).add(storage)
                for record, before in self._unkept.pop(storage, ()):
                    self._keep(record, before)
        return func(*args, **given)

    def _keep(self, record: TensorRecord, values: torch.Tensor) -> None:
        with torch.no_grad():
            self.initial.setdefault(id(record), Values(values.detach().to("cpu", copy=True)))


def _written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that an operator writes to, also those in lists."""
    for position, name in _write_arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor


@functools.lru_cache(4096)
def _write_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operator's schema marks as written to."""
    schema = getattr(func, "_schema", None)
    arguments: Iterable[Any] = () if schema is None else schema.arguments
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
