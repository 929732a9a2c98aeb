"""The flat table of a nested state dict: every tensor by name, tensors that share memory stored once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...checkpoint.dtypes import METADATA_KEY, SAFETENSORS_NAMES, torch_name
from ...errors import SourceError
from .form import FORMAT, Structure
from .walk import Leaf, Path, Walk

_NEXT = "Take it out, or turn it into tensors, numbers, strings, lists, tuples or dicts."


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of the flat table, not yet copied: ``tensor`` may have any layout and shares its memory."""

    name: str
    tensor: torch.Tensor

    def contiguous(self) -> torch.Tensor:
        """The tensor as it is stored: contiguous, on the CPU, of a dtype that safetensors has.

        Shares memory with the original where that is such a tensor already.
        """
        tensor = _dense(self.tensor.detach().cpu())
        return tensor if tensor.dtype in SAFETENSORS_NAMES else tensor.reshape(-1).view(torch.uint8)


def flatten(nested: Any) -> tuple[dict[str, torch.Tensor], Structure]:
    """Take a nested state dict apart.

    Args:
        nested: dicts, lists and tuples of tensors, strings, numbers, bools and None, as deep as Python's
            recursion goes. Keys of dicts may be anything but tensors, dicts and lists. ``OrderedDict`` and
            its ``_metadata`` (versions of modules) are kept, so are ``nn.Parameter`` and ``requires_grad``.

    Returns:
        Tensors by name, contiguous, on the CPU, no two sharing memory, ready for ``safetensors``; and the
        structure. A name is the path with dots (``model.layers.0.weight``); of paths that would collide the
        later ones get a suffix (``~2``). Tensors that shared memory are stored once. Values share memory
        with the originals where those are contiguous on the CPU.

    Raises:
        SourceError: something that is none of these; lists the path of each. Also a structure that holds
            itself.

    """
    stored, structure = lay_out(nested)
    return {item.name: item.contiguous() for item in stored}, structure


def lay_out(nested: Any, *, outline: bool = False) -> tuple[list[Stored], Structure]:
    """As ``flatten``, with tensors that are not copied yet, in the order in which they are met.

    With ``outline`` all tensors are on meta: they say how others lie in memory that is elsewhere.
    """
    walk = Walk(outline)
    try:
        tree = walk.node(nested, ())
    except RecursionError:
        raise SourceError(f"This state dict is nested too deeply. {_NEXT}") from None
    if walk.refused:
        listed = "; ".join(walk.refused[:8])
        more = f"; and {len(walk.refused) - 8} more" if len(walk.refused) > 8 else ""
        raise SourceError(f"A state dict holds what cannot be stored: {listed}{more}. {_NEXT}")
    return _Naming(walk.leaves).settle(), {"format": FORMAT, "tree": tree}


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the strides that say so: dimensions of one element may come with any."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    strides = [math.prod(tensor.shape[d + 1 :]) for d in range(tensor.dim())]
    return tensor.as_strided(tensor.shape, strides)


class _Naming:
    """Tensors that were met, as they are stored; the nodes of the tree learn where they are."""

    def __init__(self, leaves: list[Leaf]) -> None:
        self._leaves = leaves
        self._names: set[str] = {METADATA_KEY}

    def settle(self) -> list[Stored]:
        """Name every tensor, and store those that share memory once."""
        shared: dict[int, list[Leaf]] = defaultdict(list)
        for leaf in self._leaves:
            shared[leaf.tensor.untyped_storage()._cdata].append(leaf)
        owners = {
            id(leaf): group for leaves in shared.values() for group in _overlapping(leaves) for leaf in group
        }
        stored: list[Stored] = []
        done: set[int] = set()
        for leaf in self._leaves:
            if id(leaf) not in done:
                group = owners[id(leaf)]
                done |= {id(member) for member in group}
                stored.append(self._store(group))
        return stored

    def _store(self, group: list[Leaf]) -> Stored:
        """One tensor that holds all of a group: a member, where one covers the others, else their bytes."""
        start = min(leaf.span[0] for leaf in group)
        end = max(leaf.span[1] for leaf in group)
        base = next((leaf for leaf in group if _is_whole(leaf, (start, end))), None)
        if base is None and len(group) == 1:
            base = group[0]
        first = base or group[0]
        name = self._name(first.path)
        for leaf in group:
            leaf.node["tensor"] = name
            if leaf is not base and not (base is not None and _same_place(leaf.tensor, base.tensor)):
                leaf.node["view"] = _view_of(leaf.tensor, start)
        if base is not None:
            if base.tensor.dtype not in SAFETENSORS_NAMES:
                _note_dtype(group, base)
            return Stored(name, base.tensor)
        storage = group[0].tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
            storage, start, (end - start,), (1,)
        )
        return Stored(name, whole)

    def _name(self, path: Path) -> str:
        plain = ".".join(_text(part) for part in path) or "tensor"
        name, count = plain, 1
        while name in self._names:
            count += 1
            name = f"{plain}~{count}"
        self._names.add(name)
        return name


def _note_dtype(group: list[Leaf], base: Leaf) -> None:
    """The table holds this tensor as bytes; members that are not views of it say what they are."""
    for leaf in group:
        if "view" not in leaf.node:
            leaf.node["view"] = _view_of(_dense(base.tensor), 0) | {"offset": 0}


def _overlapping(leaves: list[Leaf]) -> Iterator[list[Leaf]]:
    """Tensors of one storage, those together whose bytes overlap; empty ones with their like."""
    empty: dict[object, list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        if not leaf.tensor.numel():
            empty[leaf.tensor.dtype, leaf.tensor.shape, leaf.tensor.stride()].append(leaf)
    yield from empty.values()
    group: list[Leaf] = []
    end = -1
    for leaf in sorted((leaf for leaf in leaves if leaf.tensor.numel()), key=lambda leaf: leaf.span):
        if group and leaf.span[0] >= end:
            yield group
            group = []
        group.append(leaf)
        end = max(end, leaf.span[1])
    if group:
        yield group


def _is_whole(leaf: Leaf, span: tuple[int, int]) -> bool:
    plain = not (leaf.tensor.is_conj() or leaf.tensor.is_neg())
    return plain and leaf.tensor.is_contiguous() and leaf.span == span


def _same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and (one.is_conj(), one.is_neg()) == (other.is_conj(), other.is_neg())
    )


def _view_of(tensor: torch.Tensor, start: int) -> dict[str, Any]:
    """How to see a tensor in the stored bytes, which begin at byte ``start`` of its storage."""
    size = tensor.element_size()
    view: dict[str, Any] = {
        "dtype": torch_name(tensor.dtype),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset() * size - start,
    }
    bits = {"conj": tensor.is_conj(), "neg": tensor.is_neg()}
    return view | {name: True for name, there in bits.items() if there}


def _text(part: Any) -> str:
    return str(part).encode("utf-8", "backslashreplace").decode()
