"""The form in which a nested state dict is stored.

The tree is JSON. What JSON has is itself; a list is a list; everything else is an object with one tag:
``dict``, ``ordered``, ``tuple``, ``tensor`` and the numbers and strings that JSON cannot hold exactly.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

Structure = dict[str, Any]
"""What ``json.dumps`` takes, and what ``unflatten`` needs beside the tensors."""

FORMAT = "reload_plugin.nested/1"
EXACT_INTEGER = 1 << 53
"""Integers from here on are written as hexadecimal text: readers of JSON may take them for floats."""

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
