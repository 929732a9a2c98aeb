"""Fills the parameters of an FSDP model: all is checked, then staged in host memory, then copied in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ...checkpoint import Ranged, Source, Span, TensorInfo
from ...checkpoint.sharding import cut
from ...errors import SourceError, weights_error
from .layout import UNTOUCHED, Target
from .slices import SpanCoverage

PIECE = 32 << 20
"""Bytes that are read at once where they have another dtype than the model."""


class Filling:
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
        self.bytes_read = self.staged_bytes = 0
        self._source = source
        self._infos = {info.name: info for info in found}
        self._whole: dict[str, str] = {}
        self._ignored: dict[str, str] = {}
        self._missing: list[str] = []
        self._targets = targets
        self._staged: list[tuple[Target, torch.Tensor]] = []
        self._coverage = SpanCoverage()
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
            self._coverage.need(place, spans)
        for target in self._targets:
            if not self._name_of(target):
                self._coverage.excuse(target.place, target.offset, target.memory.numel())

    def stage(self) -> int:
        """Read everything this rank needs into memory beside the model.

        Returns:
            How many bytes were read for this rank.

        Raises:
            SourceError: reading failed, or the source changed meanwhile.
            WeightsError: the source did not bring what it listed.

        """
        order = {name: position for position, name in enumerate(self._infos)}
        chosen = [(self._name_of(target), target) for target in self._targets if self._name_of(target)]
        for name, target in sorted(chosen, key=lambda pair: order[pair[0]]):
            self._staged.append((target, self._read(name, target)))
        if not self._source.unchanged():
            raise SourceError(
                f"{self._source.description} changed while it was read. Restore when the trainer has "
                "finished writing."
            )
        if faults := self._coverage.faults():
            raise weights_error(self._source.description, UNTOUCHED, missing=faults)
        self.staged_bytes = sum(values.nbytes for _, values in self._staged)
        return self.bytes_read

    def commit(self) -> None:
        """Copy what was read into the model; no memory is needed for it, and none is left of it."""
        with torch.no_grad():
            while self._staged:
                target, values = self._staged.pop()
                target.memory.copy_(values.view(target.memory.shape))

    def _read(self, name: str, target: Target) -> torch.Tensor:
        """The values of a target, flat and on the CPU."""
        values = torch.empty(target.count, dtype=target.dtype, device="cpu")
        if isinstance(self._source, Ranged) and self._infos[name].dtype == target.dtype:
            self._source.read_spans(name, target.spans, values)
            self.bytes_read += values.nbytes
            self._coverage.wrote(target.place, target.offset, target.count)
            return values
        for start, part in self._parts(target, name):
            values[start : start + part.numel()].copy_(part)
            self._coverage.wrote(target.place, target.offset + start, part.numel())
        return values

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
            part = torch.empty(stop - start, dtype=info.dtype, device="cpu")
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

    @property
    def counts(self) -> dict[str, Any]:
        """What a report says about this rank."""
        return {
            "source": self._source.description,
            "tensors": sum(1 for target in self._targets if target.count and self._name_of(target)),
            "elements": self._coverage.elements,
            "bytes_read": self.bytes_read,
            "staged_bytes": self.staged_bytes,
            "whole": self._whole,
            "missing": tuple(self._missing),
            "ignored": self._ignored,
        }


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
