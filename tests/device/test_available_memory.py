"""The memory that is left for the process: of the system, and of the control groups it is in."""

from pathlib import Path

import pytest

from reload_plugin.device.available_memory import UNLIMITED, available

V2 = {"proc/self/cgroup": "0::/pods/pod-7/engine\n"}
V1 = {"proc/self/cgroup": "12:cpu,cpuacct:/pods\n4:memory:/pods/pod-7\n1:name=systemd:/user\n"}
HYBRID = {"proc/self/cgroup": "4:memory:/pods/pod-7\n0::/user\n"}
MEMINFO = {"proc/meminfo": "MemTotal: 999 kB\nMemAvailable:    8388608 kB\n"}  # 8 GiB
GIB = 1 << 30


def v2(group: str, limit: object, used: int, cache: int | None = None) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{group}".rstrip("/")
    files = {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": f"{used}\n"}
    return files | ({} if cache is None else {f"{folder}/memory.stat": f"anon 5\ninactive_file {cache}\n"})


def v1(group: str, limit: int, used: int, cache: int | None = None) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory/{group}".rstrip("/")
    files = {f"{folder}/memory.limit_in_bytes": f"{limit}\n", f"{folder}/memory.usage_in_bytes": f"{used}\n"}
    return files | ({} if cache is None else {f"{folder}/memory.stat": f"total_inactive_file {cache}\n"})


UNLIMITED_V1 = 9223372036854771712
CGROUPS = {
    "no groups": ({}, 8 * GIB),
    "v2, own group": (V2 | v2("pods/pod-7/engine", 2 * GIB, GIB), GIB),
    "v2, a group above": (
        V2 | v2("pods/pod-7/engine", "max", GIB) | v2("pods/pod-7", 3 * GIB, GIB) | v2("pods", 6 * GIB, GIB),
        2 * GIB,
    ),
    "v2, the root of a container": ({"proc/self/cgroup": "0::/\n"} | v2("", 2 * GIB, GIB), GIB),
    "v2, a path from outside the container": (V2 | v2("", 2 * GIB, GIB), GIB),
    "v2, cached files can be dropped": (V2 | v2("pods", 2 * GIB, GIB, GIB // 2), GIB + GIB // 2),
    "v2, over the limit": (V2 | v2("pods", GIB, 2 * GIB), 0),
    "v2, not limited": (V2 | v2("pods", "max", GIB), 8 * GIB),
    "v2, damaged": (V2 | v2("pods", "what", GIB), 8 * GIB),
    "v1, own group": (V1 | v1("pods/pod-7", 2 * GIB, GIB), GIB),
    "v1, a group above": (V1 | v1("pods/pod-7", UNLIMITED_V1, GIB) | v1("pods", 2 * GIB, GIB), GIB),
    "v1, the root of a container": (V1 | v1("", 2 * GIB, GIB), GIB),
    "v1, cached files can be dropped": (V1 | v1("pods", 2 * GIB, GIB, GIB // 2), GIB + GIB // 2),
    "v1, not limited": (V1 | v1("pods/pod-7", UNLIMITED_V1, GIB), 8 * GIB),
    "v1 beside v2": (HYBRID | v1("pods/pod-7", 2 * GIB, GIB) | v2("user", "max", GIB), GIB),
    "a path that climbs": ({"proc/self/cgroup": "0::/../../etc\n"} | v2("", 2 * GIB, GIB), GIB),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_available_memory_is_the_least_that_any_control_group_leaves(case: str, tmp_path: Path) -> None:
    files, left = CGROUPS[case]
    for name, text in (MEMINFO | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available(tmp_path) == left


def test_available_memory_without_any_of_these_files_is_not_limited(tmp_path: Path) -> None:
    assert available(tmp_path) == UNLIMITED
    assert 0 < available() < UNLIMITED
