"""Layers that a partial update must not change: what they hold, and whether they still hold it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..errors import CrossGroupEffectError
from .model_record import ModelRecord
from .snapshot import Snapshot, holds_same, put_back, read

_SHOWN = 3


class UntouchedLayers:
    """The groups of a model that are not reloaded, and what their layers held when this was made.

    Args:
        record: of the model.
        reloaded: names of the groups that are.

    """

    def __init__(self, record: ModelRecord, reloaded: Iterable[str]) -> None:
        chosen = set(reloaded)
        groups = [group for group in record.groups if group.name not in chosen]
        self._tensors = [(tensor.name, tensor.ref) for group in groups for tensor in group.tensors]
        layers = [layer for group in groups for layer in group.layers]
        held = [(layer.name, holder.ref()) for layer in layers for holder in layer.holders]
        self._held: list[tuple[str, object, Snapshot]] = [
            (name, holder, read(holder)) for name, holder in held if holder is not None
        ]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of these groups that still exist. A loader must not write to them."""
        alive = ((name, ref()) for name, ref in self._tensors)
        yield from ((name, tensor) for name, tensor in alive if tensor is not None)

    def put_back(self) -> list[str]:
        """Restore what the layers held. Returns the names of those that had changed."""
        changed = []
        for name, holder, contents in self._held:
            now = read(holder)
            if not holds_same(now, contents):
                changed.append(name)
                put_back(holder, contents, now)
        return changed

    def check(self, source: str) -> None:
        """Restore what the layers held.

        Raises:
            CrossGroupEffectError: some layers had changed; they are restored.

        """
        if changed := self.put_back():
            shown = ", ".join(name or "the model" for name in changed[:_SHOWN])
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise CrossGroupEffectError(
                f"Processing the layers that {source} has weights for also changes {shown}{more}, "
                "for which no weight was sent. The engine serves what it served before. Send all weights."
            )
