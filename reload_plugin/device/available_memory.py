"""How many bytes of host memory can still be allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 62
"""Bytes; what is left where nothing says how much. Control groups of version 1 write about as much for "no
limit"."""
_ROOT = Path("/")

# Files of a memory control group: limit, use, and in memory.stat the file cache that the kernel drops first.
# See the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(root: Path = _ROOT) -> int:
    """Bytes that the system and every control group of this process leave, the groups above included.

    Args:
        root: the folder that holds ``proc`` and ``sys``.

    """
    return min([UNLIMITED, *_system_left(root), *_groups_left(root)])


def _system_left(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        yield int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10


def _groups_left(root: Path) -> Iterator[int]:
    """What each memory control group leaves: those of this process and all above them."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left_up_to(root / "sys/fs/cgroup", path, *_V2)
            elif "memory" in controllers.split(","):
                yield from _left_up_to(root / "sys/fs/cgroup/memory", path, *_V1)


def _left_up_to(mount: Path, path: str, limit: str, used: str, cache: str) -> Iterator[int]:
    """What a group and each group above it leave, up to the mount.

    Inside a container the path may be the host's: then the groups are not there, and the mount itself is the
    container's group.
    """
    own = PurePosixPath(path.lstrip("/"))
    groups = [] if ".." in own.parts else [own, *own.parents]
    for group in dict.fromkeys([*groups, PurePosixPath()]):
        with contextlib.suppress(OSError, ValueError):
            folder = mount / group
            most = int((folder / limit).read_text())  # "max" where there is no limit
            if most < UNLIMITED:
                held = int((folder / used).read_text()) - _droppable(folder, cache)
                yield max(0, most - held)


def _droppable(folder: Path, cache: str) -> int:
    """Bytes of cached files that nobody used lately; they count as used, and are dropped when memory is asked
    for.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == cache:
                return int(value)
    return 0
