"""Weights that stay in their modules while their model is dispatched."""

from __future__ import annotations

import gc
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from reload_plugin import OffloadError, dispatch, keep_weights_in_module, materialize, materialized
from reload_plugin.offload.placement import placements
from tests.dispatched import HERE, counted, counted_situations, llama, logits, situations, split_map, values

IN_MEMORY = [
    name for name in situations(False) if "cpu_offload" in name or "dict" in name or "mixed" in name
] + ["dispatch_model, nested hooks"]
EACH = [(tied, name) for tied in (False, True) for name in IN_MEMORY]
each_situation = pytest.mark.parametrize(("tied", "name"), EACH, ids=str)


@each_situation
def test_weights_are_where_everybody_looks(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path)
    on_disk = {place.name for place in placements(model) if place.where in ("dat", "safetensors")}
    report = keep_weights_in_module(model)
    assert set(report.on_disk) == on_disk
    assert report.kept
    assert report.hooks
    expected = values(llama(tied))
    for key, value in values(model).items():
        assert value.is_meta == (key in on_disk), key
        assert value.is_meta or torch.equal(value, expected[key]), key
    assert torch.equal(logits(model), logits(llama(tied)))
    assert {key for key, value in values(model).items() if value.is_meta} == on_disk


@each_situation
def test_edits_in_place_count(tied: bool, name: str, tmp_path: Path) -> None:
    model, other = situations(tied)[name](tmp_path), llama(tied)
    keep_weights_in_module(model)
    logits(model)
    for each in (model, other):
        with torch.no_grad():
            each.model.layers[0].mlp.up_proj.weight.add_(0.25)
            each.model.layers[0].self_attn.q_proj.weight = nn.Parameter(
                each.model.layers[0].self_attn.q_proj.weight * 2
            )
            each.model.layers[0].input_layernorm.weight.data.mul_(3)
    assert torch.equal(logits(model), logits(other))


def test_ties_are_ties_again(tmp_path: Path) -> None:
    model = situations(True)["cpu_offload"](tmp_path)
    keep_weights_in_module(model)
    logits(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_disk_comes_too_when_asked(tmp_path: Path) -> None:
    model = situations(True)["dispatch_model, mixed"](tmp_path)
    report = keep_weights_in_module(model, disk=True)
    assert report.read_bytes > 0
    assert not any(value.is_meta for value in values(model).values())
    for file in tmp_path.iterdir():
        file.unlink()
    assert torch.equal(logits(model), logits(llama(True)))


def test_disk_may_come_later(tmp_path: Path) -> None:
    model = situations(True)["dispatch_model, mixed"](tmp_path)
    keep_weights_in_module(model)
    keep_weights_in_module(model, disk=True)
    assert not any(value.is_meta for value in values(model).values())
    assert torch.equal(logits(model), logits(llama(True)))


@pytest.mark.parametrize("name", counted_situations())
def test_buffers_are_kept_as_well(name: str, tmp_path: Path) -> None:
    model = counted_situations()[name](tmp_path)
    keep_weights_in_module(model, disk=True)
    assert not any(value.is_meta for value in values(model).values())
    assert torch.equal(logits(model), logits(counted()))


def test_gradients_reach_the_parameters(tmp_path: Path) -> None:
    model, plain = situations(False)["cpu_offload"](tmp_path), llama(False)
    keep_weights_in_module(model)
    for each in (model, plain):
        each(torch.arange(4).reshape(1, 4)).logits.square().mean().backward()
    for key, value in plain.named_parameters():
        assert torch.equal(dict(model.named_parameters())[key].grad, value.grad), key


def test_load_state_dict_loads(tmp_path: Path) -> None:
    model = situations(True)["cpu_offload"](tmp_path)
    keep_weights_in_module(model)
    model.load_state_dict(llama(True, seed=1).state_dict())
    assert torch.equal(logits(model), logits(llama(True, seed=1)))


@each_situation
def test_materialize_after_keeping(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path)
    keep_weights_in_module(model)
    kept, plain = model.model.layers[0].input_layernorm.weight, llama(tied)
    with torch.no_grad():
        kept.fill_(2)
        plain.model.layers[0].input_layernorm.weight.fill_(2)
    with materialized(model):
        assert torch.equal(kept, torch.full((32,), 2.0))
    materialize(model)
    assert torch.equal(logits(model), logits(plain))


def test_removing_the_hooks_loses_nothing(tmp_path: Path) -> None:
    model = situations(True)["cpu_offload, nested hooks"](tmp_path)
    keep_weights_in_module(model)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), logits(llama(True)))
    assert not any(hasattr(module.forward, "_reload_plugin_guards") for module in model.modules())


def test_keeping_twice_changes_nothing(tmp_path: Path) -> None:
    model = situations(True)["dispatch_model, mixed"](tmp_path)
    keep_weights_in_module(model)
    before = {key: id(value) for key, value in values(model).items()}
    assert keep_weights_in_module(model).hooks == 0
    assert {key: id(value) for key, value in values(model).items()} == before


def test_a_pass_that_raises_leaves_disk_weights_away(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, nested hooks"](tmp_path)
    keep_weights_in_module(model)
    before = {key: id(value) for key, value in values(model).items() if not value.is_meta}
    layer = model.model.layers[0]
    handle = layer.mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert {key: id(value) for key, value in values(model).items() if key in before} == before
    assert torch.equal(logits(model), logits(llama(False)))


def test_replaced_memory_is_free(tmp_path: Path) -> None:
    """Neither a hook nor its loader holds the old values."""
    model = situations(False)["dispatch_model, mixed"](tmp_path)
    keep_weights_in_module(model)
    old = StorageWeakRef(model.model.layers[0].mlp.up_proj.weight.untyped_storage())
    assert not old.expired()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32))
    gc.collect()
    assert old.expired()


# -- dispatch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "device_map",
    [split_map("cpu", HERE), split_map("cpu", "disk"), split_map("disk", "disk", "cpu"), {"": "cpu"}],
    ids=["cpu", "mixed", "disk", "whole"],
)
def test_dispatch_keeps_parameters_and_their_attributes(tied: bool, device_map: dict, tmp_path: Path) -> None:
    model = llama(tied)
    before = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in before.items():
        parameter.weight_loader = name
    assert dispatch(model, device_map, main_device=HERE, offload_dir=str(tmp_path)) is model
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.is_meta or parameter is before[name]
    assert model.hf_device_map == device_map
    assert torch.equal(logits(model), logits(llama(tied)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert materialize(model).tensors == 23 - tied


def test_a_whole_model_goes_to_disk(tmp_path: Path) -> None:
    model = dispatch(llama(True), {"": "disk"}, offload_dir=str(tmp_path))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(llama(True)))
    materialize(model)
    assert torch.equal(logits(model), logits(llama(True)))


def test_a_dispatch_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(True)
    before = {key: id(value) for key, value in values(model).items()}
    with pytest.raises(OffloadError, match="offload_dir"):
        dispatch(model, split_map("cpu", "disk"), main_device=HERE)
    real = accelerate.hooks.set_module_tensor_to_device
    for count in (1, 5, 20):
        calls = []

        def failing(*given: object, calls: list = calls, count: int = count, **options: object) -> None:
            calls.append(given)
            if len(calls) == count:
                raise OSError(28, "No space left on device")
            real(*given, **options)

        monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", failing)
        with pytest.raises(OffloadError, match="No space left"):
            dispatch(
                model, split_map("cpu", "disk"), main_device=HERE, offload_dir=str(tmp_path / str(count))
            )
        monkeypatch.undo()
        assert {key: id(value) for key, value in values(model).items()} == before
        assert torch.equal(logits(model), logits(llama(True)))


def test_a_dispatched_model_is_not_dispatched_again(tmp_path: Path) -> None:
    model = situations(False)["cpu_offload"](tmp_path)
    with pytest.raises(OffloadError, match="dispatched already"):
        dispatch(model, split_map("cpu", HERE))


def test_nothing_piles_up_over_fifty_passes(tmp_path: Path) -> None:
    model = situations(True)["dispatch_model, mixed"](tmp_path)
    keep_weights_in_module(model)
    counts = []
    for number in range(50):
        logits(model)
        if number in (4, 49):
            gc.collect()
            counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1]
