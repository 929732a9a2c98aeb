"""Where the tensors of dispatched models are, and that each is read and written there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import offload_module
from torch import nn

from reload_plugin import SourceError
from reload_plugin.offload.placement import is_offloaded, placements
from tests.dispatched import checkpoint, counted, counted_situations, llama, logits, situations, values

CASES = [(tied, name) for tied in (False, True) for name in situations(tied)]
each_situation = pytest.mark.parametrize(("tied", "name"), CASES, ids=lambda value: str(value))


@each_situation
def test_every_value_is_found_where_it_is(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path)
    expected = values(llama(tied))
    found = placements(model)
    assert [place.name for place in found] == list(dict.fromkeys(place.name for place in found))
    assert {place.name for place in found} == expected.keys()
    assert all(torch.equal(place.read(), expected[place.name]) for place in found)
    assert is_offloaded(model)


@pytest.mark.parametrize("name", counted_situations())
def test_buffers_are_found_where_they_are(name: str, tmp_path: Path) -> None:
    model = counted_situations()[name](tmp_path)
    expected = values(counted())
    found = {place.name: place for place in placements(model)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(place.read(), expected[key]) for key, place in found.items())
    assert found["fixed"].where == "module"
    assert found["table"].where == ("module" if "stay" in name else "memory" if "dict" in name else "dat")


@each_situation
def test_what_is_written_is_what_the_model_computes_with(tied: bool, name: str, tmp_path: Path) -> None:
    model = situations(tied)[name](tmp_path)
    other = llama(tied, seed=1)
    expected = values(other)
    for place in placements(model):
        place.write(expected[place.name])
    assert all(torch.equal(place.read(), expected[place.name]) for place in placements(model))
    if not (
        tied and name.endswith("all .dat")
    ):  # Accelerate has no file for the head, so the model does not run
        assert torch.equal(logits(model), logits(other))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    again = type(other).from_pretrained(checkpoint(tied))
    assert torch.equal(logits(again), logits(llama(tied))), "the checkpoint it was loaded from changed"


def test_a_model_that_is_not_offloaded_has_its_values_in_its_modules() -> None:
    model = counted()
    assert {place.where for place in placements(model)} == {"module"}
    assert not is_offloaded(model)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_cache_of_compressed_tensors(where: str, tmp_path: Path) -> None:
    model, expected = counted(), values(counted())
    options = {"offload_dir": str(tmp_path)} if where == "disk" else {}
    for module in model.modules():
        offload_module(module, "cpu", where, **options)
    found = {place.name: place for place in placements(model)}
    assert found.keys() == expected.keys()
    assert {place.where for place in found.values()} == {"memory" if where == "cpu" else "safetensors"}
    assert all(torch.equal(place.read(), expected[key]) for key, place in found.items())
    other = counted(seed=1)
    for key, place in found.items():
        place.write(values(other)[key])
    assert torch.equal(logits(model), logits(other))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, .dat"](tmp_path)
    file = tmp_path / "model.norm.weight.dat"
    file.write_bytes(file.read_bytes()[:-1])
    place = next(place for place in placements(model) if place.name == "model.norm.weight")
    with pytest.raises(SourceError, match=r"model\.norm\.weight\.dat has 127 bytes"):
        place.read()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, .dat"](tmp_path)
    (tmp_path / "model.norm.weight.dat").unlink()
    place = next(place for place in placements(model) if place.name == "model.norm.weight")
    with pytest.raises(SourceError, match=r"model\.norm\.weight could not be read"):
        place.read()


def test_a_write_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = situations(False)["dispatch_model, dict"](tmp_path)
    place = next(place for place in placements(model) if place.name == "model.norm.weight")
    with pytest.raises(SourceError, match=r"a tensor of the shape \[1\] cannot be written"):
        place.write(torch.ones(1))


def test_a_value_that_is_nowhere_is_named() -> None:
    model = nn.Linear(2, 2, device="meta")
    assert [place.where for place in placements(model)] == ["nowhere", "nowhere"]
    with pytest.raises(SourceError, match="weight is on meta"):
        placements(model)[0].read()
