"""The package's own promises: what it imports, what it exports, where vLLM enters."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reload_plugin

PACKAGE = Path(reload_plugin.__file__).parent
ORDER = (
    "errors",
    "interrupts",
    "tensors",
    "options",
    "report",
    "device",
    "vllm_api",
    "record",
    "plan",
    "checkpoint",
    "load",
    "process",
    "commit",
    "digest",
    "ranks",
    "transaction",
    "export",
    "offload",
    "vllm_hooks",
    "tools",
    "cli",
)
"""Files of the ground floor and folders, in the order in which they may import one another: a file imports
only from its own folder and from those before it. On the ground floor that holds file by file.
"""

PUBLIC = [
    "DuplicateWeightsError",
    "EngineBrokenError",
    "ExportError",
    "ExportReport",
    "KeepReport",
    "KernelFormatError",
    "MaterializeReport",
    "MisshapenWeightsError",
    "MissingWeightsError",
    "NonFiniteWeightsError",
    "NotRecordedError",
    "OffloadError",
    "ParkReport",
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
    "VerifyReport",
    "WeightsError",
    "WorkerDiedError",
    "abort_weight_update",
    "convert",
    "dispatch",
    "export_checkpoint",
    "flatten",
    "is_stale",
    "keep_weights_in_module",
    "materialize",
    "materialized",
    "open_source",
    "park",
    "parked",
    "read_nested",
    "record_for_reloading",
    "reload_dispatched",
    "reload_engine",
    "reload_engine_async",
    "reload_weights",
    "restore_for_reloading",
    "restore_fsdp",
    "save_offloaded",
    "status",
    "status_async",
    "unflatten",
    "unpark",
    "verify",
]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place_of(file: Path) -> str:
    """The folder of the package that a file belongs to; a file of the ground floor is a place by itself."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_places(file: Path) -> dict[str, str]:
    """Folder (or file of the ground floor) -> an import of it, anywhere in a file, also inside functions."""
    found = {}
    parts = ("reload_plugin", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - (node.level - 1)]
            target = (*base, *(node.module.split(".") if node.module else ()))[1:]
            for name in [target[0]] if target else [alias.name for alias in node.names]:
                found[name] = f"line {node.lineno}: from {'.' * node.level}{node.module or ''} import ..."
    return found


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_backwards_along_the_line(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        return
    own = ORDER.index(place_of(file))
    later = {name: where for name, where in imported_places(file).items() if ORDER.index(name) > own}
    assert not later, f"{file.relative_to(PACKAGE)} imports from folders that come after its own: {later}"


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_the_door_names_vllm(file: Path) -> None:
    if place_of(file) == "vllm_api":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.split(".")[0] == "vllm" for name in names), f"{file.name} imports vLLM"


KNOW_VERSIONS = ("vllm_api/versions.py", "vllm_api/seams.py", "vllm_api/ranges/", "vllm_hooks/ranges/")
"""Where versions of vLLM are compared, listed or named."""


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_versions_of_vllm_are_known_in_one_place(file: Path) -> None:
    """Elsewhere, what differs between versions is a call whose implementation was chosen already."""
    if str(file.relative_to(PACKAGE)).startswith(KNOW_VERSIONS):
        return
    text = file.read_text()
    named = re.findall(r"\b0\.(?:2[4-9]|[34]\d)\b|\(0, (?:2[4-9]|[34]\d)\)|__version__", text)
    assert not named, f"{file.relative_to(PACKAGE)} names versions: {named}"


ASKS_FOR_CUDA = {"checkpoint/formats/fast_readers.py"}
"""Files outside ``device/`` that name a kind of device: a reader there that exists for CUDA only."""


def kinds_of_device_named(tree: ast.AST) -> list[str]:
    """Where code asks which kind of device something is on. Whether a tensor has values (meta) is no such
    question.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = any(
                isinstance(side, ast.Attribute) and side.attr == "type" and "device" in ast.unparse(side)
                for side in sides
            )
            if asked and not any(isinstance(side, ast.Constant) and side.value == "meta" for side in sides):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and (
            node.attr in ("is_cpu", "is_cuda", "is_xpu", "is_mps")
            or ast.unparse(node) in ("torch.cuda", "torch.accelerator", "torch.xpu")
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any(name.startswith(("torch.cuda", "torch.accelerator", "torch.xpu")) for name in names):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_the_device_folder_asks_which_kind_of_device_it_is(file: Path) -> None:
    name = str(file.relative_to(PACKAGE))
    if place_of(file) == "device" or name in ASKS_FOR_CUDA:
        return
    found = kinds_of_device_named(ast.parse(file.read_text()))
    assert not found, f"{name} asks which kind of device it is; that is for DeviceOps to answer: {found}"


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ("if tensor.device.type == 'cpu': pass", True),
        ("if device.type not in ('cuda', 'xpu'): pass", True),
        ("where = tensor.is_cpu", True),
        ("torch.cuda.synchronize()", True),
        ("from torch.cuda import Stream", True),
        ("if device.type == 'meta': pass", False),
        ("if tensor.device == other.device: pass", False),
        ("if tensor.is_meta: pass", False),
    ],
)
def test_questions_for_the_kind_of_device_are_found(code: str, asks: bool) -> None:
    assert bool(kinds_of_device_named(ast.parse(code))) is asks


def test_every_file_has_a_place_in_the_order() -> None:
    assert {place_of(file) for file in files()} - {"__init__"} <= set(ORDER)


def test_tests_mirror_the_folders() -> None:
    """Which test guards a file is a path: ``tests/<folder>`` for ``reload_plugin/<folder>``."""
    folders = {
        folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name != "__pycache__"
    }
    tested = {folder.name for folder in Path(__file__).parent.iterdir() if any(folder.glob("test_*.py"))}
    assert folders - tested <= {"process"}, f"no tests for {sorted(folders - tested)}"


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
