"""Small files and JSON from folders that somebody else writes: read without waiting, parsed strictly."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
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
    string = text.decode("utf-8")
    value, end = _value(string, _past_space(string, 0))
    _at_end(string, end)
    return value


def strict_items(text: bytes) -> Iterator[tuple[str, Any]]:
    """The keys and values of a JSON object, by the same rules, one at a time: of a large one there is never
    more in memory than the text and what the caller keeps. Keys that come twice are the caller's to notice.

    Raises:
        ValueError: as above, at the place where it shows; also when the text is not an object.

    """
    string = text.decode("utf-8")
    at = _past_space(string, 0)
    if string[at : at + 1] != "{":
        raise ValueError("it is not a JSON object")
    at = _past_space(string, at + 1)
    closed = string[at : at + 1] == "}"
    while not closed:
        key, at = _value(string, at)
        if type(key) is not str:
            raise ValueError(f"it has something else than a name before character {at:,}")
        key.encode()  # half a surrogate pair is no text; UnicodeEncodeError is a ValueError
        at = _past_space(string, at)
        if string[at : at + 1] != ":":
            raise ValueError(f"it has no colon at character {at:,}")
        value, at = _value(string, _past_space(string, at + 1))
        yield key, value
        at = _past_space(string, at)
        closed = string[at : at + 1] == "}"
        if not closed:
            if string[at : at + 1] != ",":
                raise ValueError(f"it has no comma at character {at:,}")
            at = _past_space(string, at + 1)
    _at_end(string, at + 1)


_SPACE = re.compile(r"[ \t\n\r]*")


def _past_space(string: str, at: int) -> int:
    found = _SPACE.match(string, at)
    assert found is not None, "no space is some, too"
    return found.end()


def _at_end(string: str, at: int) -> None:
    if (end := _past_space(string, at)) != len(string):
        raise ValueError(f"it goes on at character {end:,}, behind its end")


def _value(string: str, at: int) -> tuple[Any, int]:
    """The value that begins at a character, and the first one behind it."""
    try:
        return _DECODER.raw_decode(string, at)
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
    if len(text) < LONGEST_NUMBER and text[0] != "-":
        return int(text)
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


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_natural, parse_float=_finite, parse_constant=_no_constant
)
