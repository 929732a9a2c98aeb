"""``reload-plugin save`` on a real model: what it writes, what it says, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from reload_plugin.cli import main
from tests.export.folders import files_of, tensors_of
from tests.export.small_models import FAMILIES
from tests.offloaded_saves import make_original, quiet, scratch_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def mixtral() -> Iterator[Path]:
    quiet()
    family = next(family for family in FAMILIES if family.name == "mixtral")
    with scratch_folder() as folder:
        make_original(family, Path(folder, "mixtral"))
        yield Path(folder, "mixtral")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return main(["save", *map(str, arguments)]), *capfd.readouterr()

    return command


def test_a_model_is_saved_from_disk_in_other_files(run: Run, mixtral: Path, tmp_path: Path) -> None:
    original = tensors_of(mixtral)
    code, out, err = run(mixtral, tmp_path / "deep" / "out", "--max-shard-size", "4KB")
    assert (code, err) == (0, "")
    found = tensors_of(tmp_path / "deep" / "out")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)
    weights = len(list((tmp_path / "deep" / "out").glob("*.safetensors")))
    assert f"41 tensors, 24.5 KiB in {weights} files, of which 24 tensors were converted" in out
    assert files_of(tmp_path) == ["deep"]  # nothing is left of the scratch folder


def test_its_own_format_and_back_in_place(run: Run, mixtral: Path, tmp_path: Path) -> None:
    original = tensors_of(mixtral)
    code, out, _ = run(mixtral, tmp_path / "own", "--own-format", "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report["tiers"].values()) == {"source"}
    assert "model.layers.1.mlp.experts.gate_up_proj" in report["files"]
    assert run(tmp_path / "own", tmp_path / "back", "--max-shard-size", "1KB")[0] == 0
    for size in ("1KB", "1GB"):
        assert run(tmp_path / "back", tmp_path / "back", "--max-shard-size", size)[0] == 0
        found = tensors_of(tmp_path / "back")
        assert all(torch.equal(found[name], original[name]) for name in original)
    assert files_of(tmp_path / "back") == ["config.json", "generation_config.json", "model.safetensors"]


def test_what_cannot_be_opened_or_written_is_said_in_one_line(
    run: Run, mixtral: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for arguments, fact, step in (
        ((tmp_path / "none", tmp_path / "out"), "There is no folder", "Give the folder of a model"),
        ((tmp_path / "empty", tmp_path / "out"), "transformers cannot open", "with config.json and weights"),
        ((mixtral, tmp_path / "file"), "is no folder but a file", "Choose another name"),
        ((mixtral, tmp_path / "out", "--max-shard-size", "lots"), "max_shard_size is 'lots'", "Write"),
        ((mixtral, tmp_path / "out", "--scratch", tmp_path / "none"), "There is no folder", "--scratch"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert fact in err
        assert step in err.rpartition("next: ")[2]
    assert files_of(tmp_path) == ["empty", "file"]


def test_help_has_examples_and_exit_codes(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "Examples:" in out
    assert "DST may be SRC" in out
