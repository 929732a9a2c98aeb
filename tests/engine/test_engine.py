"""One real engine per kind of model: every face of a reload, and every bad input.

After each refused reload the engine is the one it was, down to the address of every tensor, and the next
good reload works. Values are compared with what the same engine answers after a reload from a folder, which
`test_oracle` compares with a cold start.
"""

import json
import mmap
import shutil
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from reload_plugin import errors, vllm_api
from reload_plugin.checkpoint.formats import safetensors_files
from reload_plugin.checkpoint.io import read_batches
from reload_plugin.commit.strategies import StagedCommit
from reload_plugin.device import cpu
from reload_plugin.device import host_memory as memory
from reload_plugin.device.cpu import CpuOps
from reload_plugin.process import native_handles as native
from reload_plugin.record.model_record import record_of
from reload_plugin.transaction import group_processing
from reload_plugin.transaction.engine_state import state_of
from tests import oracle
from tests.checkpoints import read_tensors
from tests.processor import packs_bf16
from tests.zoo import case_named

KINDS = ("llama_tied", "mixtral", "w8a8_dynamic")
Weights = list[tuple[str, torch.Tensor]]


@dataclass
class Engine:
    """A running engine, its two checkpoints and what it looks like on each."""

    llm: object
    folders: dict[str, Path]
    snapshots: dict[str, oracle.Snapshot]
    case: object

    @property
    def model(self) -> torch.nn.Module:
        return oracle.model_of(self.llm)

    def weights(self, letter: str) -> Weights:
        return list(read_tensors(self.folders[letter]).items())

    def push(self, weights: object, **options: object) -> object:
        """`model_runner.reload_weights(weights_iterator=...)`, on the worker."""
        call = lambda worker: worker.model_runner.reload_weights(weights_iterator=weights, **options)  # noqa: E731
        return self.llm.collective_rpc(call)[0]

    def reload(self, path: object) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})

    def assert_is(self, letter: str) -> None:
        """The engine answers and looks exactly as it did on that checkpoint, at the same addresses."""
        now = oracle.snapshot(self.llm, self.case)
        assert oracle.compare_values("", now, self.snapshots[letter]) == []
        assert oracle.compare_places("", self.snapshots["A"], now) == []
        assert not isinstance(vars(self.model).get("load_weights"), types.MethodType), (
            "an update still takes the loads"
        )
        assert not any(p.is_meta for p in self.model.parameters())


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    case = case_named(request.param)
    folders = oracle.write(case, tmp_path_factory.mktemp("checkpoints"))
    with oracle.running(case, folders["A"]) as llm:
        snapshots = {"A": oracle.snapshot(llm, case)}
        oracle.reload_from_folder(llm, folders["B"])
        snapshots["B"] = oracle.snapshot(llm, case)
        assert oracle.differing_answers(snapshots["A"].answers, snapshots["B"].answers)
        oracle.reload_from_folder(llm, folders["A"])
        yield Engine(llm, folders, snapshots, case)


@pytest.fixture
def on_a(engine: Engine) -> Iterator[Engine]:
    """The engine on checkpoint A; whatever a test did, it is brought back."""
    yield engine
    engine.reload(engine.folders["A"])
    engine.assert_is("A")


# --- good reloads, by every face ---


def by_iterator(engine: Engine) -> None:
    engine.push(iter(engine.weights("B")))


def by_shuffled_iterator(engine: Engine) -> None:
    weights = engine.weights("B")
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(3)).tolist()
    engine.push(weights[i] for i in order)


def by_one_buffer(engine: Engine) -> None:
    """The caller overwrites the same memory for every weight."""
    weights = engine.weights("B")
    destinations = torch.empty(max(t.nbytes for _, t in weights), dtype=torch.uint8)

    def reusing() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            view = destinations[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            destinations.fill_(0xFF)

    engine.push(reusing())


def by_strided_tensors(engine: Engine) -> None:
    """Not contiguous, and a parameter that wants gradients."""
    strided = [(n, t.t().contiguous().t() if t.dim() == 2 else t) for n, t in engine.weights("B")]
    engine.push((n, torch.nn.Parameter(t) if t.is_floating_point() else t) for n, t in strided)


def by_read_only_memory(engine: Engine) -> None:
    """Tensors in mapped pages: who writes to one dies."""
    folder = engine.folders["B"]
    infos = reload_plugin.open_source(folder).infos()
    (file,) = folder.glob("*.safetensors")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        length = int.from_bytes(pages[:8], "little")
        header = json.loads(pages[8 : 8 + length])
        mapped = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            for info in infos:
                start, end = (8 + length + offset for offset in header[info.name]["data_offsets"])
                flat = torch.frombuffer(memoryview(pages)[start:end], dtype=info.dtype)
                mapped[info.name] = flat.view(info.shape)
        engine.push(mapped.items())
        mapped.clear()
        del flat


def by_float32(engine: Engine) -> None:
    """A trainer that keeps float32 masters: exactly what bf16 values give."""
    engine.push((n, t.float() if t.dtype == torch.bfloat16 else t) for n, t in engine.weights("B"))


def by_block(engine: Engine) -> None:
    with reload_plugin.restore_for_reloading(engine.model) as session:
        engine.model.load_weights(iter(engine.weights("B")))
    assert session.report is not None


def by_block_in_pieces(engine: Engine) -> None:
    """Several calls of `load_weights`, as long as the model's own loader takes the pieces."""
    with reload_plugin.restore_for_reloading(engine.model):
        for pair in engine.weights("B"):
            engine.model.load_weights([pair])


def by_layerwise(engine: Engine) -> None:
    """The calls that vLLM's transfer engines and RL frameworks make."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = engine.model
    initialize_layerwise_reload(model)
    model.load_weights(iter(engine.weights("B")[:5]))
    model.load_weights(iter(engine.weights("B")[5:]))
    finalize_layerwise_reload(model, record_of(model).model_config)


def by_layerwise_while_serving(engine: Engine) -> None:
    """Between two pieces the engine answers with the old weights."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = engine.model
    initialize_layerwise_reload(model)
    model.load_weights(iter(engine.weights("B")[:7]))
    assert oracle.differing_answers(oracle.answer(engine.llm), engine.snapshots["A"].answers) == []
    model.load_weights(iter(engine.weights("B")[7:]))
    assert oracle.differing_answers(oracle.answer(engine.llm), engine.snapshots["A"].answers) == []
    finalize_layerwise_reload(model, record_of(model).model_config)


def by_old_spelling(engine: Engine) -> None:
    engine.push(iter(engine.weights("B")), process_weights_after_loading=True)


def by_public_function(engine: Engine) -> None:
    report = reload_plugin.reload_weights(engine.model, weights_path=str(engine.folders["B"]))
    assert report.tensors == len(engine.weights("B"))
    assert report.nbytes == sum(t.nbytes for _, t in engine.weights("B"))
    assert report.version == state_of(engine.model).generation.version > 0
    assert report.moved == ()
    assert {"load", "process", "commit", "total"} <= report.seconds.keys()


def by_single_file(engine: Engine) -> None:
    engine.reload(next(engine.folders["B"].glob("*.safetensors")))


def by_iterator_under(policy: str) -> Callable[[Engine], None]:
    """Every policy that an iterator can have, asked for through the runner."""

    def by_iterator(engine: Engine) -> None:
        engine.push(iter(engine.weights("B")), policy=policy, weight_version=f"B under {policy}")
        state = reload_plugin.status(engine.model)[0]
        assert state.weight_version == f"B under {policy}"
        assert state.report.old_generation == {"streaming": "none"}.get(policy, policy)

    by_iterator.__name__ = f"by_iterator_under_{policy}"
    return by_iterator


def by_path_under(policy: str) -> Callable[[Engine], None]:
    """Every policy that a folder can have, asked for over collective_rpc."""

    def by_path(engine: Engine) -> None:
        options = {"weights_path": str(engine.folders["B"]), "policy": policy}
        engine.llm.collective_rpc("reload_weights", kwargs=options)
        state = reload_plugin.status(engine.llm)[0]
        assert state.report.old_generation == {"streaming": "none", "spill": "reread"}.get(policy, policy)

    by_path.__name__ = f"by_path_under_{policy}"
    return by_path


def by_manifest(engine: Engine) -> None:
    weights = engine.weights("B")
    engine.push(iter(weights), manifest={n: (tuple(t.shape), t.dtype) for n, t in weights}, check_finite=True)


def by_two_spills(engine: Engine) -> None:
    """The second is checked against, and could be undone with, what the first left on disk."""
    engine.push(iter(engine.weights("A")), policy="spill")
    engine.push(iter(reversed(engine.weights("B"))), policy="spill")


GOOD = (
    *(by_iterator_under(policy) for policy in ("host", "spill", "streaming")),
    *(by_path_under(policy) for policy in ("host", "spill", "reread", "streaming")),
    by_manifest,
    by_two_spills,
    by_iterator,
    by_shuffled_iterator,
    by_one_buffer,
    by_strided_tensors,
    by_read_only_memory,
    by_float32,
    by_block,
    by_block_in_pieces,
    by_layerwise,
    by_layerwise_while_serving,
    by_old_spelling,
    by_public_function,
    by_single_file,
)


@pytest.mark.parametrize("face", GOOD, ids=lambda f: f.__name__)
def test_every_road_gives_the_same_engine(on_a: Engine, face: Callable[[Engine], None]) -> None:
    face(on_a)
    on_a.assert_is("B")


def test_without_arguments_the_own_path_is_read_and_no_other_is_remembered(on_a: Engine) -> None:
    on_a.reload(on_a.folders["B"])
    with pytest.raises(errors.SourceError):
        on_a.reload("/nowhere/at/all")
    on_a.llm.collective_rpc("reload_weights")
    on_a.assert_is("A")


def test_the_same_folder_rewritten_in_place_and_by_rename(on_a: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(on_a.folders["A"], folder)
    on_a.reload(folder)
    for file in on_a.folders["B"].glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    on_a.reload(folder)
    on_a.assert_is("B")
    for file in on_a.folders["A"].glob("*.safetensors"):
        shutil.copy(file, folder / "next")
        (folder / "next").rename(folder / file.name)
    on_a.reload(folder)
    on_a.assert_is("A")


@pytest.mark.parametrize("policy", ["auto", "host"])
def test_staging_from_the_pool_is_as_good(on_a: Engine, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """These models are too small for the pool; here it takes every tensor, filled with rubbish first."""
    taken = []

    def take(pool: memory.HostPool, nbytes: int) -> torch.UntypedStorage:
        storage = plain(pool, nbytes)
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
        taken.append(nbytes)
        return storage

    plain = memory.HostPool.take
    monkeypatch.setattr(memory, "SMALL", 1)
    monkeypatch.setattr(cpu, "SMALL", 1)
    monkeypatch.setattr(memory.HostPool, "take", take)
    reload_plugin.reload_weights(on_a.model, weights_path=str(on_a.folders["B"]), policy=policy)
    packed = [t for n, t in on_a.weights("B") if "proj" in n and (packs_bf16() or t.dtype == torch.int8)]
    staged = [t for _, t in on_a.weights("B")] if policy == "host" else packed  # the rest needs none
    assert sum(taken) >= sum(t.nbytes for t in staged), "staging did not come from the pool"
    on_a.assert_is("B")


# --- bad input ---


@dataclass(frozen=True)
class Bad:
    """A push that has to be refused: what is done to B's weights, the error, and what it must say."""

    name: str
    change: Callable[[Weights], object]
    error: type[Exception]
    says: str


def some_matrix(weights: Weights) -> int:
    """Index of a projection that ends up fused with others."""
    return next(i for i, (n, t) in enumerate(weights) if "k_proj.weight" in n and t.dim() == 2)


def replaced(weights: Weights, index: int, tensor: object) -> Weights:
    return [(n, tensor if i == index else t) for i, (n, t) in enumerate(weights)]


def raising(weights: Weights, error: BaseException, after: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from weights[:after]
    raise error


BAD = (
    Bad("empty", lambda _: [], errors.SourceError, "gave no weights"),
    Bad("not iterable", lambda _: 7, errors.SourceError, "not an iterable"),
    Bad("not pairs", lambda w: [n for n, _ in w], errors.SourceError, "not a .name, tensor. pair"),
    Bad("not a tensor", lambda w: replaced(w, 3, "seven"), errors.MisshapenWeightsError, "not a tensor"),
    Bad("meta", lambda w: replaced(w, 3, w[3][1].to("meta")), errors.MisshapenWeightsError, "meta tensor"),
    Bad(
        "one missing",
        lambda w: w[: some_matrix(w)] + w[some_matrix(w) + 1 :],
        errors.MissingWeightsError,
        "qkv",
    ),
    Bad("last missing", lambda w: w[:-1], errors.MissingWeightsError, "missing"),
    Bad("twice", lambda w: [*w, w[some_matrix(w)]], errors.DuplicateWeightsError, "k_proj"),
    Bad(
        "unknown", lambda w: [*w, ("model.nothing.weight", w[0][1])], errors.UnexpectedWeightsError, "nothing"
    ),
    Bad(
        "transposed",
        lambda w: replaced(w, some_matrix(w), w[some_matrix(w)][1].t().contiguous()),
        errors.WeightsError,
        "k_proj",
    ),
    Bad(
        "row broadcast",
        lambda w: replaced(w, some_matrix(w), w[some_matrix(w)][1][:1]),
        errors.WeightsError,
        "k_proj",
    ),
    Bad(
        "number broadcast",
        lambda w: replaced(w, some_matrix(w), w[some_matrix(w)][1][:1, :1]),
        errors.WeightsError,
        "k_proj",
    ),
    Bad(
        "too large",
        lambda w: replaced(w, some_matrix(w), torch.cat([w[some_matrix(w)][1]] * 2)),
        errors.WeightsError,
        "k_proj",
    ),
    Bad("source raises at once", lambda w: raising(w, ValueError("gone"), 0), errors.SourceError, "gone"),
    Bad(
        "source raises half way",
        lambda w: raising(w, OSError("gone"), len(w) // 2),
        errors.SourceError,
        "gone",
    ),
    Bad(
        "source raises at the end", lambda w: raising(w, KeyError("gone"), len(w)), errors.SourceError, "gone"
    ),
    Bad("interrupted", lambda w: raising(w, KeyboardInterrupt(), len(w) // 2), KeyboardInterrupt, ""),
)


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.name)
def test_a_bad_stream_is_refused_and_changes_nothing(on_a: Engine, bad: Bad) -> None:
    with pytest.raises(bad.error, match=bad.says):
        on_a.push(bad.change(on_a.weights("B")))
    on_a.assert_is("A")
    on_a.push(iter(on_a.weights("B")))
    on_a.assert_is("B")


def test_all_offenders_are_named_at_once(on_a: Engine) -> None:
    weights = on_a.weights("B")
    index = some_matrix(weights)
    changed = replaced(weights, index, weights[index][1].t().contiguous()[:3])[:-1]
    with pytest.raises(errors.WeightsError) as caught:
        on_a.push([*changed, ("first.unknown", weights[0][1]), ("second.unknown", weights[0][1]), weights[2]])
    error = caught.value
    assert set(error.unexpected) >= {"first.unknown", "second.unknown"}
    assert weights[index][0] in error.misshapen
    assert weights[2][0] in error.duplicate
    on_a.assert_is("A")


def broken_folder(engine: Engine, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of B whose tensors were changed."""
    folder.mkdir()
    tensors = read_tensors(engine.folders["B"])
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(engine.folders["B"] / "config.json", folder)
    return folder


def truncate(engine: Engine, folder: Path) -> Path:
    broken_folder(engine, folder, lambda _: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def half_written(engine: Engine, folder: Path) -> Path:
    broken_folder(engine, folder, lambda _: None)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def without_last(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[-1])


def of_another_size(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = torch.cat([tensor, tensor], -1)


def of_another_architecture(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors["transformer.h." + name] = tensors.pop(name)


FOLDERS: dict[str, tuple[Callable[[Engine, Path], Path], type[Exception], str]] = {
    "nonexistent": (lambda _, p: p / "nowhere", errors.SourceError, "no folder"),
    "empty": (lambda _, p: p.mkdir() or p, errors.SourceError, "no weights"),
    "truncated": (truncate, errors.SourceError, "not a whole safetensors file"),
    "half written": (half_written, errors.SourceError, "not there"),
    "missing": (lambda e, p: broken_folder(e, p, without_last), errors.WeightsError, "missing"),
    "another size": (lambda e, p: broken_folder(e, p, of_another_size), errors.WeightsError, "do not fit"),
    "another architecture": (
        lambda e, p: broken_folder(e, p, of_another_architecture),
        errors.WeightsError,
        "unexpected",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_bad_folder_is_refused_and_changes_nothing(on_a: Engine, tmp_path: Path, kind: str) -> None:
    make, error, says = FOLDERS[kind]
    with pytest.raises(error, match=says):
        on_a.reload(make(on_a, tmp_path / "bad"))
    on_a.assert_is("A")


def test_an_exception_in_the_block_puts_everything_back(on_a: Engine) -> None:
    def interrupted() -> None:
        with reload_plugin.restore_for_reloading(on_a.model):
            on_a.model.load_weights(iter(on_a.weights("B")[:9]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    on_a.assert_is("A")


def start_update(engine: Engine, count: int) -> Weights:
    """Open an update of checkpoint B and send `count` of its weights; returns the rest."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(engine.model)
    weights = engine.weights("B")
    engine.model.load_weights(iter(weights[:count]))
    return weights[count:]


def finish_update(engine: Engine) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(engine.model, record_of(engine.model).model_config)


def test_a_second_update_is_refused_while_one_is_open_and_says_whose_it_is(on_a: Engine) -> None:
    rest = start_update(on_a, 4)
    for second in (lambda: start_update(on_a, 1), lambda: on_a.push(iter(on_a.weights("A")))):
        with pytest.raises(
            reload_plugin.SessionError, match=r"is open: a weight update, opened by thread .* 4 weights"
        ):
            second()
    state = reload_plugin.status(on_a.llm)[0]
    assert state.state == "updating"
    assert "4 weights" in state.update
    on_a.model.load_weights(iter(rest))
    finish_update(on_a)
    on_a.assert_is("B")


@pytest.mark.parametrize("count", [0, 5, -1])
def test_an_update_can_be_aborted_at_any_moment(on_a: Engine, count: int) -> None:
    start_update(on_a, count)
    assert on_a.llm.collective_rpc("abort_weight_update") == [True]
    on_a.assert_is("A")
    assert on_a.llm.collective_rpc("abort_weight_update") == [False]
    on_a.push(iter(on_a.weights("B")))
    on_a.assert_is("B")


def test_a_finish_that_was_too_early_can_be_repeated(on_a: Engine) -> None:
    rest = start_update(on_a, 6)
    for _ in range(2):
        with pytest.raises(reload_plugin.MissingWeightsError):
            finish_update(on_a)
        assert oracle.differing_answers(oracle.answer(on_a.llm), on_a.snapshots["A"].answers) == []
    on_a.model.load_weights(iter(rest))
    finish_update(on_a)
    on_a.assert_is("B")


def test_a_finish_that_failed_can_be_aborted_or_is_dropped_for_the_next(on_a: Engine) -> None:
    start_update(on_a, 6)
    with pytest.raises(reload_plugin.MissingWeightsError):
        finish_update(on_a)
    reload_plugin.abort_weight_update(on_a.model)
    on_a.assert_is("A")
    start_update(on_a, 6)
    with pytest.raises(reload_plugin.MissingWeightsError):
        finish_update(on_a)
    on_a.push(iter(on_a.weights("B")))
    on_a.assert_is("B")


# --- partial updates ---


def mixed(engine: Engine, names: set[str]) -> Weights:
    """Checkpoint A, with the weights of these names from B."""
    ours = dict(engine.weights("B"))
    return [(name, ours[name] if name in names else tensor) for name, tensor in engine.weights("A")]


def some_names(engine: Engine) -> set[str]:
    """One part of every fused layer, a norm, an expert and the embedding, as far as the model has them."""
    parts = ("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.1.input_layernorm", "embed_tokens")
    parts += ("layers.0.block_sparse_moe.experts.1.w2",)
    return {name for name, _ in engine.weights("A") if any(part in name for part in parts)}


def expect_mixture(engine: Engine, names: set[str]) -> oracle.Snapshot:
    """What the engine is on the mixture when all of it is sent; checkpoint A is back afterwards."""
    engine.push(iter(mixed(engine, names)))
    found = oracle.snapshot(engine.llm, engine.case)
    engine.reload(engine.folders["A"])
    assert oracle.differing_answers(found.answers, engine.snapshots["A"].answers)
    return found


@pytest.mark.parametrize("kept", [None, "host", "spill"])
def test_a_partial_update_changes_what_came_and_nothing_else(on_a: Engine, kept: str | None) -> None:
    names = some_names(on_a)
    wanted = expect_mixture(on_a, names)
    if kept is not None:
        on_a.push(iter(on_a.weights("A")), keep_load_format=kept)
    ours = [(name, tensor) for name, tensor in on_a.weights("B") if name in names]
    third = len(ours) // 3
    last = ours[2 * third :]
    for part in (ours[:third], ours[third : 2 * third], last):  # the last finds what both others sent
        on_a.push(iter(part), partial=True)
    now = oracle.snapshot(on_a.llm, on_a.case)
    assert oracle.compare_values("", now, wanted) == []
    assert oracle.compare_places("", on_a.snapshots["A"], now) == []
    report = reload_plugin.status(on_a.model)[0].report
    assert report.partial
    assert report.tensors == report.companions + len(last)
    on_a.push(iter([(n, t) for n, t in on_a.weights("A") if n in names]), partial=True)
    on_a.assert_is("A")


def test_a_partial_update_from_a_folder(on_a: Engine, tmp_path: Path) -> None:
    names = some_names(on_a)
    wanted = expect_mixture(on_a, names)
    save_file({n: t for n, t in on_a.weights("B") if n in names}, tmp_path / "delta.safetensors")
    reload_plugin.reload_weights(on_a.model, weights_path=str(tmp_path / "delta.safetensors"), partial=True)
    assert oracle.compare_values("", oracle.snapshot(on_a.llm, on_a.case), wanted) == []


def test_a_partial_update_that_would_lose_weights_is_refused_and_lists_what_to_send(on_a: Engine) -> None:
    """After an iterator nobody has the other weights of a packed layer; a layer as it came can be updated."""
    on_a.push(iter(on_a.weights("A")), policy="host")
    ours = dict(on_a.weights("B"))
    name = next(name for name in ours if "layers.0.self_attn.k_proj.weight" in name)
    with pytest.raises(reload_plugin.PartialUpdateError, match="Send these as well") as refused:
        on_a.push(iter([(name, ours[name])]), partial=True)
    assert any("layers.0.self_attn.q_proj" in companion for companion in refused.value.companions)
    on_a.assert_is("A")
    norm = "model.norm.weight"
    wanted = expect_mixture(on_a, {norm})
    on_a.push(iter(on_a.weights("A")), policy="host")
    on_a.push(iter([(norm, ours[norm])]), partial=True)
    assert oracle.compare_values("", oracle.snapshot(on_a.llm, on_a.case), wanted) == []


def test_a_bad_partial_update_changes_nothing(on_a: Engine) -> None:
    ours = dict(on_a.weights("B"))
    for bad, error in (
        ([("model.nothing.weight", torch.zeros(2))], reload_plugin.UnexpectedWeightsError),
        ([("model.norm.weight", torch.zeros(3))], reload_plugin.MisshapenWeightsError),
        ([], reload_plugin.ReloadError),
        ([("model.norm.weight", ours["model.norm.weight"])] * 2, reload_plugin.DuplicateWeightsError),
    ):
        with pytest.raises(error):
            on_a.push(iter(bad), partial=True)
        on_a.assert_is("A")


# --- options ---


def test_weights_that_are_not_finite_are_weights_unless_they_are_checked(on_a: Engine) -> None:
    def with_nan() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in on_a.weights("B"):
            yield name, torch.full_like(tensor, float("nan")) if name == "model.norm.weight" else tensor

    for policy in ("host", "spill"):
        with pytest.raises(reload_plugin.NonFiniteWeightsError, match="NaN or infinite") as refused:
            on_a.push(with_nan(), check_finite=True, policy=policy)
        assert list(refused.value.nonfinite) == ["model.norm.weight"]
        on_a.assert_is("A")
    on_a.push(with_nan())
    assert on_a.model.get_parameter("model.norm.weight").isnan().all()


def test_an_iterator_is_held_to_its_manifest(on_a: Engine) -> None:
    weights = on_a.weights("B")
    manifest = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights}
    short = dict(list(manifest.items())[:-1])
    asked: list[int] = []
    with pytest.raises(reload_plugin.MissingWeightsError):
        on_a.push((asked.append(1) or pair for pair in weights), manifest=short)
    assert asked == [], "refused before a weight is asked for"
    other = manifest | {"model.norm.weight": ((1,), torch.bfloat16)}
    with pytest.raises(reload_plugin.WeightsError) as refused:
        on_a.push(iter(weights), manifest=other)
    assert list(refused.value.misshapen) == ["model.norm.weight"]
    with pytest.raises(reload_plugin.MissingWeightsError):
        on_a.push(iter(weights[:-2]), manifest=manifest)
    with pytest.raises(reload_plugin.SourceError, match="not in the manifest"):
        on_a.push(iter([*weights, ("one.more", torch.zeros(1))]), manifest=manifest)
    on_a.assert_is("A")


def test_options_that_do_not_exist_are_named(on_a: Engine) -> None:
    with pytest.raises(reload_plugin.ReloadError, match="policies are auto, device, host, spill"):
        on_a.push(iter(on_a.weights("B")), policy="careful")
    with pytest.raises(reload_plugin.ReloadError, match="reread"):
        on_a.push(iter(on_a.weights("B")), policy="reread")
    on_a.assert_is("A")


def test_a_shuffled_stream_beyond_the_budget_goes_through_a_file(
    on_a: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(StagedCommit, "waiting_bytes", -(1 << 40))
    by_shuffled_iterator(on_a)
    on_a.assert_is("B")
    report = reload_plugin.status(on_a.model)[0].report
    assert report.spilled_bytes > 0
    rest = start_update(on_a, 9)
    assert oracle.differing_answers(oracle.answer(on_a.llm), on_a.snapshots["B"].answers) == []
    on_a.model.load_weights(iter(rest))
    finish_update(on_a)
    on_a.assert_is("B")


def test_a_full_spill_disk_is_named_and_changes_nothing(
    on_a: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    write = os.pwrite
    left = [7]

    def pwrite(*arguments: object) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(reload_plugin.SourceError, match="No space is left in the spill folder"):
        on_a.push(iter(on_a.weights("B")), policy="spill")
    on_a.assert_is("A")
    with pytest.raises(reload_plugin.SourceError, match="spill folder /nowhere"):
        on_a.push(iter(on_a.weights("B")), policy="spill", spill_dir="/nowhere")
    on_a.assert_is("A")


def test_auto_takes_the_policy_that_there_is_memory_for_and_the_report_says_which(
    on_a: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen() -> str:
        return reload_plugin.status(on_a.model)[0].report.old_generation

    needed = sum(group.nbytes for group in record_of(on_a.model).groups)
    for free, policy in ((2 * needed, "host"), (needed, "spill")):
        on_a.reload(on_a.folders["A"])  # whatever was served before, what is served now is in files
        on_a.reload(on_a.folders["A"])
        assert chosen() == "reread", "both are in files, so memory does not matter"
        monkeypatch.setattr(CpuOps, "free_bytes", lambda _, free=free: free)
        on_a.push(iter(on_a.weights("B")))
        assert chosen() == policy
        on_a.assert_is("B")


def test_what_is_ignored_is_ignored_by_a_rule_with_a_name(on_a: Engine) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("rotary table", torch.zeros(16))}
    sent = [*on_a.weights("B"), *((name, tensor) for name, (_, tensor) in extra.items())]
    report = reload_plugin.reload_weights(on_a.model, weights_iterator=iter(sent))
    assert {name: report.ignored.get(name) for name in extra} == {n: rule for n, (rule, _) in extra.items()}
    on_a.assert_is("B")


def test_a_trainer_may_send_the_tied_head_as_well(on_a: Engine) -> None:
    """The copy plan is of a checkpoint without the head; vLLM's loader then loads the head alone."""
    if on_a.case.name != "llama_tied":
        pytest.skip("its head is its own")
    plain = on_a.weights("B")
    sent = [*plain, ("lm_head.weight", dict(plain)["model.embed_tokens.weight"].clone())]
    for weights in (sent, plain, sent[::-1]):
        report = reload_plugin.reload_weights(on_a.model, iter(weights))
        assert report.ignored == ({"lm_head.weight": "tied head"} if len(weights) > len(plain) else {})
        on_a.assert_is("B")
    with reload_plugin.restore_for_reloading(on_a.model):
        for weight in sent:
            on_a.model.load_weights([weight])
    on_a.assert_is("B")
    head_alone = [pair for pair in sent if "embed" not in pair[0]]
    with pytest.raises(reload_plugin.MissingWeightsError, match="embed_tokens"):
        on_a.push(iter(head_alone))
    on_a.assert_is("B")


# --- what is served ---


def test_status_tells_version_digest_source_and_the_last_error(on_a: Engine) -> None:
    before = reload_plugin.status(on_a.llm, digest=True)[0]
    with pytest.raises(reload_plugin.SourceError):
        on_a.reload("/nowhere/at/all")
    after = reload_plugin.status(on_a.llm, digest=True)[0]
    assert "/nowhere/at/all" in after.last_error
    assert (after.version, after.digest, after.since) == (before.version, before.digest, before.since)
    on_a.push(iter(on_a.weights("B")), weight_version="step 12", digest=True)
    served = reload_plugin.status(on_a.llm)[0]
    assert (served.state, served.version, served.weight_version) == ("serving", before.version + 1, "step 12")
    assert served.last_error is None
    assert served.since >= before.since
    assert served.digest == reload_plugin.status(on_a.llm, digest=True)[0].digest != before.digest
    states = reload_plugin.reload_engine(
        on_a.llm, str(on_a.folders["A"]), reset_caches=("prefix", "encoder"), digest=True
    )
    assert states[0].digest == before.digest
    assert states[0].source == str(on_a.folders["A"])
    assert states[0].report.caches["prefix"] == states[0].report.caches["encoder"] == "reset"
    name = "model.layers.0.self_attn.o_proj.weight"
    one_changed = [(n, -w if n == name else w) for n, w in on_a.weights("A")]
    on_a.push(iter(one_changed), digest=False)
    assert reload_plugin.status(on_a.llm, digest=False)[0].digest is None
    on_a.push(iter(one_changed))
    assert reload_plugin.status(on_a.llm, digest=False)[0].digest is None, "nobody asked for it"
    asked = reload_plugin.status(on_a.llm)[0]
    served = reload_plugin.status(on_a.llm, digest=False)[0]
    assert served.digest not in (None, before.digest)
    assert served.report.digest == served.digest == asked.digest
    on_a.reload(str(on_a.folders["A"]))
    assert reload_plugin.status(on_a.llm)[0].digest == before.digest
    with pytest.raises(reload_plugin.ReloadError, match="No cache is called prefixes"):
        reload_plugin.reload_engine(on_a.llm, str(on_a.folders["A"]), reset_caches=("prefixes",))


def test_a_streaming_reload_that_fails_refuses_to_serve_until_healed(on_a: Engine) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield from on_a.weights("B")[:-1]
        raise OSError("gone")

    with pytest.raises(reload_plugin.EngineBrokenError, match="Reload a complete checkpoint"):
        on_a.push(failing(), policy="streaming")
    with pytest.raises(reload_plugin.EngineBrokenError):
        state_of(on_a.model).before_forward_pass()
    assert reload_plugin.status(on_a.model)[0].state == "broken"
    on_a.reload(on_a.folders["B"])
    assert reload_plugin.status(on_a.model)[0].state == "serving"
    on_a.assert_is("B")


def failing_at(
    count: int, calls: list[object], first: Callable[[], object] = lambda: None
) -> Callable[..., None]:
    """vLLM's processing of some layers, which runs out of memory at the `count`-th time."""
    process = vllm_api.process_layers

    def failing(*args: object) -> None:
        calls.append(args)
        if len(calls) == count:
            first()
            raise MemoryError("no room")
        process(*args)

    return failing


def test_processing_that_raises_leaves_the_old_weights(on_a: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under both policies: staged (iterator), and streaming with earlier layers committed (folder)."""
    calls: list[object] = []
    monkeypatch.setattr(vllm_api, "process_layers", failing_at(6, calls))
    with pytest.raises(reload_plugin.ProcessingError, match="no room"):
        on_a.push(iter(on_a.weights("B")))
    on_a.assert_is("A")
    calls.clear()
    with pytest.raises(reload_plugin.ProcessingError, match="no room"):
        on_a.reload(on_a.folders["B"])
    monkeypatch.undo()
    on_a.assert_is("A")


@pytest.fixture
def giving_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer counts as one whose old and new native memory do not fit the budget together."""
    monkeypatch.setattr(group_processing, "KEPT_BESIDE", 0)


def test_large_native_memory_is_released_before_new_memory_is_allocated(
    on_a: Engine, giving_way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time are there more handles than the engine has; under `host` the old ones are served."""
    handles, most = state_of(on_a.model).handles, []
    make = native._digest_of
    monkeypatch.setattr(native, "_digest_of", lambda given: most.append(len(handles)) or make(given))
    served = len(handles)
    on_a.reload(on_a.folders["B"])
    on_a.assert_is("B")
    packed = len(most)
    assert packed == served, "every handle was made once"
    assert all(before < served for before in most)
    most.clear()
    reload_plugin.reload_weights(on_a.model, weights_path=str(on_a.folders["A"]), policy="host")
    assert max(most, default=0) == max(0, 2 * packed - 1)


def test_processing_that_raises_after_native_memory_was_released(
    on_a: Engine, giving_way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first layer on: its old values are gone and have to be read again."""
    for number in range(1, 7):
        monkeypatch.setattr(vllm_api, "process_layers", failing_at(number, []))
        with pytest.raises(reload_plugin.ProcessingError, match="no room"):
            on_a.reload(on_a.folders["B"])
        monkeypatch.undo()
        monkeypatch.setattr(group_processing, "KEPT_BESIDE", 0)
        on_a.assert_is("A")
    on_a.reload(on_a.folders["B"])
    on_a.assert_is("B")


def test_an_engine_whose_native_memory_was_released_without_a_commit_does_not_serve(
    on_a: Engine, giving_way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything was committed, and there is no rollback source: the caller chose so."""
    if not state_of(on_a.model).handles:
        pytest.skip("nothing of this model is packed on this processor")
    monkeypatch.setattr(vllm_api, "process_layers", failing_at(1, []))
    packed_first = sorted(on_a.weights("B"), key=lambda weight: "layers.0.self_attn" not in weight[0])
    with pytest.raises(reload_plugin.EngineBrokenError, match="no room"):
        on_a.push(iter(packed_first), policy="streaming")
    with pytest.raises(reload_plugin.EngineBrokenError):
        state_of(on_a.model).before_forward_pass()


def test_the_folder_of_the_old_weights_may_be_deleted_while_a_reload_may_need_it(
    on_a: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "served"
    shutil.copytree(on_a.folders["A"], folder)
    on_a.reload(folder)
    failing = failing_at(6, [], lambda: shutil.rmtree(folder))
    monkeypatch.setattr(vllm_api, "process_layers", failing)
    with pytest.raises(reload_plugin.ProcessingError, match="no room"):
        on_a.reload(on_a.folders["B"])
    assert not folder.exists(), "nothing was committed when it failed"
    monkeypatch.undo()
    on_a.assert_is("A")


def test_when_the_old_weights_are_gone_the_engine_refuses_until_healed(
    on_a: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload fails half way, and the files that the served weights came from are being overwritten."""
    folder = tmp_path / "served"
    shutil.copytree(on_a.folders["A"], folder)
    on_a.reload(folder)

    def overwrite() -> None:
        for file in folder.glob("*.safetensors"):
            file.write_bytes(b"the next step")

    failing = failing_at(6, [], overwrite)
    monkeypatch.setattr(vllm_api, "process_layers", failing)
    with pytest.raises(reload_plugin.EngineBrokenError, match="heal"):
        on_a.reload(on_a.folders["B"])
    monkeypatch.undo()
    with pytest.raises(reload_plugin.EngineBrokenError, match="does not serve"):
        state_of(on_a.model).before_forward_pass()
    on_a.reload(on_a.folders["B"])
    on_a.assert_is("B")


def test_staging_memory_is_used_again_from_layer_to_layer(
    on_a: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may hold on to a layer that is done, or each would need pages of its own."""
    monkeypatch.setattr(memory, "SMALL", 1)
    monkeypatch.setattr(cpu, "SMALL", 1)
    monkeypatch.setattr(read_batches, "BATCH", 1)
    anew = safetensors_files._cached_read_batches.__wrapped__  # those of earlier tests are larger
    monkeypatch.setattr(safetensors_files, "_cached_read_batches", anew)
    taken, in_use = [], []
    take = memory.HostPool.take

    def noting(pool: memory.HostPool, nbytes: int) -> torch.UntypedStorage:
        taken.append(nbytes)
        found = take(pool, nbytes)
        in_use.append(max(block.end for block in pool._used()))
        return found

    monkeypatch.setattr(memory.HostPool, "take", noting)
    on_a.reload(on_a.folders["B"])
    assert state_of(on_a.model).outcome.report.old_generation == "reread"
    if not taken and not packs_bf16():
        pytest.skip("nothing of this model is packed on this processor")
    pages = sum(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for nbytes in taken)
    assert max(in_use) <= pages / 2, f"{max(in_use):,} bytes in use at a time of {pages:,} in all"
    monkeypatch.undo()
    on_a.assert_is("B")


# --- kernel format ---


def test_kernel_format_is_refused_where_it_is_not_made_of_tensors(on_a: Engine) -> None:
    """On a CPU every packed linear layer lives in a closure or behind a native handle."""
    if not packs_bf16() and on_a.case.name != "w8a8_dynamic":
        pytest.skip("linear layers are not packed on this processor")
    weights = [(n, p.data.clone()) for n, p in on_a.model.named_parameters()]
    with pytest.raises(reload_plugin.KernelFormatError, match="closures or native handles"):
        on_a.push(iter(weights), is_checkpoint_format=False)
    with pytest.raises(reload_plugin.KernelFormatError):
        on_a.push(iter(weights), process_weights_after_loading=False)
    on_a.assert_is("A")
