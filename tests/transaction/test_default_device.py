"""A reload under a default device of the caller's, which must not reach what the reload allocates."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reload_plugin import reload_weights
from reload_plugin.errors import ReloadError
from reload_plugin.vllm_hooks import plugin
from tests.transaction.test_session import METHODS, Method, Model, Packing, Tied, start, values, weights

B, C = weights(2), weights(3)


@contextlib.contextmanager
def as_default() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "with torch.device": lambda: torch.device("meta"),
    "torch.set_default_device": as_default,
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    before = plugin.patched()
    plugin.register()
    yield
    if not before:
        plugin.unregister()


def from_iterator(model: Model, folder: Path) -> None:
    reload_weights(model, iter(B.items()))


def from_folder(model: Model, folder: Path) -> None:
    reload_weights(model, weights_path=str(folder / "model.safetensors"))


def with_spill(model: Model, folder: Path) -> None:
    reload_weights(model, iter(B.items()), keep_load_format="spill", check_finite=True)


def partially(model: Model, folder: Path) -> None:
    reload_weights(model, iter(B.items()), keep_load_format="host")
    reload_weights(model, iter({"first.weight": C["first.weight"]}.items()), partial=True)


ROADS = [from_iterator, from_folder, with_spill, partially]


@pytest.mark.parametrize(
    ("method", "default"),
    [(method, "with torch.device") for method in METHODS] + [(Packing, "torch.set_default_device")],
)
@pytest.mark.parametrize("road", ROADS)
def test_a_reload_under_a_default_device_equals_one_without(
    tmp_path: Path, method: type[Method], road: Callable[[Model, Path], None], default: str
) -> None:
    save_file(B, tmp_path / "model.safetensors")
    expected, model = start(Model, method), start(Model, method)
    road(expected, tmp_path)
    with DEFAULTS[default]():
        road(model, tmp_path)
        road(model, tmp_path)
    assert values(model) == values(expected)


def test_a_failing_reload_under_a_default_device_keeps_the_old_weights() -> None:
    model = start(Tied)
    served = values(model)
    with torch.device("meta"), pytest.raises(ReloadError, match="The engine serves what it served before"):
        reload_weights(model, iter({"nothing": torch.ones(1, device="cpu")}.items()))
    assert values(model) == served


def test_the_callers_iterator_runs_under_the_callers_default_device() -> None:
    model, seen = start(Model, Method), set()

    def generator() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in B.items():
            seen.add(torch.empty(1).device.type)
            yield name, tensor

    with torch.device("meta"):
        reload_weights(model, generator())
        reload_weights(model, generator())  # by the copy plan
        assert torch.empty(1).device.type == "meta"
    assert seen == {"meta"}
    assert torch.empty(1).device.type == "cpu"
