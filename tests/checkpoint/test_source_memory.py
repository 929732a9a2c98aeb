"""Reading or converting a checkpoint takes memory for a tensor and a buffer, whatever its format and size."""

import base64
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from tests import trainers

MEBIBYTE = 1 << 20
SIZE = int(os.environ.get("SOURCE_MEMORY_MIB", "320")) * MEBIBYTE
"""Bytes of a checkpoint: more than twice what may be used. 2048 was tried by hand for each format."""
ONE = 16 * MEBIBYTE
ROWS, COLUMNS = 4096, 2048

MEASURE = """
import sys, pathlib, torch
torch.set_num_threads(1)
from reload_plugin import convert, open_source

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
source = open_source(sys.argv[1])
sums = {}
for name, tensor in source:
    sums[name] = tensor[::64, ::64].double().sum().item()
    del tensor
read = status("VmHWM") - before
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
convert(sys.argv[1], sys.argv[2], weights_only=True)
print(source.format, len(sums), sum(sums.values()), read, status("VmHWM") - before)
"""


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    for number in range(SIZE // ONE):
        yield f"layers.{number}.weight", torch.full((ROWS, COLUMNS), number % 100, dtype=torch.bfloat16)


EXPECTED = sum(t[::64, ::64].double().sum().item() for _, t in weights())


def in_torch(folder: Path) -> None:
    torch.save({"model": dict(weights())}, folder / "model.pt")


def in_torch_transposed(folder: Path) -> None:
    torch.save({name: t.view(COLUMNS, ROWS).t() for name, t in weights()}, folder / "model.pt")


def in_old_torch(folder: Path) -> None:
    torch.save(dict(weights()), folder / "model.pt", _use_new_zipfile_serialization=False)


def in_safetensors(folder: Path) -> None:
    save_file(dict(weights()), folder / "model.safetensors")


def in_olmo(folder: Path) -> None:
    encoded = {base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode(): t for name, t in weights()}
    save_file(encoded, folder / "model.safetensors")


def in_dcp(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": dict(weights())}, checkpoint_id=folder, no_dist=True)


def _by_rank(rank: int, world: int, root: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.tensor import DTensor, Shard

    mesh = trainers._mesh(world, names=("fsdp",))
    for kind, dim in (("fsdp", 0), ("fsdp_columns", 1)):
        state = {
            name: DTensor.from_local(t.chunk(world, dim)[rank].clone(), mesh, [Shard(dim)], run_check=False)
            for name, t in weights()
        }
        Path(root, kind).mkdir(exist_ok=True)
        trainers.save_rank(state, f"{root}/{kind}", rank, world)
    writer = HuggingFaceStorageWriter(f"{root}/dcp_safetensors", save_distributed=True)
    dcp.save(state, storage_writer=writer)


BY_RANKS = ("fsdp", "fsdp_columns", "dcp_safetensors")


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("ranks")
    trainers.ranks(2, _by_rank, str(root))
    yield root
    shutil.rmtree(root)


def measured(folder: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    converted = folder.parent / f"{folder.name}-converted"
    command = [sys.executable, "-c", MEASURE, str(folder), str(converted)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    read, written = int(out[3]), int(out[4])
    with capsys.disabled():
        print(f"\n{name}, {SIZE >> 20} MiB: read in {read >> 20}, converted in {written >> 20} MiB", end="")
    assert int(out[1]) == SIZE // ONE
    assert float(out[2]) == EXPECTED
    assert max(read, written) < ONE + 128 * MEBIBYTE < SIZE // 2
    assert sum(t.nbytes for _, t in reload_plugin.open_source(converted)) == SIZE
    shutil.rmtree(converted)


@pytest.mark.parametrize(
    "write",
    [in_torch, in_torch_transposed, in_old_torch, in_safetensors, in_olmo, in_dcp],
    ids=lambda write: write.__name__.removeprefix("in_"),
)
def test_memory_is_bounded(
    tmp_path: Path, write: Callable[[Path], None], capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path)
    measured(tmp_path, write.__name__, capsys)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("kind", BY_RANKS)
def test_memory_is_bounded_for_files_of_ranks(
    by_ranks: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    measured(by_ranks / kind, kind, capsys)
