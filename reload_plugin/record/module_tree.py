"""Remove wrappers that were put around layers after the start (LoRA), and put them back."""

from __future__ import annotations

from torch import nn

from .model_record import ModelRecord

WrappedTree = list[tuple[nn.Module, dict[str, nn.Module | None]]]
"""Modules, each with the children it had while the wrappers were in place."""


def unwrap_tree(record: ModelRecord) -> WrappedTree:
    """Remove wrappers that were put around layers after the start (LoRA) from the module tree.

    Parameters then have the names they had at the start, which loaders use. Inverse: ``rewrap_tree``.
    """
    before: WrappedTree = []
    for layer in record.layers:
        parent = layer.ref()
        if parent is None:
            continue
        wrapped = {
            name: child
            for name, ref in layer.children.items()
            if (child := ref()) is not None and _wraps(parent._modules.get(name), child)
        }
        if wrapped:
            before.append((parent, dict(parent._modules)))
            parent._modules.update(wrapped)
    return before


def rewrap_tree(tree: WrappedTree) -> None:
    """Put the wrappers back that ``unwrap_tree`` removed."""
    for parent, children in tree:
        parent._modules.clear()
        parent._modules.update(children)


def _wraps(current: nn.Module | None, original: nn.Module) -> bool:
    return current is not None and current is not original and any(m is original for m in current.modules())
