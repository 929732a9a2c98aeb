"""vLLM's ``process_weights_after_loading`` (PWAL) on some layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .ranges import calls


def is_deferred_attention_layer(module: nn.Module) -> bool:
    """Whether vLLM processes this module after all others (attention and the like)."""
    return calls().is_deferred_attention_layer(module)


def is_processed(module: nn.Module) -> bool:
    """Whether PWAL may have something to call for this module: a method's, or its own."""
    own = getattr(module, "process_weights_after_loading", None)
    return own is not None or getattr(module, "quant_method", None) is not None


class _LayersView:
    """What vLLM's whole-model function sees when it is to process some layers only.

    With ``root`` it stands for the model itself: its own hook is run, and attributes that vLLM sets
    on the model arrive there.
    """

    def __init__(self, layers: list[tuple[str, nn.Module]], root: nn.Module | None) -> None:
        vars(self).update(_layers=layers, _root=root)
        hook = getattr(root, "process_weights_after_loading", None)
        if hook is not None:
            vars(self)["process_weights_after_loading"] = hook

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(vars(self)["_layers"])

    def get_submodule(self, target: str) -> Any:
        """The module around a head that vLLM ties: it sets the head there again, to no effect."""
        return dict(vars(self)["_layers"]).get(target, self)

    def __setattr__(self, name: str, value: object) -> None:
        root = vars(self)["_root"]
        if root is not None:
            setattr(root, name, value)


def process_layers(
    original: Callable[..., None],
    layers: list[tuple[str, nn.Module]],
    model_config: Any,
    device: torch.device,
    root: nn.Module | None = None,
) -> None:
    """Run vLLM's own PWAL over ``layers`` only, in its own order; ``root`` adds the model's hook."""
    original(_LayersView(layers, root), model_config, device)


def process_online(layer: nn.Module) -> None:
    """What a cold start does to a layer of an online method while the weights stream in."""
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    calls().after_processing(layer)
