"""The benchmarks measure every table, write what they promise, and fail when what they timed was wrong."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.processor import has_operator
from tests.test_examples import run
from tests.zoo import INT4

TINY = ["--layers", "1", "--hidden", "128", "--vocabulary", "256", "--experts", "8"]
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TABLES = ("main", "tensors", "bytes", "changed", "order", "disk", "replay", "roads", "repeated")
QUANTIZED = ("dense, INT8 W8A8", "dense, W4A16", "dense, INT8 online")
"""Their processing leaves more behind than new parameters, and the floor has to undo all of it."""
PNG = b"\x89PNG"


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the benchmarks, as their scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# -- with engines ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_table_is_measured_and_written(tmp_path: Path) -> None:
    """Tiny models, one process a side; a way or two of each table."""
    models = ["--models", "dense", "1 k", "0.25 GB", *QUANTIZED]
    ways = [
        "--ways",
        "",
        "1/2 of the layers, only those sent",
        "1/2 of the layers",
        "shuffled, auto",
        "cold",
        "by the model's loader",
        "replayed",
    ]
    printed = run("benchmarks/reload.py", "all", "--smoke", "--profile", *models, *ways, "--output", tmp_path)
    for name in TABLES:
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["models"], name
        for model in report["models"].values():
            check_model(model)
        if name == "main":
            left_out = {name for name in QUANTIZED if "W4A16" in name and not has_operator(INT4)}
            assert report["models"].keys() == {"dense", *QUANTIZED} - left_out
        assert (tmp_path / f"{name}.md").read_text().strip() in printed
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert "tottime" in printed
    (tmp_path / "disk.png").unlink()
    run("benchmarks/plot.py", tmp_path / "disk.json")
    assert (tmp_path / "disk.png").read_bytes().startswith(PNG)


def check_model(model: dict[str, Any]) -> None:
    """Every reload of ours was right and says where its time went; the figures are those of the runs."""
    floor = model["summary"]["floor"]["median"]
    assert floor > 0
    for name, sides in model["runs"].items():
        way = model["summary"]["ways"][name]
        for one in (one for process in sides["ours"] for one in process["reloads"]):
            assert one["right"]
            assert one["seconds"] >= one["stages"]["total"] > 0
        assert way["ours"]["verdict"] == "right"
        assert way["ours"]["extra"]["first"] is not None
        assert way["ours over floor, later"] == way["ours"]["later"]["median"] / floor
        for run_of_ours in sides["ours"]:
            floors = [run_of_ours["floor"]] if "floor" in run_of_ours else []
            assert all(one["right"] and one["layers"] >= 4 for one in floors)
        assert way["vllm"]["verdict"] in ("right", "wrong")  # of experts, on a CPU; no promise of ours


def test_work_on_openmp_threads_is_timed_and_checked() -> None:
    printed = run("benchmarks/openmp.py", "--mib", "2", "--trials", "2")
    rows = [line for line in printed.splitlines() if line.startswith(("| read", "| hash"))]
    assert len(rows) == 2
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split("|")[1:])


@pytest.mark.slow
def test_formats_benchmark_reloads_right_answers_from_each(tmp_path: Path) -> None:
    """One format of one process, and one that ranks write."""
    chosen = [word for name in ("torch", "fsdp, columns") for word in ("--format", name)]
    printed = run("benchmarks/formats.py", *chosen, "--output", tmp_path, *TINY)
    rows = json.loads((tmp_path / "formats.json").read_text())["rows"]
    assert [row["format"] for row in rows] == ["torch", "fsdp, columns"]
    assert all(len(row["runs"]) == 2 and row["runs"][0]["seconds"] > 0 for row in rows)
    assert (tmp_path / "formats.md").read_text().strip() in printed


# -- without engines ------------------------------------------------------------------------------


class Answers:
    """Stands in for processes: the answers of an engine that is what it should be, unless told otherwise."""

    def __init__(self, **wrong: Any) -> None:
        self._wrong = wrong

    def do(self, job: dict[str, Any], plugin: bool) -> Any:
        if job["task"] == "cold":
            return {name: f"the answer of {name}" for name in job["folders"]} | self._wrong.get("truth", {})
        if not plugin and "dies" in self._wrong:
            raise RuntimeError(self._wrong["dies"])
        reloads = [self._reload(step, plugin) for step in job["steps"]]
        result = {"reloads": reloads, "ready": 9.0, "error": self._wrong.get("error") if plugin else None}
        result["graphs"] = self._wrong.get("graphs", [0, 0])
        if job.get("floor_of"):
            answer = self._wrong.get("floor", f"the answer of {job['floor_of']}")
            seconds = {"copy": 0.1, "process": 0.2, "read": 0.3, "once": 0.5, "hash": 0.05}
            result["floor"] = seconds | {"layers": 3, "answer": answer}
        return result

    def _reload(self, step: dict[str, Any], plugin: bool) -> dict[str, Any]:
        answer = f"the answer of {step['to']}"
        if not plugin:
            answer = self._wrong.get("own", answer)
        stages = {"total": 0.5} if plugin else {}
        common = {"extra": 1, "device_extra": None, "resident": 2, "from_disk": 0}
        common |= {"replayed": self._wrong.get("replayed", 0)}
        return {"to": step["to"], "seconds": 0.6, "stages": stages, "answer": answer} | common


def measured(imported: Callable[[str], ModuleType], root: Path, table: str = "disk", **wrong: Any) -> Any:
    tables = imported("tables")
    chosen = tables.TABLES[table]
    return tables.measure(chosen, chosen.models[0].small(), Answers(**wrong), root)


def test_a_way_by_the_loader_takes_no_copy_plan(
    imported: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    measured(imported, tmp_path / "right", "replay")
    with pytest.raises(SystemExit, match="weights took the copy plan"):
        measured(imported, tmp_path / "wrong", "replay", replayed=2)


def test_right_answers_are_summed_up(imported: Callable[[str], ModuleType], tmp_path: Path) -> None:
    found = measured(imported, tmp_path)["summary"]
    assert found["floor"]["median"] == pytest.approx(0.3)
    assert found["plain"]["median"] == pytest.approx(0.85)
    assert found["restart"]["median"] == 9
    assert found["ways"]["cold"]["ours over floor, later"] == pytest.approx(2)
    assert found["ways"]["warm"]["ours"]["later"]["count"] == 5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"truth": {"B": "another"}}, "differently from a cold start: reload 0, reload 2, reload 4"),
        ({"error": "ReloadError: no"}, "reload_plugin failed: ReloadError: no"),
        ({"floor": "another"}, "the floor was measured on answered differently"),
        ({"graphs": [4, 8]}, "4 CUDA graphs at the start and 8 after"),
    ],
)
def test_what_is_wrong_fails_the_run(
    imported: Callable[[str], ModuleType], tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        measured(imported, tmp_path, **wrong)


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ({"own": "another"}, "wrong"),
        (
            {"dies": "a child of reload.py died, status -11:\n"},
            "dies: a child of reload.py died, status -11:",
        ),
    ],
)
def test_what_vllm_gets_wrong_is_recorded(
    imported: Callable[[str], ModuleType], tmp_path: Path, wrong: dict[str, Any], verdict: str
) -> None:
    """And the tables and the plot can be made all the same."""
    report = {"table": "disk", "title": "A table", "axis": ""}
    report["models"] = {"dense": measured(imported, tmp_path / "models", **wrong)}
    for way in report["models"]["dense"]["summary"]["ways"].values():
        assert way["vllm"]["verdict"] == verdict
    imported("plot").write(report, tmp_path)
    assert f"**{verdict}**" in (tmp_path / "disk.md").read_text()
    assert (tmp_path / "disk.png").read_bytes().startswith(PNG)


def test_runs_of_one_table_become_one(imported: Callable[[str], ModuleType], tmp_path: Path) -> None:
    model = measured(imported, tmp_path / "models")
    files = []
    for name, malloc in (("a", "glibc"), ("b", "glibc"), ("a", "tcmalloc")):
        report = {"table": "disk", "title": "A table", "axis": "", "machine": {"malloc": malloc}}
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps(report | {"models": {name: model}}))
    run("benchmarks/plot.py", *files, "--output", tmp_path)
    models = json.loads((tmp_path / "disk.json").read_text())["models"]
    assert list(models) == ["a", "b", "a, tcmalloc"]
    assert "| a, tcmalloc: " in (tmp_path / "disk.md").read_text()
    assert (tmp_path / "disk.png").read_bytes().startswith(PNG)


def test_a_model_without_graphs_is_none_for_the_gpu(
    imported: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    tables = imported("gpu").with_graphs()
    assert tuple(tables) == (*TABLES, "card")
    models = {model.name: model for table in tables.values() for model in table.models}
    assert all(model.options["enforce_eager"] is False for model in models.values())
    fp8 = {name for name, model in models.items() if model.options.get("quantization") == "fp8"}
    assert fp8 == {"dense, FP8 online", "8 layers × 128 experts, FP8 online", "dense, 4 GB, FP8 online"}
    disk = tables["disk"]
    with pytest.raises(SystemExit, match="0 CUDA graphs at the start"):
        imported("tables").measure(disk, disk.models[0].small(), Answers(), tmp_path)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is something to measure on")
def test_gpu_tables_need_a_gpu() -> None:
    assert "no GPU" in run("benchmarks/gpu.py", fails=True)


def test_checkpoints_differ_in_the_share_that_was_asked_for(
    imported: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    models = imported("models")
    model = models.Model("", models.DENSE).small()
    a, b = models.write(tmp_path / "a", model, 1), models.write(tmp_path / "b", model, 2, changed=1 / 2)
    part = models.write_changed(tmp_path / "part", b, model, 1 / 2)
    from safetensors.torch import load_file

    before, after, sent = (load_file(folder / models.WEIGHTS) for folder in (a, b, part))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.0.")} == set(sent)
