"""``save_offloaded`` on real models: each tensor the original's, from wherever it was, in any files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reload_plugin.errors import ExportError
from reload_plugin.export.offloaded import save_offloaded
from tests.export.folders import files_of, tensors_of
from tests.export.live_bytes import LiveBytes
from tests.export.placements import PLACEMENTS
from tests.export.small_models import DECODER, EXPERTS, FAMILIES, Family
from tests.offloaded_saves import expected, make_original, quiet, scratch_folder, sizes_of, why_wrong

Original = tuple[Family, Path, dict[str, torch.Tensor]]


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    quiet()
    with scratch_folder() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def originals(work: Path) -> dict[str, Original]:
    """Family -> its checkpoint, made when it is asked for."""

    class Made(dict[str, Original]):
        def __missing__(self, name: str) -> Original:
            folder = work / name
            self[name] = (family_named(name), folder, make_original(family_named(name), folder))
            return self[name]

    return Made()


@pytest.fixture
def place(work: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield Path(folder)


def loaded_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of a folder; every weight has to be there and fit."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return dict(model.state_dict())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_each_tensor_is_the_originals_from_wherever_it_was(
    originals: dict[str, Original], place: Path, name: str, placement: str
) -> None:
    family, folder, original = originals[name]
    model = PLACEMENTS[placement](folder, place / "scratch")
    right = expected(original, family, placement)
    for size in sizes_of(original, 3):
        report = save_offloaded(model, place / "out", max_shard_size=size)
        assert why_wrong(place / "out", right) is None
        assert report.files.keys() == report.tiers.keys() == report.dtypes.keys() == right.keys()
        assert report.nbytes == sum(tensor.nbytes for tensor in right.values())
    if placement in ("in memory", "full disk", "cpu_offload()"):
        loaded, first = loaded_tensors(place / "out"), loaded_tensors(folder)
        assert loaded.keys() == first.keys()
        assert all(torch.equal(loaded[key], first[key]) for key in first)


@pytest.mark.parametrize("name", ["nomic_bert", "qwen3_moe", "ernie4_5_vl_moe", "kimi_k25"])
def test_every_size_from_one_tensor_a_file_to_one_file(
    originals: dict[str, Original], place: Path, name: str
) -> None:
    _, folder, original = originals[name]
    model = PLACEMENTS["full disk"](folder, place / "scratch")
    sizes = sizes_of(original)
    counts = []
    for size in sizes:
        report = save_offloaded(model, place / "out", max_shard_size=size)
        assert why_wrong(place / "out", original) is None
        counts.append(len(set(report.files.values())))
    assert counts[0] == len(original)
    assert counts[-1] == 1
    assert len(set(counts)) == len(counts)


def test_the_models_own_format_when_asked(originals: dict[str, Original], place: Path) -> None:
    _, folder, _ = originals["mixtral"]
    model = PLACEMENTS["full disk"](folder, place / "scratch")
    report = save_offloaded(model, place / "out", save_original_format=False)
    assert set(report.tiers.values()) == {"source"}
    found = tensors_of(place / "out")
    held = PLACEMENTS["in memory"](folder, place).state_dict()
    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], held[name]) for name in held)
    loaded = loaded_tensors(place / "out")
    assert all(torch.equal(loaded[name], held[name]) for name in held)


def test_the_report_says_where_everything_is(originals: dict[str, Original], place: Path) -> None:
    _, folder, original = originals["mixtral"]
    model = PLACEMENTS["full disk"](folder, place / "scratch")
    report = save_offloaded(model, place / "out", max_shard_size="4KB")
    expert, norm = "model.layers.0.block_sparse_moe.experts.1.w2.weight", "model.norm.weight"
    assert (report.tiers[expert], report.tiers[norm]) == ("converted", "source")
    assert report.dtypes[expert] == "bfloat16"
    index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == report.files
    assert report.copied == ("config.json", "generation_config.json")
    assert report.source == "MixtralForCausalLM"
    assert report.directory == str(place / "out")
    experts = original[expert].nbytes * 4 * 2  # w1 and w3 of four experts
    assert report.peak_bytes == 2 * experts  # as one tensor, and as eight
    assert "MixtralForCausalLM" in report.model_dump_json()


def test_config_and_tokenizer_come_along_and_the_model_stays_as_it_was(
    originals: dict[str, Original], place: Path
) -> None:
    _, folder, _ = originals["llama, tied"]
    model = PLACEMENTS["full disk"](folder, place / "scratch")
    (place / "origin").mkdir()
    (place / "origin" / "tokenizer.json").write_text('{"a": 1}')
    (place / "origin" / "notes.txt").write_text("not a tokenizer")
    model.config._name_or_path = model.name_or_path = str(place / "origin")
    before = model.config.to_json_string()
    report = save_offloaded(model, place / "out")
    assert report.copied == ("config.json", "generation_config.json", "tokenizer.json")
    assert (place / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert model.config.to_json_string() == before
    config = json.loads((place / "out" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")


# -- what is refused ------------------------------------------------------------------------------


def refused(model: Any, place: Path, says: str, **options: Any) -> ExportError:
    with pytest.raises(ExportError, match=says) as raised:
        save_offloaded(model, place / "out", **options)
    assert "othing was written" in str(raised.value)
    assert not (place / "out").exists()
    assert not [name for name in files_of(place) if name.endswith(".partial")]
    return raised.value


def test_a_source_that_is_missing_is_an_error_before_a_byte(
    originals: dict[str, Original], place: Path
) -> None:
    """Transformers concatenates the others and says nothing."""
    model = PLACEMENTS["in memory"](originals["nomic_bert"][1], place)
    layer = model.layers[1].self_attn if hasattr(model.layers[1], "self_attn") else model.layers[1]
    del layer.k_proj
    error = refused(model, place, "k_proj.*is missing")
    assert any("layers.1" in name for name in error.tensors)


def test_weights_without_values_are_named(originals: dict[str, Original], place: Path) -> None:
    model = PLACEMENTS["in memory"](originals["llama, tied"][1], place)
    model.model.layers[1].mlp.to("meta")
    error = refused(model, place, "3 tensors of LlamaForCausalLM cannot be read: .*is on meta")
    assert error.tensors.keys() == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}


def test_an_operation_that_cannot_be_undone_is_named_with_its_tensors(
    originals: dict[str, Original], place: Path
) -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Square(ConversionOps):
        def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return input_dict

    model = PLACEMENTS["in memory"](originals["llama, tied"][1], place)
    model._weight_conversions = [WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [Square()])]
    error = refused(model, place, "cannot be converted back by transformers: .*Square")
    assert error.tensors == {f"model.layers.{i}.mlp.up_proj.weight": "Square" for i in range(2)}
    save_offloaded(model, place / "out", save_original_format=False)
    assert len(tensors_of(place / "out")) == 20


def test_a_weight_that_would_be_lost_is_named(originals: dict[str, Original], place: Path) -> None:
    from transformers.core_model_loading import WeightRenaming

    model = PLACEMENTS["in memory"](originals["llama, tied"][1], place)
    model._weight_conversions = [WeightRenaming("up_proj", "gate_proj")]
    error = refused(model, place, "2 tensors of LlamaForCausalLM would be lost")
    assert error.tensors.keys() <= model.state_dict().keys()


@pytest.mark.parametrize("size", ["0", "many", -3])
def test_a_size_that_is_none_is_refused(originals: dict[str, Original], place: Path, size: str) -> None:
    model = PLACEMENTS["in memory"](originals["llama, tied"][1], place)
    refused(model, place, "max_shard_size", max_shard_size=size)


def test_what_is_no_transformers_model_is_refused(place: Path) -> None:
    refused(torch.nn.Linear(2, 2), place, "Linear is no transformers model")


@pytest.mark.parametrize(
    ("quantizer", "serializable", "says"),
    [("FineGrainedFP8HfQuantizer", False, "cannot be saved"), ("Mxfp4HfQuantizer", True, "rearranges")],
)
def test_quantizers_that_save_in_their_own_way_are_refused(
    originals: dict[str, Original], place: Path, quantizer: str, serializable: bool, says: str
) -> None:
    from unittest import mock

    from transformers.quantizers import auto

    model = PLACEMENTS["in memory"](originals["llama, tied"][1], place)
    cls = next(c for c in auto.AUTO_QUANTIZER_MAPPING.values() if c.__name__ == quantizer)
    model.hf_quantizer = cls.__new__(cls)
    model.hf_quantizer.quantization_config = mock.Mock(quant_method="some")
    with mock.patch.object(cls, "is_serializable", return_value=serializable):
        refused(model, place, f"LlamaForCausalLM is quantized with some, .*{says}")


def test_a_compiled_model_is_saved_as_itself(originals: dict[str, Original], place: Path) -> None:
    _, folder, original = originals["llama, tied"]
    report = save_offloaded(torch.compile(PLACEMENTS["in memory"](folder, place)), place / "out")
    assert report.source == "LlamaForCausalLM"
    assert why_wrong(place / "out", original) is None


def test_tied_weights_that_differ_are_both_kept(originals: dict[str, Original], place: Path) -> None:
    model = PLACEMENTS["in memory"](originals["llama, tied"][1], place)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    save_offloaded(model, place / "out")
    found = tensors_of(place / "out")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(found["model.embed_tokens.weight"], model.model.embed_tokens.weight)


# -- memory ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(work: Path) -> Path:
    """A Mixtral of 200 MB whose largest group is a tenth of it."""
    import transformers

    options = {**DECODER, **EXPERTS, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**options)).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(index / 7)
    model.save_pretrained(work / "large")
    return work / "large"


@pytest.mark.parametrize("placement", ["in memory", "full disk", "compressed-tensors, disk"])
def test_memory_is_bounded_by_the_largest_group_at_every_size(
    large: Path, place: Path, placement: str
) -> None:
    model = PLACEMENTS[placement](large, place / "scratch")
    for size in ("1MB", "60MB", "50GB"):
        with LiveBytes() as live:
            report = save_offloaded(model, place / "out", max_shard_size=size)
        assert report.nbytes > 190e6
        assert 8e6 < live.peak <= report.peak_bytes + (16 << 20)
        assert report.peak_bytes <= 4 * 2 * 2 * 512 * 2048 * 2  # experts' w1 and w3, fused and apart
    assert live.now == 0
