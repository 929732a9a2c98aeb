"""Which names of a model are one tensor, after Accelerate has taken them apart.

Offloading gives every name of a tied weight a placeholder of its own, so the modules do not show ties any
more. What shows them: values that are one memory or one place of a file, what a transformers model declares,
and what Accelerate noted when it offloaded the weight.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import nn

from .placement import Placement, declared_ties


def tie_groups(
    model: nn.Module, places: Sequence[Placement], trust_declared: bool = False
) -> list[list[Placement]]:
    """The placements, those of one tensor together; in their order, by the first of each group.

    Values that are declared to be tied and lie in two places are read and compared, two tensors at a time.
    Those that differ are not tied: the model computes with both.

    Args:
        model: the model.
        places: of all of it.
        trust_declared: whether what a transformers model declares to be tied is, whatever the values are now.

    Raises:
        SourceError: a value cannot be read.

    """
    groups = _Groups(places)
    by_name = {place.name: place for place in places}
    for copy, original in declared_ties(model).items():
        if copy in by_name and original in by_name:
            join = groups.join if trust_declared else groups.join_if_equal
            join(by_name[copy], by_name[original])
    noted = defaultdict(list)
    for place in places:
        if place.noted_as_tied:
            noted[tuple(place.shown.shape), place.shown.dtype].append(place)
    for alike in noted.values():
        for one, other in itertools.combinations(alike, 2):
            groups.join_if_equal(one, other)
    return groups.listed()


class _Groups:
    """Groups of placements, which only grow together."""

    def __init__(self, places: Iterable[Placement]) -> None:
        self._group: dict[str, list[Placement]] = {}
        first: dict[Hashable, Placement] = {}
        for place in places:
            self._group[place.name] = [place]
            self.join(first.setdefault(_identity(place), place), place)

    def join_if_equal(self, one: Placement, other: Placement) -> None:
        """Join the groups of two placements unless their values differ."""
        if self._group[one.name] is self._group[other.name] or one.stored is None or other.stored is None:
            return
        if one.is_buffer == other.is_buffer and _equal(one.read(), other.read()):
            self.join(one, other)

    def join(self, one: Placement, other: Placement) -> None:
        """Join the groups of two placements."""
        joined, added = self._group[one.name], self._group[other.name]
        if joined is not added:
            joined.extend(added)
            self._group.update(dict.fromkeys((place.name for place in added), joined))

    def listed(self) -> list[list[Placement]]:
        """Each group once."""
        return list({id(group): group for group in self._group.values()}.values())


def _identity(place: Placement) -> Hashable:
    """Equal for placements that are one tensor for certain."""
    if place.stored is None or place.where == "module":
        return id(place.shown)  # two parameters over one memory stay two
    return place.is_buffer, place.stored.key


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, on whatever devices they are."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bits(one), _bits(other).to(one.device))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
