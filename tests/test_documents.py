"""The documents: their length, their links, their commands, their code, and the figures they give."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

import reload_plugin
from reload_plugin import errors, options
from reload_plugin.vllm_hooks import plugin
from tests import faults, zoo
from tests.test_structure import ORDER

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "reload_plugin"
README = ROOT / "README.md"
LIMITS = {"README.md": 150, "reload_plugin/README.md": 250, "reload_plugin/checkpoint/README.md": 150}
"""Document -> lines it may have."""
WORDS = 80
"""Words that a paragraph of the README may have."""
DOCUMENTS = tuple(
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in ("results", "output") for part in path.relative_to(ROOT).parts)
)
WANTED = {
    "README.md",
    "reload_plugin/README.md",
    "reload_plugin/checkpoint/README.md",
    "tests/README.md",
    "benchmarks/README.md",
    "benchmarks/NOTES.md",
    "examples/README.md",
}
MEASURED = re.compile(
    r"\d[\d.,]*\s?(?:s|ms|µs|seconds|milliseconds|microseconds|[KMG]i?B|GB/s|%|times|floors)(?![\w-])"
)
"""A figure with a unit in which something was measured."""
TABLES = ("main", "tensors", "bytes", "changed", "order", "disk", "repeated", "replay")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


# -- reading Markdown -----------------------------------------------------------------------------


def blocks(path: Path, *languages: str) -> Iterator[str]:
    """Code blocks in one of these languages, without their fences."""
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield code


def prose(path: Path) -> list[str]:
    """Paragraphs and list items; no code blocks, tables, headings and comments."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(\||#|<!--).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?=- |\d+\. )", "\n", text, flags=re.MULTILINE)
    return [part for part in map(str.strip, re.split(r"\n\s*\n", text)) if part]


def rows(path: Path, *columns: str) -> list[list[str]]:
    """Cells of the table whose first columns are these, without its head."""
    head = "| " + " | ".join(columns)
    _, found, rest = path.read_text().partition(head)
    assert found, f"no table in {path} begins with {head}"
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def anchors(path: Path) -> set[str]:
    """What a link to a heading of this document is called on GitHub."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def inline(path: Path) -> list[str]:
    """Code within sentences and tables."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def commands(path: Path) -> Iterator[list[str]]:
    """Command lines in code blocks and in sentences, as words."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
    for code in inline(path):
        if re.match(r"(python3? |reload-plugin \w|pip )", code):
            yield shlex.split(code)


# -- length and sentences -------------------------------------------------------------------------


def test_every_document_is_there() -> None:
    assert {str(path.relative_to(ROOT)) for path in DOCUMENTS} == WANTED


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_documents_are_short(name: str, limit: int) -> None:
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= limit, f"{name} has {lines} lines"


def test_paragraphs_of_the_readme_are_short() -> None:
    long = {part[:60]: count for part in prose(README) if (count := len(part.split())) > WORDS}
    assert not long


def test_the_readme_gives_measured_figures_in_tables_only() -> None:
    found = {figure: part[:60] for part in prose(README) for figure in MEASURED.findall(part)}
    assert not found


def test_the_readme_begins_with_what_was_measured_and_what_was_not_run() -> None:
    head = "\n".join(README.read_text().splitlines()[:10])
    for words in (
        "**Measured:**",
        "vLLM 0.32",
        "EPYC",
        "Xeon",
        "**Not run:**",
        "GPU",
        "**Frameworks:**",
    ):
        assert words in head


@each_document
def test_documents_speak_of_the_project_alone(path: Path) -> None:
    assert not re.findall(r"\bD\d+\b|#\d+\b|\bissue \d+|\bsession \d+", path.read_text())


# -- what documents refer to ----------------------------------------------------------------------


@each_document
def test_links_and_anchors_resolve(path: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(_page(target))):
            broken.append(link)
    assert not broken


def _page(target: Path) -> Path:
    """The document that a link to a folder shows."""
    return target / "README.md" if target.is_dir() else target


@each_document
def test_files_named_in_documents_exist(path: Path) -> None:
    tops = ("reload_plugin", "tests", "examples", "benchmarks")
    there = {f"/{found.relative_to(ROOT)}" for top in tops for found in (ROOT / top).rglob("*")}
    names = {code.rstrip("/") for code in inline(path) if re.fullmatch(r"[\w./]*\w\.py|[\w./]*\w/", code)}
    missing = {name for name in names if not any(found.endswith(f"/{name}") for found in there)}
    assert not missing - {*tops, *FOREIGN}


FOREIGN = {"zero_to_fp32.py"}
"""Files of other projects."""


@each_document
def test_commands_exist(path: Path) -> None:
    unknown = [shlex.join(words) for words in commands(path) if not _is_known(words)]
    assert not unknown


def _is_known(words: list[str]) -> bool:
    first, *rest = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if first in ("python", "python3", ".venv/bin/python"):
        return _is_script(rest)
    if first == "reload-plugin":
        return _is_subcommand(rest)
    if first == "pip":
        return _is_install_from_repository(rest)
    return first in ("curl", "post", "post()") or (ROOT / first).is_file()


def _is_script(words: list[str]) -> bool:
    """A file or module of this repository that takes these options and these tables."""
    if words[0] == "-m" and words[1] == "pytest":
        return all((ROOT / word).exists() for word in words[2:] if "/" in word)
    module = words[0] == "-m"
    name = words[1].replace(".", "/") + ".py" if module else words[0]
    if module and (ROOT / name.removesuffix(".py") / "__main__.py").is_file():
        name = name.removesuffix(".py") + "/__main__.py"
    if not (ROOT / name).is_file():
        return False
    arguments = words[2 if module else 1 :]
    source = (ROOT / name).read_text()
    if name in ("benchmarks/reload.py", "benchmarks/gpu.py"):
        return all(word in TABLES for word in arguments)
    return all(word in source for word in arguments if word.startswith("--"))


def _is_subcommand(words: list[str]) -> bool:
    import typer.main

    from reload_plugin.cli.app import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if words[0] not in known:
        return False
    taken = {option for parameter in known[words[0]].params for option in parameter.opts}
    return all(word in taken for word in words[1:] if word.startswith("--"))


def _is_install_from_repository(words: list[str]) -> bool:
    """Whether pip installs from a clone, by ``-e .`` or ``git+``, and from no index of packages.

    ``NAME @ git+file:///...`` is no requirement that pip takes.
    """
    install, *rest = words
    return install == "install" and (rest[:1] == ["-e"] or all(word.startswith("git+") for word in rest))


def test_messages_claim_no_package_index_either() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    claims = [str(file) for file in files if re.search(r"pip install \W*vllm-reload", file.read_text())]
    assert not claims


# -- code -----------------------------------------------------------------------------------------


@each_document
def test_python_in_documents_compiles_and_its_imports_resolve(path: Path) -> None:
    for code in blocks(path, "python"):
        tree = ast.parse(textwrap.dedent(code))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(alias.name) for alias in node.names), code
            elif isinstance(node, ast.ImportFrom):
                _assert_importable(node)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                of_ours = node.value.id == "reload_plugin"
                assert not of_ours or node.attr in reload_plugin.__all__, f"reload_plugin.{node.attr}"


def _assert_importable(node: ast.ImportFrom) -> None:
    assert node.module is not None
    if node.module.split(".")[0] == "vllm":  # imported, it costs seconds
        assert importlib.util.find_spec(node.module)
        return
    module = importlib.import_module(node.module)
    for alias in node.names:
        assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_errors_of_the_readme_are_those_that_can_be_raised() -> None:
    named = {
        name for cells in rows(README, "error", "cause") for name in re.findall(r"`(\w+Error)`", cells[0])
    }
    named |= {
        name for cells in rows(README, "error", "cause") for name in re.findall(r"`(\w+Error)`", cells[1])
    }
    # Of weights that go out, and of worker processes: the recipes have them.
    named |= {"ExportError", "WorkerDiedError"} & set(inline(ROOT / "examples" / "README.md"))
    public = {name for name in reload_plugin.__all__ if name.endswith("Error")}
    assert named <= {name for name in vars(errors) if name.endswith("Error")}
    assert public - named <= {"ReloadError", "NotRecordedError"}


def test_policies_and_options_are_all_described() -> None:
    policies = [cells[0].strip("`") for cells in rows(README, "`policy`")]
    assert sorted(policies) == sorted(get_args(options.ReloadPolicy))
    recipes = ROOT / "examples" / "README.md"
    described = [re.match(r"`(\w+)", cells[0])[1] for cells in rows(recipes, "option")]
    assert sorted(described) == sorted(options.OPTION_NAMES)


def test_formats_of_the_readme_are_those_of_the_package() -> None:
    def formats(path: Path) -> set[str]:
        return {
            name for cells in rows(path, "format", "on disk") for name in re.findall(r"`([\w-]+)`", cells[0])
        }

    assert formats(README) == formats(PACKAGE / "checkpoint" / "README.md")


# -- the architecture -----------------------------------------------------------------------------


def test_every_folder_of_the_package_is_described_in_the_order_of_the_line() -> None:
    cells = [row[0] for row in rows(PACKAGE / "README.md", "folder", "stage")]
    described = [name for cell in cells for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)]
    there = {
        path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.suffix != ".md"
    }
    assert described == [name for name in ORDER if name in there]


def test_everything_that_is_patched_is_described() -> None:
    plugin.register()
    patched = {name.rsplit(".", 1)[1] for name in plugin.patched()}
    described = "".join(cells[0] for cells in rows(PACKAGE / "README.md", "in vLLM"))
    assert patched
    assert not [name for name in patched if not re.search(rf"\b{name}\b", described)]


# -- figures --------------------------------------------------------------------------------------


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes the tables of a document from the results, as `benchmarks/readme.py` does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module: ModuleType = importlib.import_module("readme")
    return module.filled


def test_measured_tables_are_those_of_the_results(readme: Callable[[str], str]) -> None:
    for path in (README, ROOT / "benchmarks/README.md", PACKAGE / "checkpoint/README.md"):
        written = path.read_text()
        assert written.count("<!-- benchmark ") == written.count("<!-- end -->") > 0
        assert readme(written) == written, f"python benchmarks/readme.py writes {path} anew"
    assert readme(README.read_text().replace("| dense, ", "| sparse, ", 1)) == README.read_text()


def test_the_oracles_table_has_every_case() -> None:
    table = rows(ROOT / "tests" / "README.md", "case")
    assert [cells[0] for cells in table] == [case.name for case in zoo.CASES]
    own = {
        zoo.RIGHT: "values right",
        zoo.MOVED: "values right",
        zoo.WRONG: "**wrong**",
        zoo.RAISES: "**raises**",
    }
    for case, cells in zip(zoo.CASES, table, strict=True):
        assert cells[1].startswith(own.get(case.own, "**dies**")), case.name
        assert cells[2] == "right"


def test_the_table_of_faults_has_every_kind_and_adds_up() -> None:
    *table, total = rows(ROOT / "tests" / "README.md", "fault")
    assert [cells[0] for cells in table] == [kind.name for kind in faults.KINDS]
    for column, cell in enumerate(total[1:], 1):
        counts = [cells[column].split("/") for cells in table if cells[column] != "–"]
        assert cell == "/".join(str(sum(int(pair[side]) for pair in counts)) for side in (0, 1))


def test_figures_of_the_readme_stand_in_the_tables_of_the_tests() -> None:
    table = {cells[0]: cells for cells in rows(README, "what", "vLLM's own reload")}
    totals = [cell.split("/") for cell in rows(ROOT / "tests" / "README.md", "fault")[-1][1:]]
    own, ours = ([sum(int(cell[i]) for cell in totals[side::2]) for i in (0, 1)] for side in (0, 1))
    survived = table["survives a fault at every step"]
    assert survived[1:3] == [f"{pair[0]:,} of {pair[1]:,}" for pair in (own, ours)]
    assert ours[0] == ours[1]
    assert f"right in {_configurations()} configurations" in str(table)
    assert f"right in {_histories():,}" in str(table)
    known = {*re.findall(r"[\d,]*\d", str(survived[1:3])), str(_configurations()), f"{_histories():,}", "2"}
    figure = re.compile(r"(?<!\w)\d[\d,]*(?![\w,])")  # none within a word, as in W4A16
    said = {found for cells in table.values() for found in figure.findall(" ".join(cells[:3]))}
    assert said <= known, "a figure that no test or table gives"


def _configurations() -> int:
    """Rows of the methods for GPUs."""
    from tests.engine.gpu_methods.rows import ROWS

    said = (ROOT / "tests" / "README.md").read_text()
    assert f"of {len(ROWS)} configurations" in " ".join(said.split())
    return len(ROWS)


def _histories() -> int:
    """Histories that the suite plays, on models and on engines."""
    tree = ast.parse((ROOT / "tests/engine/test_histories.py").read_text())
    counts = {
        node.targets[0].id: sum(ast.literal_eval(node.value).values())
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("ON_MODELS", "ON_ENGINES")
    }
    said = " ".join((ROOT / "tests" / "README.md").read_text().split())
    assert f"{counts['ON_MODELS']:,} random histories" in said
    assert f"{counts['ON_ENGINES']} on two real engines" in said
    return sum(counts.values())
