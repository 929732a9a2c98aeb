"""Checkpoints turned into safetensors: exact, whole or not at all, and never stale unnoticed."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reload_plugin import convert, is_stale, read_nested, unflatten
from reload_plugin.checkpoint import open_folder, open_source
from reload_plugin.checkpoint.io import atomic, writing
from reload_plugin.errors import SourceError
from reload_plugin.tools.nested import NestedFile
from tests.checkpoint.test_sources import DTYPES, SHAPES
from tests.tools.test_nested import NESTED, assert_same, filled

STATE = {f"t{i}.{j}": filled(s, d, i + j) for i, s in enumerate(SHAPES) for j, d in enumerate(DTYPES)}
TRAINER = {
    "model": {
        "embed": torch.randn(4, 3),
        "t": torch.randn(3, 4).t(),
        "c": torch.randn(3, dtype=torch.complex128),
    },
    "optimizer": {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(4, 3)}},
        "groups": [{"lr": float("inf")}, (None, True)],
    },
    "rng": torch.arange(5, dtype=torch.uint8),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder: weights in two files, a config, a tokenizer, and things that do not go along."""
    path = tmp_path / "model"
    path.mkdir()
    names = sorted(STATE)
    for part in range(2):
        save_file({name: STATE[name] for name in names[part::2]}, path / f"model-{part}.safetensors")
    table = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    for name in ("config.json", "tokenizer.json", "vocab.txt", "modeling.py", ".hidden", "optimizer.pt"):
        (path / name).write_text("{}")
    return path


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    path = tmp_path / "trainer.pt"
    torch.save(TRAINER, path)
    return path


def by_the_library(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def in_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(tensors.items()))


# --- what is written ---


@pytest.mark.parametrize("limit", [10**9, 200, 1])
def test_a_folder_comes_out_bit_for_bit_whatever_the_size_of_its_files(folder: Path, limit: int) -> None:
    out = folder.parent / "out"
    report = convert(folder, out, max_file_bytes=limit)
    assert_same(in_order(by_the_library(out)), in_order(STATE))
    assert report.tensors == len(STATE)
    assert report.nbytes == sum(tensor.nbytes for tensor in STATE.values())
    assert report.copied == ("config.json", "modeling.py", "tokenizer.json", "vocab.txt")
    beside = {"model.safetensors.index.json"} if len(report.files) > 1 else set()
    assert {file.name for file in out.iterdir()} == set(report.files) | set(report.copied) | beside
    for file in report.files:
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            held = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
            assert held <= limit or len(opened.keys()) == 1
    if beside:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == report.nbytes
        assert all(name in load_file(out / file) for name, file in list(index["weight_map"].items())[::40])


def test_one_file_holds_everything_when_that_is_asked_for(folder: Path) -> None:
    out = folder.parent / "one.safetensors"
    assert convert(folder, out, max_file_bytes=1).files == ("one.safetensors",)
    assert_same(in_order(by_the_library(out)), in_order(STATE))


def test_every_tensor_begins_at_a_multiple_of_its_element(folder: Path) -> None:
    out = folder.parent / "one.safetensors"
    convert(folder, out)
    raw = out.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % STATE[name].element_size() == 0


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_torch_file_is_kept_exactly(tmp_path: Path, new: bool, target: str) -> None:
    torch.save(TRAINER, tmp_path / "trainer.pt", _use_new_zipfile_serialization=new)
    report = convert(tmp_path / "trainer.pt", tmp_path / target, max_file_bytes=100)
    assert (report.format, report.nested) == ("torch", True)
    assert_same(read_nested(tmp_path / target), TRAINER)
    assert "model.embed" in by_the_library(tmp_path / target)


def test_tied_weights_of_a_torch_file_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(100, 10)
    torch.save({"embed": weight, "head": weight, "rows": weight[3:5]}, tmp_path / "tied.pt")
    report = convert(tmp_path / "tied.pt", tmp_path / "tied.safetensors")
    assert report.nbytes == weight.nbytes
    back = read_nested(tmp_path / "tied.safetensors")
    back["head"][3, 0] = 7
    assert back["embed"][3, 0] == back["rows"][0, 0] == 7


@settings(max_examples=60, deadline=None)
@given(nested=NESTED, zipped=st.booleans())
def test_whatever_torch_saves_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, nested: object, zipped: bool
) -> None:
    file = tmp_path_factory.mktemp("saved") / "trainer.pt"
    torch.save(nested, file, _use_new_zipfile_serialization=zipped)
    convert(file, file.with_name("out.safetensors"))
    assert_same(read_nested(file.with_name("out.safetensors")), nested)


def test_a_module_keeps_its_metadata_and_its_parameters(trainer: Path) -> None:
    module = torch.nn.BatchNorm1d(3)
    state = module.state_dict(keep_vars=True)
    torch.save({"model": state, "again": state}, trainer)
    convert(trainer, trainer.with_name("out.safetensors"))
    back = read_nested(trainer.with_name("out.safetensors"))
    assert_same(back, {"model": state, "again": state})
    assert type(back["model"]["weight"]) is torch.nn.Parameter
    assert back["model"]["weight"] is back["again"]["weight"]
    assert back["model"]._metadata == state._metadata


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1, 2}, "builtins.set"),
        (torch.Size([1]), "torch.Size"),
        (torch.device("cpu"), "torch.device"),
        (torch.float32, "torch.dtype"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta_tensor"),
        (np.zeros(2), "numpy"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_safetensors_file_holds_is_named_by_its_path(trainer: Path, value: object, kind: str) -> None:
    torch.save({"model": [{"w": torch.zeros(1)}, {"x.y": value}]}, trainer)
    with pytest.raises(SourceError, match=rf"\['model'\]\[1\]\['x\.y'\] is .*{kind}"):
        convert(trainer, trainer.with_name("out"))
    assert not trainer.with_name("out").exists()


def test_a_state_dict_that_holds_itself_is_refused(trainer: Path) -> None:
    loop: dict = {"w": torch.zeros(1)}
    loop["again"] = [loop]
    torch.save(loop, trainer)
    with pytest.raises(SourceError, match=r"\['again'\]\[0\] holds itself"):
        convert(trainer, trainer.with_name("out"))


def test_a_converted_file_converted_again_keeps_its_nesting(trainer: Path) -> None:
    convert(trainer, trainer.with_name("once.safetensors"))
    convert(trainer.with_name("once.safetensors"), trainer.with_name("twice"))
    assert_same(read_nested(trainer.with_name("twice")), TRAINER)


def test_config_and_tokenizer_come_from_where_one_says(folder: Path, trainer: Path) -> None:
    report = convert(trainer, trainer.with_name("out"), config=folder)
    assert "config.json" in report.copied
    assert not convert(trainer, trainer.with_name("other")).copied
    with pytest.raises(SourceError, match="no folder /nowhere"):
        convert(trainer, trainer.with_name("third"), config="/nowhere")


def test_progress_is_told_and_ends_with_all_of_it(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(folder, folder.parent / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert seen == sorted(seen)


# --- what is refused ---


def test_a_pickle_that_would_run_a_command_does_not_run_it(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for name, write in (
        ("new.pt", torch.save),
        ("plain.bin", lambda value, path: path.write_bytes(pickle.dumps(value))),
    ):
        write({"w": torch.zeros(1), "bad": Bad()}, tmp_path / name)
        with pytest.raises(SourceError, match=r"cannot be read as a file of torch\.save"):
            convert(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_damaged_torch_files_are_refused_or_read(trainer: Path) -> None:
    whole = trainer.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        for changed in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            trainer.write_bytes(changed)
            try:
                convert(trainer, trainer.with_name("out.safetensors"), overwrite=True)
            except SourceError:
                continue
    assert {file.name for file in trainer.parent.iterdir()} <= {"trainer.pt", "out.safetensors"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_refused_or_read(trainer: Path, zipped: bool) -> None:
    """Bytes of the listing are replaced, often by operations of a pickle."""
    state = torch.nn.BatchNorm1d(3).state_dict(keep_vars=True)
    lazy, negative = (torch.randn(3, dtype=torch.complex64).conj() for _ in range(2))
    rich = {
        "model": state,
        "lazy": lazy,
        "negative": negative.imag,
        "t": TRAINER["model"]["t"],
        "o": (1, {0: 2j}),
    }
    torch.save(rich, trainer, _use_new_zipfile_serialization=zipped)
    opened = NestedFile(trainer)
    assert_same(unflatten(dict(opened.read()), opened.structure), rich)
    whole, random = trainer.read_bytes(), Random(5)
    listing = whole.index(b"byteorder") if zipped else len(whole)
    outcomes = set()
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(random.choice([1, 1, 3])):
            some = random.choice(b"\x00\x01(.)}]estuabRQhK\xff")
            changed[random.randrange(listing)] = random.choice([some, random.randrange(256)])
        trainer.write_bytes(changed)
        try:
            opened = NestedFile(trainer)
            if sum(info.nbytes for info in opened.infos()) < 1 << 24:
                unflatten(dict(opened.read()), opened.structure)
            outcomes.add("read")
        except SourceError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_nothing_is_overwritten_unasked(folder: Path, trainer: Path) -> None:
    out = folder.parent / "out"
    convert(trainer, out)
    for target in (out, trainer.with_name("there.safetensors"), folder):
        if not target.exists():
            target.write_text("mine")
        with pytest.raises(SourceError, match=r"exists already|is the source itself"):
            convert(folder, target)
    assert trainer.with_name("there.safetensors").read_text() == "mine"
    with pytest.raises(SourceError, match="is the source itself"):
        convert(trainer, trainer, overwrite=True)
    convert(folder, out, overwrite=True)
    assert_same(in_order(by_the_library(out)), in_order(STATE))
    assert leftovers(folder.parent) == []


def test_an_empty_folder_is_no_obstacle(trainer: Path) -> None:
    out = trainer.with_name("out")
    out.mkdir()
    assert convert(trainer, out).files == ("model.safetensors",)


def leftovers(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.name.endswith(atomic.PARTIAL)]


FAULTS = {
    "no space": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "Ctrl-C": KeyboardInterrupt,
    "a bug": lambda: ZeroDivisionError("bug"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", ["out", "out.safetensors"])
@pytest.mark.parametrize("there", [False, True])
def test_whatever_fails_while_writing_nothing_is_left_and_the_old_stays(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str, target: str, there: bool
) -> None:
    """At every piece that is written, every flush to disk, and the last rename."""
    out = folder.parent / target
    if there:
        convert(folder, out)
    before = {file: file.read_bytes() for file in folder.parent.rglob("*") if file.is_file()}
    step = 0
    while failed_at(
        step, monkeypatch, FAULTS[fault], lambda: convert(folder, out, overwrite=there, max_file_bytes=900)
    ):
        now = {file: file.read_bytes() for file in folder.parent.rglob("*") if file.is_file()}
        assert now == before
        assert leftovers(folder.parent) == []
        step += 40 if step < len(STATE) - 40 else 1
    assert step > 8
    assert_same(in_order(by_the_library(out)), in_order(STATE))


def failed_at(step: int, monkeypatch: pytest.MonkeyPatch, fault: Callable, action: Callable) -> bool:
    """Whether an action with a fault at this step failed."""
    count = 0

    def counting(original: Callable) -> Callable:
        def replacement(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count > step:
                raise fault()
            return original(*args, **kwargs)

        return replacement

    with monkeypatch.context() as patches:
        patches.setattr(writing, "bytes_of", counting(writing.bytes_of))
        patches.setattr(writing.os, "fsync", counting(os.fsync))
        patches.setattr(atomic, "_rename_into_place", counting(atomic._rename_into_place))
        try:
            action()
        except SourceError as error:
            return "Nothing was left there" in str(error) or pytest.fail(str(error))
        except (KeyboardInterrupt, ZeroDivisionError):
            return True
    return count > step


def test_a_source_that_changes_meanwhile_is_refused(folder: Path, trainer: Path) -> None:
    def touch(done: int, total: int) -> None:
        for file in (*folder.glob("*.safetensors"), trainer):
            os.utime(file, ns=(0, 0))

    for source in (folder, trainer):
        os.utime(trainer)
        with pytest.raises(SourceError, match="changed while it was read"):
            convert(source, folder.parent / "out", progress=touch)
        assert not (folder.parent / "out").exists()


TRUNCATED = """
import os, sys
from pathlib import Path
import torch
from reload_plugin import convert
from reload_plugin.errors import ReloadError

source, target, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def cut(done, total):
    if done >= at:
        os.truncate(source, 1000)

try:
    convert(source, target, progress=cut)
except ReloadError as error:
    print(error)
"""


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_a_torch_file_truncated_while_it_is_converted_is_an_error(
    tmp_path: Path, new: bool, transposed: bool
) -> None:
    """In a process of its own: one that mapped the file would die of it."""
    size = 4 << 20
    weights = {f"{i}.w": torch.full((1024, size >> 10), i, dtype=torch.uint8) for i in range(24)}
    state = {"model": {name: w.t() if transposed else w for name, w in weights.items()}, "step": 3}
    torch.save(state, tmp_path / "trainer.pt", _use_new_zipfile_serialization=new)
    paths = [str(tmp_path / "trainer.pt"), str(tmp_path / "out.safetensors")]
    command = [sys.executable, "-c", TRUNCATED, *paths, str(8 * size)]
    root = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": root}
    )
    assert ended.returncode == 0, ended
    assert "trainer.pt" in ended.stdout
    assert "ends in the middle of" in ended.stdout or "changed while it was read" in ended.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["trainer.pt"]


# --- older than its source ---


def rewritten(file: Path, keep_times: bool = True) -> None:
    """One byte in the middle changes; the size and, if asked, the time of modification stay."""
    stamp = file.stat()
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    if keep_times:
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_what_was_converted_knows_when_its_source_changed(trainer: Path) -> None:
    out = trainer.with_name("out.safetensors")
    convert(trainer, out)
    assert not is_stale(out)
    os.utime(trainer)
    assert not is_stale(out), "a new time and the old bytes: only touched"
    trainer.rename(trainer.with_name("moved.pt"))
    assert not is_stale(out), "the original is gone"
    trainer.with_name("moved.pt").rename(trainer)
    with trainer.open("ab") as file:
        file.write(b"more")
    assert is_stale(out)
    convert(trainer, out, overwrite=True)
    rewritten(trainer)
    assert is_stale(out), "same size, same time, other bytes"


def test_staleness_is_settled_by_times_where_they_can_settle_it(
    monkeypatch: pytest.MonkeyPatch, trainer: Path
) -> None:
    from reload_plugin.checkpoint import sidecar

    monkeypatch.setattr(sidecar, "_TICKS", -(10**12))
    convert(trainer, trainer.with_name("out"))
    monkeypatch.setattr(sidecar, "file_digest", lambda _: pytest.fail("the bytes were read"))
    assert not is_stale(trainer.with_name("out"))


def test_a_stale_sidecar_never_wins_over_a_newer_original(folder: Path) -> None:
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    sidecar = folder.parent / "beside"
    sidecar.mkdir()
    (folder / "pytorch_model.bin").rename(sidecar / "pytorch_model.bin")
    convert(sidecar / "pytorch_model.bin", sidecar / "model.safetensors")
    assert dict(open_source(sidecar).read())["w"].tolist() == [1, 1, 1]
    torch.save({"w": torch.zeros(3)}, sidecar / "pytorch_model.bin")
    for opening in (
        lambda: open_source(sidecar),
        lambda: open_source(sidecar / "model.safetensors"),
        lambda: open_folder(str(sidecar / "model.safetensors"), None, None, torch.nn.Module()),
        lambda: open_folder(str(sidecar), config_of_auto(), None, torch.nn.Module()),
    ):
        with pytest.raises(
            SourceError, match=r"does not win over a newer original\. Convert .* again, or take"
        ):
            opening()
    (sidecar / "model.safetensors").rename(folder / "model-elsewhere.safetensors")
    assert len(open_source(folder / "model-elsewhere.safetensors").infos()) == 1, (
        "an export of then, elsewhere"
    )


def config_of_auto() -> object:
    from types import SimpleNamespace

    from vllm.config.load import LoadConfig

    return SimpleNamespace(load_config=LoadConfig())


def test_what_was_not_converted_here_says_so(folder: Path) -> None:
    with pytest.raises(SourceError, match="does not say what it was converted from"):
        is_stale(folder / "model-0.safetensors")
    with pytest.raises(SourceError, match="holds no nested state dict"):
        read_nested(folder)


# --- a target that holds other files too ---


def test_converting_again_keeps_the_files_that_no_conversion_wrote(folder: Path) -> None:
    out = folder.parent / "out"
    convert(folder, out, max_file_bytes=900)
    (out / "results").mkdir()
    others = {"notes.txt": "mine", "results/eval.json": "[1]", ".hidden": "x", "aaa.bin": "y"}
    for name, text in others.items():
        (out / name).write_text(text)
    (out / "link").symlink_to("notes.txt")
    (out / "dangling").symlink_to("nowhere")
    (folder / "vocab.txt").unlink()
    convert(folder, out, replace_converted=True)
    assert {name: (out / name).read_text() for name in others} == others
    assert (out / "link").is_symlink()
    assert (out / "dangling").is_symlink()
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (out / "vocab.txt").exists(), "written by the first conversion, and not by the second"
    assert_same(in_order(by_the_library(out)), in_order(STATE))
    assert leftovers(folder.parent) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00001.txt"])
def test_converting_again_never_writes_over_a_file_of_the_users(folder: Path, name: str) -> None:
    """Not over one that the conversion wrote and the user changed, nor over one it never wrote."""
    out = folder.parent / "out"
    convert(folder, out)
    (out / name).write_text("mine")
    before = {file: file.read_bytes() for file in out.iterdir()}
    collides = name.endswith(".json")
    if collides:
        with pytest.raises(SourceError, match=f"{name}.*Move them elsewhere"):
            convert(folder, out, replace_converted=True, max_file_bytes=900)
        assert {file: file.read_bytes() for file in out.iterdir()} == before
        convert(folder, out, overwrite=True, max_file_bytes=900)
        assert (out / name).read_text() != "mine"
    else:
        convert(folder, out, replace_converted=True, max_file_bytes=900)
        assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_conversion_that_fails_leaves_a_folder_with_other_files_as_it_was(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str
) -> None:
    out = folder.parent / "out"
    convert(folder, out)
    (out / "results").mkdir()
    (out / "results" / "eval.json").write_text("[1]")
    before = {file: file.read_bytes() for file in folder.parent.rglob("*") if file.is_file()}
    step = 0
    while failed_at(
        step,
        monkeypatch,
        FAULTS[fault],
        lambda: convert(folder, out, replace_converted=True, max_file_bytes=900),
    ):
        assert {file: file.read_bytes() for file in folder.parent.rglob("*") if file.is_file()} == before
        step += 40 if step < len(STATE) - 40 else 1
    assert (out / "results" / "eval.json").read_text() == "[1]"


def test_a_foreign_safetensors_file_does_not_hide_the_record_of_a_conversion(folder: Path) -> None:
    out = folder.parent / "out"
    convert(folder, out)
    save_file({"w": torch.ones(2)}, out / "adapter_model.safetensors")
    assert not is_stale(out)
    convert(folder, out, replace_converted=True)
    assert (out / "adapter_model.safetensors").exists()


# --- memory ---

MEASURE = """
import sys
from pathlib import Path
import torch
from reload_plugin import convert

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10

def now():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) << 10

torch.set_num_threads(1)
small, large, out = map(Path, sys.argv[1:])
convert(small, out / "of small")
Path("/proc/self/clear_refs").write_text("5")
before = now()
convert(large, out / "of large")
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["model.safetensors", "model.pt"])
def test_extra_memory_is_one_tensor_and_a_fixed_budget(tmp_path: Path, kind: str) -> None:
    """Twelve tensors of 32 MiB; twice as many bytes as the budget."""
    largest = 32 << 20
    write = torch.save if kind.endswith(".pt") else save_file
    for name, count in (("small", 1), ("large", 12)):
        (tmp_path / name).mkdir()
        size = largest // 4 if name == "large" else 4
        write({f"layers.{i}.w": torch.zeros(size) + i for i in range(count)}, tmp_path / name / kind)
    paths = [str(tmp_path / name / kind) for name in ("small", "large")]
    command = [sys.executable, "-c", MEASURE, *paths, str(tmp_path)]
    root = str(Path(__file__).resolve().parents[2])
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert int(out.stdout) < largest + (128 << 20), f"{int(out.stdout) >> 20} MiB"
