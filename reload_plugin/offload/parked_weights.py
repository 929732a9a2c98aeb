"""The weights of a vLLM model in host memory, and back on their device: the same tensor objects all the time.

Memory moves storage by storage, so tensors that are views of one memory stay views of one memory. Everything
that can fail (allocations, copies) happens before the first tensor of the model is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..device.hashing import Hash
from ..device.ops import DeviceOps, ops_for
from ..errors import OffloadError, UnsupportedError
from ..interrupts import held
from ..record.model_record import ModelRecord, TensorRecord
from ..record.module_state import reachable
from ..record.snapshot import ABSENT, tables_of
from ..record.tensor_layout import Geometry
from ..tensors import storage_id, wraps_others
from .memory import refuse_if_short

_HOST = torch.device("cpu")


@dataclass(eq=False)
class _Tensor:
    """A tensor of the model, and which part of its memory it shows."""

    name: str
    tensor: torch.Tensor
    geometry: Geometry
    dtype: torch.dtype


@dataclass(eq=False)
class _Memory:
    """One storage of the device, the host memory that has its bytes meanwhile, and the tensors over it."""

    storage: torch.UntypedStorage
    """The device's. Kept, so that it is the same storage again: emptied, or left as it is."""
    nbytes: int
    host: torch.UntypedStorage
    tensors: list[_Tensor] = field(default_factory=list)


class ParkedWeights:
    """The weights of one model while they are in host memory.

    Args:
        record: of the model.
        keeps_addresses: the memory of the device stays allocated at its addresses; its owner (vLLM's sleep
            mode) gives it back and takes it again.

    """

    def __init__(self, record: ModelRecord, keeps_addresses: bool) -> None:
        self._record = record
        self.keeps_addresses = keeps_addresses
        self._memories: list[_Memory] = []
        self._seal = b""
        """Hash of the values when nobody but a reload had written to them."""
        self._to_settle = False

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the weights had."""
        return sum(memory.nbytes for memory in self._memories)

    @property
    def tensors(self) -> int:
        """How many tensors of the model moved."""
        return sum(len(memory.tensors) for memory in self._memories)

    # -- to the host -------------------------------------------------------------------------------

    def park(self) -> None:
        """Move everything that is on a device to the host.

        Raises:
            OffloadError: host memory does not suffice. Nothing was changed.
            UnsupportedError: a tensor cannot be moved; it says which and why. Nothing was changed.

        """
        found = by_storage(self._record)
        refuse_unmovable(found, self._record, self.keeps_addresses)
        refuse_if_short({_HOST: sum(s.nbytes() for s, _ in found)}, "Parking the weights")
        devices = _fenced({storage.device for storage, _ in found})
        moved = [_Memory(s, s.nbytes(), _bytes_on(s, _HOST), tensors) for s, tensors in found]
        for ops in devices:
            ops.fence()
        with held():
            for memory in moved:
                for one in memory.tensors:
                    replace_data(one.tensor, _view(memory.host, one))
                if not self.keeps_addresses:
                    memory.storage.resize_(0)
            self._memories += moved
        for ops in devices:
            ops.release_unused()
        self.seal()

    def note_commit(self) -> None:
        """A reload wrote to the weights."""
        self._to_settle = True

    def settle(self) -> None:
        """After a reload: what it left on the device (values that took the place of others) goes to the host
        too, and the values as they are now are the known ones.
        """
        if self._to_settle:
            self._to_settle = False
            self._follow()
            self.park()

    def _follow(self) -> None:
        """Forget tensors that a reload has replaced, and note those to which it gave another layout."""
        there = {id(tensor) for _, tensor in recorded_tensors(self._record)}
        kept: list[_Memory] = []
        for memory in self._memories:
            mine = [one for one in memory.tensors if id(one.tensor) in there]
            moved = [one for one in mine if _has_other_layout(one) or is_on_device(one.tensor)]
            memory.tensors = [one for one in mine if one not in moved]
            kept += [memory] if memory.tensors else []
            for one in moved:
                if not is_on_device(one.tensor):  # else it is parked anew
                    host = one.tensor.untyped_storage()
                    anew = _Tensor(one.name, one.tensor, Geometry.of(one.tensor), one.tensor.dtype)
                    empty = torch.UntypedStorage(0, device=memory.storage.device)
                    kept.append(_Memory(empty, host.nbytes(), host, [anew]))
        self._memories = kept

    def seal(self) -> None:
        """The values as they are now are those of the generation."""
        self._seal = self._hash()

    def written(self) -> bool:
        """Whether somebody wrote to the weights since ``seal``."""
        return self._seal != self._hash()

    def _hash(self) -> bytes:
        total = Hash()
        for _, tensor in recorded_tensors(self._record):
            if not is_on_device(tensor):
                total.add_tensor(tensor)
        return total.digest()

    # -- back to the device ------------------------------------------------------------------------

    def bring_back(self) -> None:
        """Move everything back, with the values as they are now.

        Raises:
            OffloadError: a tensor was replaced by another one or has another shape, so its value would be
                lost; or device memory does not suffice. The weights stay parked.

        """
        self._refuse_replaced()
        if not self.keeps_addresses:
            needs: dict[torch.device, int] = {}
            for memory in self._memories:
                device = memory.storage.device
                needs[device] = needs.get(device, 0) + memory.nbytes
            stay = "They stay parked. Free memory there and unpark again."
            refuse_if_short(needs, "Bringing the weights back", stay)
        filled: list[_Memory] = []
        try:
            for memory in self._memories:
                filled.append(memory)
                self._fill(memory)
            for ops in _fenced({memory.storage.device for memory in filled}):
                ops.fence()
        except BaseException as error:
            for memory in filled if not self.keeps_addresses else ():
                memory.storage.resize_(0)
            if isinstance(error, RuntimeError):
                raise OffloadError(
                    f"The weights could not be brought back: {error}. They stay parked. Free memory on the "
                    "device, and unpark again."
                ) from error
            raise
        with held():
            for memory in self._memories:
                for one in memory.tensors:
                    replace_data(one.tensor, _view(memory.storage, one))
            self._memories = []

    def _fill(self, memory: _Memory) -> None:
        """Give a storage its memory and the bytes of the host's; tensors that were rebound to other memory
        give their own.
        """
        storage = memory.storage
        if storage.nbytes() < memory.nbytes:
            storage.resize_(memory.nbytes)
        ops = ops_for(storage.device)
        ops.copy(_as_bytes(storage), _as_bytes(memory.host))
        for one in memory.tensors:
            if storage_id(one.tensor) != memory.host._cdata:
                ops.copy(_view(storage, one), one.tensor.data)

    def _refuse_replaced(self) -> None:
        there = {id(tensor) for _, tensor in recorded_tensors(self._record)}
        moved = [one for memory in self._memories for one in memory.tensors]
        gone = [one.name for one in moved if id(one.tensor) not in there]
        other = [one.name for one in moved if _has_other_form(one)]
        if gone or other:
            raise OffloadError(
                f"{', '.join(sorted(gone + other)[:8])} was replaced by another tensor, or has another shape "
                "or dtype, while it was parked: kernels would not see it. The weights stay parked. Write the "
                "new values into the tensor that was there (copy_)."
            )


# -- what moves -----------------------------------------------------------------------------------


def recorded_tensors(record: ModelRecord) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and object of every tensor that the constructor or processing gave a model's layers: parameters,
    buffers, attributes, tensors in helper objects and closures. Each object once. Not what was bound after
    the start, such as KV caches.
    """
    alive = [
        (layer.name, holder, held)
        for layer in record.layers
        for holder in layer.holders
        if holder.keys and (held := holder.ref()) is not None
    ]
    seen = {id(held) for _, _, held in alive}
    for name, holder, held in alive:
        tables = tables_of(held)
        for key in holder.keys:
            kind, attribute = key
            value = tables[kind].get(attribute, ABSENT)
            if id(value) in seen or holder.is_bound_late(key, value):
                continue
            for found in reachable(value, seen):
                if isinstance(found, torch.Tensor) and id(found) not in seen:
                    seen.add(id(found))
                    yield ".".join(str(part) for part in (name, holder.path, attribute) if part), found


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory that is not the host's."""
    return not tensor.is_meta and not ops_for(tensor.device).on_host


Found = Sequence[tuple[torch.UntypedStorage, list[_Tensor]]]


def by_storage(record: ModelRecord) -> Found:
    """The storages on devices that a model's tensors lie in, and the tensors."""
    found: dict[int, tuple[torch.UntypedStorage, list[_Tensor]]] = {}
    for name, tensor in recorded_tensors(record):
        if not is_on_device(tensor) or wraps_others(type(tensor)):
            continue
        storage = tensor.untyped_storage()
        entry = found.setdefault(storage._cdata, (storage, []))
        entry[1].append(_Tensor(name, tensor, Geometry.of(tensor), tensor.dtype))
    return list(found.values())


def refuse_unmovable(found: Found, record: ModelRecord, keeps_addresses: bool) -> None:
    """Raises UnsupportedError where a weight has no memory of its own to give back, or somebody holds its
    address as a number.
    """
    reasons = {
        name: "it wraps other tensors"
        for name, tensor in recorded_tensors(record)
        if wraps_others(type(tensor)) and is_on_device(tensor)
    }
    addresses: dict[int, str] = {}
    for storage, tensors in found:
        if not keeps_addresses and not storage.resizable():
            reasons[tensors[0].name] = "its memory belongs to somebody else"
        addresses |= {one.tensor.data_ptr(): one.name for one in tensors if one.tensor.data_ptr()}
    if not keeps_addresses:
        for path, name in _addresses_held(record, addresses):
            reasons[name] = f"{path} holds its address as a number"
    if reasons:
        listed = ", ".join(f"{name} ({reason})" for name, reason in sorted(reasons.items())[:8])
        raise UnsupportedError(f"These weights cannot be parked: {listed}. Nothing was changed.")


def _addresses_held(record: ModelRecord, addresses: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for layer in record.layers:
        for holder in layer.holders:
            held = holder.ref()
            if held is None:
                continue
            tables = tables_of(held)
            for kind, attribute in holder.keys:
                value = tables[kind].get(attribute, ABSENT)
                if type(value) is int and value in addresses:
                    yield f"{layer.name}.{attribute}", addresses[value]


def packed_parameters(record: ModelRecord) -> tuple[str, ...]:
    """Names of parameters that are empty while the model serves: kernels have their values in memory that no
    tensor shows (packed weights of a CPU).
    """
    found = []
    for layer in record.layers:
        module = layer.ref()
        for holder in layer.holders:
            for (kind, name), constructed in holder.constructed.items():
                if kind != "_parameters" or not isinstance(module, nn.Module) or holder.ref() is not module:
                    continue
                now = module._parameters.get(name)
                full = isinstance(constructed, TensorRecord) and constructed.format.geometry.numel
                if full and now is not None and not now.numel():
                    found.append(f"{layer.name}.{name}")
    return tuple(found)


def _has_other_form(one: _Tensor) -> bool:
    """Whether a parked tensor has another shape or dtype than it had."""
    return one.tensor.shape != one.geometry.size or one.tensor.dtype != one.dtype


def _has_other_layout(one: _Tensor) -> bool:
    """Whether a reload gave a parked tensor another layout, which kernels want."""
    return _has_other_form(one) or one.tensor.stride() != one.geometry.stride


# -- memory ---------------------------------------------------------------------------------------


def replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Make an existing tensor object show other data, on whatever device. Its class and attributes stay."""
    if torch._has_compatible_shallow_copy_type(tensor, data):
        tensor.data = data
    else:  # a device of torch's open registration: the objects exchange what they are made of
        twin = data.requires_grad_(tensor.requires_grad)
        torch._C._swap_tensor_impl(tensor, twin)


def _bytes_on(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    """New memory with the bytes of a storage."""
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
    ops_for(storage.device).copy(copy, _as_bytes(storage))
    return copy.untyped_storage()


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))


def _view(storage: torch.UntypedStorage, one: _Tensor) -> torch.Tensor:
    geometry = one.geometry
    empty = torch.empty(0, dtype=one.dtype, device=storage.device)
    return empty.set_(storage, geometry.offset, geometry.size, geometry.stride)


def _fenced(devices: Iterable[torch.device]) -> list[DeviceOps]:
    """The operations of each device, after all work that was queued there."""
    found = [ops_for(device) for device in devices]
    for ops in found:
        ops.fence()
    return found
