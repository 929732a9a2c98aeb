"""Weights as a framework hands them over in one call: their names, noted as they pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

Weights = Iterable[tuple[str, torch.Tensor]]


class NamedWeights:
    """Weights whose names are noted as they pass. ``first`` is the name of the first, before it is loaded."""

    def __init__(self, weights: Weights) -> None:
        self.names: list[str] = []
        self.first: str | None = None
        try:
            items = iter(weights)
            head = list(itertools.islice(items, 1))
        except Exception as error:  # noqa: BLE001 - raised where the weights are loaded
            self._weights: Iterator[Any] = _raising(error)
            return
        self._weights = itertools.chain(head, items)
        if head and (name := name_of(head[0])) is not None:
            self.first = without_wrapper(name)

    def __iter__(self) -> Iterator[Any]:
        for item in self._weights:
            if (name := name_of(item)) is None:
                yield item
                continue
            self.names.append(without_wrapper(name))
            yield (self.names[-1], *item[1:])
            del item  # the caller may overwrite the tensor from now on


def _raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


def name_of(item: object) -> str | None:
    name = item[0] if isinstance(item, (tuple, list)) and item else None
    return name if isinstance(name, str) else None


def without_wrapper(name: str) -> str:
    """A name as it is without LoRA: trainers that send a wrapped model's names have ``.base_layer.`` in
    them.
    """
    return name.replace(".base_layer.", ".")
