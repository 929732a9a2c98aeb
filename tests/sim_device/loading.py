"""Compiling the device, and making it known to torch."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import sysconfig
import tempfile
import types
from pathlib import Path

import torch

from tests.sim_device.device import SimDevice

SOURCES = Path(__file__).parent / "csrc"
MODULE = "sim_device"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sim_device"


@functools.cache
def load() -> SimDevice:
    """Compile the device, or take it from the cache, and register it as ``sim``.

    Raises:
        RuntimeError: g++ or ninja is missing, or the extension does not compile.

    """
    compiled = _import(_compiled())
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _device_module())
    return SimDevice(compiled)


def _compiled() -> Path:
    """The shared library. A process that finds none compiles in a folder of its own and moves the result to
    the cache: a lock would outlive a process that is killed.
    """
    cached = CACHE / f"{MODULE}_{_fingerprint()}.so"
    if cached.exists():
        return cached
    from torch.utils import cpp_extension

    scripts = sysconfig.get_path("scripts")  # where pip puts ninja; not on PATH unless the venv is activated
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{scripts}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        cpp_extension.load(
            name=MODULE,
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=["-O1", "-g0", "-std=c++20"],
            build_directory=folder,
            is_python_module=False,  # it is imported as from the cache
        )
        (Path(folder) / f"{MODULE}.so").replace(cached)
    return cached


def _import(library: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fingerprint() -> str:
    """Differs for other versions of Python, of torch and of the sources."""
    texts = [sys.version, torch.__version__, *(path.read_text() for path in sorted(SOURCES.iterdir()))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _device_module() -> types.ModuleType:
    """``torch.sim``: what torch itself asks of a device's module."""
    module = types.ModuleType("torch.sim")
    members = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "simulated",
        "set_device": lambda _: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda _: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    vars(module).update(members)
    return module
