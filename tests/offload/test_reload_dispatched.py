"""New weights into dispatched models: all of them, wherever they are, or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reload_plugin import (
    DuplicateWeightsError,
    MisshapenWeightsError,
    MissingWeightsError,
    NonFiniteWeightsError,
    ReloadError,
    SourceError,
    UnexpectedWeightsError,
    WeightsError,
    dispatch,
    keep_weights_in_module,
    materialize,
    reload_dispatched,
)
from reload_plugin.offload import stored
from reload_plugin.offload.placement import placements
from tests.dispatched import (
    HERE,
    MIXTURES,
    checkpoint,
    counted,
    counted_situations,
    llama,
    logits,
    mixture,
    mixture_checkpoint,
    situations,
    split_map,
    values,
)

EACH = [(tied, name) for tied in (False, True) for name in situations(tied)]
each_situation = pytest.mark.parametrize(("tied", "name"), EACH, ids=str)
NO_FORWARD = (True, "load_checkpoint_and_dispatch, all .dat")


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every value, copied."""
    return {place.name: place.read().clone() for place in placements(model)}


def assert_holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = held(model)
    assert found.keys() == expected.keys()
    assert not [name for name, value in found.items() if not torch.equal(value, expected[name])]


@each_situation
def test_a_reload_is_what_a_load_would_give(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path / "a")
    files = {place.name: place.where for place in placements(model)}
    for seed in (1, 0):
        report = reload_dispatched(model, checkpoint(tied, seed))
        assert_holds(model, values(llama(tied, seed)))
        if (tied, name) != NO_FORWARD:
            assert torch.equal(logits(model), logits(llama(tied, seed)))
        assert report.tensors == report.replayed == 21 - tied
    assert report.version == 2
    changed = {key for key, where in files.items() if where != "dat"}
    now = {place.name: place.where for place in placements(model)}
    assert {key: now[key] for key in changed} == {key: files[key] for key in changed}
    partial = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not partial


def test_files_of_earlier_reloads_are_removed(tmp_path: Path) -> None:
    model = situations(False)["from_pretrained, all index"](tmp_path)
    reload_dispatched(model, checkpoint(False, 1))
    count = len(list(tmp_path.iterdir()))
    for seed in (2, 1, 2):
        reload_dispatched(model, checkpoint(False, seed))
    assert len(list(tmp_path.iterdir())) == count
    materialize(model)
    assert torch.equal(logits(model), logits(llama(False, 2)))


@pytest.mark.parametrize(
    ("tied", "name"),
    [(True, "dispatch_model, mixed"), (False, "from_pretrained, index"), (True, "cpu_offload")],
)
def test_an_iterator_may_reuse_its_buffers(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path)
    tensors = load_file(Path(checkpoint(tied, 1)) / "model.safetensors")
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in tensors.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield key, view
            buffer.fill_(float("nan"))

    reload_dispatched(model, weights_iterator=pairs())
    assert_holds(model, values(llama(tied, 1)))


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("where", ["disk", "both", "memory"])
def test_experts_are_converted_as_transformers_does(kind: str, where: str, tmp_path: Path) -> None:
    device_map = {
        "disk": split_map("disk", "disk", "disk"),
        "both": split_map("cpu", "disk", "cpu"),
        "memory": None,
    }[where]
    model = mixture(kind, device_map=device_map, offload_folder=str(tmp_path))
    report = reload_dispatched(model, mixture_checkpoint(kind, 1))
    assert_holds(model, values(mixture(kind, 1)))
    assert torch.equal(logits(model), logits(mixture(kind, 1)))
    assert report.computed
    assert report.layers < report.tensors


@pytest.mark.parametrize("name", counted_situations())
def test_a_module_of_another_kind_takes_its_own_names(name: str, tmp_path: Path) -> None:
    model, other = counted_situations()[name](tmp_path / "a"), counted(seed=1)
    reload_dispatched(model, weights_iterator=other.state_dict().items())
    expected = values(other) | {"fixed": values(counted())["fixed"]}
    assert_holds(model, expected)


def test_kept_weights_and_plain_models_are_reloaded_too(tmp_path: Path) -> None:
    for model in (
        llama(True),
        dispatch(llama(True), split_map("cpu", "disk"), main_device=HERE, offload_dir=str(tmp_path)),
    ):
        ids = {key: id(value) for key, value in values(model).items()}
        reload_dispatched(model, checkpoint(True, 1))
        assert torch.equal(logits(model), logits(llama(True, 1)))
        assert {
            key: id(value) for key, value in values(model).items() if not value.is_meta
        }.items() <= ids.items()
    model = situations(True)["dispatch_model, mixed"](tmp_path / "b")
    keep_weights_in_module(model)
    reload_dispatched(model, checkpoint(True, 2))
    assert torch.equal(logits(model), logits(llama(True, 2)))


def test_broken_ties_heal(tmp_path: Path) -> None:
    model = situations(True)["dispatch_model, .dat"](tmp_path)
    next(place for place in placements(model) if place.name == "lm_head.weight").write(torch.zeros(96, 32))
    reload_dispatched(model, checkpoint(True, 1))
    assert torch.equal(logits(model), logits(llama(True, 1)))


def test_dtypes_are_the_models(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, mixed"](tmp_path)
    other = llama(False, 1)
    half = {key: value.to(torch.bfloat16) for key, value in other.state_dict().items()}
    reload_dispatched(model, weights_iterator=half.items())
    assert_holds(
        model,
        {key: value.to(torch.bfloat16).float() for key, value in values(other).items()}
        | {key: value for key, value in values(other).items() if "inv_freq" in key},
    )


@pytest.mark.parametrize("name", ["from_pretrained, all index", "dispatch_model, mixed"])
def test_the_index_can_point_to_files_that_stay(name: str, tmp_path: Path) -> None:
    model = situations(True)[name](tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    reload_dispatched(model, checkpoint(True, 1), point_to_files=True)
    assert torch.equal(logits(model), logits(llama(True, 1)))
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == before
    where = {place.stored.file for place in placements(model) if place.where == "safetensors"}
    assert where == {str(Path(checkpoint(True, 1)) / "model.safetensors")}
    reload_dispatched(model, checkpoint(True, 2))
    assert torch.equal(logits(model), logits(llama(True, 2)))
    assert torch.equal(logits(type(model).from_pretrained(checkpoint(True, 1))), logits(llama(True, 1)))


# -- what does not fit -----------------------------------------------------------------------------


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def unexpected(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.side_proj.weight"] = torch.zeros(1)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3] = float("nan")


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(96, 32)


BAD: list[tuple[Callable[[dict[str, torch.Tensor]], None], type[WeightsError], str]] = [
    (wrong_shape, MisshapenWeightsError, r"\[47, 32\] in place of \[48, 32\]"),
    (missing, MissingWeightsError, r"1 missing: model.layers.1.mlp.up_proj.weight"),
    (unexpected, UnexpectedWeightsError, r"side_proj"),
    (not_finite, NonFiniteWeightsError, r"32 values"),
    (another_head, DuplicateWeightsError, r"one weight with"),
]


@pytest.mark.parametrize("road", ["path", "iterator"])
@pytest.mark.parametrize("name", ["dispatch_model, mixed", "from_pretrained, index"])
@pytest.mark.parametrize(("spoil", "error", "text"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_what_does_not_fit_changes_nothing(
    spoil: Callable[[dict[str, torch.Tensor]], None],
    error: type[WeightsError],
    text: str,
    name: str,
    road: str,
    tmp_path: Path,
) -> None:
    model = situations(True)[name](tmp_path)
    before, files = held(model), sorted(tmp_path.iterdir())
    tensors = load_file(Path(checkpoint(True, 1)) / "model.safetensors")
    spoil(tensors)
    path = tmp_path / "bad" / "model.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    given = {"weights_iterator": tensors.items()} if road == "iterator" else {"weights_path": path.parent}
    with pytest.raises(error, match=text) as caught:
        reload_dispatched(model, **given, check_finite=True)
    assert "The model is as it was." in str(caught.value)
    assert_holds(model, before)
    assert torch.equal(logits(model), logits(llama(True)))
    assert sorted(path for path in tmp_path.iterdir() if path.name != "bad") == files


@pytest.mark.parametrize("name", ["dispatch_model, mixed", "cpu_offload"])
def test_a_tied_weight_may_come_under_both_names(name: str, tmp_path: Path) -> None:
    """Also then the old value is what a failure brings back."""
    model = situations(True)[name](tmp_path)
    before = held(model)
    tensors = load_file(Path(checkpoint(True, 1)) / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    spoiled = {**tensors, "model.norm.weight": torch.full((32,), float("nan"))}
    with pytest.raises(NonFiniteWeightsError):
        reload_dispatched(model, weights_iterator=spoiled.items(), check_finite=True)
    assert_holds(model, before)
    reload_dispatched(model, weights_iterator=tensors.items())
    assert torch.equal(logits(model), logits(llama(True, 1)))


def test_everything_is_named_at_once(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, mixed"](tmp_path)
    tensors = load_file(Path(checkpoint(False, 1)) / "model.safetensors")
    unexpected(tensors)
    tensors["model.norm.weight"] = torch.zeros(31)
    del tensors["lm_head.weight"]
    with pytest.raises(WeightsError) as caught:
        reload_dispatched(model, weights_iterator=tensors.items())
    assert list(caught.value.missing) == ["lm_head.weight"]
    assert list(caught.value.unexpected) == ["model.layers.1.mlp.side_proj.weight"]
    assert list(caught.value.misshapen) == ["model.norm.weight"]


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    model = mixture("mixtral", device_map=split_map("cpu", "disk", "cpu"), offload_folder=str(tmp_path))
    before = held(model)
    tensors = load_file(Path(mixture_checkpoint("mixtral", 1)) / "model.safetensors")
    del tensors[next(key for key in tensors if ".experts.1." in key)]
    with pytest.raises(WeightsError, match=r"experts\.(gate_up|down)_proj"):
        reload_dispatched(model, weights_iterator=tensors.items())
    assert_holds(model, before)


def test_names_that_come_twice_and_things_that_are_no_tensors() -> None:
    model = llama(False)
    with pytest.raises(DuplicateWeightsError):
        reload_dispatched(model, weights_iterator=[("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(MisshapenWeightsError, match="a float is no tensor"):
        reload_dispatched(model, weights_iterator=[("a", 1.0)])
    with pytest.raises(ReloadError, match="not both"):
        reload_dispatched(model)


def test_a_truncated_source_changes_nothing(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, mixed"](tmp_path / "a")
    before = held(model)
    content = (Path(checkpoint(False, 1)) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        reload_dispatched(model, tmp_path / "model.safetensors")
    assert_holds(model, before)


def test_an_iterator_that_raises_changes_nothing(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, mixed"](tmp_path)
    before = held(model)

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(load_file(Path(checkpoint(False, 1)) / "model.safetensors").items())[:9]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reload_dispatched(model, weights_iterator=pairs())
    assert_holds(model, before)


# -- faults ----------------------------------------------------------------------------------------


class Fault:
    """Makes the n-th call of a function raise."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException) -> None:
        self.calls = 0
        self.at = -1
        real = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls == self.at:
                raise error
            return real(*args, **kwargs)

        patch.setattr(owner, name, call)


FULL = OSError(28, "No space left on device")
STEPS = {
    "files are synced": (os, "fsync", FULL),
    "files are linked": (os, "link", FULL),
    "files are renamed": (Path, "replace", FULL),
    "memory is written": (stored.InMemory, "write", RuntimeError("device error")),
    "the index is written": (stored.RepointedEntry, "commit", RuntimeError("read-only index")),
    "old values are noted": (os, "pwrite", FULL),
    "Ctrl-C between groups": (
        __import__("reload_plugin.offload.reload_dispatched", fromlist=["x"]),
        "deliver",
        KeyboardInterrupt(),
    ),
}


@pytest.mark.parametrize("name", ["dispatch_model, mixed", "from_pretrained, dict and index"])
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_at_every_step_changes_nothing(
    step: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = situations(True)[name](tmp_path)
    before, files = held(model), sorted(tmp_path.iterdir())
    fault = Fault(monkeypatch, *STEPS[step])
    reload_dispatched(model, checkpoint(True, 0))
    count = fault.calls
    files = sorted(tmp_path.iterdir())
    for at in range(1, count + 1):
        fault.calls, fault.at = 0, at
        with pytest.raises((ReloadError, RuntimeError, KeyboardInterrupt)):
            reload_dispatched(model, checkpoint(True, 1))
        fault.at = -1
        assert_holds(model, before)
        assert sorted(tmp_path.iterdir()) == files, at
    assert torch.equal(logits(model), logits(llama(True)))
    reload_dispatched(model, checkpoint(True, 1))
    assert torch.equal(logits(model), logits(llama(True, 1)))


def test_a_fault_at_every_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reload_plugin.checkpoint.io import vectored

    model = situations(True)["dispatch_model, mixed"](tmp_path)
    before = held(model)
    fault = Fault(monkeypatch, vectored, "preadv", OSError(5, "Input/output error"))
    reload_dispatched(model, checkpoint(True, 0))
    count = fault.calls
    assert count
    for at in range(1, count + 1):
        fault.calls, fault.at = 0, at
        with pytest.raises(SourceError, match="Input/output error"):
            reload_dispatched(model, checkpoint(True, 1))
        fault.at = -1
        assert_holds(model, before)
