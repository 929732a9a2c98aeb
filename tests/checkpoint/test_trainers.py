"""One trained model in every format that is read, written by the library that does it in practice.

Each is read bit for bit, and reloaded into a running engine that then equals a cold start on safetensors.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reload_plugin
from reload_plugin.checkpoint import from_transformers
from tests import oracle, trainers
from tests.checkpoints import read_tensors
from tests.zoo import MIXTRAL, QWEN2_MOE, case_named

KIND = dict.fromkeys(trainers.FORMATS, "torch")
KIND |= dict.fromkeys(("safetensors", "safetensors_sharded", "dcp_consolidated"), "safetensors")
KIND |= dict.fromkeys(("fsdp1", "fsdp1_mesh", "fsdp2", "hsdp", "fsdp_tp"), "fsdp")
KIND |= dict.fromkeys(("dcp", "dcp_app", "dcp_flat", "dcp_fsdp1", "accelerate"), "dcp")
KIND |= {"olmo_safetensors": "olmo", "dcp_safetensors": "dcp-safetensors"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A: the trained model, somewhat off. B: the trained model."""
    root = tmp_path_factory.mktemp("models")
    yield oracle.write(case_named("minilm"), root)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("saved")
    yield trainers.write_all(models["B"], root)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(saved: dict[str, Path]) -> dict[str, torch.Tensor]:
    return read_tensors(saved["safetensors"])


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", trainers.FORMATS)
def test_every_format_is_listed_and_read_bit_for_bit(
    saved: dict[str, Path], expected: dict[str, torch.Tensor], name: str
) -> None:
    source = reload_plugin.open_source(saved[name])
    assert source.format == KIND[name]
    listed = {info.name: (info.shape, info.dtype) for info in source.infos()}
    assert listed == {key: (tuple(t.shape), t.dtype) for key, t in expected.items()}
    assert source.nbytes == sum(t.nbytes for t in expected.values())
    assert source.files
    assert all(Path(file).is_file() for file in source.files)
    order = []
    for key, tensor in source:
        order.append(key)
        assert bits(tensor) == bits(expected[key]), key
    assert order == source.names() == [info.name for info in source.infos()]
    layers = [int(key.split(".")[2]) for key in order if key.startswith("encoder.layer.")]
    assert layers == sorted(layers)
    assert source.unchanged()
    backwards = order[::-1][:7]
    assert [key for key, _ in source.read(backwards)] == backwards


@pytest.mark.parametrize("name", trainers.FORMATS)
def test_every_format_converts_to_the_same_safetensors(
    saved: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    report = reload_plugin.convert(saved[name], tmp_path / "converted.safetensors", weights_only=True)
    assert report.format == KIND[name]
    found = load_file(tmp_path / "converted.safetensors")
    assert found.keys() == expected.keys()
    assert all(bits(found[key]) == bits(tensor) for key, tensor in expected.items())
    (tmp_path / "converted.safetensors").unlink()


@pytest.mark.slow
def test_every_format_reloads_an_engine_to_a_cold_start(
    models: dict[str, Path], saved: dict[str, Path]
) -> None:
    case = case_named("minilm")
    with oracle.running(case, models["B"], load_format="auto") as llm:
        cold = oracle.snapshot(llm, case)
    with oracle.running(case, models["A"], load_format="auto") as llm:
        before = oracle.snapshot(llm, case)
        assert oracle.differing_answers(before.answers, cold.answers)
        for name, folder in saved.items():
            oracle.reload_from_folder(llm, folder)
            now = oracle.snapshot(llm, case)
            assert oracle.compare_values("", now, cold) == [], name
            assert oracle.compare_places("", before, now) == [], name
            oracle.reload_from_folder(llm, models["A"])
        live = from_transformers(trainers.bare_model(models["B"]))
        llm.collective_rpc(lambda worker: worker.model_runner.reload_weights(weights_iterator=iter(live)))
        assert oracle.compare_values("", oracle.snapshot(llm, case), cold) == []
        oracle.reload_from_folder(llm, models["A"])
        assert oracle.compare_values("", oracle.snapshot(llm, case), before) == []


# --- a live model ---


@pytest.mark.parametrize(
    "config", [MIXTRAL, QWEN2_MOE, case_named("llama_tied").config], ids=lambda c: c["model_type"]
)
@pytest.mark.parametrize("offload", ["", "cpu", "disk", "device_map"])
def test_a_live_model_is_read_as_it_would_be_saved(tmp_path: Path, config: dict, offload: str) -> None:
    """transformers fuses the experts of a mixture in memory; Accelerate may have put weights elsewhere."""
    import accelerate
    from transformers import AutoModelForCausalLM

    from tests.checkpoints import write_transformers

    write_transformers(tmp_path / "model", config, 1)
    on_disk = read_tensors(tmp_path / "model")
    more: dict[str, object] = {}
    if offload == "device_map":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        more = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16, **more)
    if offload == "cpu":
        accelerate.cpu_offload(model)
    elif offload == "disk":
        accelerate.disk_offload(model, str(tmp_path / "offloaded"))
    source = from_transformers(model)
    listed = {info.name: (info.shape, info.dtype) for info in source.infos()}
    assert listed == {name: (tuple(t.shape), t.dtype) for name, t in on_disk.items()}
    assert {name: bits(t) for name, t in source} == {name: bits(t) for name, t in on_disk.items()}
    assert source.format == "transformers"
    assert not source.unchanged()


def test_something_else_than_a_transformers_model_is_refused() -> None:
    with pytest.raises(reload_plugin.SourceError, match="no transformers model"):
        from_transformers(torch.nn.Linear(2, 2))
