"""Export of what an engine serves: byte for byte the checkpoint, or refused and nothing written."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import reload_plugin
from reload_plugin import ExportError, ReloadError, export_checkpoint, verify
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.reload import reload_weights
from tests import exports, oracle
from tests.checkpoints import Tensors, read_tensors
from tests.zoo import case_named


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Module, dict[str, Path]]]:
    case = case_named("llama")
    folders = oracle.write(case, tmp_path_factory.mktemp("llama"))
    with oracle.built(case, folders["A"]) as model:
        yield model, folders


def export_of(model: nn.Module, place: Path, **how: object) -> Tensors:
    export_checkpoint(model, place, **how)
    return read_tensors(place)


def test_tiers_are_told(llama: tuple[nn.Module, dict[str, Path]], tmp_path: Path) -> None:
    model, folders = llama
    weights = read_tensors(folders["B"])
    reload_weights(model, weights_path=str(folders["B"]))
    assert set(export_checkpoint(model, tmp_path / "a").tiers.values()) == {"source"}
    reload_weights(model, iter(weights.items()))
    report = export_checkpoint(model, tmp_path / "b", max_shard_size="100KB")
    assert set(report.tiers.values()) == {"plan", "inverse"}
    assert report.tiers["model.embed_tokens.weight"] == "plan"
    assert report.tiers["model.layers.0.self_attn.q_proj.weight"] == "inverse"
    assert len(set(report.files.values())) > 3
    assert exports.differing(read_tensors(tmp_path / "b"), weights) == {}
    reload_weights(model, iter(weights.items()), keep_load_format="host")
    assert set(export_checkpoint(model, tmp_path / "c").tiers.values()) == {"kept"}


def test_partial_updates_and_live_pushes_are_in_it(
    llama: tuple[nn.Module, dict[str, Path]], tmp_path: Path
) -> None:
    model, folders = llama
    a, b = read_tensors(folders["A"]), read_tensors(folders["B"])
    reload_weights(model, iter(a.items()))
    norm = "model.layers.1.input_layernorm.weight"
    reload_weights(model, iter([(norm, b[norm])]), partial=True)
    assert exports.differing(export_of(model, tmp_path / "partial"), a | {norm: b[norm]}) == {}
    model.load_weights([(name, tensor.float()) for name, tensor in b.items()])
    # In the dtype of the engine's own checkpoint, and not in that of the push.
    assert exports.differing(export_of(model, tmp_path / "pushed"), b) == {}


def test_a_source_that_changed_is_not_copied(
    llama: tuple[nn.Module, dict[str, Path]], tmp_path: Path
) -> None:
    model, folders = llama
    folder = tmp_path / "source"
    folder.mkdir()
    weights = read_tensors(folders["B"])
    (folder / "config.json").write_bytes((folders["B"] / "config.json").read_bytes())
    save_file(weights, folder / "model.safetensors")
    reload_weights(model, weights_path=str(folder))
    save_file(read_tensors(folders["A"]), folder / "model.safetensors")
    report = export_checkpoint(model, tmp_path / "out")
    assert "source" not in report.tiers.values()
    assert exports.differing(read_tensors(tmp_path / "out"), weights) == {}


def test_serving_is_as_before(llama: tuple[nn.Module, dict[str, Path]], tmp_path: Path) -> None:
    model, folders = llama
    reload_weights(model, iter(read_tensors(folders["B"]).items()))
    handles = dict(state_of(model).handles)
    before = oracle.live_tensors(model)
    export_checkpoint(model, tmp_path / "out")
    verify(model, folders["A"])
    assert oracle.live_tensors(model) == before
    assert state_of(model).handles == handles


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: setattr(state, "broken", "half of it"), "does not serve"),
        (lambda state: setattr(state, "asleep", True), "sleeps"),
    ],
)
def test_what_cannot_be_read_is_refused(
    llama: tuple[nn.Module, dict[str, Path]],
    tmp_path: Path,
    spoil: Callable[[object], None],
    says: str,
) -> None:
    model, folders = llama
    state = state_of(model)
    spoil(state)
    try:
        for call in (
            lambda: export_checkpoint(model, tmp_path / "out"),
            lambda: verify(model, folders["A"]),
        ):
            with pytest.raises(ReloadError, match=says):
                call()
    finally:
        state.broken, state.asleep = None, False
    assert not (tmp_path / "out").exists()


def test_an_open_update_is_refused(llama: tuple[nn.Module, dict[str, Path]], tmp_path: Path) -> None:
    model, folders = llama
    with reload_plugin.restore_for_reloading(model):
        with pytest.raises(ReloadError, match="Finish it or abort it"):
            export_checkpoint(model, tmp_path / "out")
        model.load_weights(list(read_tensors(folders["B"]).items()))
    assert verify(model, folders["B"]).serves


def test_wrong_options_are_refused(llama: tuple[nn.Module, dict[str, Path]], tmp_path: Path) -> None:
    model, _ = llama
    with pytest.raises(ExportError, match="lossy is 'a little'"):
        export_checkpoint(model, tmp_path / "out", lossy="a little")
    with pytest.raises(ExportError, match="max_shard_size"):
        export_checkpoint(model, tmp_path / "out", max_shard_size="much")


def test_a_served_value_that_nobody_loaded_is_found(llama: tuple[nn.Module, dict[str, Path]]) -> None:
    model, folders = llama
    reload_weights(model, iter(read_tensors(folders["B"]).items()))
    norm = model.get_parameter("model.norm.weight")
    kept = norm.detach().clone()
    with torch.no_grad():
        norm[3] += 1
    report = verify(model, folders["B"])
    assert list(report.different) == ["model.norm.weight"]
    assert (report.different["model.norm.weight"].elements, report.different["model.norm.weight"].first) == (
        1,
        (3,),
    )
    with torch.no_grad():
        norm.copy_(kept)
    assert verify(model, folders["B"]).serves
