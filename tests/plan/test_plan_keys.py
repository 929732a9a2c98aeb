"""A plan and a learnt copy plan are for one listing on one placement: if either changes, it is traced again.

On a running engine with experts, by a folder (the kept plan) and by an iterator (the kept copy plan). Each
test first sees that what was learnt is used, else it would show nothing.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vllm.model_executor.layers.fused_moe import expert_map_manager

import reload_plugin
from reload_plugin.errors import WeightsError
from reload_plugin.record.model_record import record_of
from reload_plugin.record.placement import SHARDS, placement
from reload_plugin.record.recorder import record_constructed
from reload_plugin.transaction import known
from tests import oracle
from tests.checkpoints import Tensors, read_tensors
from tests.zoo import case_named

AT_START = (0, 1, 2, 3)
MOVED = (2, 0, 3, 1)
"""Expert -> the slot that it has on this rank."""
CASE = case_named("qwen3_moe")
NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
HEAD = "lm_head.weight"

ExpertPlaces = tuple[int, ...]


@dataclass
class Engine:
    """A running engine with a table of experts, and what a cold start on other weights gives."""

    llm: object
    folders: Mapping[str, Path]
    cold: Mapping[tuple[str, ExpertPlaces], oracle.Snapshot]
    traced: list[str] = field(default_factory=list)
    """What was traced since this list was last emptied."""

    @property
    def model(self) -> torch.nn.Module:
        return oracle.model_of(self.llm)

    def by_folder(self, folder: Path) -> reload_plugin.ReloadReport:
        return reload_plugin.reload_weights(self.model, weights_path=str(folder))

    def by_iterator(self, folder: Path) -> reload_plugin.ReloadReport:
        return reload_plugin.reload_weights(self.model, iter(read_tensors(folder).items()))

    def learn(self, reload: Callable) -> None:
        """Reload until nothing has to be traced any more, and see that the loader is not used either."""
        for letter in "BABA":
            self.traced.clear()
            report = reload(self, self.folders[letter])
        assert self.traced == []
        assert report.replayed == report.tensors > 0
        assert report.computed == 0

    def assert_is(self, letter: str, places: ExpertPlaces = AT_START) -> None:
        now = oracle.snapshot(self.llm, CASE)
        assert oracle.compare_values("", now, self.cold[letter, places]) == []


FACES = {"folder": Engine.by_folder, "iterator": Engine.by_iterator}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine on A, its experts in the order of the checkpoint, by a table as with expert parallelism."""
    folders = oracle.write(CASE, tmp_path_factory.mktemp("checkpoints"))
    folders["wide"] = saved(folders["A"].parent / "wide", folders["B"], in_float32)
    cold = {}
    with pytest.MonkeyPatch.context() as patch:
        for letter, places in (("B", MOVED), ("wide", AT_START)):
            patch.setattr(expert_map_manager, "determine_expert_map", table_of(places))
            with oracle.running(CASE, folders[letter]) as llm:
                cold[letter, places] = oracle.snapshot(llm, CASE)
        patch.setattr(expert_map_manager, "determine_expert_map", table_of(AT_START))
        with oracle.running(CASE, folders["A"]) as llm:
            cold["A", AT_START] = oracle.snapshot(llm, CASE)
            found = Engine(llm, folders, cold)
            plain = known.make_plan

            def noting(model: object, infos: object, source: str, *rest: object) -> object:
                found.traced.append(source)
                return plain(model, infos, source, *rest)

            patch.setattr(known, "make_plan", noting)
            yield found


@pytest.fixture(params=FACES)
def face(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """A way to reload that has learnt all there is to learn; afterwards the engine is on A again."""
    reload = FACES[request.param]
    engine.learn(reload)
    engine.assert_is("A")
    yield reload
    reload(engine, engine.folders["A"])
    engine.assert_is("A")


def table_of(places: ExpertPlaces) -> Callable:
    """vLLM's function that says where experts are; it makes no table for one rank."""
    return lambda *_, **__: (len(places), torch.tensor(places, dtype=torch.int32), None)


def saved(folder: Path, like: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint with other tensors in it."""
    folder.mkdir()
    for file in like.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(change(read_tensors(like)), folder / "model.safetensors")
    return folder


def in_float32(tensors: Tensors) -> Tensors:
    """One weight of each kind in another dtype, with values that bf16 cannot hold."""
    wide = {name: tensors[name].float() * 1.001 for name in (NORM, EXPERT, HEAD)}
    return tensors | wide


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("experts.2.up", "experts.2.above"): tensor for name, tensor in tensors.items()}


def widened(tensors: Tensors) -> Tensors:
    return tensors | {EXPERT: torch.cat([tensors[EXPERT]] * 2), NORM: tensors[NORM][None]}


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    found = [module for module in model.modules() if hasattr(module, "update_expert_map_info")]
    assert len(found) == 2
    return found


def write_into_tables(model: torch.nn.Module, places: ExpertPlaces) -> None:
    for experts in experts_of(model):
        experts.expert_map.copy_(torch.tensor(places))
        assert experts.expert_map is experts.expert_map_manager.expert_map


def exchange_tables(model: torch.nn.Module, places: ExpertPlaces) -> None:
    """As vLLM does when the number of ranks changes (``update_expert_map``)."""
    for experts in experts_of(model):
        experts.expert_map_manager._expert_map = torch.tensor(places, dtype=torch.int32)
        experts.update_expert_map_info()


@pytest.mark.parametrize("move", [write_into_tables, exchange_tables])
def test_experts_that_moved_are_loaded_to_where_they_are_now(
    engine: Engine, face: Callable, move: Callable[[torch.nn.Module, ExpertPlaces], None]
) -> None:
    """Twice in a row: the second table must not be taken for the first."""
    for letter, places in (("B", MOVED), ("A", AT_START)) * 2:
        move(engine.model, places)
        engine.traced.clear()
        report = face(engine, engine.folders[letter])
        assert len(engine.traced) == 1
        assert report.replayed == report.tensors
        engine.assert_is(letter, places)
    engine.learn(face)


def test_another_dtype_is_converted_as_a_cold_start_does(engine: Engine, face: Callable) -> None:
    for _ in range(2):
        face(engine, engine.folders["wide"])
        engine.assert_is("wide")
        face(engine, engine.folders["A"])
        engine.assert_is("A")


@pytest.mark.parametrize(
    ("change", "kind", "offenders"),
    [
        (renamed, "unexpected", {f"model.layers.{n}.mlp.experts.2.above_proj.weight" for n in (0, 1)}),
        (widened, "misshapen", {EXPERT, NORM}),
    ],
)
def test_other_names_and_shapes_are_refused_and_named(
    engine: Engine,
    face: Callable,
    change: Callable[[Tensors], Tensors],
    kind: str,
    offenders: set[str],
    tmp_path: Path,
) -> None:
    """Same number of tensors, same bytes or nearly: nothing but the listing tells them apart."""
    folder = saved(tmp_path / "changed", engine.folders["B"], change)
    with pytest.raises(WeightsError) as caught:
        face(engine, folder)
    assert set(getattr(caught.value, kind)) == offenders
    engine.assert_is("A")


def test_a_layer_of_another_rank_is_traced_again(engine: Engine, face: Callable) -> None:
    """The checkpoint has no part for a second rank, so the trace refuses it; a copy plan would load it."""
    shards = experts_of(engine.model)[1].moe_config.moe_parallel_config
    shards.tp_rank = 1
    try:
        with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.experts"):
            face(engine, engine.folders["B"])
    finally:
        shards.tp_rank = 0
    engine.assert_is("A")


@pytest.mark.parametrize("name", ["rank", "world_size", "data_parallel_rank", "data_parallel_size"])
def test_every_rank_has_a_placement_of_its_own(engine: Engine, name: str) -> None:
    record = record_of(engine.model)
    parallel = record.vllm_config.parallel_config
    elsewhere = types.SimpleNamespace(**vars(parallel))
    setattr(elsewhere, name, getattr(parallel, name) + 1)
    here = placement(record)
    config = types.SimpleNamespace(parallel_config=elsewhere)
    assert placement(dataclasses.replace(record, vllm_config=config)) != here
    assert placement(record) == here


# --- what the placement of a layer is ---


def buffered(values: list[int]) -> nn.Module:
    layer = nn.Module()
    layer.register_buffer("expert_map", torch.tensor(values))
    return layer


def holding(**attributes: object) -> nn.Module:
    layer = nn.Module()
    layer.__dict__.update(attributes)
    return layer


def of_a_manager(values: list[int]) -> nn.Module:
    return holding(expert_map_manager=types.SimpleNamespace(expert_map=torch.tensor(values)))


def in_parallel(rank: int) -> nn.Module:
    return holding(
        moe_config=types.SimpleNamespace(moe_parallel_config=types.SimpleNamespace(ep_rank=rank, ep_size=2))
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (buffered([0, -1]), buffered([-1, 0])),
        (of_a_manager([0, -1]), of_a_manager([-1, 0])),
        (in_parallel(0), in_parallel(1)),
        *((holding(**{name: 0}), holding(**{name: 1})) for name in SHARDS),
    ],
)
def test_each_thing_alone_that_a_loader_asks_makes_another_placement(
    one: nn.Module, other: nn.Module
) -> None:
    def of(layer: nn.Module) -> object:
        return placement(record_constructed(nn.Sequential(nn.Linear(2, 2), layer), None, None))

    assert of(one) == of(one)
    assert of(one) != of(other)
    assert of(one) != of(nn.Module())
