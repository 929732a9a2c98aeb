"""Nested state dicts as a flat table of tensors and a JSON tree that says where each belongs; no pickle.

The tree is JSON. What JSON has is itself; a list is a list; everything else is an object with one tag:
``dict``, ``ordered``, ``tuple``, ``tensor`` and the numbers and strings that JSON cannot hold exactly.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import ReloadError, SourceError

Structure = dict[str, Any]
"""What ``json.dumps`` takes, and what ``unflatten`` needs beside the tensors."""

FORMAT = "reload_plugin.nested/1"
RESERVED = "__metadata__"
"""The one name that a tensor in a safetensors file cannot have."""

EXACT_INTEGER = 1 << 53
"""Integers from here on are written as hexadecimal text: readers of JSON may take them for floats."""

ALIGNMENT = 16
"""Bytes of the largest element."""

STORABLE: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""dtype -> its name in a safetensors header; tensors of others are stored as bytes."""

_NEXT = "Take it out, or turn it into tensors, numbers, strings, lists, tuples or dicts."


@dataclass(frozen=True)
class NotMade:
    """Stands in a nested state dict for an object that nobody made; ``kind`` is the name of its class."""

    kind: str


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
        return tensor if tensor.dtype in STORABLE else tensor.reshape(-1).view(torch.uint8)


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


def unflatten(flat: Mapping[str, torch.Tensor], structure: Structure) -> Any:
    """The nested state dict that ``flatten`` took apart: same types, keys, order and sharing of memory.

    Args:
        flat: tensors by name; the result shares their memory.
        structure: what ``flatten`` returned beside them, also after a way through JSON.

    Raises:
        SourceError: a tensor is missing or too small, or the structure is something else.

    """
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        raise SourceError(f"This is no structure of a nested state dict ({FORMAT}). Flatten it again.")
    try:
        return _Builder(flat).build(structure["tree"])
    except ReloadError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SourceError(
            f"The structure of a nested state dict is damaged: {reason}. Flatten it again."
        ) from error


def lay_out(nested: Any, *, outline: bool = False) -> tuple[list[Stored], Structure]:
    """As ``flatten``, with tensors that are not copied yet, in the order in which they are met.

    With ``outline`` all tensors are on meta: they say how others lie in memory that is elsewhere.
    """
    walk = _Walk(outline)
    try:
        tree = walk.node(nested, ())
    except RecursionError:
        raise SourceError(f"This state dict is nested too deeply. {_NEXT}") from None
    if walk.refused:
        listed = "; ".join(walk.refused[:8])
        more = f"; and {len(walk.refused) - 8} more" if len(walk.refused) > 8 else ""
        raise SourceError(f"A state dict holds what cannot be stored: {listed}{more}. {_NEXT}")
    return walk.settle(), {"format": FORMAT, "tree": tree}


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the strides that say so: dimensions of one element may come with any."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    strides = [math.prod(tensor.shape[d + 1 :]) for d in range(tensor.dim())]
    return tensor.as_strided(tensor.shape, strides)


# -- taking apart ---------------------------------------------------------------------------------

Path = tuple[Any, ...]


@dataclass(eq=False)
class _Leaf:
    """A tensor as it was met, and its place in the tree, filled in when all tensors are known."""

    path: Path
    tensor: torch.Tensor
    node: dict[str, Any]

    @property
    def span(self) -> tuple[int, int]:
        """First byte and the byte after the last, counted in the storage."""
        tensor, size = self.tensor, self.tensor.element_size()
        start = int(tensor.storage_offset()) * size
        if not tensor.numel():
            return start, start
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return start, start + (last + 1) * size


class _Walk:
    """One pass over a nested state dict."""

    def __init__(self, outline: bool) -> None:
        self.refused: list[str] = []
        self._outline = outline
        self._leaves: list[_Leaf] = []
        self._open: set[int] = set()
        self._names: set[str] = {RESERVED}

    def node(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict, list, tuple):
            return self._container(value, path)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind in _SCALARS:
            return _scalar(value)
        return self._refuse(path, f"is {_indefinite(value)}")

    def _container(self, value: Any, path: Path) -> Any:
        if id(value) in self._open:
            return self._refuse(path, "holds itself")
        self._open.add(id(value))
        try:
            if type(value) is list:
                return [self.node(item, (*path, i)) for i, item in enumerate(value)]
            if type(value) is tuple:
                return {"tuple": [self.node(item, (*path, i)) for i, item in enumerate(value)]}
            entries = [
                [self._key(key, path), self.node(item, (*path, key))]
                for key, item in type(value).items(value)
            ]
            if type(value) is dict:
                return {"dict": entries}
            return {"ordered": entries} | self._attributes(value, path)
        finally:
            self._open.discard(id(value))

    def _key(self, key: Any, path: Path) -> Any:
        if type(key) in _SCALARS:
            return _scalar(key)
        if type(key) is tuple:
            return {"tuple": [self._key(part, path) for part in key]}
        return self._refuse(path, f"has a key that is {_indefinite(key)}")

    def _attributes(self, value: OrderedDict[Any, Any], path: Path) -> dict[str, Any]:
        """``state_dict()`` hangs the versions of its modules on its result."""
        found = vars(value)
        for name in found.keys() - {"_metadata"}:
            self._refuse(path, f"has the attribute {name!r}")
        return (
            {"_metadata": self.node(found["_metadata"], (*path, "_metadata"))} if "_metadata" in found else {}
        )

    def _tensor(self, value: torch.Tensor, path: Path) -> Any:
        if type(value) not in (torch.Tensor, nn.Parameter):
            return self._refuse(path, f"is {_indefinite(value)}")
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            return self._refuse(path, f"is a tensor of the layout {value.layout}")
        if value.is_meta and not self._outline:
            return self._refuse(path, "is a meta tensor, without values")
        node: dict[str, Any] = {"tensor": None}
        if type(value) is nn.Parameter:
            node["parameter"] = True
        if value.requires_grad:
            node["requires_grad"] = True
        self._leaves.append(_Leaf(path, value.detach(), node))
        return node

    def _refuse(self, path: Path, reason: str) -> None:
        self.refused.append(f"{_spelled(path)} {reason}")

    def settle(self) -> list[Stored]:
        """Name every tensor, and store those that share memory once."""
        shared: dict[int, list[_Leaf]] = defaultdict(list)
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

    def _store(self, group: list[_Leaf]) -> Stored:
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
            if base.tensor.dtype not in STORABLE:
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


def _note_dtype(group: list[_Leaf], base: _Leaf) -> None:
    """The table holds this tensor as bytes; members that are not views of it say what they are."""
    for leaf in group:
        if "view" not in leaf.node:
            leaf.node["view"] = _view_of(_dense(base.tensor), 0) | {"offset": 0}


def _overlapping(leaves: list[_Leaf]) -> Iterator[list[_Leaf]]:
    """Tensors of one storage, those together whose bytes overlap; empty ones with their like."""
    empty: dict[object, list[_Leaf]] = defaultdict(list)
    for leaf in leaves:
        if not leaf.tensor.numel():
            empty[leaf.tensor.dtype, leaf.tensor.shape, leaf.tensor.stride()].append(leaf)
    yield from empty.values()
    group: list[_Leaf] = []
    end = -1
    for leaf in sorted((leaf for leaf in leaves if leaf.tensor.numel()), key=lambda leaf: leaf.span):
        if group and leaf.span[0] >= end:
            yield group
            group = []
        group.append(leaf)
        end = max(end, leaf.span[1])
    if group:
        yield group


def _is_whole(leaf: _Leaf, span: tuple[int, int]) -> bool:
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
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset() * size - start,
    }
    bits = {"conj": tensor.is_conj(), "neg": tensor.is_neg()}
    return view | {name: True for name, there in bits.items() if there}


# -- numbers and strings --------------------------------------------------------------------------

_SCALARS = (type(None), bool, int, float, complex, str)


def _scalar(value: Any) -> Any:
    kind = type(value)
    if kind is int and abs(value) >= EXACT_INTEGER:
        return {"int": hex(value)}
    if kind is float and not math.isfinite(value):
        return {"float": struct.pack(">d", value).hex()}
    if kind is complex:
        return {"complex": [_scalar(value.real), _scalar(value.imag)]}
    if kind is str and not _is_text(value):
        return {"points": [ord(character) for character in value]}
    return value


def _is_text(value: str) -> bool:
    """Whether a string survives JSON: two halves of a pair that are not one would be joined there."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_TAGS: Mapping[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "points": lambda points: "".join(map(chr, points)),
}


def _text(part: Any) -> str:
    return str(part).encode("utf-8", "backslashreplace").decode()


def _spelled(path: Path) -> str:
    return "the state dict itself" if not path else "".join(f"[{part!r}]" for part in path)


def _indefinite(value: Any) -> str:
    if isinstance(value, NotMade):
        return f"of the type {value.kind}"
    kind = type(value)
    name = (
        kind.__qualname__
        if kind.__module__ in ("builtins", "__main__")
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    return f"of the type {name}"


# -- putting together -----------------------------------------------------------------------------


class _Builder:
    """One tree being turned back; nodes alike give one and the same tensor object."""

    def __init__(self, flat: Mapping[str, torch.Tensor]) -> None:
        self._flat = flat
        self._made: dict[str, torch.Tensor] = {}
        self._bytes: dict[str, torch.Tensor] = {}

    def build(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.build(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return self._tensor(node)
        if "dict" in node:
            return {self._key(key): self.build(item) for key, item in node["dict"]}
        if "ordered" in node:
            return self._ordered(node)
        if "tuple" in node:
            return tuple(self.build(item) for item in node["tuple"])
        return self._number(node)

    def _key(self, node: Any) -> Any:
        return self.build(node)

    def _number(self, node: dict[str, Any]) -> Any:
        ((tag, value),) = node.items()
        if tag == "complex":
            return complex(*(self.build(part) for part in value))
        return _TAGS[tag](value)

    def _ordered(self, node: dict[str, Any]) -> OrderedDict[Any, Any]:
        made = OrderedDict((self._key(key), self.build(item)) for key, item in node["ordered"])
        if "_metadata" in node:
            vars(made)["_metadata"] = self.build(node["_metadata"])
        return made

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor:
        key = repr(sorted(node.items()))
        if key not in self._made:
            self._made[key] = self._new(node)
        return self._made[key]

    def _new(self, node: dict[str, Any]) -> torch.Tensor:
        name = node["tensor"]
        if name not in self._flat:
            raise SourceError(
                f"{name} is missing beside the structure. Give all tensors that flatten returned."
            )
        seen = _seen(self._aligned(name), node["view"]) if "view" in node else self._flat[name]
        grad = bool(node.get("requires_grad"))
        if node.get("parameter"):
            return nn.Parameter(seen, requires_grad=grad)
        return seen.detach().requires_grad_() if grad else seen

    def _aligned(self, name: str) -> torch.Tensor:
        """Bytes that any dtype may be seen in; kernels for complex numbers crash on others."""
        if name not in self._bytes:
            tensor = self._flat[name]
            self._bytes[name] = tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
        return self._bytes[name]


def _seen(tensor: torch.Tensor, view: Mapping[str, Any]) -> torch.Tensor:
    """A view of the stored bytes of ``tensor``."""
    dtype = getattr(torch, view["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{view['dtype']} is no dtype")
    if not tensor.is_contiguous():
        raise ValueError("a stored tensor is not contiguous any more")
    start = tensor.storage_offset() * tensor.element_size() + view["offset"]
    shape, stride = _naturals(view["shape"]), _naturals(view["stride"])
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else -1
    if (
        view["offset"] < 0
        or view["offset"] + (last + 1) * dtype.itemsize > tensor.nbytes
        or start % dtype.itemsize
    ):
        raise ValueError("a view reaches beyond the tensor that holds it")
    empty = torch.empty(0, dtype=dtype, device=tensor.device)
    made = empty.set_(tensor.untyped_storage(), start // dtype.itemsize, shape, stride)
    made = made.conj() if view.get("conj") else made
    return torch._neg_view(made) if view.get("neg") else made


def _naturals(found: Sequence[Any]) -> list[int]:
    if not all(type(number) is int and number >= 0 for number in found):
        raise ValueError("sizes and strides have to be natural numbers")
    return list(found)
