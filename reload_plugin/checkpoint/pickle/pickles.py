"""Reading pickles without running anything in them: every object becomes a description of itself.

A pickle is a program that may import and call anything. The one here may only name things from a list, and
what it names is not imported: classes become ``Inert`` values, tensors become ``StoredTensor`` descriptions
of bytes in a file, and calls only build such values. Python's own unpickler in Python is the base and not
the one in C, which allocates whatever a damaged pickle asks for.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, NoReturn

import torch

from ..dtypes import TORCH_DTYPES, TORCH_STORAGE_DTYPES
from .pickle_names import NOT_STORED, PLAIN


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that is not on the list."""


@dataclass(frozen=True)
class Storage:
    """Memory that torch.save wrote beside the pickle, by its key."""

    key: str
    nbytes: int
    itemsize: int
    start: int = 0
    """First byte, for a view of a larger storage (files of torch before 1.6)."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a storage: strides and offset count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conj: bool = False
    """Whether its values are the conjugates of what lies there; so with ``neg``."""
    neg: bool = False
    parameter: bool = field(default=False, compare=False)
    requires_grad: bool = field(default=False, compare=False)

    @property
    def start(self) -> int:
        """First byte in the storage's record."""
        return self.storage.start + self.offset * self.dtype.itemsize


class Inert:
    """An object that was not made: the name of its class, what it was called with, its state."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.kind}>"

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the object, if its state says so."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class Ordered(dict[Any, Any]):
    """An OrderedDict, and the attributes that were hung on it."""

    __slots__ = ("attributes",)

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self.attributes: Any = None


Maker = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that a pickle may use: ``make`` is what calling it gives."""

    name: str
    make: Maker


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a class that spreads it over ranks; ``state`` is what the class would be given."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    state: Any


def _sizes(*found: Any) -> None:
    if not all(type(sizes) is tuple and all(type(n) is int and n >= 0 for n in sizes) for sizes in found):
        raise Refused("a tensor has a shape, a stride or an offset that none can have")


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
        raise Refused("a tensor has no dtype")
    return _stored(storage, dtype, offset, shape, strides, grad, metadata)


def _dtype_of(storage: Any) -> torch.dtype:
    if type(storage) is not tuple or len(storage) != 2 or type(storage[0]) is not Storage:
        raise Refused("a tensor has no storage")
    dtype: torch.dtype = storage[1]
    return dtype


def _stored(
    kept: Any, dtype: torch.dtype, offset: Any, shape: Any, strides: Any, grad: Any, metadata: Any
) -> StoredTensor:
    _dtype_of(kept)
    storage: Storage = kept[0]
    _sizes((offset,), shape, strides)
    if len(shape) != len(strides):
        raise Refused("a tensor has more dimensions than strides")
    bits = {name for name, value in metadata.items() if value} if type(metadata) is dict else set()
    if bits - {"conj", "neg"}:
        raise Refused(f"a tensor has the property {_brief(min(map(str, bits)))}, which is not known")
    if 0 not in shape:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > storage.nbytes:
            raise Refused(f"a tensor of shape {list(shape)} reaches beyond the end of its storage")
    lazy = "conj" in bits, "neg" in bits
    return StoredTensor(storage, dtype, offset, shape, strides, *lazy, requires_grad=grad is True)


def _values(make: Maker) -> Maker:
    """Only tensors whose values are what lies in the file."""

    def made(*args: Any) -> StoredTensor:
        tensor: StoredTensor = make(*args)
        if tensor.conj or tensor.neg:
            raise Refused("a tensor is stored as a lazy conjugate or negative; save a plain copy of it")
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
    made = _called(function, args)
    if isinstance(made, ForeignTensor):
        return ForeignTensor(made.kind, made.dtype, made.shape, state)
    if type(kind) is not _Global or kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise Refused(f"a tensor is of the class {_brief(kind)}")
    return made


def _wrapper(kind: Any, dtype: Any, shape: Any, *_rest: Any) -> ForeignTensor:
    _sizes(shape)
    if type(kind) is not _Global or type(dtype) is not torch.dtype:
        raise Refused("a tensor subclass has no dtype")
    return ForeignTensor(kind.name, dtype, shape, None)


def _sequence(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _dictionary(*items: Any) -> dict[Any, Any]:
    return dict(_pairs(*items))


def _ordered(*items: Any) -> Ordered:
    return Ordered(_pairs(*items))


def _pairs(found: Any = ()) -> Any:
    if type(found) not in (list, tuple):
        raise Refused("a dict is made from something else than pairs")
    for key, _ in found:
        _check_key(key)
    return found


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise Refused("a complex number is made from something else than two numbers")
    return complex(real, imaginary)


_CALLS: Mapping[str, Maker] = {
    "torch._utils._rebuild_tensor": _values(_tensor),
    "torch._utils._rebuild_tensor_v2": _values(_tensor),
    "torch._utils._rebuild_tensor_v3": _values(_tensor_v3),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _sequence,
    "collections.OrderedDict": _dictionary,
}
_EXACT: Mapping[str, Maker] = {
    **_CALLS,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _kept_parameter,
    "torch._utils._rebuild_parameter_with_state": _kept_parameter,
    "torch.Size": lambda *args: Inert("torch.Size", args),
    "collections.OrderedDict": _ordered,
    "builtins.complex": _complex,
}
"""The same where more than the weights is wanted: nothing looks like something else then."""


def unpickle(
    data: bytes | BinaryIO,
    extra: Collection[str] = (),
    *,
    tensors: bool = True,
    plain: bool = True,
    exact: bool = False,
    storages: dict[str, Storage] | None = None,
) -> Any:
    """What a pickle describes. Nothing is imported, called or made that it names.

    Args:
        data: the pickle; a file is left behind its end.
        extra: names that it may use beside tensors, of the form ``module.name``; they become ``Inert``.
        tensors: whether it may use tensors.
        plain: whether it may use what lies beside the weights in a trainer's file.
        exact: whether everything has to be told apart: an OrderedDict becomes ``Ordered``, torch.Size and
            tensors that are no plain ones ``Inert``, and tensors say whether they are parameters.
        storages: collects the storages it names, by key.

    Raises:
        ValueError: it is damaged, or names anything else.

    """
    allowed = frozenset(extra) | (PLAIN if plain else frozenset()) | (NOT_STORED if exact else frozenset())
    calls = _EXACT if exact else _CALLS
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return _Unpickler(file, allowed, calls, tensors, {} if storages is None else storages).load()
    except Refused as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {_brief(error)})") from error


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined, unused-ignore]
    """See the module. The operations that are left build values; those that call go through ``_called``."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: Any,
        allowed: Collection[str],
        calls: Mapping[str, Maker],
        tensors: bool,
        storages: dict[str, Storage],
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="strict")
        self._allowed = allowed
        self._calls = calls
        self._tensors = tensors
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name, dtypes excepted, which are themselves."""
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        if (
            self._tensors
            and module in ("torch", "torch.cuda", "torch.storage")
            and name in TORCH_STORAGE_DTYPES
        ):
            return _Global(full, _not_called)
        if full == "torch._utils._rebuild_wrapper_subclass" and full in self._allowed:
            return _Global(full, _wrapper)
        if full == "builtins.getattr" and full in self._allowed:
            return _Global(full, self._attribute)
        if full in self._calls and (self._tensors or full in ("torch.Size", "collections.OrderedDict")):
            return _Global(full, self._calls[full])
        if full in self._allowed:
            return _Global(full, lambda *args: Inert(full, args))
        raise Refused(f"its pickle asks for {_brief(full)}, which is not loaded because it could run code")

    def _attribute(self, owner: Any, name: Any) -> _Global:
        """A class inside a class, which old protocols spell as a call of getattr."""
        full = f"{owner.name}.{name}" if type(owner) is _Global and type(name) is str else "getattr"
        if full not in self._allowed:
            raise Refused(
                f"its pickle asks for {_brief(full)}, which is not loaded because it could run code"
            )
        return _Global(full, lambda *args: Inert(full, args))

    def persistent_load(self, pid: Any) -> tuple[Storage, torch.dtype]:
        """A storage, and the dtype that it was written with."""
        if not self._tensors or type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Refused("its pickle refers to something outside that is no storage")
        kind, key, _, numel = pid[1:5]
        view = pid[5] if len(pid) == 6 else None
        if type(kind) is not _Global or type(key) is not str:
            raise Refused("its pickle has a storage without a kind or a key")
        _sizes((numel,))
        dtype = TORCH_STORAGE_DTYPES[kind.name.rpartition(".")[2]]
        whole = Storage(key, numel * dtype.itemsize, dtype.itemsize)
        known = self._storages.setdefault(key, whole)
        if known != whole:
            raise Refused(f"its pickle gives storage {_brief(key)} two sizes")
        return (whole if view is None else _view(whole, view)), dtype

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], args)

    def _newobj(self) -> None:
        self._reduce()

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Inert:
            slots = type(state) is tuple and len(state) == 2 and type(state[1]) is dict
            plain = state[0] if slots and type(state[0]) is dict else {}
            target.state = plain | state[1] if slots else state
        elif type(target) is Ordered:
            target.attributes = state
        elif type(target) is not dict:  # an OrderedDict carries _metadata, which is no weight
            raise Refused(f"its pickle sets the state of {_brief(target)}")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], (key, value))

    def _setitems(self) -> None:
        items = self.pop_mark()
        _put(self.stack[-1], items)

    def _dict(self) -> None:
        items = self.pop_mark()
        found: dict[Any, Any] = {}
        _put(found, items)
        self.append(found)

    def _append(self) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def _appends(self) -> None:
        items = self.pop_mark()
        _extend(self.stack[-1], items)


def _table() -> dict[int, Callable[[Any], None]]:
    """The operations of pickle that build plain values, as Python does them, and ours for the rest."""
    own = {
        "REDUCE": _Unpickler._reduce,
        "NEWOBJ": _Unpickler._newobj,
        "BUILD": _Unpickler._build,
        "SETITEM": _Unpickler._setitem,
        "SETITEMS": _Unpickler._setitems,
        "DICT": _Unpickler._dict,
        "APPEND": _Unpickler._append,
        "APPENDS": _Unpickler._appends,
    }
    plain = """
        PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1
        FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES UNICODE BINUNICODE
        SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT GLOBAL STACK_GLOBAL
        BINPERSID GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    """
    base: Mapping[int, Any] = pickle._Unpickler.dispatch  # type: ignore[attr-defined, unused-ignore]
    found = {getattr(pickle, name)[0]: base[getattr(pickle, name)[0]] for name in plain.split()}
    return found | {getattr(pickle, name)[0]: function for name, function in own.items()}


_Unpickler.dispatch = _table()


def _called(function: Any, args: Any) -> Any:
    if type(function) is not _Global or type(args) is not tuple:
        raise Refused(f"its pickle calls {_brief(function)}")
    return function.make(*args)


def _not_called(*_args: Any) -> NoReturn:
    raise Refused("its pickle makes a storage of its own")


def _view(whole: Storage, view: Any) -> Storage:
    """A part of a storage, as torch before 1.6 writes it: (key, first element, elements)."""
    if type(view) is not tuple or len(view) != 3:
        raise Refused("its pickle has a view of a storage that is none")
    _sizes(view[1:])
    start, nbytes = view[1] * whole.itemsize, view[2] * whole.itemsize
    if start + nbytes > whole.nbytes:
        raise Refused("its pickle has a view that reaches beyond its storage")
    return Storage(whole.key, nbytes, whole.itemsize, start)


def _put(target: Any, items: Any) -> None:
    if type(target) not in (dict, Ordered) or len(items) % 2:
        raise Refused("its pickle sets items of something that is no dict")
    for index in range(0, len(items), 2):
        _check_key(items[index])
        target[items[index]] = items[index + 1]


def _check_key(key: Any) -> None:
    """Keys that are cheap to hash: nested tuples can take longer than the universe has."""
    simple = (str, int, float, complex, bool, bytes, type(None), Inert, torch.dtype)
    if type(key) not in simple and not (type(key) is tuple and all(type(item) in simple for item in key)):
        raise Refused("its pickle has a dict with keys that are no names")


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise Refused("its pickle appends to something that is no list")
    target.extend(items)


def _brief(value: Any) -> str:
    """A short text; containers are named by their class, since printing them can take for ever."""
    if type(value) is _Global:
        value = value.name
    text = str(value) if isinstance(value, (str, int, Exception)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
