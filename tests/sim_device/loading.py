"""Compiling the device, and making it known to torch."""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
import types
from pathlib import Path

import torch

from tests.sim_device.device import SimDevice

SOURCES = Path(__file__).parent / "csrc"


@functools.cache
def load() -> SimDevice:
    """Compile the device, or take it from the cache, and register it as ``sim``.

    Raises:
        RuntimeError: g++ or ninja is missing, or the extension does not compile.

    """
    from torch.utils import cpp_extension

    scripts = sysconfig.get_path("scripts")  # where pip puts ninja; not on PATH unless the venv is activated
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{scripts}"
    compiled = cpp_extension.load(
        name=f"sim_device_{_fingerprint()}",
        sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
        extra_cflags=["-O1", "-g0", "-std=c++20"],
    )
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _device_module(compiled))
    return SimDevice(compiled)


def _fingerprint() -> str:
    """Differs for other versions of torch or of the sources, so that two checkouts do not compile in turn."""
    texts = [torch.__version__, *(path.read_text() for path in sorted(SOURCES.iterdir()))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _device_module(compiled: object) -> types.ModuleType:
    """``torch.sim``: what torch itself asks of a device's module."""
    module = types.ModuleType("torch.sim")
    members = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda _: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    vars(module).update(members)
    return module
