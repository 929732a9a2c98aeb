"""How Accelerate and compressed-tensors offload weights: who has the value of a module's tensor, and where.

Accelerate puts hooks on modules, each with a mapping (``weights_map``): a dict, or a loader over a dict and
an index of files, often seen through a prefix (``accelerate/utils/offload.py``). compressed-tensors puts a
cache in the place of a module's ``_parameters`` (``compressed_tensors/offload``). An index names a file and a
tensor in it; Accelerate's own files are plain memory, ``<name>.dat``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class HeldValue:
    """A value in memory."""

    tensor: torch.Tensor


@dataclass(frozen=True, eq=False)
class IndexedValue:
    """A value in a file that an index names."""

    key: Any
    """In the index: a name, or a placeholder."""
    name: str
    """Of the weight where the index gives none."""
    index: MutableMapping[Any, Any]
    folder: str | None
    """Of the files that the index does not name."""
    owner: object
    """Whom the index belongs to."""

    @property
    def entry(self) -> Mapping[str, Any]:
        """What the index says: ``dtype``, and ``shape`` or ``safetensors_file`` and ``weight_name``."""
        found: Mapping[str, Any] = self.index[self.key]
        return found

    @property
    def is_dat(self) -> bool:
        """Whether its file is the plain memory of one tensor, without a header."""
        return self.entry.get("safetensors_file") is None

    @property
    def file(self) -> str:
        """Path of the file."""
        if self.is_dat:
            return str(Path(self.folder or "", f"{self.name}.dat"))
        return str(self.entry["safetensors_file"])

    @property
    def weight_name(self) -> str:
        """The tensor's name in a safetensors file."""
        return str(self.entry.get("weight_name", self.name))


@dataclass(frozen=True, eq=False)
class MadeValue:
    """A value that a mapping of somebody else's makes when it is asked for."""

    mapping: Mapping[str, torch.Tensor]
    key: str


FoundValue = HeldValue | IndexedValue | MadeValue


def hooks_of(module: nn.Module | None) -> Iterator[Any]:
    """Accelerate's hooks of a module, one by one in their order; nested ``SequentialHook``s are opened."""
    hook = None if module is None else module.__dict__.get("_hf_hook")
    waiting = [] if hook is None else [hook]
    while waiting:
        hook = waiting.pop(0)
        inner = getattr(hook, "hooks", None)
        if inner is None:
            yield hook
        else:
            waiting[:0] = inner


def is_offloading(hook: Any) -> bool:
    """Whether a hook takes weights from a mapping for each forward pass."""
    return bool(getattr(hook, "offload", False)) and getattr(hook, "weights_map", None) is not None


def is_cache(mapping: Any) -> bool:
    """Whether a module's table of tensors is a cache of compressed-tensors'."""
    return hasattr(mapping, "offloaded_values")


def value_in_mapping(mapping: Any, key: str) -> FoundValue | None:
    """The value that a hook's mapping has for a key; None if it has no such key."""
    while hasattr(mapping, "prefix") and hasattr(mapping, "dataset"):  # PrefixedDataset
        key = f"{mapping.prefix}{key}"
        mapping = mapping.dataset
    state, index = getattr(mapping, "state_dict", None), getattr(mapping, "index", None)
    if isinstance(state, Mapping) and isinstance(index, Mapping):  # Accelerate's OffloadedWeightsLoader
        if key in state:
            return HeldValue(state[key])
        folder = None if mapping.save_folder is None else str(mapping.save_folder)
        return IndexedValue(key, key, index, folder, mapping) if key in index else None  # type: ignore[arg-type]
    if isinstance(mapping, dict):
        return HeldValue(mapping[key]) if key in mapping else None
    return MadeValue(mapping, key) if key in set(mapping) else None


def value_in_cache(cache: Any, attribute: str, name: str) -> HeldValue | IndexedValue | None:
    """The value that a cache of compressed-tensors' has for a tensor of its module; None if it has none.

    Args:
        cache: see ``is_cache``.
        attribute: of the module.
        name: the tensor's full name.

    """
    held = cache.offloaded_values.get(attribute)
    if held is None:
        return None
    index = getattr(cache, "index", {})
    if held.is_meta and held in index:
        return IndexedValue(held, name, index, str(cache.offload_dir), cache)
    return HeldValue(held)
