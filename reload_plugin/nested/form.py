"""The form in which a nested state dict is stored.

The tree is JSON. What JSON has is itself; a list is a list; everything else is an object with one tag:
``dict``, ``ordered``, ``tuple``, ``tensor`` and the numbers and strings that JSON cannot hold exactly.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch

Structure = dict[str, Any]
"""What ``json.dumps`` takes, and what ``unflatten`` needs beside the tensors."""

FORMAT = "reload_plugin.nested/1"
RESERVED = "__metadata__"
"""The one name that a tensor in a safetensors file cannot have."""

EXACT_INTEGER = 1 << 53
"""Integers from here on are written as hexadecimal text: readers of JSON may take them for floats."""

STORABLE: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""dtype -> its name in a safetensors header; tensors of others are stored as bytes."""

SCALARS = (type(None), bool, int, float, complex, str)
"""Types of leaves that are no tensors."""


def scalar(value: Any) -> Any:
    """A leaf as JSON has it, or the object with one tag that stands for it."""
    kind = type(value)
    if kind is int and abs(value) >= EXACT_INTEGER:
        return {"int": hex(value)}
    if kind is float and not math.isfinite(value):
        return {"float": struct.pack(">d", value).hex()}
    if kind is complex:
        return {"complex": [scalar(value.real), scalar(value.imag)]}
    if kind is str and not _is_text(value):
        return {"points": [ord(character) for character in value]}
    return value


def _is_text(value: str) -> bool:
    """Whether a string survives JSON: two halves of a pair that are not one would be joined there."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


TAGS: Mapping[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "points": lambda points: "".join(map(chr, points)),
}
"""Tag -> the leaf, from what stands beside the tag."""
