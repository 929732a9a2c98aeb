"""The unpickler for checkpoints: it runs nothing, every object becomes a description of itself.

A pickle is a program that may import and call anything. This unpickler accepts names from a list only, and
imports none of them: classes become ``OpaqueObject`` values, tensors become ``StoredTensor`` descriptions of
bytes in a file, and calls build such values. The base is Python's unpickler in Python: the one in C allocates
whatever a damaged pickle asks for.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

import torch

from ..dtypes import TORCH_DTYPES, TORCH_STORAGE_DTYPES
from .calls import CALLS, EXACT_CALLS, Global, Maker, brief, call, check_key, check_sizes, not_called, wrapper
from .pickle_names import NOT_STORED, PLAIN
from .values import OpaqueObject, RefusedPickleError, Storage, StoredDict


def unpickle(
    data: bytes | BinaryIO,
    extra: Collection[str] = (),
    *,
    tensors: bool = True,
    plain: bool = True,
    exact: bool = False,
    storages: dict[str, Storage] | None = None,
) -> Any:
    """Read a pickle. Nothing that it names is imported, called or created.

    Args:
        data: the pickle; a file is left positioned after it.
        extra: names that it may use beside tensors, as ``module.name``; they become ``OpaqueObject``.
        tensors: whether it may use tensors.
        plain: whether it may name what trainers save beside the weights (``PLAIN``).
        exact: whether types are kept apart (see ``EXACT_CALLS``): an OrderedDict becomes ``StoredDict``,
            torch.Size and tensor subclasses ``OpaqueObject``, and tensors say whether they are parameters.
        storages: collects the storages it names, by key.

    Raises:
        ValueError: it is damaged, or names anything else.

    """
    allowed = frozenset(extra) | (PLAIN if plain else frozenset()) | (NOT_STORED if exact else frozenset())
    calls = EXACT_CALLS if exact else CALLS
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return _Unpickler(file, allowed, calls, tensors, {} if storages is None else storages).load()
    except RefusedPickleError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"its pickle is damaged ({type(error).__name__}: {brief(error)})") from error


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined, unused-ignore]
    """Operations that build plain values are Python's; those that call or set state are replaced."""

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
        """The description of a name; for a dtype the dtype itself."""
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        if (
            self._tensors
            and module in ("torch", "torch.cuda", "torch.storage")
            and name in TORCH_STORAGE_DTYPES
        ):
            return Global(full, not_called)
        if full == "torch._utils._rebuild_wrapper_subclass" and full in self._allowed:
            return Global(full, wrapper)
        if full == "builtins.getattr" and full in self._allowed:
            return Global(full, self._attribute)
        if full in self._calls and (self._tensors or full in ("torch.Size", "collections.OrderedDict")):
            return Global(full, self._calls[full])
        if full in self._allowed:
            return Global(full, lambda *args: OpaqueObject(full, args))
        raise RefusedPickleError(
            f"its pickle asks for {brief(full)}, which is not loaded because it could run code"
        )

    def _attribute(self, owner: Any, name: Any) -> Global:
        """A nested class, which protocols before 4 write as a call of getattr."""
        full = f"{owner.name}.{name}" if type(owner) is Global and type(name) is str else "getattr"
        if full not in self._allowed:
            raise RefusedPickleError(
                f"its pickle asks for {brief(full)}, which is not loaded because it could run code"
            )
        return Global(full, lambda *args: OpaqueObject(full, args))

    def persistent_load(self, pid: Any) -> tuple[Storage, torch.dtype]:
        """A storage, and the dtype that it was written with."""
        if not self._tensors or type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise RefusedPickleError("its pickle refers to something outside that is no storage")
        kind, key, _, numel = pid[1:5]
        view = pid[5] if len(pid) == 6 else None
        if type(kind) is not Global or type(key) is not str:
            raise RefusedPickleError("its pickle has a storage without a kind or a key")
        check_sizes((numel,))
        dtype = TORCH_STORAGE_DTYPES[kind.name.rpartition(".")[2]]
        whole = Storage(key, numel * dtype.itemsize, dtype.itemsize)
        known = self._storages.setdefault(key, whole)
        if known != whole:
            raise RefusedPickleError(f"its pickle gives storage {brief(key)} two sizes")
        return (whole if view is None else _view(whole, view)), dtype

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = call(self.stack[-1], args)

    def _newobj(self) -> None:
        self._reduce()

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is OpaqueObject:
            slots = type(state) is tuple and len(state) == 2 and type(state[1]) is dict
            plain = state[0] if slots and type(state[0]) is dict else {}
            target.state = plain | state[1] if slots else state
        elif type(target) is StoredDict:
            target.attributes = state
        elif type(target) is not dict:  # an OrderedDict carries _metadata, which is no weight
            raise RefusedPickleError(f"its pickle sets the state of {brief(target)}")

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
    """Opcode -> operation: Python's for plain values, ours for calls and state; all others are missing."""
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


def _view(whole: Storage, view: Any) -> Storage:
    """A view of a storage in files of torch before 1.6: (key, first element, number of elements)."""
    if type(view) is not tuple or len(view) != 3:
        raise RefusedPickleError("its pickle has a view of a storage that is none")
    check_sizes(view[1:])
    start, nbytes = view[1] * whole.itemsize, view[2] * whole.itemsize
    if start + nbytes > whole.nbytes:
        raise RefusedPickleError("its pickle has a view that reaches beyond its storage")
    return Storage(whole.key, nbytes, whole.itemsize, start)


def _put(target: Any, items: Any) -> None:
    if type(target) not in (dict, StoredDict) or len(items) % 2:
        raise RefusedPickleError("its pickle sets items of something that is no dict")
    for index in range(0, len(items), 2):
        check_key(items[index])
        target[items[index]] = items[index + 1]


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise RefusedPickleError("its pickle appends to something that is no list")
    target.extend(items)
