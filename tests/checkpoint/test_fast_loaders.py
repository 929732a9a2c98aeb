"""vLLM's fast loaders as readers of a reload: the same weights, or our own reader, but no lost reload."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reload_plugin
from reload_plugin.checkpoint import folder
from reload_plugin.checkpoint.formats import fast_readers
from reload_plugin.checkpoint.formats.fast_files import FastSafetensors
from reload_plugin.checkpoint.formats.fast_readers import READERS
from reload_plugin.commit.strategies import StreamingCommit
from reload_plugin.errors import MissingWeightsError, SourceError
from reload_plugin.record.model_record import record_of
from reload_plugin.transaction import group_processing
from tests import oracle
from tests.checkpoints import read_tensors
from tests.zoo import Case, case_named

CPU = torch.device("cpu")
PACKAGES = {
    "runai_streamer": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Of several dtypes, among them an odd number of bytes, none at all and a single number."""
    made = {f"layers.{n}.weight": torch.randn(16, 32).to(torch.bfloat16) for n in range(6)}
    odd = {"odd": torch.arange(3, dtype=torch.uint8), "empty": torch.ones(0), "one": torch.tensor(2.5)}
    return made | odd | {"wide": torch.randn(7, 5)}


@pytest.fixture
def files(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    names = list(tensors)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    return [str(file) for file in sorted(tmp_path.iterdir())]


def source_of(files: Sequence[str], load_format: str) -> FastSafetensors:
    return FastSafetensors(files, "step-7", load_format, CPU)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.reload_plugin")
    return caplog


# --- the libraries, as far as they run without a GPU ---


@pytest.mark.parametrize("load_format", ["runai_streamer", "fastsafetensors"])
def test_a_library_reads_what_the_files_hold(
    load_format: str,
    files: list[str],
    tensors: dict[str, torch.Tensor],
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(PACKAGES[load_format])
    monkeypatch.setattr(fast_readers, "AHEAD", 4096)
    source = source_of(files, load_format)
    assert [info.name for info in source.infos()]
    for _ in range(2):
        assert same({name: tensor.clone() for name, tensor in source.read()}, tensors)
    assert [record for record in said.records if "our own reader" in record.getMessage()] == []
    reading = source.read()
    next(reading)
    reading.close()


# --- what goes wrong ---


def test_without_the_library_our_own_reader_is_used_and_says_why(
    files: list[str],
    tensors: dict[str, torch.Tensor],
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for load_format, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, package + ".parallel_loader", None)
        said.clear()
        assert same(dict(source_of(files, load_format).read()), tensors)
        (line,) = [record.getMessage() for record in said.records]
        assert f"load_format={load_format} failed with" in line
        assert f"{len(tensors)} of {len(tensors)} tensors" in line


def breaking(files: Sequence[str], device: torch.device, largest: int, after: int, how: str) -> Iterator:
    """A library that goes wrong somewhere."""
    pairs = [pair for file in files for pair in load_file(file).items()]
    for name, tensor in pairs[:after]:
        yield name, tensor
    if how == "raises":
        raise RuntimeError("the device is gone")
    if how == "ends":
        return
    name, tensor = pairs[after]
    yield {
        "repeats": pairs[0],
        "invents": ("nothing", tensor),
        "casts": (name, tensor.double()),
        "bends": (name, tensor[None]),
    }[how]


@pytest.mark.parametrize("how", ["raises", "ends", "repeats", "invents", "casts", "bends"])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_what_a_library_does_not_give_is_read_by_us(
    how: str,
    after: int,
    files: list[str],
    tensors: dict[str, torch.Tensor],
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (how, after) == ("repeats", 0):
        pytest.skip("nothing to repeat")
    monkeypatch.setitem(READERS, "fastsafetensors", functools.partial(breaking, after=after, how=how))
    pairs = list(source_of(files, "fastsafetensors").read())
    assert len(pairs) == len(tensors)
    assert same(dict(pairs), tensors)
    assert f"{len(tensors) - after} of {len(tensors)} tensors" in said.text


def test_files_that_change_are_an_error_and_not_the_librarys(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replacing(files: Sequence[str], device: torch.device, largest: int) -> Iterator:
        yield from load_file(files[0]).items()
        save_file(load_file(files[1]), files[1])
        yield from load_file(files[1]).items()

    monkeypatch.setitem(READERS, "fastsafetensors", replacing)
    source = source_of(files, "fastsafetensors")
    with pytest.raises(SourceError, match="changed while it was read"):
        list(source.read())
    assert not source.unchanged()
    with pytest.raises(SourceError, match="changed while it was read"):
        next(source.read())


def test_files_that_are_kept_open_do_not_go_through_the_library(
    files: list[str], tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look for them by their names."""
    monkeypatch.setitem(READERS, "runai_streamer", None)
    source = source_of(files, "runai_streamer")
    with source.held_open():
        for file in files:
            Path(file).unlink()
        assert same(dict(source.read()), tensors)


def test_parts_of_a_checkpoint_do_not_go_through_the_library(
    files: list[str], tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READERS, "fastsafetensors", functools.partial(breaking, after=0, how="raises"))
    found = dict(source_of(files, "fastsafetensors").read(["odd", "layers.0.weight"]))
    assert list(found) == ["odd", "layers.0.weight"]
    assert torch.equal(found["odd"], tensors["odd"])


# --- engines ---


def started_with(load_format: str) -> Case:
    case = case_named("qwen3_moe")
    return replace(case, engine_kwargs={**case.engine_kwargs, "load_format": load_format})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return oracle.write(case_named("qwen3_moe"), tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every tensor that a library has read."""
    read: list[str] = []

    def counting(plain: Callable, *args: object) -> Iterator:
        for name, tensor in plain(*args):
            read.append(name)
            yield name, tensor

    for load_format, plain in READERS.items():
        monkeypatch.setitem(READERS, load_format, functools.partial(counting, plain))
    return read


def reloads_equal_cold_starts(
    llm: object, case: Case, folders: dict[str, Path], cold: dict, read: list[str]
) -> None:
    """Under every policy, there and back; and a checkpoint that does not fit."""
    model, names = oracle.model_of(llm), set(read_tensors(folders["A"]))
    start = oracle.snapshot(llm, case)
    assert oracle.compare_values("start", start, cold["A"]) == []
    for policy, rollback_source in (
        ("auto", "reread"),
        ("reread", "reread"),
        ("host", "host"),
        ("streaming", "none"),
    ):
        for letter in "BA":
            read.clear()
            report = reload_plugin.reload_weights(model, weights_path=str(folders[letter]), policy=policy)
            assert set(read) == names, "the library was not used"
            assert (report.old_generation, report.replayed) == (rollback_source, len(names))
            now = oracle.snapshot(llm, case)
            assert oracle.compare_values(policy, now, cold[letter]) == []
            assert oracle.compare_places(policy, start, now) == []


@pytest.fixture(scope="module")
def cold(folders: dict[str, Path]) -> dict[str, oracle.Snapshot]:
    """What ordinary engines give that were started on A and on B."""
    found = {}
    for letter in "AB":
        with oracle.running(case_named("qwen3_moe"), folders[letter]) as llm:
            found[letter] = oracle.snapshot(llm, case_named("qwen3_moe"))
    return found


def test_an_engine_started_with_runai_reloads_with_it(
    folders: dict[str, Path],
    cold: dict[str, oracle.Snapshot],
    counted: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(PACKAGES["runai_streamer"])
    case = started_with("runai_streamer")
    with oracle.running(case, folders["A"]) as llm:
        reloads_equal_cold_starts(llm, case, folders, cold, counted)
        model = oracle.model_of(llm)

        incomplete = read_tensors(folders["B"])
        del incomplete["model.norm.weight"]
        (tmp_path / "config.json").write_bytes((folders["B"] / "config.json").read_bytes())
        save_file(incomplete, tmp_path / "model.safetensors")
        counted.clear()
        with pytest.raises(MissingWeightsError):
            reload_plugin.reload_weights(model, weights_path=str(tmp_path))
        assert counted == [], "it is refused before a byte is read"

        fails_half_way(model, folders, monkeypatch)
        assert oracle.compare_values("brought back", oracle.snapshot(llm, case), cold["A"]) == []

        in_a_bucket(model, folders, monkeypatch)
        assert oracle.compare_values("bucket", oracle.snapshot(llm, case), cold["B"]) == []


def fails_half_way(model: torch.nn.Module, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers were committed already; the old weights come back through the library too."""
    plain, calls = group_processing.process_group, []

    def failing(*args: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no kernel")
        plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(group_processing, "process_group", failing)
        with pytest.raises(reload_plugin.ReloadError):
            reload_plugin.reload_weights(model, weights_path=str(folders["B"]), policy="reread")


def in_a_bucket(model: torch.nn.Module, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's loader on an address that only looks like a bucket's; the streamer reads the files behind it."""
    from vllm.model_executor.model_loader import runai_streamer_loader

    listing = [str(file) for file in folders["B"].glob("*.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr(runai_streamer_loader, "list_safetensors", lambda **_: listing)
        report = reload_plugin.reload_weights(model, weights_path="s3://policies/step-12")
    assert (report.source, report.policy, report.replayed) == (
        "s3://policies/step-12",
        "staged",
        report.tensors,
    )


def test_fastsafetensors_reloads_on_a_cpu_too(
    folders: dict[str, Path],
    cold: dict[str, oracle.Snapshot],
    counted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM starts with it on a GPU only, so this engine is told afterwards that it was."""
    pytest.importorskip(PACKAGES["fastsafetensors"])
    case = case_named("qwen3_moe")
    with oracle.running(case, folders["A"]) as llm:
        config = record_of(oracle.model_of(llm)).vllm_config.load_config
        monkeypatch.setattr(config, "load_format", "fastsafetensors")
        reloads_equal_cold_starts(llm, case, folders, cold, counted)
        model = oracle.model_of(llm)
        monkeypatch.setitem(READERS, "fastsafetensors", shuffled)
        monkeypatch.setattr(StreamingCommit, "waiting_bytes", 0)
        for policy in ("reread", "streaming"):
            report = reload_plugin.reload_weights(model, weights_path=str(folders["B"]), policy=policy)
            assert report.spilled_bytes > 0, "all layers were open at once"
            assert oracle.compare_values(policy, oracle.snapshot(llm, case), cold["B"]) == []


def shuffled(files: Sequence[str], device: torch.device, largest: int) -> Iterator:
    """A library that brings tensors in any order; layers that wait for the rest must not pile up."""
    pairs = [pair for file in files for pair in load_file(file).items()]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(3)).tolist()
    yield from (pairs[index] for index in order)


def test_a_bucket_is_refused_where_nobody_can_read_it() -> None:
    model = torch.nn.Linear(1, 1)
    for config in (None, type("Config", (), {"load_config": type("Load", (), {"load_format": "auto"})})):
        with pytest.raises(SourceError, match="load_format='runai_streamer'"):
            folder.open_folder("s3://policies/step-12", config, None, model)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("load_format", ["fastsafetensors", "instanttensor", "runai_streamer"])
def test_on_a_gpu_engines_reload_with_what_they_were_started_with(
    load_format: str, folders: dict[str, Path], cold: dict[str, oracle.Snapshot], counted: list[str]
) -> None:
    pytest.importorskip(PACKAGES[load_format])
    case = started_with(load_format)
    with oracle.running(case, folders["A"]) as llm:
        reloads_equal_cold_starts(llm, case, folders, cold, counted)
