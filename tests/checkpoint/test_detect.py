"""What is no checkpoint, or one of a kind that is not read, is refused with what to use instead."""

import base64
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reload_plugin import open_source, reload_weights
from reload_plugin.errors import ReloadError, SourceError
from tests.checkpoint.test_torch_files import ATTACKS, Command, bits
from tests.transaction.test_session import A, B, Model, cold, identities, registered, values  # noqa: F401

W = {"a.weight": torch.ones(2, 3)}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def megatron(folder: Path) -> None:
    touch(folder, "latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt")


def megatron_step(folder: Path) -> None:
    touch(folder, "mp_rank_00_001/model_optim_rng.pt", "mp_rank_01_001/model_optim_rng.pt")


def megatron_core(folder: Path) -> None:
    """Megatron-Core's distributed checkpoints are DCP with tensors that only it can map."""
    touch(folder, ".metadata", "__0_0.distcp", "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def zero(folder: Path) -> None:
    touch(folder, "latest", "zero_to_fp32.py", "global_step500/mp_rank_00_model_states.pt")


def zero_step(folder: Path) -> None:
    touch(folder, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt")


def zero_three(folder: Path) -> None:
    touch(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt")


def lora(folder: Path) -> None:
    touch(folder, "adapter_config.json")
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def lora_bin(folder: Path) -> None:
    torch.save(W, folder / "adapter_model.bin")


def gguf(folder: Path) -> None:
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0")


def text(folder: Path) -> None:
    (folder / "weights.txt").write_bytes(base64.b64encode(pickle.dumps(W)))


def nothing(folder: Path) -> None:
    pass


def notes(folder: Path) -> None:
    touch(folder, "README.md", "config.json", "training_args.bin", "optimizer.pt")


def two_below(folder: Path) -> None:
    for name in ("step_1", "step_2"):
        (folder / name).mkdir()
        save_file(W, folder / name / "model.safetensors")


def unfinished_consolidation(folder: Path) -> None:
    (folder / "sharded").mkdir()
    save_file(W, folder / "sharded" / "shard-00001-model-00001-of-00001.safetensors")


def numbered(folder: Path) -> None:
    save_file(W, folder / "model-00002-of-00003.safetensors")


REFUSED = {
    megatron: "Megatron checkpoint.*AutoBridge.*export_hf_weights",
    megatron_step: "Megatron checkpoint",
    megatron_core: "Megatron checkpoint",
    zero: r"DeepSpeed ZeRO.*python .*/zero_to_fp32\.py .* --safe_serialization",
    zero_step: r"DeepSpeed ZeRO.*zero_to_fp32\.py",
    zero_three: "DeepSpeed ZeRO",
    lora: "LoRA adapter without the weights.*merge_and_unload",
    lora_bin: "LoRA adapter",
    gguf: "GGUF.*from_transformers",
    text: "in base64.*weights_iterator",
    nothing: "holds no weights: nothing",
    notes: r"holds no weights: only README\.md, config\.json, optimizer\.pt, training_args\.bin",
    two_below: "its folders step_1, step_2 do. Give one of them",
    unfinished_consolidation: "its folders sharded do. Give one of them",
    numbered: "lacks file 1 of the 3 of model",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_known_is_refused_with_what_to_use(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    with pytest.raises(SourceError, match=REFUSED[make]) as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "make", [zero_step, zero_three, lora, lora_bin, gguf, text], ids=lambda m: m.__name__
)
def test_a_single_file_of_such_a_kind_is_refused_too(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    for file in tmp_path.iterdir():
        with pytest.raises(SourceError):
            open_source(file)


def test_parts_of_a_checkpoint_say_what_to_give(tmp_path: Path) -> None:
    touch(
        tmp_path, "model_world_size_2_rank_0.pt", "__0_0.distcp", ".metadata", "model.safetensors.index.json"
    )
    for file in tmp_path.iterdir():
        with pytest.raises(SourceError, match=f"Give the folder {tmp_path}"):
            open_source(file)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"hello", b"{}", b"\x89PNG", b"\x80", b"PK\x03\x04", b"\x80\x02."]
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "pytorch_model.bin", "weights", "x.gguf"])
def test_files_of_anything_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(SourceError, match=str(tmp_path)):
            open_source(path)


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", "org/model", "a\0b", ""):
        with pytest.raises(SourceError):
            open_source(path)


def test_weights_one_folder_below_are_found(tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    (tmp_path / "huggingface").mkdir()
    torch.save(W, tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    assert open_source(tmp_path).names() == ["a.weight"]


def test_weights_beside_training_states_of_deepspeed_are_read(tmp_path: Path) -> None:
    zero(tmp_path)
    save_file(W, tmp_path / "model.safetensors")
    assert open_source(tmp_path).format == "safetensors"


# --- OLMo's names ---


def olmo(path: Path, *entries: tuple[tuple, bool], **more: bytes) -> Path:
    named = {base64.urlsafe_b64encode(pickle.dumps(entry)).decode(): torch.ones(2) for entry in entries}
    save_file(named, path)
    return path


def test_nested_paths_of_olmo_become_names(tmp_path: Path) -> None:
    path = olmo(tmp_path / "model.safetensors", (("transformer.wte.weight",), False), (("step",), True))
    assert open_source(path).names() == ["transformer.wte.weight"]
    entries = (
        (("model", "w"), False),
        (("optim", "state", 0, "exp_avg"), False),
        (("optim", "param_groups"), True),
    )
    assert open_source(olmo(path, *entries)).names() == ["w"]
    assert open_source(olmo(tmp_path / "x.safetensors", *entries)).format == "olmo"


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_names_of_olmo_run_nothing(tmp_path: Path, attack: Callable[[Path], tuple]) -> None:
    where = tmp_path / "ran"
    path = olmo(tmp_path / "model.safetensors", ((Command(attack, where),), False), (("w",), False))
    for place in (path, tmp_path):
        with pytest.raises(SourceError, match="could run code"):
            open_source(place)
    assert not where.exists()


def test_values_of_olmo_that_are_pickles_are_not_loaded(tmp_path: Path) -> None:
    where = tmp_path / "ran"
    evil = torch.frombuffer(bytearray(pickle.dumps(Command(ATTACKS[0], where))), dtype=torch.uint8)
    names = [
        base64.urlsafe_b64encode(pickle.dumps(entry)).decode() for entry in ((("x",), True), (("w",), False))
    ]
    save_file({names[0]: evil, names[1]: torch.ones(2)}, tmp_path / "model.safetensors")
    assert {name: bits(t) for name, t in open_source(tmp_path)} == {"w": bits(torch.ones(2))}
    assert not where.exists()


@pytest.mark.parametrize(
    "entry", [3, (), ((), False), (("w",), 1), ((None,), False), ((("w",),), False)], ids=repr
)
def test_other_names_in_base64_are_refused(tmp_path: Path, entry: object) -> None:
    with pytest.raises(SourceError, match="no path of OLMo"):
        open_source(olmo(tmp_path / "model.safetensors", entry))


# --- through a reload ---


@pytest.fixture(scope="module")
def served() -> tuple:
    model = cold(Model, A)
    return model, values(model), values(cold(Model, B)), identities(model)


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_model_is_not_touched_by_what_is_refused(
    served: tuple, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    model, on_a, _, places = served
    make(tmp_path)
    with pytest.raises(ReloadError, match="The engine serves what it served before") as caught:
        reload_weights(model, weights_path=str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert values(model) == on_a
    assert identities(model) == places


def forms(folder: Path) -> Iterator[Path]:
    torch.save({"model": B, "optimizer": {"state": {}, "param_groups": []}}, folder / "x.pt")
    yield folder / "x.pt"
    (folder / "bin").mkdir()
    torch.save(B, folder / "bin" / "pytorch_model.bin")
    yield folder / "bin"
    (folder / "dcp").mkdir()
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": B}, checkpoint_id=folder / "dcp", no_dist=True)
    yield folder / "dcp"


def test_a_reload_asks_for_the_marker_and_reads_every_form(served: tuple, tmp_path: Path) -> None:
    model, on_a, on_b, places = served
    for path in forms(tmp_path):
        folder = path if path.is_dir() else path.parent
        with pytest.raises(SourceError, match=r"has no file STABLE.*serves what it served before"):
            reload_weights(model, weights_path=str(path), require_marker="STABLE")
        assert values(model) == on_a
        (folder / "STABLE").touch()
        report = reload_weights(model, weights_path=str(path), require_marker="STABLE")
        assert report.tensors == len(B)
        assert values(model) == on_b
        reload_weights(model, iter(A.items()))
        assert values(model) == on_a
        assert identities(model) == places
        (folder / "STABLE").unlink()


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    served: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reload_plugin.checkpoint import file_source

    model, on_a, _, _ = served
    name = next(iter(B))
    torch.save(B | {name: torch.ones(3)}, tmp_path / "x.pt")
    monkeypatch.setattr(file_source, "read_locations", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ReloadError, match="misshapen"):
        reload_weights(model, weights_path=str(tmp_path / "x.pt"))
    assert values(model) == on_a


def test_a_damaged_chunk_in_the_middle_leaves_the_model_as_it_was(served: tuple, tmp_path: Path) -> None:
    model, on_a, _, places = served
    *_, folder = forms(tmp_path)
    path = folder / "__0_0.distcp"
    before, storage, after = path.read_bytes().rpartition(b"FloatStorage")
    path.write_bytes(before + storage[::-1] + after)
    with pytest.raises(SourceError, match=r"__0_0\.distcp is damaged"):
        reload_weights(model, weights_path=str(folder))
    assert values(model) == on_a
    assert identities(model) == places
    shutil.rmtree(folder)


def test_the_index_of_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(SourceError):
        open_source(tmp_path)
