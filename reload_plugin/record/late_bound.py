"""Attributes that are set after the start, by the first forward pass: what a reload keeps, and makes anew.

vLLM's layers and kernels have attributes that are None until they run for the first time. Most belong to the
runtime (workspaces, communication handles), and captured graphs point into them. Some are made of weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .. import vllm_api
from .module_state import holders_of
from .snapshot import read, write


class LateBound:
    """The attributes of a model's objects that were None when processing had ended at the start.

    Args:
        modules: of the model, processed. Objects are held weakly where they allow it.

    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._unset: dict[int, tuple[Any, frozenset[str]]] = {}
        for module in modules:
            for _, holder in holders_of(module):
                names = frozenset(
                    name
                    for (kind, name), value in read(holder).items()
                    if kind == "attribute" and value is None
                )
                if names:
                    self._unset[id(holder)] = _reference(holder), names

    def is_late(self, holder: object, name: object) -> bool:
        """Whether an attribute of an object was None after the start."""
        ref, names = self._unset.get(id(holder), (None, frozenset()))
        return name in names and ref is not None and ref() is holder

    def settle(self, holder: object, name: object) -> None:
        """An attribute is processing's: a reload has set it, where the start had left it None."""
        if self.is_late(holder, name):
            ref, names = self._unset[id(holder)]
            self._unset[id(holder)] = ref, names - {str(name)}

    def set_since(self, names: Iterable[str]) -> Iterator[tuple[Any, str, Any]]:
        """(object, name, value) of the attributes with one of these names that have been set meanwhile."""
        asked = frozenset(names)
        for ref, unset in self._unset.values():
            if not asked & unset or (holder := ref()) is None:
                continue
            held = read(holder)
            for name in sorted(asked & unset):
                if (value := held.get(("attribute", name))) is not None:
                    yield holder, name, value


def make_anew(late: LateBound) -> None:
    """Values made of weights follow the weights that are served now.

    A tensor whose object has a method to make it is made by that and copied to where it was, so that graphs
    read the new values. Others are unset, so that the next forward pass makes them.

    Which they are: ``vllm_api.LATE_VALUES``.
    """
    makers = vllm_api.LATE_VALUES
    with torch.inference_mode():  # as in a forward pass: the tensors may be ones of inference
        for holder, name, value in list(late.set_since(makers)):
            write(holder, ("attribute", name), None)
            maker = getattr(holder, makers[name] or "", None)
            if not isinstance(value, torch.Tensor) or maker is None:
                continue
            maker()
            made = read(holder).get(("attribute", name))
            if isinstance(made, torch.Tensor) and made.shape == value.shape and made.dtype == value.dtype:
                value.copy_(made)
                write(holder, ("attribute", name), value)


def _reference(holder: object) -> Any:
    try:
        return weakref.ref(holder)
    except TypeError:
        return lambda: holder
