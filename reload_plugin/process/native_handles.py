"""Native handles: what they were made of, since nobody can look into them afterwards.

oneDNN's matmul handlers own a packed copy of the weights that no tensor shows. Their constructors are
watched while layers are processed: the memory that a handle goes on reading has to live as long as it
does, and a digest of what it was made of stands for what it holds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import vllm_api
from ..device.hashing import Hash
from ..device.ops import ops_for
from ..device.shared_setting import SharedSetting
from ..record.module_state import owns_native, reachable, values_of

Handles = dict[int, bytes | None]
"""Handle -> digest of all that its constructor was given; None where that was not hashed."""


@dataclass(eq=False)
class NativeWatch:
    """What the watch over native handles notes.

    Args:
        handles: receives every handle that is made.
        hashed: whether what it is made of is hashed.

    """

    handles: Handles
    hashed: bool = True
    captured: list[torch.Tensor] = field(default_factory=list)
    """The tensors that new handles point into: oneDNN's int8 handler keeps the address of the weight scales
    it was made with."""
    paused: bool = False
    """Whether handles that are made now are nobody's business."""

    def made(self, name: str, handle: int, given: tuple[Any, ...], kept: tuple[Any, ...]) -> None:
        """A constructor made a handle of what it was ``given``, and goes on reading what is ``kept``."""
        self.captured.extend(value.detach() for value in kept if isinstance(value, torch.Tensor))
        try:
            self.handles[handle] = _digest_of(given) if self.hashed else None
        except BaseException:
            vllm_api.release_native(name, handle)
            raise


_of_thread = threading.local()
"""``watches``: those of this thread, the innermost last. Reloads of two threads make handles of their own."""


def _wrap_constructors() -> Callable[[], object]:
    """Wrap the constructors themselves: a dispatch mode does not see them (they are composite), and a
    function mode breaks the ``torch.compile`` that some methods use while processing.
    """
    replaced = []
    for library, name, positions in vllm_api.native_constructors():
        constructor = getattr(library, name)
        setattr(library, name, _noting(name, constructor, positions))
        replaced.append((library, name, constructor))

    def undo() -> None:
        for library, name, constructor in replaced:
            setattr(library, name, constructor)

    return undo


def _noting(
    name: str, constructor: Callable[..., Any], positions: tuple[int, ...] | None
) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        watches: list[NativeWatch] = getattr(_of_thread, "watches", [])
        handle = constructor(*args, **kwargs)  # raises where a processor cannot do it, and vLLM goes on
        if watches and not watches[-1].paused:
            given = (*args, *kwargs.values())
            kept = given if positions is None or kwargs else tuple(args[position] for position in positions)
            watches[-1].made(name, int(handle), given, kept)
        return handle

    return noting


_wrapped = SharedSetting(_wrap_constructors)


@contextlib.contextmanager
def watching_native(
    device: torch.device | None, handles: Handles, hashed: bool = True
) -> Iterator[NativeWatch]:
    """Notes what native handles are made of while this thread makes them.

    Args:
        device: where layers are processed. None, or a device without such handles, watches nothing.
        handles: receives every handle that is made.
        hashed: whether its arguments are hashed.

    """
    watch = NativeWatch(handles, hashed)
    if device is None or not ops_for(device).has_native_handles:
        yield watch
        return
    watches = _of_thread.__dict__.setdefault("watches", [])
    with _wrapped.wanted():
        watches.append(watch)
        try:
            yield watch
        finally:
            watches.remove(watch)


def handle_in(tensor: torch.Tensor) -> int | None:
    """The native handle that a tensor may hold: vLLM keeps one as a number in a tensor, so that compiled code
    does not inline it.
    """
    is_number = tensor.dtype == torch.int64 and tensor.numel() == 1
    return int(tensor) if is_number and ops_for(tensor.device).has_native_handles else None


def release_native_memory(values: Iterable[object], handles: Handles) -> bool:
    """Release the native memory that served values own, to make room for what takes its place.

    An owner and its tensors stay the objects they are, with a null handle, until a new twin trades contents
    with them. Whoever computes with one before that ends the process.

    Args:
        values: as they are served.
        handles: those that are known; owners of others keep them.

    Returns:
        Whether anything was released.

    """
    seen: set[int] = set()
    owners = [found for value in values for found in reachable(value, seen) if owns_native(found)]
    return sum(_empty(owner, handles) for owner in owners) > 0  # every one, not the first alone


def _empty(owner: Any, handles: Handles) -> bool:
    held = _handles_of(owner)
    if not held or any(handle not in handles for _, handle in held):
        return False
    contents = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(owner).items()}
    for tensor, handle in held:
        tensor.zero_()
        handles.pop(handle, None)
    heir = object.__new__(type(owner))  # its class knows how to release what it holds, and does so now
    heir.__dict__ = contents
    return True


def forget_handles(owner: object, handles: Handles) -> None:
    """An owner of native handles is about to release them: what was made of them is of no use any more."""
    for _, handle in _handles_of(owner):
        handles.pop(handle, None)


def _handles_of(owner: object) -> list[tuple[torch.Tensor, int]]:
    """The tensors in which an owner may hold native handles, and those; null is none."""
    tensors = (value for value in values_of(owner) if isinstance(value, torch.Tensor))
    return [(tensor, handle) for tensor in tensors if (handle := handle_in(tensor))]


def _digest_of(arguments: tuple[Any, ...]) -> bytes:
    total = Hash()
    for value in arguments:
        if isinstance(value, torch.Tensor):
            total.add_tensor(value)
        else:
            total.add_text(f"{value!r};")
    return total.digest()
