"""FSDP models filled from checkpoints, on two processes; and the arithmetic of who holds what."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reload_plugin.tools.fsdp.slices import Division, SpanCoverage, local_shape, spans_of
from tests.fsdp_ranks import BUILDERS, Model

RANKS = 2
FORWARDS = (None, "eval", "grad")


def state() -> dict[str, torch.Tensor]:
    """A checkpoint with a NaN that is meant, and integers that no float holds."""
    torch.manual_seed(9)
    found = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
    found["blocks.0.steps"] = torch.tensor([1, -2, 2**60 + 1])
    found["blocks.1.norm.weight"][0] = float("nan")
    return found


def checkpoints(folder: Path) -> dict[str, Path]:
    whole = state()
    tied = {name: tensor for name, tensor in whole.items() if name != "head.weight"}
    untied_head = whole["embed.weight"].clone()
    finite = whole | {"blocks.1.norm.weight": torch.ones(8)}
    bad = {
        name: tensor for name, tensor in whole.items() if name not in ("blocks.0.up.bias", "blocks.1.steps")
    }
    bad |= {
        "extra.weight": torch.zeros(1),
        "embed.weight": torch.zeros(11, 9),
        "blocks.0.steps": torch.zeros(3),
    }
    contents = {
        "whole": whole,
        "tied": tied,
        "both": tied | {"head.weight": untied_head},
        "untied": whole,
        "finite": finite,
        "dropped": {name: tensor for name, tensor in whole.items() if name != "blocks.1.down.weight"},
        "bad": bad,
        "half": {name: t.bfloat16() if t.is_floating_point() else t for name, t in whole.items()},
    }
    paths = {name: folder / f"{name}.safetensors" for name in contents}
    for name, tensors in contents.items():
        save_file(tensors, paths[name])
    return paths


def cases(paths: dict[str, Path]) -> dict[str, list]:
    found: dict[str, list] = {}
    for kind in BUILDERS:
        for forward in FORWARDS:
            found[f"{kind}/{forward}"] = [
                "restored",
                {"kind": kind, "checkpoint": "whole", "forward": forward},
            ]
        found[f"{kind}/tied"] = ["restored", {"kind": kind, "checkpoint": "tied", "tied": True}]
        found[f"{kind}/both"] = ["restored", {"kind": kind, "checkpoint": "both", "tied": True}]
        found[f"{kind}/untied"] = ["refused", {"kind": kind, "checkpoint": "untied", "tied": True}]
        for name in ("bad", "dropped", "half"):
            found[f"{kind}/{name}"] = ["refused", {"kind": kind, "checkpoint": name}]
        found[f"{kind}/parts"] = ["from_whole_tensors", {"kind": kind, "checkpoint": "whole"}]
    found["olmo"] = ["checks_of_olmo_and_ours", {"checkpoint": "finite"}]
    found["opening"] = ["one_rank_fails", {"checkpoint": "whole", "when": "opening"}]
    for kind in ("fsdp1", "fsdp2"):
        found[f"{kind}/half way"] = ["one_rank_fails_half_way", {"kind": kind, "checkpoint": "whole"}]
    found["interrupted"] = ["one_rank_is_interrupted", {"checkpoint": "whole"}]
    found["absent"] = ["one_rank_never_comes", {"checkpoint": "whole"}]
    found["fsdp2/after all that"] = ["restored", {"kind": "fsdp2", "checkpoint": "whole"}]
    for _, arguments in found.values():
        arguments["checkpoint"] = str(paths[arguments["checkpoint"]])
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def ranks(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank found in every case; one start of two processes for all."""
    return run(RANKS, cases(paths), tmp_path_factory.mktemp("ranks"))


GRIDS = [(columns, by_ranks) for columns in (False, True) for by_ranks in (False, True)]


@pytest.fixture(scope="module")
def grid(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The same of four ranks on a mesh of two by two."""
    work = tmp_path_factory.mktemp("grid")
    asked = {
        f"{columns}/{by_ranks}": [
            "restored_on_a_grid",
            {
                "checkpoint": str(paths["whole"]),
                "work": str(work),
                "columns": columns,
                "by_ranks": by_ranks,
            },
        ]
        for columns, by_ranks in GRIDS
    }
    return run(4, asked, work)


def run(count: int, asked: dict[str, list], work: Path) -> list[dict]:
    """What each of ``count`` processes found."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-W", "ignore", "-m", "tests.fsdp_ranks"]
    arguments = [str(work), json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(count), *arguments], cwd=root, env=environment)
        for rank in range(count)
    ]
    try:
        for process in processes:
            process.wait(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(count)]


def found(ranks: list[dict], case: str) -> list[dict]:
    for rank in ranks:
        assert "failed" not in rank[case], rank[case]["failed"]
    return [rank[case] for rank in ranks]


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_rank_reads_its_slices_and_the_model_is_the_checkpoint(
    ranks: list[dict], kind: str, forward: str | None
) -> None:
    """Also after a forward pass, whose gathered weights must not be used again."""
    answers = found(ranks, f"{kind}/{forward}")
    for answer in answers:
        assert answer["same"]
        assert answer["forward"]
        report = answer["report"]
        assert report["elements"] == answer["elements"]
        assert report["bytes_read"] == report["staged_bytes"] == 4 * (answer["elements"] - 6) + 8 * 6
        assert report["whole"] == report["ignored"] == {}
        assert report["bytes_of_ranks"] == [other["report"]["bytes_read"] for other in answers]


def test_ranks_read_about_half_each(ranks: list[dict], paths: dict[str, Path]) -> None:
    total = sum(tensor.nbytes for tensor in state().values())
    buffers = 2 * 3 * 8
    for kind in ("fsdp1", "fsdp1_orig"):
        first, second = (answer["report"]["bytes_read"] for answer in found(ranks, f"{kind}/None"))
        assert first + second == total + buffers
        assert abs(first - second) < 32


@pytest.mark.parametrize("kind", BUILDERS)
def test_tied_weights_come_under_one_name_or_under_both(ranks: list[dict], kind: str) -> None:
    assert all(answer["same"] and answer["forward"] for answer in found(ranks, f"{kind}/tied"))
    for answer in found(ranks, f"{kind}/both"):
        assert answer["same"]
        assert answer["forward"]
        (reason,) = answer["report"]["ignored"].values()
        assert reason.startswith("tied to ")
        assert reason.endswith(", and equal")


@pytest.mark.parametrize("kind", BUILDERS)
def test_two_values_for_one_tied_weight_are_refused(ranks: list[dict], kind: str) -> None:
    for answer in found(ranks, f"{kind}/untied"):
        assert answer["same"]
        ((name, reason),) = answer["named"]["duplicate"].items()
        assert {name, reason.split()[2].rstrip(",")} == {"head.weight", "embed.weight"}


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_does_not_fit_is_named_on_every_rank_and_nothing_is_changed(
    ranks: list[dict], kind: str
) -> None:
    for answer in found(ranks, f"{kind}/bad"):
        assert answer["error"] == "WeightsError"
        assert answer["same"]
        assert sorted(answer["named"]["missing"]) == ["blocks.0.up.bias", "blocks.1.steps"]
        assert list(answer["named"]["unexpected"]) == ["extra.weight"]
        assert sorted(answer["named"]["misshapen"]) == ["blocks.0.steps", "embed.weight"]
        assert "Nothing was changed, on any rank." in answer["text"]
    for answer in found(ranks, f"{kind}/dropped"):
        assert (answer["error"], answer["same"]) == ("MissingWeightsError", True)
        assert list(answer["named"]["missing"]) == ["blocks.1.down.weight"]
    for answer in found(ranks, f"{kind}/half"):
        assert (answer["error"], answer["same"]) == ("MisshapenWeightsError", True)
        assert "cast=True converts" in answer["text"]


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_format_without_parts_is_read_whole_and_the_report_says_so(ranks: list[dict], kind: str) -> None:
    for answer in found(ranks, f"{kind}/parts"):
        assert answer["same"]
        whole = answer["report"]["whole"]
        assert all(reason == "a format without parts cannot be read in parts" for reason in whole.values())
        assert bool(whole) is (kind not in ("fsdp1_none", "fsdp2_hybrid"))


def test_olmos_check_refuses_padding_and_ours_does_not(ranks: list[dict]) -> None:
    """Its NaN stays in the padding; the weights are all there."""
    answers = found(ranks, "olmo")
    assert sum(answer["padding"] for answer in answers) > 0
    for answer in answers:
        assert answer["olmo refuses"] is (answer["padding"] > 0)
        assert answer["same"]


def test_a_rank_that_cannot_open_stops_all_before_anything_is_changed(ranks: list[dict]) -> None:
    first, second = found(ranks, "opening")
    assert (first["error"], second["error"]) == ("RanksDisagreeError", "SourceError")
    assert first["same"]
    assert second["same"]
    assert "nowhere.safetensors" in first["text"]
    assert "Nothing was changed, on any rank." in first["text"]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_rank_that_cannot_read_on_half_way_leaves_every_rank_as_it_was(
    ranks: list[dict], kind: str
) -> None:
    first, second = found(ranks, f"{kind}/half way")
    assert (first["error"], second["error"]) == ("RanksDisagreeError", "ReloadError")
    for answer in (first, second):
        assert answer["same"], "bit for bit what it had"
        assert answer["untouched"], "and the memory as well, padding included"
        assert "the disk is gone" in answer["text"]
        assert "Nothing was changed, on any rank." in answer["text"]
        assert answer["restored"], "the next restore is right"
    assert second["reads"] > 3
    assert all(answer["same"] for answer in found(ranks, "fsdp2/after all that"))


def test_ctrl_c_while_one_rank_reads_stops_all(ranks: list[dict]) -> None:
    first, second = found(ranks, "interrupted")
    assert (first["error"], second["error"]) == ("RanksDisagreeError", "KeyboardInterrupt")
    assert first["same"]
    assert second["same"]


def test_a_rank_that_never_comes_is_not_waited_for(ranks: list[dict]) -> None:
    first, _ = found(ranks, "absent")
    assert first["error"] == "RanksDisagreeError"
    assert "rank 1: did not answer rank 0 within 1 s" in first["text"]


@pytest.mark.parametrize(("columns", "by_ranks"), GRIDS)
def test_fsdp_with_tensor_parallelism_gets_the_shards_that_torch_cuts(
    grid: list[dict], columns: bool, by_ranks: bool
) -> None:
    """Rows that divide evenly neither by two nor by four; compared shard by shard with torch's own."""
    answers = found(grid, f"{columns}/{by_ranks}")
    for answer in answers:
        assert answer["before"], "the ranks held something else before"
        assert answer["local"]
        assert answer["same"]
        report = answer["report"]
        assert report["staged_bytes"] == sum(answer["bytes"])
        assert bool(report["whole"]) is by_ranks
        if not by_ranks:
            assert report["bytes_read"] == report["staged_bytes"]
    assert any("_StridedShard" in answer["placements"] for answer in answers)


# --- who holds what ---

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=3)


def divided(tensor: torch.Tensor, divisions: list[Division]) -> torch.Tensor:
    """What torch's own chunking leaves."""
    for d in divisions:
        pieces = [chunk(piece, d.ranks, d.rank, d.dim) for piece in all_chunks(tensor, d.pieces, d.dim)]
        tensor = torch.cat(pieces, d.dim)
    return tensor


def all_chunks(tensor: torch.Tensor, parts: int, dim: int) -> list[torch.Tensor]:
    found = list(tensor.chunk(parts, dim)) if tensor.shape[dim] else [tensor]
    return found + [tensor.narrow(dim, 0, 0)] * (parts - len(found))


def chunk(tensor: torch.Tensor, parts: int, part: int, dim: int) -> torch.Tensor:
    return all_chunks(tensor, parts, dim)[part]


@given(SIZES, st.data())
def test_spans_are_the_elements_that_chunking_leaves(shape: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 3))
    divisions = []
    for _ in range(count):
        ranks = data.draw(st.integers(1, 4))
        pieces = data.draw(st.sampled_from([1, 1, 2, 3]))
        dim = data.draw(st.integers(0, len(shape) - 1))
        divisions.append(Division(dim, ranks, data.draw(st.integers(0, ranks - 1)), pieces))
    numbers = torch.arange(math.prod(shape)).view(shape)
    expected = divided(numbers, divisions)
    spans = spans_of(shape, divisions)
    assert [i for span in spans for i in range(*span)] == expected.reshape(-1).tolist()
    assert local_shape(shape, divisions) == tuple(expected.shape)
    assert all(a[1] != b[0] for a, b in itertools.pairwise(spans))


def test_tensor_parallel_before_fsdp_as_torch_documents_it() -> None:
    """Eight rows on a mesh of 2 by 2 with the placements of ``_StridedShard``'s example."""
    rows = {}
    for data, tensor in ((0, 0), (0, 1), (1, 0), (1, 1)):
        spans = spans_of((8, 8), [Division(0, 2, data, pieces=2), Division(0, 2, tensor)])
        rows[data, tensor] = [(start // 8, stop // 8) for start, stop in spans]
    assert rows == {(0, 0): [(0, 2)], (0, 1): [(4, 6)], (1, 0): [(2, 4)], (1, 1): [(6, 8)]}


def test_the_table_names_what_is_missing_twice_or_padding() -> None:
    table = SpanCoverage()
    for place in ("whole", "short", "twice", "padding", "excused"):
        table.need(place, [(0, 4), (6, 9)])
    for place in ("whole", "short", "twice", "padding", "excused"):
        table.wrote(place, 0, 4)
    for place in ("whole", "twice", "padding"):
        table.wrote(place, 6, 3)
    table.wrote("short", 6, 1)
    table.wrote("twice", 3, 1)
    table.wrote("padding", 5, 1)
    table.excuse("excused", 6, 3)
    assert table.faults() == {
        "short": "elements 7 to 9 were not written",
        "twice": "element 3 was written twice",
        "padding": "elements 5 to 6 are padding and were written",
    }
