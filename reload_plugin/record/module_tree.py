"""Wrappers that were put around layers after the start (LoRA), taken out for a while."""

from __future__ import annotations

from torch import nn

from .model_record import ModelRecord

WrappedTree = list[tuple[nn.Module, dict[str, nn.Module | None]]]
"""Modules and the children they had before wrappers were taken out from between them."""


def unwrap_tree(record: ModelRecord) -> WrappedTree:
    """Take wrappers that were put around layers after the start (LoRA) out of the module tree.

    Parameters have the names of the start then, which is what loaders look for. Undone by ``rewrap_tree``.
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
    """Put back what ``unwrap_tree`` took out."""
    for parent, children in tree:
        parent._modules.clear()
        parent._modules.update(children)


def _wraps(current: nn.Module | None, original: nn.Module) -> bool:
    return current is not None and current is not original and any(m is original for m in current.modules())
