"""What a pickle's calls give: each function that it may name is replaced by one that builds a description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from .values import ForeignTensor, OpaqueObject, RefusedPickleError, Storage, StoredDict, StoredTensor

Maker = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class that a pickle may name: ``make`` builds what a call of it stands for."""

    name: str
    make: Maker


def check_sizes(*found: Any) -> None:
    if not all(type(sizes) is tuple and all(type(n) is int and n >= 0 for n in sizes) for sizes in found):
        raise RefusedPickleError("a tensor has a shape, a stride or an offset that none can have")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    grad, _hooks, metadata = (*rest, None, None, None)[:3]
    return _stored(storage, _dtype_of(storage), offset, shape, strides, grad, metadata)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> StoredTensor:
    if type(dtype) is not torch.dtype:
        raise RefusedPickleError("a tensor has no dtype")
    return _stored(storage, dtype, offset, shape, strides, grad, metadata)


def _dtype_of(storage: Any) -> torch.dtype:
    if type(storage) is not tuple or len(storage) != 2 or type(storage[0]) is not Storage:
        raise RefusedPickleError("a tensor has no storage")
    dtype: torch.dtype = storage[1]
    return dtype


def _stored(
    kept: Any, dtype: torch.dtype, offset: Any, shape: Any, strides: Any, grad: Any, metadata: Any
) -> StoredTensor:
    _dtype_of(kept)
    storage: Storage = kept[0]
    check_sizes((offset,), shape, strides)
    if len(shape) != len(strides):
        raise RefusedPickleError("a tensor has more dimensions than strides")
    bits = {name for name, value in metadata.items() if value} if type(metadata) is dict else set()
    if bits - {"conj", "neg"}:
        raise RefusedPickleError(
            f"a tensor has the property {brief(min(map(str, bits)))}, which is not known"
        )
    if 0 not in shape:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > storage.nbytes:
            raise RefusedPickleError(f"a tensor of shape {list(shape)} reaches beyond the end of its storage")
    lazy = "conj" in bits, "neg" in bits
    return StoredTensor(storage, dtype, offset, shape, strides, *lazy, requires_grad=grad is True)


def _values(make: Maker) -> Maker:
    """``make``, refusing tensors whose values are not the stored bytes (lazy conjugates and negatives)."""

    def made(*args: Any) -> StoredTensor:
        tensor: StoredTensor = make(*args)
        if tensor.conj or tensor.neg:
            raise RefusedPickleError(
                "a tensor is stored as a lazy conjugate or negative; save a plain copy of it"
            )
        return tensor

    return made


def _kept_parameter(data: Any, requires_grad: Any = True, *_rest: Any) -> Any:
    if type(data) is not StoredTensor:
        return data
    return replace(data, parameter=True, requires_grad=requires_grad is True)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor of a subclass, or one with attributes of its own."""
    made = call(function, args)
    if isinstance(made, ForeignTensor):
        return ForeignTensor(made.kind, made.dtype, made.shape, state)
    if type(kind) is not Global or kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise RefusedPickleError(f"a tensor is of the class {brief(kind)}")
    return made


def wrapper(kind: Any, dtype: Any, shape: Any, *_rest: Any) -> ForeignTensor:
    check_sizes(shape)
    if type(kind) is not Global or type(dtype) is not torch.dtype:
        raise RefusedPickleError("a tensor subclass has no dtype")
    return ForeignTensor(kind.name, dtype, shape, None)


def _sequence(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _dictionary(*items: Any) -> dict[Any, Any]:
    return dict(_pairs(*items))


def _ordered(*items: Any) -> StoredDict:
    return StoredDict(_pairs(*items))


def _pairs(found: Any = ()) -> Any:
    if type(found) not in (list, tuple):
        raise RefusedPickleError("a dict is made from something else than pairs")
    for key, _ in found:
        check_key(key)
    return found


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise RefusedPickleError("a complex number is made from something else than two numbers")
    return complex(real, imaginary)


CALLS: Mapping[str, Maker] = {
    "torch._utils._rebuild_tensor": _values(_tensor),
    "torch._utils._rebuild_tensor_v2": _values(_tensor),
    "torch._utils._rebuild_tensor_v3": _values(_tensor_v3),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _sequence,
    "collections.OrderedDict": _dictionary,
}
EXACT_CALLS: Mapping[str, Maker] = {
    **CALLS,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _kept_parameter,
    "torch._utils._rebuild_parameter_with_state": _kept_parameter,
    "torch.Size": lambda *args: OpaqueObject("torch.Size", args),
    "collections.OrderedDict": _ordered,
    "builtins.complex": _complex,
}
"""As ``CALLS``, keeping apart what ``CALLS`` merges: OrderedDict and dict, torch.Size and tuple, parameters
and tensors."""


def call(function: Any, args: Any) -> Any:
    if type(function) is not Global or type(args) is not tuple:
        raise RefusedPickleError(f"its pickle calls {brief(function)}")
    return function.make(*args)


def not_called(*_args: Any) -> NoReturn:
    raise RefusedPickleError("its pickle makes a storage of its own")


def check_key(key: Any) -> None:
    """Refuse keys that are not cheap to hash: hashing nested shared tuples takes exponential time."""
    simple = (str, int, float, complex, bool, bytes, type(None), OpaqueObject, torch.dtype)
    if type(key) not in simple and not (type(key) is tuple and all(type(item) in simple for item in key)):
        raise RefusedPickleError("its pickle has a dict with keys that are no names")


def brief(value: Any) -> str:
    """At most 80 characters; containers by the name of their class: printing nested ones takes exponential
    time.
    """
    if type(value) is Global:
        value = value.name
    text = str(value) if isinstance(value, (str, int, Exception)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
