"""Which weights of a transformers model a save holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .model_weights import HeldWeight, weights_of
from .weight_reader import same_values


@dataclass(frozen=True)
class SavedWeights:
    """Entries of a model's state dict and where their values lie."""

    kept: Mapping[str, HeldWeight]
    """Those that a save holds."""
    left_out: Mapping[str, HeldWeight]
    """The others: what the class of the model says is not saved, and all but one name of tied weights."""
    tied_to: Mapping[str, str]
    """Name that is left out because it is tied -> the one that is kept."""


def saved_weights_of(model: torch.nn.Module) -> SavedWeights:
    """The weights of a transformers model as it is saved.

    Weights that are called tied and differ are both kept: ``from_pretrained`` then does not tie them.

    Raises:
        ExportError, SourceError: as ``weights_of``.

    """
    found = weights_of(model)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {name: weight for name, weight in found.items() if name not in ignored}
    tied_to = {}
    for copy, original in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if copy in kept and original in kept and same_values(kept[copy], kept[original]):
            tied_to[copy] = original
            del kept[copy]
    return SavedWeights(kept, {name: found[name] for name in found.keys() - kept.keys()}, tied_to)
