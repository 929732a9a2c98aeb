"""Checkpoints of many ranks: put together without a process group, or refused before a weight is read."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reload_plugin import open_source
from reload_plugin.checkpoint.formats.fsdp_files import _coordinate
from reload_plugin.checkpoint.pickle.values import OpaqueObject, Storage, StoredTensor
from reload_plugin.checkpoint.sharding import cover_error
from reload_plugin.errors import SourceError
from tests import trainers
from tests.checkpoint.test_torch_files import ATTACKS, Command, archived, bits, records

SIZES = ((5, 7), (7, 3), (3, 9), (9, 2), (2, 5))
"""In and out of each layer: none divides by three or four, and some have fewer rows than there are ranks."""


class OddLayer(torch.nn.Module):
    def __init__(self, number: int, inner: int, outer: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.linear = torch.nn.Linear(inner, outer)
        self.register_buffer("counts", torch.arange(3 + number))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def odd_model() -> torch.nn.Module:
    return torch.nn.Sequential(*(OddLayer(n, *size) for n, size in enumerate(SIZES)))


def _by_rank(rank: int, world: int, root: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def save(kind: str, state: dict) -> None:
        Path(root, f"{kind}{world}").mkdir(exist_ok=True)
        trainers.save_rank(state, f"{root}/{kind}{world}", rank, world)

    flat = trainers.sharded(odd_model(), trainers._mesh(world, names=("fsdp",))).state_dict()
    save("fsdp2_", flat)
    with trainers.fsdp1_state(odd_model()) as state:
        save("fsdp1_", state)
    if world == 4:
        mesh = trainers._mesh(2, 2, names=("ddp", "fsdp"))
        save("hsdp_", trainers.sharded(odd_model(), mesh).state_dict())
        mesh = trainers._mesh(2, 2, names=("fsdp", "tp"))
        cut = odd_model()
        plan = {f"{n}.linear": RowwiseParallel() if n % 2 else ColwiseParallel() for n in range(len(SIZES))}
        parallelize_module(cut, mesh["tp"], plan)
        state = trainers.sharded(cut, mesh["fsdp"]).state_dict()
        save("fsdp_tp_", state)
        dcp.save({"model": state}, checkpoint_id=f"{root}/dcp_tp")
        return
    dcp.save({"model": flat, "step": 3}, checkpoint_id=f"{root}/dcp")
    writer = HuggingFaceStorageWriter(f"{root}/dcp_safetensors", save_distributed=True)
    dcp.save(dict(flat), storage_writer=writer)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    for world in (3, 4):
        trainers.ranks(world, _by_rank, str(root))
    return root


KINDS = (
    *("fsdp2_3", "fsdp2_4", "fsdp1_3", "fsdp1_4", "hsdp_4", "fsdp_tp_4"),
    *("dcp", "dcp_tp", "dcp_safetensors"),
)
EXPECTED = {name: bits(tensor) for name, tensor in odd_model().state_dict().items()}


def read(folder: Path) -> dict[str, tuple]:
    return {name: bits(tensor) for name, tensor in open_source(folder)}


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_shards_are_put_together(written: Path, kind: str) -> None:
    assert read(written / kind) == EXPECTED
    assert not torch.distributed.is_initialized()


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(written / kind, tmp_path / kind))


def refuses(folder: Path, says: str) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        open_source(folder)
    assert str(folder) in str(caught.value)


# --- half written ---


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("kind", ["fsdp2_3", "fsdp1_3"])
def test_a_missing_rank_is_refused(copy: Callable, kind: str, rank: int) -> None:
    folder = copy(kind)
    (folder / f"model_world_size_3_rank_{rank}.pt").unlink()
    refuses(folder, rf"lacks the files of rank {rank} of 3 \(model_world_size_3_rank_{rank}\.pt\)")


def test_ranks_of_two_worlds_are_refused(copy: Callable, written: Path) -> None:
    folder = copy("fsdp2_3")
    shutil.copy(written / "fsdp2_4" / "model_world_size_4_rank_3.pt", folder)
    refuses(folder, "rank files of 3 and 4 ranks")


def test_a_rank_under_the_name_of_another_is_refused(copy: Callable) -> None:
    for kind, says in (
        ("fsdp2_3", "saved by rank 1 and the file says rank 0"),
        ("fsdp1_3", "overlap|in no part"),
    ):
        folder = copy(kind)
        shutil.copy(folder / "model_world_size_3_rank_1.pt", folder / "model_world_size_3_rank_0.pt")
        with pytest.raises(SourceError, match=says):
            open_source(folder)


def test_ranks_of_different_steps_are_refused(copy: Callable) -> None:
    folder = copy("fsdp2_3")
    beside = folder / "extra_state_world_size_3_rank_1.pt"
    extra = torch.load(beside)
    extra["lr_scheduler"]["last_epoch"] += 1
    torch.save(extra, beside)
    refuses(folder, r"ranks of different steps: lr_scheduler\.last_epoch is 1 for rank 0 and 2 for rank 1")


def test_optimizers_of_different_steps_are_refused(copy: Callable) -> None:
    folder = copy("fsdp2_3")
    for rank in range(3):
        state = {"0.linear.weight": {"step": torch.tensor(4.0 + (rank == 2)), "exp_avg": torch.ones(2)}}
        optimizer = {"state": state, "param_groups": [{"lr": 1.0}]}
        torch.save(optimizer, folder / f"optim_world_size_3_rank_{rank}.pt")
    refuses(folder, r"different steps: state\.0\.linear\.weight\.step is 4 for rank 0 and 5 for rank 2")
    (folder / "optim_world_size_3_rank_2.pt").write_bytes(b"a file of another kind")
    assert read(folder) == EXPECTED


@pytest.mark.parametrize(("kind", "name"), [("hsdp_4", "0.linear.weight"), ("fsdp2_3", "4.counts")])
def test_copies_that_differ_are_of_different_steps(copy: Callable, kind: str, name: str) -> None:
    folder = copy(kind)
    rank = 2
    path = next(folder.glob(f"model_world_size_*_rank_{rank}.pt"))
    tensor = odd_model().state_dict()[name]
    held = bits(tensor)[2] if name.endswith("counts") else bits(tensor[:4])[2]
    whole = path.read_bytes()
    at = whole.index(held)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refuses(folder, "hold copies of .* that differ: they are ranks of different steps")


def test_ranks_with_other_weights_are_refused(copy: Callable) -> None:
    folder = copy("fsdp2_3")
    torch.save({"w": torch.ones(2)}, folder / "model_world_size_3_rank_2.pt")
    refuses(folder, "do not hold the same weights")


def test_a_shard_of_another_size_is_refused(copy: Callable, written: Path) -> None:
    folder = copy("fsdp1_3")
    for rank in (0, 1, 2):
        source = written / "fsdp1_4" / f"model_world_size_4_rank_{rank}.pt"
        shutil.copy(source, folder / f"model_world_size_3_rank_{rank}.pt")
    refuses(folder, "is not whole in the files beside .*elements are in no part")


@pytest.mark.parametrize("kind", ["dcp", "dcp_tp"])
def test_a_missing_or_short_file_of_dcp_is_refused(copy: Callable, kind: str) -> None:
    folder = copy(kind)
    path = folder / "__1_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refuses(folder, rf"__1_0\.distcp has {len(whole) - 1:,} bytes and by \.metadata it has {len(whole):,}")
    path.unlink()
    refuses(folder, r"lacks __1_0\.distcp, which its \.metadata names")


def test_a_save_of_dcp_that_has_not_ended_is_refused(copy: Callable) -> None:
    folder = copy("dcp")
    (folder / ".metadata").rename(folder / ".metadata.tmp")
    refuses(folder, r"holds \.metadata\.tmp: a save into it has not ended")
    (folder / ".metadata.tmp").unlink()
    refuses(folder, r"holds \.distcp files and no \.metadata")


def test_a_missing_shard_of_safetensors_is_refused(copy: Callable) -> None:
    folder = copy("dcp_safetensors")
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    refuses(folder, "has no shard 2 of its 3 or more")


def test_a_hole_in_shards_of_safetensors_is_refused(copy: Callable) -> None:
    folder = copy("dcp_safetensors")
    path = folder / "shard-00002-model-00001-of-00001.safetensors"
    tensors = load_file(path)
    table = {name: {"saved_offsets": [9] * t.ndim} for name, t in tensors.items()}
    save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(table)})
    refuses(folder, "is not whole in")
    save_file(tensors, path, {"DCP_SHARDING_INFO": "{"})
    with pytest.raises(SourceError, match="damaged DCP_SHARDING_INFO"):
        open_source(folder)


@pytest.mark.parametrize("kind", ["fsdp2_3", "dcp", "dcp_safetensors"])
def test_files_that_change_while_they_are_read_are_an_error(copy: Callable, kind: str) -> None:
    folder = copy(kind)
    source = open_source(folder)
    iterator = iter(source)
    next(iterator)
    file = Path(source.files[-1])
    os.utime(file, ns=(0, 0))
    with pytest.raises(SourceError, match="changed while it was read"):
        list(iterator)
    assert not source.unchanged()
    with pytest.raises(SourceError, match="changed while it was read"):
        list(source)


@pytest.mark.parametrize("kind", ["fsdp2_3", "dcp", "dcp_safetensors"])
def test_a_marker_is_asked_for(copy: Callable, kind: str) -> None:
    folder = copy(kind)
    with pytest.raises(SourceError, match="has no file STABLE, so its save has not ended"):
        open_source(folder, require_marker="STABLE")
    (folder / "STABLE").touch()
    assert set(open_source(folder, require_marker="STABLE").names()) == set(EXPECTED)
    with pytest.raises(SourceError, match="is the name of a file"):
        open_source(folder, require_marker="../STABLE")


# --- pickles ---


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_pickles_of_ranks_and_metadata_run_nothing(
    copy: Callable, tmp_path: Path, attack: Callable[[Path], tuple]
) -> None:
    where = tmp_path / "ran"
    evil = Command(attack, where)
    folder = copy("fsdp2_3")
    path = folder / "model_world_size_3_rank_1.pt"
    state = torch.load(path, weights_only=False)
    torch.save(state | {"evil": evil}, path)
    with pytest.raises(SourceError, match="could run code"):
        open_source(folder)
    folder = copy("dcp")
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for field in ("planner_data", "storage_meta"):
        setattr(metadata, field, {"model.0.linear.weight": evil})
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(SourceError, match="could run code"):
            open_source(folder)
    assert not where.exists()


def test_a_chunk_that_is_a_command_does_not_run(copy: Callable, tmp_path: Path) -> None:
    """The files of DCP hold pickles too, which are opened when their tensor is read."""
    import io

    folder = copy("dcp")
    where = tmp_path / "ran"
    path = folder / "__0_0.distcp"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save({"evil": Command(ATTACKS[0], where)}, buffer)
    for index, info in metadata.storage_data.items():
        if index.fqn == "model.0.linear.weight" and info.relative_path == path.name:
            info.offset, info.length = path.stat().st_size, len(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    path.write_bytes(path.read_bytes() + buffer.getvalue())
    with pytest.raises(SourceError, match=r"is damaged at byte .*could run code"):
        list(open_source(folder))
    assert not where.exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "..", "", "a\0b"])
def test_metadata_that_names_files_elsewhere_is_refused(copy: Callable, path: str) -> None:
    folder = copy("dcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refuses(folder, "names a file outside its folder")


# --- damaged at random ---

FUZZED = {
    "fsdp2_3": "model_world_size_3_rank_1.pt",
    "fsdp1_3": "model_world_size_3_rank_1.pt",
    "dcp": ".metadata",
    "dcp_tp": "__2_0.distcp",
    "dcp_safetensors": "shard-00002-model-00001-of-00001.safetensors",
}
TIMES = 800


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_bytes(copy: Callable, kind: str) -> None:
    """A SourceError, or the listed tensors. What is flipped inside a weight's bytes nothing can tell."""
    folder = copy(kind)
    path = folder / FUZZED[kind]
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(7)

    def number(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    refused = 0
    for _ in range(TIMES):
        data = bytearray(whole)
        for _ in range(1 + number(3)):
            data[number(len(data))] = number(256)
        if not number(10):
            del data[number(len(data)) :]
        path.write_bytes(data)
        try:
            source = open_source(folder)
            listed = {info.name: (info.shape, info.dtype) for info in source.infos()}
            found = read(folder)
        except SourceError:
            refused += 1
        else:
            assert {name: value[:2] for name, value in found.items()} == listed
    assert TIMES // 20 < refused < TIMES


# --- boxes ---


def grid(rows: int, columns: int) -> Iterator[tuple]:
    for row in range(rows):
        for column in range(columns):
            yield ((row * 2, column * 3), (2, 3))


def test_boxes_that_cover_a_tensor_once() -> None:
    boxes = list(grid(4, 5))
    assert cover_error(boxes, (8, 15)) is None
    assert cover_error(boxes[::-1], (8, 15)) is None
    assert "6 of its 120 elements are in no part" in cover_error(boxes[1:], (8, 15))
    assert "overlap" in cover_error([*boxes[1:], ((1, 2), (1, 2))], (8, 15))
    assert "overlap" in cover_error([*boxes, boxes[3]], (8, 15))
    assert "reaches to" in cover_error([*boxes, ((8, 0), (1, 1))], (8, 15))
    assert cover_error([((), ())], ()) is None
    assert "overlap" in cover_error([((), ()), ((), ())], ())
    assert cover_error([], (0, 4)) is None
    assert "1 of its 1 elements" in cover_error([], ())


# --- what other versions of torch write ---


OLDER = {
    b"torch.distributed.tensor\nDTensor\n": b"torch.distributed._tensor.api\nDTensor\n",
    b"tensor.placement_types\nShard\n": b"_tensor.placement_types\nShard\n",
    b"tensor._dtensor_spec\nDTensorSpec": b"_tensor.placement_types\nDTensorSpec",
    b"tensor._dtensor_spec\nTensorMeta": b"_tensor.placement_types\nTensorMeta",
}


def test_older_names_of_the_same_classes_are_known(copy: Callable) -> None:
    """DTensor has lived in several modules of torch."""
    folder = copy("fsdp_tp_4")
    for path in folder.glob("model_*.pt"):
        content = records(path)
        name = next(n for n in content if n.endswith("data.pkl"))
        old = content[name]
        for now, then in OLDER.items():
            assert now in old
            old = old.replace(now, then)
        archived(path, content | {name: old})
    assert read(folder) == EXPECTED


@pytest.mark.parametrize(
    "layout",
    [
        {"mesh": StoredTensor(Storage("0", 24, 4), torch.int32, 0, (2, 3), (3, 1))},
        {"_layout": {"shape": (2, 3), "stride": (3, 1)}},
        {"_layout": {"axes": [{"shape": (2,)}, {"shape": (3,)}]}},
        {"_layout": {"shape": ((1, 2), 3), "stride": ((6, 3), 1)}},
    ],
    ids=range(4),
)
@pytest.mark.parametrize("place", [None, (1, 2), [1, 2]], ids=str)
def test_every_spelling_of_a_device_mesh_is_understood(layout: dict, place: object) -> None:
    mesh = inert(layout | {"_rank": 5, "_coordinate_on_dim": place})
    assert _coordinate(mesh, 5, 6) == ((2, 3), (1, 2))
    with pytest.raises(ValueError, match="saved by rank 5"):
        _coordinate(mesh, 4, 6)


def inert(value: object) -> object:
    """Dicts as objects with that state, at any depth."""
    if isinstance(value, dict):
        made = OpaqueObject("x", ())
        made.state = {key: inert(inner) for key, inner in value.items()}
        return made
    return (
        [inert(inner) for inner in value]
        if type(value) is list and value and type(value[0]) is dict
        else value
    )
