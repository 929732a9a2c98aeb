"""Models of every kind, exported: byte for byte the checkpoint, or refused."""

from pathlib import Path

import pytest

from reload_plugin import ExportError, export_checkpoint, verify
from reload_plugin.transaction.reload import reload_weights
from tests import exports, oracle
from tests.checkpoints import read_tensors
from tests.zoo import case_named

ROADS_OF = {"llama_tied": ("folder", "iterator", "gone"), "mamba2": ("folder", "iterator", "kept")}


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("llama_tied", ()),
        ("qwen2", ()),
        ("mixtral", ()),
        ("deepseek_v2", ()),
        ("padded_vocabulary", ()),
        ("w8a8_dynamic", ()),
        ("mamba2", ("iterator",)),
        ("online_linear", ("iterator",)),
    ],
)
def test_an_export_is_the_checkpoint_or_is_refused(
    name: str, refused: tuple[str, ...], tmp_path: Path
) -> None:
    roads = ROADS_OF.get(name, ("folder", "iterator"))
    for road, (text, wrong) in exports.run(exports.case_of(name), tmp_path, roads, every=False):
        if road in refused:
            assert text.startswith("refused")
            assert 0 < len(wrong) < 20
        else:
            assert wrong == {}, f"{name}, {road}"


def test_dequantized_weights_are_served_the_same_way(tmp_path: Path) -> None:
    case = case_named("online_linear")
    folders = oracle.write(case, tmp_path)
    weights = read_tensors(folders["B"])
    with oracle.built(case, folders["A"]) as model:
        reload_weights(model, iter(weights.items()))
        with pytest.raises(ExportError, match="lossy='dequantize'") as raised:
            export_checkpoint(model, tmp_path / "out")
        assert raised.value.tensors.keys() == {name for name in weights if name.endswith("_proj.weight")}
        assert not (tmp_path / "out").exists()
        report = export_checkpoint(model, tmp_path / "out", lossy="dequantize")
        assert report.largest_error.keys() == raised.value.tensors.keys()
        made = read_tensors(tmp_path / "out")
        for name, error in report.largest_error.items():
            assert report.tiers[name] == "dequantized"
            assert 0 < (made[name].float() - weights[name].float()).abs().max() <= 2 * error
        assert verify(model, tmp_path / "out").serves
