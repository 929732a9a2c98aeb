"""Dispatched models become ordinary ones, with every value, and go back."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import reload_plugin
from reload_plugin import OffloadError, SourceError, materialize, materialized
from reload_plugin.checkpoint.formats.offloading import hooks_of
from reload_plugin.offload import memory
from reload_plugin.offload.placement import placements
from tests.dispatched import counted, counted_situations, llama, logits, situations, values

EACH = [(tied, name) for tied in (False, True) for name in situations(tied)]
each_situation = pytest.mark.parametrize(("tied", "name"), EACH, ids=str)
NO_FORWARD = ("load_checkpoint_and_dispatch, all .dat",)
"""Accelerate's model does not run where its map has one name of a tied weight: tied models only."""


def is_ordinary(model: nn.Module) -> bool:
    """Whether nothing of a dispatch is left."""
    left = {"_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map"}
    return not any(left & module.__dict__.keys() for module in model.modules())


def state_of(model: nn.Module) -> dict[str, object]:
    """What a dispatch is made of, by identity."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers"):
                found.update({f"{name}.{key}.{k}": id(v) for k, v in value.items()})
            elif not key.startswith("_") or key in ("_hf_hook", "_old_forward"):
                found[f"{name}.{key}"] = id(value)
    return found


@each_situation
def test_a_materialized_model_is_an_ordinary_one(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path)
    before = llama(tied)
    report = materialize(model)
    assert is_ordinary(model)
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(torch.equal(value, values(before)[key]) for key, value in values(model).items())
    assert torch.equal(logits(model), logits(before))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert [sorted(names) for names in report.ties] == [
        ["lm_head.weight", "model.embed_tokens.weight"]
    ] * tied
    model.to(torch.float64)
    assert all(value.dtype == torch.float64 for value in model.parameters())
    assert not any(value.is_meta for value in values(model).values())


@pytest.mark.parametrize("name", counted_situations())
def test_buffers_come_with_the_weights(name: str, tmp_path: Path) -> None:
    model = counted_situations()[name](tmp_path)
    answers = logits(model)
    report = materialize(model)
    assert is_ordinary(model)
    assert report.hooks > 0
    expected = values(counted())
    assert all(torch.equal(value, expected[key]) for key, value in values(model).items())
    assert torch.equal(logits(model), answers)
    assert torch.equal(answers, logits(counted()))


@each_situation
def test_the_same_dispatch_comes_back_with_what_was_changed(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path)
    runs = not (tied and name in NO_FORWARD)
    if runs:
        logits(model)
    before = state_of(model)
    other = llama(tied, seed=1)
    with materialized(model) as report:
        assert is_ordinary(model)
        with torch.no_grad():
            for key, value in values(model).items():
                value.copy_(values(other)[key])
        model.model.norm.weight = nn.Parameter(values(other)["model.norm.weight"].clone())
    offloaded = {place.name for place in placements(model) if place.offloaded}
    changed = {key for key, value in state_of(model).items() if before[key] != value}
    assert changed <= {"model.norm._parameters.weight"} - {
        f"{key.rpartition('.')[0]}._parameters.weight" for key in offloaded
    }
    assert report.hooks
    assert all(torch.equal(place.read(), values(other)[place.name]) for place in placements(model))
    if runs:
        assert torch.equal(logits(model), logits(other))


def test_nothing_is_written_where_nothing_changed(tmp_path: Path) -> None:
    model = situations(True)["dispatch_model, .dat"](tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    with materialized(model):
        pass
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == before


def test_data_edits_are_written_too(tmp_path: Path) -> None:
    """Edits through ``.data`` raise no version counter."""
    model = situations(False)["dispatch_model, .dat"](tmp_path)
    with materialized(model):
        model.model.norm.weight.data.fill_(2.5)
    with materialized(model):
        assert bool((model.model.norm.weight == 2.5).all())


def test_an_exception_in_the_block_puts_the_dispatch_back(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, mixed"](tmp_path)
    logits(model)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), materialized(model):
        1 / 0  # noqa: B018 - to raise
    assert state_of(model) == before
    assert torch.equal(logits(model), logits(llama(False)))


@pytest.mark.parametrize(
    "name", ["dispatch_model, .dat", "dispatch_model, mixed", "from_pretrained, all index"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_file_that_cannot_be_read_leaves_the_model_dispatched(
    name: str, damage: str, tmp_path: Path
) -> None:
    model = situations(False)[name](tmp_path)
    if "index" in name:  # a file of its own, so that the shared checkpoint stays
        place = next(
            place for place in placements(model) if place.name == "model.layers.1.mlp.up_proj.weight"
        )
        place.write(place.read())
    logits(model)
    before = state_of(model)
    file = next(path for path in tmp_path.iterdir() if "layers.1.mlp.up_proj" in path.name)
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj"):
        materialize(model)
    assert state_of(model) == before
    file.write_bytes(content)
    assert torch.equal(logits(model), logits(llama(False)))
    materialize(model)
    assert torch.equal(logits(model), logits(llama(False)))


def test_too_little_memory_is_said_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = situations(False)["dispatch_model, .dat"](tmp_path)
    before = state_of(model)

    class Ops:
        def free_bytes(self) -> int:
            return 1000

    monkeypatch.setattr(memory, "ops_for", lambda _: Ops())
    with pytest.raises(OffloadError, match=r"needs [\d,]+ bytes on cpu, where 1,000 are available"):
        materialize(model)
    assert state_of(model) == before


def test_values_that_were_lost_are_named() -> None:
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(OffloadError, match="weight, bias"):
        materialize(model)


def test_a_changed_module_leaves_the_model_ordinary(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, mixed"](tmp_path)
    with pytest.raises(OffloadError, match=r"model\.norm"), materialized(model):
        model.model.norm = nn.LayerNorm(32)
    assert is_ordinary(model)
    logits(model)


def test_a_full_disk_at_the_end_leaves_the_model_ordinary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = situations(False)["dispatch_model, .dat"](tmp_path)
    other = llama(False, seed=1)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(handle)

    def change() -> None:
        with materialized(model), torch.no_grad():
            for key, value in values(model).items():
                value.copy_(values(other)[key])
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OffloadError, match="No space left"):
        change()
    assert is_ordinary(model)
    assert torch.equal(logits(model), logits(other))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_one_value_in_two_places_may_not_get_two(tmp_path: Path) -> None:
    model = situations(True)["cpu_offload"](tmp_path)
    with pytest.raises(OffloadError, match="got two"), materialized(model):
        model.lm_head.weight = nn.Parameter(torch.zeros(96, 32))
    assert is_ordinary(model)


def test_hooks_that_are_not_about_devices_stay(tmp_path: Path) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    model = counted_situations()["buffers, dict"](tmp_path)
    add_hook_to_module(model.first, Doubles(), append=True)
    answers = logits(model)
    materialize(model)
    assert [type(hook).__name__ for hook in hooks_of(model.first)] == ["Doubles"]
    assert torch.equal(logits(model), answers)


def test_attributes_and_frozen_parameters_stay(tmp_path: Path) -> None:
    model = situations(False)["cpu_offload"](tmp_path)
    model.model.norm.weight.note = "kept"
    materialize(model)
    assert model.model.norm.weight.note == "kept"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_memory_stays_level_over_fifty_rounds(tmp_path: Path) -> None:
    """Live tensors and files, counted; the resident size is measured by ``python -m tests.dispatched``."""
    model = situations(False)["dispatch_model, mixed"](tmp_path)

    def live() -> tuple[int, int]:
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        return tensors, len(list(tmp_path.iterdir()))

    counts = []
    for number in range(50):
        with materialized(model), torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.fill_(number)
        if number in (4, 49):
            counts.append(live())
    assert counts[0] == counts[1]


def test_names_are_public() -> None:
    assert {"materialize", "materialized", "MaterializeReport", "OffloadError"} <= set(reload_plugin.__all__)
