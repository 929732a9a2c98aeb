"""Fill an FSDP model from a checkpoint: each rank reads its own slices, and all ranks fail together or none.

What has to be written is worked out from how FSDP lays a model out; what was written is noted as it is
written. A ledger holds one against the other, by position: padding is not asked for, and NaN is a value.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from .errors import (
    RanksDisagreeError,
    ReloadError,
    SessionError,
    SourceError,
    UnsupportedError,
    weights_error,
)
from .ranks import PATIENCE, Vote, vote_among
from .slices import Division, Ledger, cut, local_shape, spans_of
from .sources import Ranged, Source, Span, TensorInfo, open_source

UNTOUCHED = "Nothing was changed, on any rank."
MIXED = "The model holds a mixture of old and new weights: restore it again before it is used."
PIECE = 32 << 20
"""Bytes that are read at once where they cannot be read straight into the model."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile put into the names of parameters."""

Rename = Callable[[str], str]


class RestoreReport(BaseModel):
    """What ``restore_fsdp`` did on one rank."""

    model_config = ConfigDict(frozen=True)

    source: str
    rank: int
    tensors: int
    """Tensors of the checkpoint that this rank holds a part of."""
    elements: int
    """Elements written on this rank; every one that is not padding, each once."""
    bytes_read: int
    bytes_of_ranks: tuple[int, ...]
    """``bytes_read`` of every rank."""
    whole: dict[str, str]
    """Tensor -> why it was read whole although this rank needs a part of it."""
    missing: tuple[str, ...]
    """Of the model and not in the checkpoint (with ``strict=False``); they kept their values."""
    ignored: dict[str, str]
    """Of the checkpoint -> why it was not used."""
    seconds: float


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


def restore_fsdp(
    model: nn.Module,
    source: Source | str | Path,
    *,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    timeout: float = PATIENCE,
    group: Any = None,
) -> RestoreReport:
    """Fill a model wrapped by FSDP1 (``FullyShardedDataParallel``) or FSDP2 (``fully_shard``) in place.

    To be called on every rank of ``group``, outside of ``summon_full_params``. Parameters, and buffers that a
    state dict has, are written where they lie, sharded, replicated or offloaded. Parts are read from formats
    whose tensors lie in one piece in a file; of others whole tensors are read, one at a time, and the report
    says so. Extra memory: 32 MiB, or the largest tensor that has to be read whole.

    Args:
        model: on its device already (``to_empty`` a model that was made on meta). Its wrappers do not count
            in names: ``_fsdp_wrapped_module.`` and the like are left out.
        source: a checkpoint that every rank can read, or its path.
        rename: name in the model -> name in the checkpoint.
        strict: False lets weights be missing or unexpected; the report lists them.
        cast: True converts floating values to the model's dtype; else another dtype is an error.
        timeout: seconds that a rank waits for the others.
        group: process group; None for all processes.

    Returns:
        What was read and written here, and how many bytes every rank read.

    Raises:
        WeightsError: weights are missing, unexpected or misshapen, all of them named, on every rank; nothing
            was changed.
        RanksDisagreeError: another rank failed or did not answer; says what the model holds now.
        SourceError: the checkpoint cannot be read here.
        UnsupportedError: parts of the model are laid out in a way that is not known.
        SessionError: the model's full parameters are summoned.

    """
    started = time.perf_counter()
    council = _Council(group, timeout)
    with council.before("restore"):
        opened = open_source(source) if isinstance(source, (str, Path)) else source
        with torch.no_grad():
            targets = list(_targets(model, rename or str))
        restoring = _Restoring(opened, targets, strict, cast)
        restoring.check_tied()
        restoring.expect(_needs(model, targets))
    with council.after("restore", restoring):
        with torch.no_grad():
            restoring.run()
        _drop_gathered(model)
    return restoring.report(council, time.perf_counter() - started)


# -- ranks ----------------------------------------------------------------------------------------


class _Council:
    """The ranks of one restore: each phase ends well on all of them or on none."""

    def __init__(self, group: Any, timeout: float) -> None:
        import torch.distributed as dist

        self.rank = 0
        self.bytes_of_ranks: tuple[int, ...] = ()
        self._votes: Iterator[Vote | None] = itertools.repeat(None)
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank()
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            vote = vote_among("restore", ranks, self.rank)
            vote.patience = timeout
            self._votes = iter([vote, vote.following()])

    @contextlib.contextmanager
    def before(self, what: str) -> Iterator[None]:
        """The phase in which nothing is changed."""
        with self._together(f"Not every rank can {what} this checkpoint, so none does. {UNTOUCHED}"):
            yield

    @contextlib.contextmanager
    def after(self, what: str, restoring: _Restoring) -> Iterator[None]:
        """The phase that writes."""
        with self._together(f"Not every rank could {what} this checkpoint. {MIXED}", restoring):
            try:
                yield
            except SourceError as error:
                raise SourceError(f"{error} {MIXED}") from error.__cause__
            except ReloadError:
                raise
            except Exception as error:
                raise ReloadError(
                    f"Restoring failed with {type(error).__name__}: {error}. {MIXED}"
                ) from error

    @contextlib.contextmanager
    def _together(self, summary: str, restoring: _Restoring | None = None) -> Iterator[None]:
        vote = next(self._votes)
        try:
            yield
        except BaseException as error:
            if vote is not None:
                vote(error)
            raise
        if vote is None:
            self.bytes_of_ranks = () if restoring is None else (restoring.bytes_read,)
            return
        if restoring is not None:
            vote.note(str(restoring.bytes_read))
        try:
            vote(None)
        except RanksDisagreeError as error:
            reasons = [f"rank {rank}: {reason}" for rank, reason in sorted(error.reasons.items())]
            raise RanksDisagreeError("\n  ".join([summary, *reasons]), error.reasons) from None
        if restoring is not None:
            self.bytes_of_ranks = tuple(map(int, vote.notes()))
        if vote.postponed is not None:
            raise vote.postponed


# -- what a model holds here ----------------------------------------------------------------------


def _targets(model: nn.Module, rename: Rename) -> Iterator[Target]:
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


def _needs(model: nn.Module, targets: Iterable[Target]) -> Iterator[tuple[str, list[Span]]]:
    for prefix, handle in _handles(model):
        place = f"the flat parameter of {prefix.rstrip('.') or 'the model'}"
        yield place, _needed_of_flat(handle, _shard_of(handle, place))
    for target in targets:
        if target.place in target.names:
            yield target.place, [(0, target.memory.numel())]


def _drop_gathered(model: nn.Module) -> None:
    """Old values that FSDP1 gathered for a forward pass and would use in the next one."""
    for _, handle in _handles(model):
        if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
            handle.reshard(True)


# -- filling --------------------------------------------------------------------------------------


class _Restoring:
    """One restore on one rank. Making it checks everything and changes nothing.

    Raises:
        WeightsError: names what does not fit.

    """

    def __init__(self, source: Source, targets: list[Target], strict: bool, cast: bool) -> None:
        found = source.infos()
        if found is None:
            raise SourceError(
                f"{source.description} cannot be listed before it is read. {UNTOUCHED} Convert it first."
            )
        self.bytes_read = 0
        self._source = source
        self._infos = {info.name: info for info in found}
        self._whole: dict[str, str] = {}
        self._ignored: dict[str, str] = {}
        self._missing: list[str] = []
        self._targets = targets
        self._ledger = Ledger()
        self._check(strict, cast)

    def _name_of(self, target: Target) -> str:
        """The first of a target's names that the checkpoint has; empty when it has none."""
        return next((name for name in target.names if name in self._infos), "")

    def _check(self, strict: bool, cast: bool) -> None:
        missing = {t.names[0]: _reason(t) for t in self._targets if not self._name_of(t)}
        known = {name for target in self._targets for name in target.names}
        unexpected = dict.fromkeys(self._infos.keys() - known, "the model has no place for it")
        misshapen: dict[str, str] = {}
        for target in self._targets:
            for name in target.names:
                if name in self._infos and (reason := _misfit(self._infos[name], target, cast)):
                    misshapen[name] = reason
        if not strict:
            self._missing, self._ignored = sorted(missing), dict(sorted(unexpected.items()))
            missing, unexpected = {}, {}
        if missing or unexpected or misshapen:
            offenders = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
            listed = {kind: dict(sorted(found.items())) for kind, found in offenders.items()}
            raise weights_error(self._source.description, UNTOUCHED, **listed)

    def check_tied(self) -> None:
        """Refuse a checkpoint that has different values for weights that are one in the model.

        Raises:
            WeightsError: names them.

        """
        different: dict[str, str] = {}
        for target in self._targets:
            first, *others = [name for name in target.names if name in self._infos] or [""]
            for other in others:
                if self._equal(target, first, other):
                    self._ignored[other] = f"tied to {first}, and equal"
                else:
                    different[other] = f"differs from {first}, and the model has one weight for both"
        if different:
            raise weights_error(self._source.description, UNTOUCHED, duplicate=different)

    def _equal(self, target: Target, first: str, other: str) -> bool:
        if self._infos[first].dtype != self._infos[other].dtype:
            return False
        pairs = zip(self._parts(target, first), self._parts(target, other), strict=True)
        return all(torch.equal(_bits(one), _bits(two)) for (_, one), (_, two) in pairs)

    def expect(self, needs: Iterable[tuple[str, list[Span]]]) -> None:
        """What has to be written for the model to be whole."""
        for place, spans in needs:
            self._ledger.need(place, spans)
        for target in self._targets:
            if not self._name_of(target):
                self._ledger.excuse(target.place, target.offset, target.memory.numel())

    def run(self) -> None:
        """Fill the model.

        Raises:
            SourceError: reading failed.
            WeightsError: the source did not bring what it listed.

        """
        order = {name: position for position, name in enumerate(self._infos)}
        chosen = [(self._name_of(target), target) for target in self._targets if self._name_of(target)]
        for name, target in sorted(chosen, key=lambda pair: order[pair[0]]):
            self._fill(name, target)
        if faults := self._ledger.faults():
            raise weights_error(self._source.description, MIXED, missing=faults)

    def _fill(self, name: str, target: Target) -> None:
        if self._fits_in_place(name, target):
            assert isinstance(self._source, Ranged)
            self._source.read_spans(name, target.spans, target.memory.view(-1))
            self.bytes_read += target.memory.nbytes
            self._ledger.wrote(target.place, target.offset, target.count)
            return
        flat = (
            target.memory.view(-1)
            if target.memory.is_contiguous()
            else torch.empty(target.count, dtype=target.dtype)
        )
        for start, part in self._parts(target, name):
            flat[start : start + part.numel()].copy_(part)
            self._ledger.wrote(target.place, target.offset + start, part.numel())
        if not target.memory.is_contiguous():
            target.memory.copy_(flat.view(target.memory.shape))

    def _fits_in_place(self, name: str, target: Target) -> bool:
        """Whether the bytes of the file are those of the model."""
        memory = target.memory
        plain = (
            memory.is_contiguous()
            and memory.device.type == "cpu"
            and not (memory.is_conj() or memory.is_neg())
        )
        return isinstance(self._source, Ranged) and plain and self._infos[name].dtype == memory.dtype

    def _parts(self, target: Target, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """What a target needs of a tensor, piece by piece: where it goes, and flat values on the CPU."""
        if not target.count:
            return
        info = self._infos[name]
        if not isinstance(self._source, Ranged):
            yield from self._cut_from_whole(target, info)
            return
        step = max(1, PIECE // info.dtype.itemsize)
        for start in range(0, target.count, step):
            stop = min(target.count, start + step)
            part = torch.empty(stop - start, dtype=info.dtype)
            self._source.read_spans(name, list(cut(target.spans, start, stop)), part)
            self.bytes_read += part.nbytes
            yield start, part

    def _cut_from_whole(self, target: Target, info: TensorInfo) -> Iterator[tuple[int, torch.Tensor]]:
        if target.count < math.prod(info.shape):
            self._whole[info.name] = f"{self._source.description} cannot be read in parts"
        with contextlib.closing(self._source.read([info.name])) as tensors:
            for _, tensor in tensors:
                self.bytes_read += tensor.nbytes
                flat = tensor.reshape(-1)
                start = 0
                for low, high in target.spans:
                    yield start, flat[low:high]
                    start += high - low

    def report(self, council: _Council, seconds: float) -> RestoreReport:
        return RestoreReport(
            source=self._source.description,
            rank=council.rank,
            tensors=sum(1 for target in self._targets if target.count and self._name_of(target)),
            elements=self._ledger.elements,
            bytes_read=self.bytes_read,
            bytes_of_ranks=council.bytes_of_ranks,
            whole=self._whole,
            missing=tuple(self._missing),
            ignored=self._ignored,
            seconds=seconds,
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def _reason(target: Target) -> str:
    others = target.names[1:]
    return "not in the checkpoint" + (f", and neither is {', '.join(others)}" if others else "")


def _misfit(info: TensorInfo, target: Target, cast: bool) -> str | None:
    """Why a tensor cannot fill a target, if it cannot."""
    if info.shape != target.shape:
        return f"{list(info.shape)} in the checkpoint, {list(target.shape)} in the model"
    convertible = cast and info.dtype.is_floating_point and target.dtype.is_floating_point
    if info.dtype != target.dtype and not convertible:
        hint = (
            " (cast=True converts)" if info.dtype.is_floating_point and target.dtype.is_floating_point else ""
        )
        return f"{info.dtype} in the checkpoint, {target.dtype} in the model{hint}"
    return None
