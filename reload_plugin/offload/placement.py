"""Where each tensor of a model is: in its module, or where a hook of Accelerate's or a cache of
compressed-tensors' takes it from.

A hook is the truth for what it covers: it overwrites the module's tensor before each forward pass. So a
tensor that an offloading hook covers is read from the hook's mapping even while the module shows a real one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.formats.offloading import (
    IndexedValue,
    MadeValue,
    hooks_of,
    is_cache,
    is_offloading,
    value_in_cache,
    value_in_mapping,
)
from ..checkpoint.formats.safetensors_files import SafetensorsSource
from ..errors import SourceError
from .stored import DatFile, InMemory, SafetensorsEntry, Stored, folder_of

_RESHAPED = ("Params4bit",)
"""Parameters whose placeholder has another shape than their stored value."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """One name of a model, and where its value is."""

    name: str
    """As in ``model.state_dict()``; buffers that are not persistent have one too."""
    module: nn.Module
    """Owns the tensor under ``attribute``."""
    attribute: str
    is_buffer: bool
    persistent: bool
    shown: torch.Tensor
    """What the module shows: the value, or a placeholder on meta."""
    stored: Stored | None
    """Where the value is; None if it is nowhere (on meta, and no hook has it)."""
    statistics: Stored | None = None
    """The scales (``SCB``) of an int8 weight of bitsandbytes that the hook keeps beside it."""
    noted_as_tied: bool = False
    """Whether Accelerate noted that it was tied when it was offloaded; not to what."""
    hooks: tuple[Any, ...] = ()
    """Offloading hooks that cover it, the one that writes it last at the end."""

    @property
    def where(self) -> str:
        """``module``, ``memory``, ``dat``, ``safetensors`` or ``nowhere``."""
        return "nowhere" if self.stored is None else self.stored.where

    @property
    def offloaded(self) -> bool:
        """Whether the value is elsewhere than in the module."""
        return self.where != "module"

    @property
    def nbytes(self) -> int:
        """Bytes of the value in the dtype that the module has."""
        return math.prod(self.shown.shape) * self.shown.element_size()

    def read(self) -> torch.Tensor:
        """The value in the dtype that the module has, as a forward pass would get it.

        Returns:
            The stored memory itself where it needs no cast (not to be written to), else a new tensor on the
            CPU.

        Raises:
            SourceError: its file is missing, truncated or has another shape; or it is nowhere.

        """
        if self.stored is None:
            raise SourceError(
                f"{self.name} is on meta, and no hook or cache holds its value. It was lost before: load the "
                "model again."
            )
        value = self.stored.read()
        if value.shape != self.shown.shape and type(self.shown).__name__ not in _RESHAPED:
            raise SourceError(
                f"{self.name} has the shape {list(self.shown.shape)} in the model, and {list(value.shape)} "
                f"in {self.stored.file or 'the mapping of its hook'}. Load the model again."
            )
        return value.to(self.shown.dtype)

    def write(self, tensor: torch.Tensor) -> None:
        """Replace the value where it is. Tied names whose values are one memory or file change with it.

        Args:
            tensor: of the same shape, on any device.

        Raises:
            SourceError: the shape is another, the disk is full, or the value is nowhere.

        """
        if self.stored is None or tensor.shape != self.shown.shape:
            raise SourceError(
                f"{self.name} has the shape {list(self.shown.shape)} (where: {self.where}); a tensor of the "
                f"shape {list(tensor.shape)} cannot be written there."
            )
        self.stored.write(tensor.detach().to(self.shown.dtype))


def placements(model: nn.Module) -> list[Placement]:
    """Where every parameter and buffer of a model is, in the order of the modules; tied ones under each name.

    Reads no weight. Valid until the model is dispatched anew, moved or loaded.
    """
    found = {place.name: place for place in _Walk().of(model, "", [])}
    for copy, original in declared_ties(model).items():
        if (
            copy in found and found[copy].stored is None and original in found
        ):  # a mapping has one name of the two
            found[copy] = dataclasses.replace(found[copy], stored=found[original].stored)
    return list(found.values())


def declared_ties(model: nn.Module) -> dict[str, str]:
    """Tied name -> the name that it is tied to, as a transformers model says; empty for other models."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def is_offloaded(model: nn.Module) -> bool:
    """Whether any tensor of the model is elsewhere than in its module."""
    return any(place.offloaded for place in placements(model))


class _Walk:
    """One walk over a model. Files are listed once."""

    def __init__(self) -> None:
        self._listed: dict[str, SafetensorsSource] = {}

    def of(self, module: nn.Module, name: str, above: list[tuple[Any, str]]) -> Iterator[Placement]:
        """The placements of a module and of those below it.

        Args:
            module: the module.
            name: its full name.
            above: hooks that bring tensors of submodules, outermost first, with the name of their module.

        """
        own = [(hook, name) for hook in hooks_of(module) if is_offloading(hook)]
        covering = [*above, *own]
        for attribute, tensor, is_buffer, persistent in _tensors_of(module):
            full = f"{name}.{attribute}" if name else attribute
            cache = module._buffers if is_buffer else module._parameters
            statistics, noted, hooks = None, False, []
            if is_cache(cache):
                stored = self._cached(cache, attribute, full)
            else:
                hooks = [pair for pair in covering if _covers(*pair, full, is_buffer, persistent)]
                stored = None
                if hooks:
                    hook, key = hooks[-1][0], _below(full, hooks[-1][1])
                    stored = self._mapped(hook.weights_map, key)
                    noted = stored is not None and key in hook.tied_params_names
                    if stored is not None and tensor.dtype == torch.int8:
                        statistics = self._mapped(hook.weights_map, key.replace("weight", "SCB"))
                if stored is None and not tensor.is_meta:
                    stored = InMemory(tensor, "module")
            owners = tuple(hook for hook, _ in hooks)
            yield Placement(
                full, module, attribute, is_buffer, persistent, tensor, stored, statistics, noted, owners
            )
        passed = [*above, *(pair for pair in own if pair[0].place_submodules)]
        for child, submodule in module._modules.items():
            if submodule is not None:
                yield from self.of(submodule, f"{name}.{child}" if name else child, passed)

    def _mapped(self, mapping: Any, key: str) -> Stored | None:
        """Where a hook's mapping has the value of a key; None if it has no such key."""
        value = value_in_mapping(mapping, key)
        if isinstance(value, IndexedValue):
            if value.is_dat:
                return DatFile(value)
            owned = None if value.folder is None else Path(value.folder) / f"{value.name}.safetensors"
            return SafetensorsEntry(
                value,
                lambda: folder_of(value.owner, value.folder),
                lambda file: Path(file) == owned,
                self._listed,
            )
        if isinstance(value, MadeValue):
            return InMemory(value.mapping[value.key], "memory")
        return None if value is None else InMemory(value.tensor, "memory")

    def _cached(self, cache: Any, attribute: str, name: str) -> Stored | None:
        """Where a cache of compressed-tensors' has a value."""
        value = value_in_cache(cache, attribute, name)
        if isinstance(value, IndexedValue):
            folder = str(value.folder)
            return SafetensorsEntry(value, lambda: folder, lambda _: True, self._listed)
        return None if value is None else InMemory(value.tensor, "memory")


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool, bool]]:
    """Attribute, tensor, whether it is a buffer, whether it is persistent. A cache shows its placeholders."""
    for mapping, is_buffer in ((module._parameters, False), (module._buffers, True)):
        shown: Mapping[str, torch.Tensor | None] = getattr(mapping, "offloaded_values", mapping)
        for attribute, tensor in shown.items():
            if tensor is not None:
                persistent = not (is_buffer and attribute in module._non_persistent_buffers_set)
                yield attribute, tensor, is_buffer, persistent


def _covers(hook: Any, at: str, name: str, is_buffer: bool, persistent: bool) -> bool:
    """Whether a hook that brings the tensors of a module brings this one."""
    if _below(name, at) in getattr(hook, "kept_names", ()):
        return False
    return not is_buffer or bool(hook.offload_buffers and persistent)


def _below(name: str, module: str) -> str:
    """A full name, as seen from a module above it."""
    return name[len(module) + 1 :] if module else name
