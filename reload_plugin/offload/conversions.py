"""Which tensors of a checkpoint a transformers model makes each of its own from.

transformers renames, fuses, splits and stacks weights while it loads them, by tables of its own
(``core_model_loading``). The same tables and operations run here, a group at a time: tensors that are
converted together. A dry run on meta tensors tells what each group makes before a weight is read.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..plan.source import TensorInfo

Fetch = Callable[[TensorInfo], torch.Tensor]
"""Gives the value of a tensor of the checkpoint."""


@dataclass
class LoadGroup:
    """Tensors of the checkpoint that are converted together.

    Args:
        first: the first tensor of the model that they make.
        dtype: they are cast to it before they are converted, as transformers does.
        converter: of transformers; None where one tensor is only renamed.
        sources: the tensors, and the pattern of the converter that each matched.

    """

    first: str
    dtype: torch.dtype
    converter: Any
    sources: list[tuple[TensorInfo, str]] = field(default_factory=list)

    @property
    def names(self) -> str:
        """The checkpoint's names, for messages."""
        names = [info.name for info, _ in self.sources]
        return ", ".join(names if len(names) < 4 else [*names[:3], f"{len(names) - 3} more"])

    @property
    def nbytes(self) -> int:
        """Bytes of the sources."""
        return sum(info.nbytes for info, _ in self.sources)

    def convert(self, model: nn.Module, fetch: Fetch) -> dict[str, torch.Tensor]:
        """What the group makes: name in the model -> value.

        Raises:
            Exception: whatever an operation of transformers raises.

        """
        if self.converter is None:
            return {self.first: fetch(self.sources[0][0]).to(self.dtype)}
        converter = copy.deepcopy(self.converter)
        for info, pattern in self.sources:
            converter.add_tensor(
                self.first, info.name, pattern, functools.partial(self._fetched, fetch, info)
            )
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _fetched(self, fetch: Fetch, info: TensorInfo) -> torch.Tensor:
        return fetch(info).to(self.dtype)


def load_groups(
    model: nn.Module, own: Mapping[str, torch.Tensor], infos: Iterable[TensorInfo]
) -> tuple[list[LoadGroup], dict[str, str], dict[str, str]]:
    """Sort the tensors of a checkpoint into groups, as transformers would.

    Args:
        model: a transformers model, or any module, whose names are those of its checkpoints then.
        own: every persistent tensor of the model, on meta.
        infos: the checkpoint.

    Returns:
        Groups in the order in which transformers loads them; unexpected names -> why; names that come twice
        -> why.

    Raises:
        UnsupportedError: transformers is too old, or the model is quantized by it.

    """
    rename, key_of, converters = _tables(model)
    groups: dict[str, LoadGroup] = {}
    unexpected, duplicate = {}, {}
    for info in sorted(infos, key=lambda info: key_of(info.name)):
        target, pattern = rename(info.name, own)
        if target not in own:
            unexpected[info.name] = f"the model has no {target}" if target != info.name else ""
        elif pattern is None and target in groups:
            duplicate[info.name] = f"{groups[target].names} is {target} too"
        else:
            converter = None if pattern is None else converters[pattern]
            group = groups.setdefault(target, LoadGroup(target, own[target].dtype, converter))
            group.sources.append((info, pattern or info.name))
    return list(groups.values()), unexpected, duplicate


def ignored_by_rule(names: Iterable[str], rules: Sequence[str]) -> dict[str, str]:
    """Names that a pattern of the model's class lets pass -> the pattern."""
    found = {}
    for name in names:
        rule = next((rule for rule in rules if re.search(rule, name)), None)
        if rule is not None:
            found[name] = rule
    return found


_Rename = Callable[[str, Mapping[str, torch.Tensor]], tuple[str, str | None]]


def _tables(model: nn.Module) -> tuple[_Rename, Callable[[str], Any], Mapping[str, Any]]:
    """How names become the model's own, the order of loading, and converters by their patterns."""
    if not hasattr(model, "base_model_prefix"):
        return lambda name, _: (name, None), lambda name: name, {}
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError(
            f"{type(model).__name__} is quantized by transformers, whose quantizers cannot load into a model "
            "again. Nothing was changed. Load it anew with from_pretrained."
        )
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise UnsupportedError(
            f"This transformers does not say how it converts weights: {error}. Nothing was changed. Install "
            "transformers 5.19 or newer."
        ) from error
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str, own: Mapping[str, torch.Tensor]) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=own)
        return target, pattern

    patterns = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    return rename, dot_natural_key, patterns
