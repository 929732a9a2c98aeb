"""Staging has a bound that no order of a stream can break: the largest layer and a budget, and one copy under
`host`. The budget is made small here, so that a small model breaks through it.
"""

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import reload_plugin
from reload_plugin.checkpoint.io import read_batches, reading
from reload_plugin.commit.strategies import StagedCommit, StreamingCommit
from reload_plugin.record import staged_storage
from reload_plugin.record.model_record import record_of
from reload_plugin.transaction import group_processing
from tests import oracle
from tests.checkpoints import read_tensors
from tests.processor import packs_bf16
from tests.zoo import case_named

MIXTRAL = case_named("mixtral")
CASE = replace(MIXTRAL, name="bounds", config=MIXTRAL.config | {"num_hidden_layers": 6})
BUDGET = 256 << 10
"""Less than two expert layers, and more than all norms, which wait together for the last of them."""
Weights = list[tuple[str, torch.Tensor]]


@dataclass
class Meter:
    """What staging really takes: memory of layers that are not done, counted at each allocation."""

    open: int = 0
    """Most bytes at one time."""
    layers: int = 0
    """Most parameters at one time."""
    _alive: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def note(self, storage: staged_storage.StagedStorage) -> None:
        """One more was allocated."""
        self._alive.add(storage)
        staged = [found for found in self._alive if not found.is_served_memory]
        waiting = [found.storage.nbytes() for found in staged if not found.closed]
        self.open = max(self.open, sum(waiting))
        self.layers = max(self.layers, sum(nbytes > 0 for nbytes in waiting))


@dataclass
class Engine:
    llm: object
    folders: dict[str, Path]
    cold_b: oracle.Snapshot

    def __post_init__(self) -> None:
        groups = record_of(oracle.model_of(self.llm)).groups
        self.largest = max(group.nbytes for group in groups)
        self.copy = sum(group.nbytes for group in groups)

    def push(self, weights: Weights, policy: str) -> reload_plugin.ReloadReport:
        """Reload B from these pairs; the engine was on A, in a folder."""
        oracle.reload_from_folder(self.llm, self.folders["A"])

        def call(worker: object) -> None:
            worker.model_runner.reload_weights(weights_iterator=iter(weights), policy=policy)

        self.llm.collective_rpc(call)
        return reload_plugin.status(self.llm)[0].report

    def assert_is_b(self) -> None:
        now = oracle.snapshot(self.llm, CASE)
        assert oracle.compare_values("", now, self.cold_b) == []


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folders = oracle.write(CASE, tmp_path_factory.mktemp("bounds"))
    cold_b = oracle.cold_snapshot(CASE, folders["B"])
    with oracle.running(CASE, folders["A"]) as llm:
        yield Engine(llm, folders, cold_b)


@pytest.fixture
def meter(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """With the small budget. Tensors are read one by one, as those of real size are."""
    assert BUDGET < engine.largest < engine.copy / 4
    monkeypatch.setattr(StagedCommit, "waiting_bytes", BUDGET)
    monkeypatch.setattr(StreamingCommit, "waiting_bytes", BUDGET)
    monkeypatch.setattr(read_batches, "BATCH", 1)
    monkeypatch.setattr(reading, "AHEAD", 1)
    found = Meter()
    allocate = staged_storage.StagedStorage.materialise

    def noting(storage: staged_storage.StagedStorage, *args: object, **kwargs: object) -> None:
        allocate(storage, *args, **kwargs)
        found.note(storage)

    monkeypatch.setattr(staged_storage.StagedStorage, "materialise", noting)
    return found


def by_layer(weights: Weights) -> Weights:
    """As a checkpoint has them."""
    return weights


def one_of_each_first(weights: Weights) -> Weights:
    """The first shard of every fused layer, and then the rest: every layer is half loaded at one time."""
    first = [pair for pair in weights if "q_proj" in pair[0] or ".w1.weight" in pair[0]]
    names = {name for name, _ in first}
    return first + [pair for pair in weights if pair[0] not in names]


def shuffled(weights: Weights) -> Weights:
    return random.Random(3).sample(weights, len(weights))


def backwards_by_shard(weights: Weights) -> Weights:
    """All weights of one kind after another, the last layer first."""
    return sorted(weights, key=lambda pair: [part for part in pair[0].split(".") if not part.isdigit()])[::-1]


@pytest.mark.parametrize("order", [one_of_each_first, shuffled, backwards_by_shard], ids=lambda f: f.__name__)
@pytest.mark.parametrize("policy", ["host", "spill", "streaming"])
def test_a_stream_in_any_order_stays_within_the_budget(
    policy: str, order: object, engine: Engine, meter: Meter
) -> None:
    weights = list(read_tensors(engine.folders["B"]).items())
    report = engine.push(order(weights), policy)
    total = sum(tensor.nbytes for _, tensor in weights)
    assert report.spilled_bytes == total if policy == "spill" else 0 < report.spilled_bytes < total
    assert report.bytes_read is None, "bytes of a file that was spilled to are none of a checkpoint"
    assert meter.layers > (1 if policy == "spill" else 2), "what was spilled is read layer by layer"
    assert meter.open <= engine.largest + BUDGET, f"{meter.open} in {meter.layers} parameters"
    assert meter.open <= report.staging_bytes, "the report tells less than there was"
    beside = engine.copy if policy == "host" else 0
    assert report.staging_bytes <= engine.largest + BUDGET + beside
    engine.assert_is_b()


@pytest.mark.parametrize("policy", ["host", "streaming"])
def test_a_stream_in_the_order_of_layers_needs_no_file(policy: str, engine: Engine, meter: Meter) -> None:
    report = engine.push(by_layer(list(read_tensors(engine.folders["B"]).items())), policy)
    assert report.spilled_bytes == 0
    assert meter.open <= engine.largest + BUDGET
    engine.assert_is_b()


def test_without_the_budget_these_streams_do_hold_more(engine: Engine, meter: Meter) -> None:
    """Else nothing above could fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagedCommit, "waiting_bytes", 1 << 40)
        report = engine.push(one_of_each_first(list(read_tensors(engine.folders["B"]).items())), "host")
    assert report.spilled_bytes == 0
    assert meter.open > 2 * (engine.largest + BUDGET)
    engine.assert_is_b()


@pytest.mark.parametrize("policy", ["auto", "host"])
def test_garbage_collection_is_paused_while_a_folder_is_read(
    policy: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[bool] = []
    process = group_processing.process_group

    def noting(*args: object) -> None:
        searched.append(gc.isenabled())
        process(*args)

    monkeypatch.setattr(group_processing, "process_group", noting)
    options = {"weights_path": str(engine.folders["B"]), "policy": policy}
    engine.llm.collective_rpc("reload_weights", kwargs=options)
    assert searched
    assert not any(searched)
    assert gc.isenabled()
    engine.assert_is_b()


@pytest.mark.parametrize(("policy", "straight"), [("auto", True), ("streaming", True), ("host", False)])
def test_layers_without_processing_need_no_staging(
    policy: str, straight: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings and norms are read to where they are served; attention and experts are packed."""
    oracle.reload_from_folder(engine.llm, engine.folders["A"])  # so that the rollback source is in files
    staged: dict[str, bool] = {}
    allocate = staged_storage.StagedStorage.materialise

    def noting(storage: staged_storage.StagedStorage, *args: object, **kwargs: object) -> None:
        allocate(storage, *args, **kwargs)
        staged[storage.primary.name] = not storage.is_served_memory

    monkeypatch.setattr(staged_storage.StagedStorage, "materialise", noting)
    options = {"weights_path": str(engine.folders["B"]), "policy": policy}
    engine.llm.collective_rpc("reload_weights", kwargs=options)
    engine.assert_is_b()
    left = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight")
    assert [staged[name] for name in left] == [not straight] * 3
    assert staged["model.layers.0.self_attn.qkv_proj.weight"] == (packs_bf16() or not straight)
