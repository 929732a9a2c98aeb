"""Where processing moves the elements of a layer to, learnt by processing numbers in their place.

Many kernels want the same bits in another order: transposed, in blocks, interleaved, with padding. Which
order, only the code that packs them knows. So every element (of whole numbers: every bit) gets a number, the
layer is processed with these numbers as its weights, a few digits at a time, and what comes out tells where
each of them went. Processing that does arithmetic gives numbers that fit nowhere, or values that are refused
when they are processed again (``trial``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..record.model_record import TensorRecord
from .trial import as_bits

Pair = tuple[torch.Tensor, torch.Tensor]
"""A served tensor, and the one that processing made for its place, of the same shape and dtype."""

Process = Callable[[Mapping[str, torch.Tensor]], Sequence[Pair]]
"""Processes values of load-format tensors; gives the pairs in the same order each time. Owns what it gives."""

_DIGIT_BITS = {1: 6, 2: 14, 4: 30, 8: 46}
"""Bytes of a floating-point dtype -> bits of a number that its elements can carry and stay ordinary numbers."""


@dataclass(frozen=True)
class _Units:
    """The numbered units of one load-format tensor: its elements, or its bits."""

    record: TensorRecord
    first: int
    """Number of its first unit; units of all tensors of a kind are numbered on."""

    @property
    def floating(self) -> bool:
        return self.record.format.dtype.is_floating_point

    @property
    def per_element(self) -> int:
        return 1 if self.floating else 8 * self.record.format.dtype.itemsize

    @property
    def count(self) -> int:
        return self.record.format.geometry.numel * self.per_element

    def with_digit(self, place: int) -> torch.Tensor:
        """The values of the tensor that carry one digit of each number."""
        fmt = self.record.format
        size, count = fmt.dtype.itemsize, fmt.geometry.numel
        numbers = torch.arange(self.first, self.first + self.count, dtype=torch.int64, device="cpu")
        if self.floating:
            bits = _DIGIT_BITS[size]
            digits = (numbers >> min(bits * place, 62)) & ((1 << bits) - 1)
            return _from_words(digits + _zero_of(size), fmt.dtype).reshape(fmt.shape)
        digits = ((numbers >> place) & 1).view(count, self.per_element)
        words = (digits << torch.arange(self.per_element, device="cpu")).sum(-1)
        return _from_words(words, fmt.dtype).reshape(fmt.shape)

    def filled(self, ones: bool) -> torch.Tensor:
        """All bits clear or set; digits 0 where elements are numbered."""
        fmt = self.record.format
        if self.floating:
            return self.with_digit(0)
        words = torch.full((fmt.geometry.numel,), -1 if ones else 0, dtype=torch.int64, device="cpu")
        return _from_words(words, fmt.dtype).reshape(fmt.shape)


def _zero_of(size: int) -> int:
    """The bits that stand for the digit 0: those of an ordinary number."""
    return 1 << (8 * size - 3)


def _from_words(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return words.to(kinds[dtype.itemsize]).view(dtype)


def put_back(records: Sequence[TensorRecord], process: Process) -> dict[str, torch.Tensor]:
    """Load-format values, put together from served ones by where processing moves each of them.

    Args:
        records: load-format tensors of the layers.
        process: processes them.

    Returns:
        Load-format tensor -> values; those of which some element went nowhere are left out.

    """
    floats = _numbered([record for record in records if record.format.dtype.is_floating_point])
    whole = _numbered([r for r in records if _is_whole_number(r.format.dtype)])
    found = _by_elements(floats, whole, process) if floats else {}
    return found | (_by_bits(whole, floats, process) if whole else {})


def _is_whole_number(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _numbered(records: Sequence[TensorRecord]) -> list[_Units]:
    units: list[_Units] = []
    for record in records:
        if record.format.geometry.numel and record.format.dtype.itemsize in _DIGIT_BITS:
            units.append(_Units(record, units[-1].first + units[-1].count if units else 0))
    return units


def _total(units: Sequence[_Units]) -> int:
    return units[-1].first + units[-1].count if units else 0


def _by_elements(
    floats: Sequence[_Units], whole: Sequence[_Units], process: Process
) -> dict[str, torch.Tensor]:
    """Each dtype size carries its own number of bits, so as many digits as the smallest one needs."""
    bits = {_DIGIT_BITS[unit.record.format.dtype.itemsize] for unit in floats}
    digits = max(1, -(-max(1, (_total(floats) - 1).bit_length()) // min(bits)))
    still = {unit.record.name: unit.filled(ones=False) for unit in whole}
    rounds = [
        process(still | {unit.record.name: unit.with_digit(place) for unit in floats})
        for place in range(digits)
    ]
    gathered = {unit.record.name: _Gathered(unit) for unit in floats}
    for pairs in zip(*rounds, strict=True):
        served = pairs[0][0]
        size = served.element_size()
        if not served.dtype.is_floating_point or size not in _DIGIT_BITS:
            continue
        width = _DIGIT_BITS[size]
        numbers = torch.zeros(served.numel(), dtype=torch.int64, device=served.device)
        valid = torch.ones(served.numel(), dtype=torch.bool, device=served.device)
        for place, (_, made) in enumerate(pairs):
            digit = _words(made) - _zero_of(size)
            valid &= (digit >= 0) & (digit < 1 << width)
            if width * place < 63:
                numbers |= digit.clamp_min(0) << (width * place)
        for one in gathered.values():
            if one.units.record.format.dtype == served.dtype:
                one.take(numbers, valid, as_bits(served).reshape(-1))
    return {name: values for name, one in gathered.items() if (values := one.elements()) is not None}


def _by_bits(
    whole: Sequence[_Units], floats: Sequence[_Units], process: Process
) -> dict[str, torch.Tensor]:
    still = {unit.record.name: unit.filled(ones=False) for unit in floats}
    places = max(1, (_total(whole) - 1).bit_length())
    zeros = process(still | {unit.record.name: unit.filled(ones=False) for unit in whole})
    ones = process(still | {unit.record.name: unit.filled(ones=True) for unit in whole})
    rounds = [
        process(still | {unit.record.name: unit.with_digit(place) for unit in whole})
        for place in range(places)
    ]
    gathered = {unit.record.name: _Gathered(unit) for unit in whole}
    for number, (served, clear) in enumerate(zeros):
        if not _is_whole_number(served.dtype):
            continue
        base = _bits(clear)
        valid = _bits(ones[number][1]) != base
        numbers = torch.zeros(base.numel(), dtype=torch.int64, device=served.device)
        for place, pairs in enumerate(rounds):
            numbers |= (_bits(pairs[number][1]) ^ base).to(torch.int64) << place
        values = _bits(served) ^ base
        for one in gathered.values():
            one.take(numbers, valid, values)
    return {name: values for name, one in gathered.items() if (values := one.bits()) is not None}


class _Gathered:
    """The units of one load-format tensor as they are found in served ones."""

    def __init__(self, units: _Units) -> None:
        self.units = units
        self._values: torch.Tensor | None = None
        self._known = torch.zeros(units.count, dtype=torch.bool, device="cpu")

    def take(self, numbers: torch.Tensor, valid: torch.Tensor, values: torch.Tensor) -> None:
        """Take the units whose numbers are this tensor's."""
        first, last = self.units.first, self.units.first + self.units.count
        mine = valid & (numbers >= first) & (numbers < last)
        where = (numbers[mine] - first).cpu()
        if not len(where):
            return
        if self._values is None:
            self._values = torch.zeros(self.units.count, dtype=values.dtype, device="cpu")
        self._values[where] = values[mine].cpu()
        self._known[where] = True

    def elements(self) -> torch.Tensor | None:
        """The tensor, where units are elements; None if some of them went nowhere."""
        if self._values is None or not bool(self._known.all()):
            return None
        fmt = self.units.record.format
        return self._values.view(fmt.dtype).reshape(fmt.shape)

    def bits(self) -> torch.Tensor | None:
        """The tensor, where units are bits; None if some of them went nowhere."""
        if self._values is None or not bool(self._known.all()):
            return None
        fmt, width = self.units.record.format, self.units.per_element
        words = (self._values.to(torch.int64).view(-1, width) << torch.arange(width, device="cpu")).sum(-1)
        return _from_words(words, fmt.dtype).reshape(fmt.shape)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each element as a number that is not negative, but for 8 bytes."""
    size = tensor.element_size()
    words = as_bits(tensor).reshape(-1).to(torch.int64)
    return words if size == 8 else words & ((1 << (8 * size)) - 1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each element, lowest first: bool, one behind the other."""
    width = 8 * tensor.element_size()
    words = as_bits(tensor).reshape(-1).to(torch.int64)
    return ((words[:, None] >> torch.arange(width, device=words.device)) & 1).to(torch.bool).reshape(-1)
