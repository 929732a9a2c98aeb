"""The package's own promises: what it imports, what it exports, where vLLM enters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reload_plugin

PACKAGE = Path(reload_plugin.__file__).parent
LINE = (
    "errors",
    "formats",
    "holders",
    "tensors",
    "interrupts",
    "_vllm",
    "garbage",
    "memory",
    "team",
    "hashing",
    "native",
    "serving",
    "routes",
    "record",
    "placement",
    "sources",
    "overflow",
    "staging",
    "load",
    "ledger",
    "room",
    "admission",
    "results",
    "process",
    "digest",
    "ranks",
    "commit",
    "verify",
    "bystanders",
    "session",
    "plan",
    "generation",
    "options",
    "progress",
    "weight_update",
    "kernel_format",
    "partial",
    "monitor",
    "reload",
    "preflight",
    "transfer",
    "plugin",
    "nested",
    "writing",
    "conversion",
    "fsdp",
    "cli",
)
"""Modules in the order in which they may import one another: each only those before it."""

PUBLIC = [
    "DuplicateWeightsError",
    "EngineBrokenError",
    "KernelFormatError",
    "MisshapenWeightsError",
    "MissingWeightsError",
    "NonFiniteWeightsError",
    "NotRecordedError",
    "PartialUpdateError",
    "ProcessingError",
    "RanksDisagreeError",
    "ReloadError",
    "ReloadReport",
    "ReloadSession",
    "ReloadStatus",
    "RestoreReport",
    "SessionError",
    "SourceError",
    "UnexpectedWeightsError",
    "UnsupportedError",
    "WeightsError",
    "abort_weight_update",
    "convert",
    "flatten",
    "is_stale",
    "open_source",
    "read_nested",
    "record_for_reloading",
    "reload_engine",
    "reload_weights",
    "restore_for_reloading",
    "restore_fsdp",
    "status",
    "unflatten",
]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The module of the line that a file belongs to; a folder is one room."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(file: Path) -> set[str]:
    """Rooms of this package that a file imports anywhere, also inside functions."""
    found = set()
    depth = len(file.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found |= set(names)
    return found


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_backwards_along_the_line(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        return
    place = LINE.index(room(file))
    later = {name for name in own_imports(file) if LINE.index(name) > place}
    assert not later, f"{file.name} imports {later}, which come after it"


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_the_door_names_vllm(file: Path) -> None:
    if room(file) == "_vllm":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] == "vllm" for name in names), f"{file.name} imports vLLM"


def test_every_module_has_a_place_in_the_line() -> None:
    assert {room(file) for file in files()} - {"__init__"} == set(LINE)


def test_public_names_are_pinned_and_there() -> None:
    assert reload_plugin.__all__ == PUBLIC == sorted(PUBLIC, key=lambda n: (n[0].islower(), n))
    assert all(getattr(reload_plugin, name) is not None for name in PUBLIC)


def test_importing_the_package_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, reload_plugin; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reload_plugin.nothing
