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
"""Processes values of load-format tensors; gives the pairs in the same order each time."""

_DIGIT_BITS = {1: 6, 2: 14, 4: 30, 8: 46}
"""Bytes of a floating-point dtype -> bits of a number that an element can carry."""

_FLOAT_TESTS, _BIT_TESTS = 2, 16
"""Rounds with random digits. A bit that follows 16 of them by chance would be one in 65,536; values that are
wrong all the same are refused when they are processed again."""


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
        numbers = torch.arange(self.first, self.first + self.count, dtype=torch.int64, device="cpu")
        if self.floating:
            bits = _DIGIT_BITS[fmt.dtype.itemsize]
            return self.carrying((numbers >> min(bits * place, 62)) & ((1 << bits) - 1))
        return self.carrying((numbers >> place) & 1)

    def with_random(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Values that carry a random digit in each unit, and these digits."""
        limit = 1 << (_DIGIT_BITS[self.record.format.dtype.itemsize] if self.floating else 1)
        digits = torch.randint(limit, (self.count,), generator=generator, dtype=torch.int64, device="cpu")
        return self.carrying(digits), digits

    def carrying(self, digits: torch.Tensor) -> torch.Tensor:
        """Values that carry a digit in each unit."""
        fmt = self.record.format
        if self.floating:
            return _from_words(digits + _zero_of(fmt.dtype.itemsize), fmt.dtype).reshape(fmt.shape)
        words = (digits.view(-1, self.per_element) << torch.arange(self.per_element, device="cpu")).sum(-1)
        return _from_words(words, fmt.dtype).reshape(fmt.shape)

    def filled(self, digit: int) -> torch.Tensor:
        """Values that carry the same digit in each unit."""
        return self.carrying(torch.full((self.count,), digit, dtype=torch.int64, device="cpu"))


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
    """Each dtype carries its own number of bits, so there are as many digits as the smallest one needs."""
    dtypes = {unit.record.format.dtype for unit in floats}
    narrow = min(_DIGIT_BITS[dtype.itemsize] for dtype in dtypes)
    places = max(1, -(-max(1, (_total(floats) - 1).bit_length()) // narrow))
    still = {unit.record.name: unit.filled(0) for unit in whole}
    rounds = [
        process(still | {unit.record.name: unit.with_digit(place) for unit in floats})
        for place in range(places)
    ]
    tests, expected = _random_rounds(floats, still, process, _FLOAT_TESTS)
    gathered = {unit.record.name: _Gathered(unit) for unit in floats}
    for number, (served, _) in enumerate(rounds[0]):
        for dtype in dtypes if served.dtype.is_floating_point else ():
            width = _DIGIT_BITS[dtype.itemsize]
            numbers = torch.zeros(served.numel(), dtype=torch.int64, device="cpu")
            valid = torch.ones(served.numel(), dtype=torch.bool, device="cpu")
            for place, pairs in enumerate(rounds):
                digit, carries = _digits(pairs[number][1], dtype)
                valid &= carries
                if width * place < 63:
                    numbers |= digit.clamp_min(0) << (width * place)
            valid &= numbers < _total(floats)
            numbers.clamp_(0, _total(floats) - 1)
            for pairs, digits in zip(tests, expected, strict=True):
                valid &= _digits(pairs[number][1], dtype)[0] == digits[numbers]
            values = as_bits(served.to(dtype)).reshape(-1).cpu()
            for one in gathered.values():
                if one.units.record.format.dtype == dtype:
                    one.take(numbers, valid, values)
    made = {name: one.elements() for name, one in gathered.items()}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def _digits(made: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits that elements carry, and whether they do. Processing may have given them another floating
    dtype, which keeps the value.
    """
    size = dtype.itemsize
    digits = _words(made.to(dtype)) - _zero_of(size)
    return digits, (digits >= 0) & (digits < 1 << _DIGIT_BITS[size])


def _by_bits(whole: Sequence[_Units], floats: Sequence[_Units], process: Process) -> dict[str, torch.Tensor]:
    still = {unit.record.name: unit.filled(0) for unit in floats}
    zeros = process(still | {unit.record.name: unit.filled(0) for unit in whole})
    ones = process(still | {unit.record.name: unit.filled(1) for unit in whole})
    rounds = [
        process(still | {unit.record.name: unit.with_digit(place) for unit in whole})
        for place in range(max(1, (_total(whole) - 1).bit_length()))
    ]
    tests, expected = _random_rounds(whole, still, process, _BIT_TESTS)
    gathered = {unit.record.name: _Gathered(unit) for unit in whole}
    for number, (served, clear) in enumerate(zeros):
        if not _is_whole_number(served.dtype):
            continue
        base = _bits(clear)
        valid = _bits(ones[number][1]) != base
        numbers = torch.zeros(base.numel(), dtype=torch.int64, device="cpu")
        for place, pairs in enumerate(rounds):
            numbers |= (_bits(pairs[number][1]) ^ base).to(torch.int64) << place
        valid &= numbers < _total(whole)
        numbers.clamp_(0, _total(whole) - 1)
        for pairs, digits in zip(tests, expected, strict=True):
            valid &= (_bits(pairs[number][1]) ^ base).to(torch.int64) == digits[numbers]
        values = _bits(served) ^ base
        for one in gathered.values():
            one.take(numbers, valid, values)
    made = {name: one.bits() for name, one in gathered.items()}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def _random_rounds(
    units: Sequence[_Units], still: Mapping[str, torch.Tensor], process: Process, count: int
) -> tuple[list[Sequence[Pair]], list[torch.Tensor]]:
    """Rounds with random digits, and these digits by number of unit. What only looked like a moved unit (sums
    that a kernel keeps beside the weights) does not follow them.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    tests: list[Sequence[Pair]] = []
    expected: list[torch.Tensor] = []
    for _ in range(count):
        drawn = [unit.with_random(generator) for unit in units]
        named = {unit.record.name: values for unit, (values, _) in zip(units, drawn, strict=True)}
        tests.append(process({**still, **named}))
        expected.append(torch.cat([digits for _, digits in drawn]))
    return tests, expected


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
        where = numbers[mine] - first
        if not len(where):
            return
        if self._values is None:
            self._values = torch.zeros(self.units.count, dtype=values.dtype, device="cpu")
        self._values[where] = values[mine]
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
        return self.units.carrying(self._values.to(torch.int64))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each element as a number, not negative but for 8 bytes. On the CPU."""
    size = tensor.element_size()
    words = as_bits(tensor).reshape(-1).cpu().to(torch.int64)
    return words if size == 8 else words & ((1 << (8 * size)) - 1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of each element, lowest first: bool, one behind the other. On the CPU."""
    width = 8 * tensor.element_size()
    words = as_bits(tensor).reshape(-1).cpu().to(torch.int64)
    return ((words[:, None] >> torch.arange(width, device="cpu")) & 1).to(torch.bool).reshape(-1)
