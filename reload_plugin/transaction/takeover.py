"""While an update is open: ``model.load_weights`` and weight loaders of parameters lead into its session.

Between two calls the live model shows what it serves. So callers who load by hand, as
``parameter.weight_loader(parameter, tensor, ...)``, find served parameters, and these get a loader that
writes into the load format.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from ..record.snapshot import ABSENT
from ..record.staged_group import StagedGroup

LOADER = "weight_loader"


def _attribute_of(parameter: torch.Tensor) -> str:
    """Where a parameter keeps its loader: vLLM's own classes have a property over a private attribute."""
    return "_" + LOADER if hasattr(type(parameter), LOADER) else LOADER


class Takeover:
    """Replaces ``model.load_weights`` and the loaders of served parameters; ``release`` and ``end`` undo it.

    Args:
        model: of the session.
        load_weights: what ``model.load_weights`` becomes.
        loading: gives a context in which the model shows its load format.
        late: makes the error for a write to a parameter whose group is complete.

    """

    def __init__(
        self,
        model: nn.Module,
        load_weights: Callable[..., Any],
        loading: Callable[[], contextlib.AbstractContextManager[None]],
        late: Callable[[str], Exception],
    ) -> None:
        self._model = model
        self._load_weights = load_weights
        self._loading = loading
        self._late = late
        self._replaced_load_weights: object = ABSENT
        self._replaced: dict[StagedGroup, list[tuple[str, torch.Tensor, object]]] = {}
        """Group -> (name, served parameter, the loader it had)."""

    def begin(self, groups: Iterable[StagedGroup]) -> None:
        """Take over; the groups have to be hidden."""
        self._replaced_load_weights = self._model.__dict__.get("load_weights", ABSENT)
        vllm_api.attach(self._model, "load_weights", self._load_weights)
        for group in groups:
            for record, served, target in group.load_targets():
                self._replace(group, record.name, served, functools.partial(self._forward, target))

    def release(self, group: StagedGroup) -> list[tuple[str, torch.Tensor]]:
        """A group is complete and about to be compared with what it serves: its parameters get back the
        loaders they had. Returns their names and them, for ``refuse``.
        """
        released = self._replaced.pop(group, [])
        self._put_back(group, released)
        return [(name, served) for name, served, _ in released]

    def refuse(self, group: StagedGroup, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """From now on the loaders of a complete group's parameters raise."""
        for name, served in parameters:
            self._replace(group, name, served, functools.partial(self._too_late, name))

    def end(self) -> None:
        """Undo everything. Harmless when it was undone."""
        if self._model.__dict__.get("load_weights") == self._load_weights:
            if self._replaced_load_weights is ABSENT:
                del self._model.__dict__["load_weights"]
            else:
                vllm_api.attach(self._model, "load_weights", self._replaced_load_weights)
        for group, replaced in self._replaced.items():
            self._put_back(group, replaced)
        self._replaced = {}

    def _put_back(self, group: StagedGroup, replaced: list[tuple[str, torch.Tensor, object]]) -> None:
        for _, served, before in reversed(replaced):
            group.set_served_attribute(served, _attribute_of(served), before)

    def _replace(
        self, group: StagedGroup, name: str, served: torch.Tensor, loader: Callable[..., Any]
    ) -> None:
        attribute = _attribute_of(served)
        replaced = self._replaced.setdefault(group, [])
        replaced.append((name, served, served.__dict__.get(attribute, ABSENT)))
        group.set_served_attribute(served, attribute, loader)

    def _forward(self, target: torch.Tensor, _: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the loader that a parameter has in load format, on the load-format tensor."""
        with self._loading():
            loader = getattr(target, LOADER, None) or vllm_api.default_weight_loader()
            return loader(target, *args, **kwargs)

    def _too_late(self, name: str, *_: Any, **__: Any) -> None:
        raise self._late(name)
