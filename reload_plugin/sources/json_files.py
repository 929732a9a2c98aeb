"""Small files and JSON from folders that somebody else writes: read without waiting, parsed strictly."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

LONGEST_NUMBER = 19
"""Digits of the largest number of 63 bits, which sizes and offsets have to fit into."""


class NotNatural(str):
    """The text of a number that is negative or longer than any size: it compares equal to no number."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; whoever calls closes it.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device. Does not wait for a pipe's writer.
        ValueError: the path has a NUL byte.

    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is not a regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def strict_json(text: bytes) -> Any:
    """JSON as its standard has it: UTF-8, no NaN, no key twice. Numbers that are no sizes become NotNatural.

    Raises:
        ValueError: the text is something else; also when it is nested too deeply.

    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_natural,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    for name in found:
        name.encode()  # half a surrogate pair is no text; UnicodeEncodeError is a ValueError
    return found


def _natural(text: str) -> int | NotNatural:
    _finite(text)
    if text[0] == "-" or len(text) > LONGEST_NUMBER or int(text) >= 1 << 63:
        return NotNatural(text)
    return int(text)


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{text[:30]} is too large")
    return float(text)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
