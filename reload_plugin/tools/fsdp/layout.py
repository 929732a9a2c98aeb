"""What this rank holds of an FSDP model: which elements of which weights, and in what memory."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...checkpoint import Span
from ...errors import SessionError, UnsupportedError
from .slices import Division, local_shape, spans_of

UNTOUCHED = "Nothing was changed, on any rank."

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile put into the names of parameters."""

Rename = Callable[[str], str]


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter or buffer, or the part of it that this rank holds."""

    names: tuple[str, ...]
    """In the checkpoint; several where weights are tied."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    spans: tuple[Span, ...]
    """Elements of the flattened tensor that are here, in the order in which they lie here."""
    memory: torch.Tensor
    """What they are written to: the same number of elements, any layout, any device."""
    place: str
    """Whose memory it is, for the ledger."""
    offset: int = 0
    """Where it begins in that memory."""

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.spans)


def targets_of(model: nn.Module, rename: Rename) -> Iterator[Target]:
    """Everything of the model that a checkpoint has: flat parameters of FSDP1 first, then the rest.

    Raises:
        UnsupportedError, SessionError: see ``restore_fsdp``.

    """
    seen: set[str] = set()
    for target in _flat_targets(model, rename):
        seen |= set(target.names)
        yield target
    tied: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in _named_tensors(model):
        found = rename(name)
        if found not in seen and not name.endswith("_flat_param"):
            tied.setdefault(id(tensor), (tensor, []))[1].append(found)
    for tensor, names in tied.values():
        yield _plain_target(tuple(names), tensor)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under every name they have."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if _is_fsdp2(module):
            module.reshard()
        left_out = module._non_persistent_buffers_set
        own = itertools.chain(module._parameters.items(), module._buffers.items())
        for name, tensor in own:
            if tensor is not None and name not in left_out:
                yield _clean(f"{prefix}.{name}" if prefix else name), tensor


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_fsdp2(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _plain_target(names: tuple[str, ...], tensor: torch.Tensor) -> Target:
    from torch.distributed.tensor import DTensor

    local, divisions = tensor, list[Division]()
    if isinstance(tensor, DTensor):
        local, divisions = tensor.to_local(), list(_divisions(names[0], tensor))
    _require_memory(names[0], local)
    shape = tuple(tensor.shape)
    if local_shape(shape, divisions) != tuple(local.shape):
        raise UnsupportedError(
            f"{names[0]} has the shape {list(local.shape)} on this rank, which is no part of {list(shape)} "
            f"that its placements give. Restore it with the trainer's own loader. {UNTOUCHED}"
        )
    return Target(names, shape, tensor.dtype, tuple(spans_of(shape, divisions)), local.detach(), names[0])


def _divisions(name: str, tensor: Any) -> Iterator[Division]:
    """How a DTensor's placements divide it, from the first dimension of its mesh to the last."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise UnsupportedError(f"{name} lies on a mesh that this rank is no part of. {UNTOUCHED}")
    for size, rank, placement in zip(tensor.device_mesh.shape, coordinate, tensor.placements, strict=True):
        if placement.is_replicate():
            continue
        pieces = getattr(placement, "split_factor", 1)
        if placement.is_partial() or not hasattr(placement, "dim"):
            raise UnsupportedError(
                f"{name} has the placement {placement}, which no checkpoint can fill. {UNTOUCHED}"
            )
        yield Division(placement.dim, size, rank, pieces)


def _require_memory(name: str, local: torch.Tensor) -> None:
    if local.is_meta:
        raise UnsupportedError(
            f"{name} is on meta. Give the model memory first: model.to_empty(device=...). {UNTOUCHED}"
        )


# -- FSDP1 ----------------------------------------------------------------------------------------


def _handles(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name of a module that FSDP1 wraps, and the handle of its flat parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            yield _clean(f"{name}.") if name else "", module._handle


def _flat_targets(model: nn.Module, rename: Rename) -> Iterator[Target]:
    for prefix, handle in _handles(model):
        flat = handle.flat_param
        place = f"the flat parameter of {prefix.rstrip('.') or 'the model'}"
        shard = _shard_of(handle, place)
        aliases = _shared_names(flat, prefix)
        infos = zip(flat._fqns, flat._shapes, flat._shard_param_infos, flat._param_extensions, strict=True)
        for fqn, shape, info, extension in infos:
            name = _clean(prefix + fqn)
            if extension is not None:
                raise UnsupportedError(
                    f"{name} is a DTensor inside of FSDP1. Use fully_shard (FSDP2). {UNTOUCHED}"
                )
            names = tuple(rename(each) for each in (name, *aliases[name]))
            yield _flat_target(names, tuple(shape), info, shard, place)


def _flat_target(
    names: tuple[str, ...], shape: tuple[int, ...], info: Any, shard: torch.Tensor, place: str
) -> Target:
    if not info.in_shard:
        return Target(names, shape, shard.dtype, (), shard[:0], place)
    start, count = info.offset_in_shard, info.numel_in_shard
    span = (info.intra_param_start_idx, info.intra_param_end_idx + 1)
    return Target(names, shape, shard.dtype, (span,), shard[start : start + count], place, start)


def _shard_of(handle: Any, place: str) -> torch.Tensor:
    """The part of this rank of a flat parameter, padding included; all of it where it is not sharded."""
    flat = handle.flat_param
    begun = handle.uses_sharded_strategy and hasattr(flat, "_local_shard")  # else nothing was gathered yet
    shard: torch.Tensor = flat._local_shard if begun else flat.data
    if handle._training_state.name == "SUMMON_FULL_PARAMS":
        raise SessionError(f"{place} is summoned. Restore outside of summon_full_params. {UNTOUCHED}")
    _require_memory(place, shard)
    return shard.detach()


def _shared_names(flat: Any, prefix: str) -> Mapping[str, list[str]]:
    """Name of a parameter -> its other names inside of one flat parameter (tied weights)."""
    found: dict[str, list[str]] = defaultdict(list)
    for info in flat._shared_param_infos:
        first = _clean(prefix + _joined_name(info.prim_module_name, info.prim_param_name))
        found[first].append(_clean(prefix + _joined_name(info.module_name, info.param_name)))
    return found


def _joined_name(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _needed_of_flat(handle: Any, shard: torch.Tensor) -> list[Span]:
    """What of a flat parameter's shard is no padding, from how the whole of it is laid out."""
    flat = handle.flat_param
    ends = list(itertools.accumulate(flat._numels_with_padding))
    real = [
        (end - count, end)
        for end, count, padding in zip(ends, flat._numels_with_padding, flat._is_padding_mask, strict=True)
        if not padding
    ]
    first = handle.rank * shard.numel() if handle.uses_sharded_strategy else 0
    return [
        (max(a, first) - first, min(b, first + shard.numel()) - first)
        for a, b in real
        if _meet(a, b, first, shard)
    ]


def _meet(start: int, stop: int, first: int, shard: torch.Tensor) -> bool:
    return max(start, first) < min(stop, first + shard.numel())


def needs_of(model: nn.Module, targets: Iterable[Target]) -> Iterator[tuple[str, list[Span]]]:
    """Whose memory it is -> its elements that have to be written for the model to be whole."""
    for prefix, handle in _handles(model):
        place = f"the flat parameter of {prefix.rstrip('.') or 'the model'}"
        yield place, _needed_of_flat(handle, _shard_of(handle, place))
    for target in targets:
        if target.place in target.names:
            yield target.place, [(0, target.memory.numel())]


def drop_gathered(model: nn.Module) -> None:
    """Old values that FSDP1 gathered for a forward pass and would use in the next one."""
    for _, handle in _handles(model):
        if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
            handle.reshard(True)
