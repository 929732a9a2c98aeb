"""The checkpoint that the engine started from: found again at its revision, and recognised as unchanged."""

import json
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import utils

from reload_plugin import record_for_reloading, reload_weights, vllm_api
from reload_plugin.errors import SourceError
from reload_plugin.record.model_record import record_of
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.rollback import has_rollback_source
from reload_plugin.vllm_hooks import plugin
from tests.transaction.test_session import CONFIG, CPU, Method, Model, values, weights

A, B, C = weights(1), weights(2), weights(3)
REPOSITORY = "org/tiny"
COMMITS = {"main": "a" * 40, "x": "b" * 40}
CACHE_FOLDER = "models--org--tiny"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = plugin.patched()
    plugin.register()
    yield
    if not before:
        plugin.unregister()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache on disk with one repository: weights A at ``main``, B at the revision ``x``. No network."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / CACHE_FOLDER
    (repository / "refs").mkdir(parents=True)
    for (name, commit), held in zip(COMMITS.items(), (A, B), strict=True):
        (repository / "refs" / name).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save_file(held, snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": len(name)}))
    return tmp_path


def started(path: str, loaded: dict, revision: str | None = None, load_format: str = "auto") -> Model:
    """A model recorded as one that an engine started from ``path`` at ``revision``."""
    config = types.SimpleNamespace(**vars(CONFIG) | {"model": path, "revision": revision})
    model = Model(Method)
    record_for_reloading(model, VllmConfig(load_config=LoadConfig(load_format=load_format)))
    model.load_weights(iter(loaded.items()))
    utils.process_weights_after_loading(model, config, CPU)
    return model


def folder_with_consolidated(path: Path) -> Path:
    """A folder with an index, and a file beside it that the loader leaves out."""
    save_file(A, path / "model-00001-of-00001.safetensors")
    save_file(A, path / "consolidated.safetensors")
    table = dict.fromkeys(A, "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return path


# --- the revision ---


@pytest.mark.parametrize(("revision", "held"), [("x", B), (None, A), ("b" * 40, B)])
def test_a_reload_without_a_path_reads_the_revision_that_the_engine_was_started_with(
    hub: Path, revision: str | None, held: dict
) -> None:
    model, expected = started(REPOSITORY, C, revision), values(started(REPOSITORY, held, revision))
    reload_weights(model)
    assert values(model) == expected


def test_another_repository_is_read_at_its_default_revision(hub: Path) -> None:
    (hub / CACHE_FOLDER).rename(hub / "models--org--other")
    model = started(REPOSITORY, C, "x")
    with pytest.raises(SourceError, match="org/tiny holds no weights"):
        reload_weights(model)
    reload_weights(model, weights_path="org/other")
    assert values(model) == values(started(REPOSITORY, A))


def test_the_loaders_own_iterator_reads_the_revision_too(hub: Path) -> None:
    model = started(REPOSITORY, C, "x")
    record = record_of(model)
    found = dict(vllm_api.all_weights(record.vllm_config, record.model_config, model, REPOSITORY))
    assert found.keys() == B.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in B.items())


# --- whether it can be read again ---


@pytest.mark.parametrize("load_format", ["hf", "safetensors"])
def test_a_file_that_the_loader_leaves_out_does_not_cost_the_rollback_source(
    tmp_path: Path, load_format: str
) -> None:
    model = started(str(folder_with_consolidated(tmp_path)), A, load_format=load_format)
    assert has_rollback_source(model, state_of(model))
    target = tmp_path / "next"
    target.mkdir()
    save_file(B, target / "model.safetensors")
    assert reload_weights(model, weights_path=str(target)).old_generation == "reread"


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "mistral"])
def test_a_change_of_a_file_that_was_loaded_costs_the_rollback_source(
    tmp_path: Path, load_format: str
) -> None:
    model = started(str(folder_with_consolidated(tmp_path)), A, load_format=load_format)
    loaded = "consolidated" if load_format in ("auto", "mistral") else "model-00001-of-00001"
    save_file(B, tmp_path / f"{loaded}.safetensors")
    assert not has_rollback_source(model, state_of(model))


@pytest.mark.parametrize("revision", ["x", None])
def test_a_repository_in_the_local_cache_can_be_read_again(hub: Path, revision: str | None) -> None:
    held = B if revision else A
    model = started(REPOSITORY, held, revision)
    assert has_rollback_source(model, state_of(model))
    read = dict(state_of(model).rollback_source.read())
    assert all(torch.equal(read[name], tensor) for name, tensor in held.items())


def test_a_branch_that_moved_to_another_commit_is_no_rollback_source(hub: Path) -> None:
    model = started(REPOSITORY, A)
    (hub / CACHE_FOLDER / "refs" / "main").write_text(COMMITS["x"])
    assert not has_rollback_source(model, state_of(model))


def test_torch_files_that_the_engine_started_from_can_be_read_again(tmp_path: Path) -> None:
    torch.save(A, tmp_path / "pytorch_model.bin")
    model = started(str(tmp_path), A)
    assert has_rollback_source(model, state_of(model))
