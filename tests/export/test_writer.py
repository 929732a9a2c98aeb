"""The writer planned by outputs: every tensor at its place in one file, whatever the sizes and the order."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reload_plugin.errors import ExportError
from reload_plugin.export.outputs import OutputGroup, parse_size, plan_export
from reload_plugin.export.planned_files import PlannedFiles, check_written, create_files
from reload_plugin.export.writer import METADATA, write_export
from reload_plugin.plan.source import TensorInfo
from tests.export.folders import files_of, tensors_of

TENSORS = {
    "model.embed.weight": torch.randn(7, 4),
    "model.layers.0.a.weight": torch.randn(3, 5).bfloat16(),
    "model.layers.0.b.weight": torch.randint(-9, 9, (2, 3, 4), dtype=torch.int8),
    "model.layers.2.a.weight": torch.randn(5, 3).t(),
    "model.layers.2.scalar": torch.tensor(3.5, dtype=torch.float64),
    "model.layers.10.a.weight": torch.randn(64, 9).half()[::2, 1:4],
    "model.layers.10.empty": torch.empty(0, 3),
    "head.weight": torch.tensor([True, False]),
}


def info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), tensor.dtype)


def group(tensors: Mapping[str, torch.Tensor]) -> OutputGroup:
    return OutputGroup(tuple(info(name, t) for name, t in tensors.items()), lambda: tensors)


def groups_of(size: int) -> list[OutputGroup]:
    names = sorted(TENSORS)  # not in natural order
    return [
        group({n: TENSORS[n] for n in names[start : start + size]}) for start in range(0, len(names), size)
    ]


@pytest.mark.parametrize("limit", [1, 20, 100, 300, "1KB", None])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_tensor_is_in_one_file_whatever_the_sizes(tmp_path: Path, limit: int | None, size: int) -> None:
    plan = plan_export(groups_of(size), limit)
    write_export(tmp_path / "out", plan)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert all(found[name].dtype == TENSORS[name].dtype for name in TENSORS)
    weights = [name for name in files_of(tmp_path / "out") if name.endswith(".safetensors")]
    if limit is None or limit == "1KB":
        assert files_of(tmp_path / "out") == ["model.safetensors"]
    else:
        assert weights == [
            f"model-{i:05}-of-{len(weights):05}.safetensors" for i in range(1, len(weights) + 1)
        ]
        large = [load_file(tmp_path / "out" / name) for name in weights]
        assert all(
            len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= int(limit) for tensors in large
        )


def test_files_follow_the_natural_order(tmp_path: Path) -> None:
    plan = plan_export(groups_of(3), 1)
    assert list(plan.file_of) == [
        "head.weight",
        "model.embed.weight",
        "model.layers.0.a.weight",
        "model.layers.0.b.weight",
        "model.layers.2.a.weight",
        "model.layers.2.scalar",
        "model.layers.10.a.weight",
        "model.layers.10.empty",
    ]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_parts_of_a_tensor_may_be_written_by_several(tmp_path: Path, dim: int) -> None:
    """As the ranks of an engine do, each with its own object on the same files."""
    whole = torch.randn(4, 6, 8)
    plan = plan_export([group({"a": torch.zeros(3), "w": whole})], None)
    create_files(tmp_path, plan.files, METADATA)
    half = whole.shape[dim] // 2
    ranks = [PlannedFiles(tmp_path, plan.files, METADATA) for _ in range(2)]
    ranks[0].write("a", torch.zeros(3))
    for rank, files in enumerate(ranks):
        starts = [0, 0, 0]
        starts[dim] = rank * half
        files.write("w", whole.narrow(dim, rank * half, half), starts)
        files.close()
    check_written(plan.files, [files.written for files in ranks])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], whole)
    with pytest.raises(ExportError, match=r"a \(0 of 3 elements\), w \(96 of 192 elements\)"):
        check_written(plan.files, [ranks[1].written])
    with pytest.raises(ExportError, match="a part was written twice"):
        check_written(plan.files, [ranks[0].written, ranks[0].written])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"w": torch.zeros(2, 3)}, "w was planned as .3, 2. torch.float32 and came as .2, 3."),
        ({"w": torch.zeros(3, 2).half()}, "came as .3, 2. torch.float16"),
        ({"w": torch.zeros(3, 2, device="meta")}, "without values"),
        ({}, "w .planned and not made."),
        ({"w": torch.zeros(3, 2), "x": torch.zeros(1)}, "x .made and not planned."),
    ],
)
def test_what_a_group_makes_is_checked_against_the_plan(
    tmp_path: Path, made: dict[str, torch.Tensor], says: str
) -> None:
    planned = OutputGroup((TensorInfo("w", (3, 2), torch.float32),), lambda: made)
    with pytest.raises(ExportError, match=says):
        write_export(tmp_path / "out", plan_export([planned], None))
    assert files_of(tmp_path) == []


def test_names_and_dtypes_that_no_file_can_have_are_refused_before_writing() -> None:
    twice = [group({"a.w": torch.zeros(1)}), group({"a.w": torch.zeros(1)})]
    with pytest.raises(ExportError, match=r"1 tensor would be written more than once: a.w \(2 times\)"):
        plan_export(twice, None)
    with pytest.raises(ExportError, match="complex128, which safetensors has no name for"):
        plan_export([group({"c": torch.zeros(1, dtype=torch.complex128)})], None)


@pytest.mark.parametrize(
    ("size", "nbytes"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 << 29), ("10KB", 10_000), ("7", 7), (12, 12)]
)
def test_sizes_are_read_as_hugging_face_writes_them(size: int | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes


@pytest.mark.parametrize("size", ["0GB", -1, "big", "", True, 1.5, "5 apples"])
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with pytest.raises(ExportError, match=r"max_shard_size is .* has to be a positive number of bytes"):
        parse_size(size)
