"""Engines on two ranks, and what can go wrong with the weights of one of them.

Each scenario is a function that raises if a promise is broken; `rank_scenarios` runs them, and those of
`failing_ranks`.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reload_plugin
from tests import exports, oracle, ray_cluster, zoo
from tests.checkpoints import read_tensors
from tests.zoo import Case

# Two ranks share one key head, and the vocabulary does not divide: replicas and padding.
DENSE = zoo.LLAMA_TIED | {"num_key_value_heads": 1, "vocab_size": 250}
CASES = {
    "tied": Case("tied", DENSE),
    "experts": Case("experts", zoo.MIXTRAL),
    # Two pipeline stages instead: the embedding is in the first, the head that is tied to it in the last.
    "stages": Case("stages", DENSE, engine_kwargs={"pipeline_parallel_size": 2}),
    # Two stages of two shards each: four ranks.
    "grid": Case("grid", DENSE, engine_kwargs={"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
    # Whole experts, half of them on each rank, by a table that says which.
    "shared_out": Case("shared_out", zoo.MIXTRAL, engine_kwargs={"enable_expert_parallel": True}),
}

MUTE = ("shared_out",)
"""The CPU kernel of vLLM reads past the experts of a rank that has not all: only values are compared."""

Weights = Iterator[tuple[str, object]]
State = tuple[list, list[dict[str, tuple[int, int, str]]]]


@dataclass
class Engine:
    """An engine on two ranks; what it and a cold engine look like on each checkpoint."""

    llm: object
    folders: dict[str, str]
    states: dict[str, State]
    cold: State
    answers: bool = True

    def on(self, rank: int, change: Callable, letter: str = "B", other: Callable | None = None) -> list[str]:
        """Push a checkpoint to all ranks, changed on one of them; what each rank's reload came to."""
        folder, others = self.folders[letter], other or unchanged
        return self.llm.collective_rpc(
            lambda worker: push(worker, folder, change if worker.rank == rank else others)
        )

    @property
    def ranks(self) -> int:
        """How many hold the model."""
        return len(self.cold[1])

    def assert_is(self, letter: str) -> None:
        self.assert_shows(self.states[letter], letter)

    def assert_shows(self, state: State, name: str) -> None:
        """The engine answers as it did in another state, with the same values at the same addresses."""
        now = state_of(self.llm, self.answers)
        assert not oracle.differing_answers(now[0], state[0]), f"does not answer as {name}"
        for rank, (found, wanted) in enumerate(zip(now[1], state[1], strict=True)):
            assert found.keys() == wanted.keys()
            moved = [path for path in found if found[path] != wanted[path]]
            assert not moved, f"rank {rank} is not on {name}: {moved[:5]}"

    def assert_refused(self, found: list[str], *says: str) -> None:
        """Each rank raised what it should, and nothing changed."""
        assert len(found) == len(says)
        for rank, (text, part) in enumerate(zip(found, says, strict=True)):
            assert part in text, f"rank {rank}: {text!r} instead of {part!r}"
        self.assert_is("A")

    def reload(self, letter: str, name: str | None = None) -> None:
        options = {"weights_path": self.folders[letter], "weight_version": name}
        self.llm.collective_rpc("reload_weights", kwargs=options)

    def told(self) -> list[dict[str, object]]:
        """What each rank says that it serves."""
        said = reload_plugin.status(self.llm)
        assert [one.rank for one in said] == [0, 1]
        return [one.model_dump(include={"version", "weight_version", "digest"}) for one in said]


# --- on a rank ---


def look(worker: object) -> dict[str, tuple[int, int, str]]:
    """Identity, address and digest of all that this rank computes with; kept, so that no id is used again."""
    live = oracle.live_tensors(worker.get_model())
    worker.__dict__.setdefault("looked_at", []).append(live)
    return {path: (entry.object_id, entry.address, entry.digest) for path, entry in live.items()}


def attempt(reload: Callable[[], object]) -> str:
    try:
        reload()
    except Exception as error:  # noqa: BLE001 - any outcome is to be reported
        return f"{type(error).__name__}: {error}"
    return "committed"


def push(worker: object, folder: str, change: Callable) -> str:
    weights = change(iter(read_tensors(Path(folder)).items()))
    return attempt(lambda: worker.model_runner.reload_weights(weights_iterator=weights))


def state_of(llm: object, answers: bool = True) -> State:
    return oracle.answer(llm) if answers else [{}], llm.collective_rpc(look)


# --- what is done to the weights on one rank ---


def unchanged(weights: Weights) -> Weights:
    return weights


def raising(weights: Weights) -> Weights:
    yield from list(weights)[:5]
    raise OSError("the line went dead")


def without_keys(weights: Weights) -> Weights:
    return ((name, tensor) for name, tensor in weights if "layers.1.self_attn.k_proj" not in name)


def with_more(weights: Weights) -> Weights:
    yield from weights
    yield "model.nothing.weight", torch.ones(4, 4)


def cut(weights: Weights) -> Weights:
    return ((n, t[:-2] if "layers.0.self_attn.o_proj" in n else t) for n, t in weights)


def slowly(weights: Weights) -> Weights:
    time.sleep(1.5)
    return weights


def with_timeout(seconds: float) -> Callable[[Weights], Weights]:
    """Set on the rank where the weights are made; `Vote` reads it when the reload begins."""

    def change(weights: Weights) -> Weights:
        os.environ["RELOAD_PLUGIN_TIMEOUT"] = str(seconds)
        return weights

    return change


def failing_in(module: str, name: str, error: Exception, after: int = 0) -> Callable[[Weights], Weights]:
    """During this reload only, `name` of `module` raises when it is called for the ``after``-th time."""

    def change(weights: Weights) -> Weights:
        import functools
        import importlib

        *path, last = name.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        plain, calls = getattr(owner, last), []

        def fail(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) <= after:
                return plain(*args, **kwargs)
            setattr(owner, last, plain)
            raise error

        setattr(owner, last, fail)
        return weights

    return change


# --- scenarios ---


def warm_equals_cold(engine: Engine) -> None:
    """Folders and iterators, A to A to B to A to B; against an engine started on B, rank by rank."""
    for letter in "ABAB":
        engine.reload(letter)
        engine.assert_is(letter)
    for letter in "ABAB":
        assert engine.on(0, unchanged, letter) == ["committed"] * engine.ranks
        engine.assert_is(letter)
    warm = state_of(engine.llm, engine.answers)
    assert not oracle.differing_answers(warm[0], engine.cold[0])
    for found, wanted in zip(warm[1], engine.cold[1], strict=True):
        assert {p: f[2] for p, f in found.items()} == {p: f[2] for p, f in wanted.items()}
    assert warm[1][0] != warm[1][1], "both ranks hold the same, so this engine has no shards"


def each_rank_plans(engine: Engine) -> None:
    """A folder is planned on every rank, for that rank, its routes are used from then on, and a rank does not
    read all.
    """

    def known(worker: object) -> tuple[bool, bool, str, str]:
        import reload_plugin
        from reload_plugin.transaction.engine_state import state_of

        model = worker.get_model()
        report = reload_plugin.reload_weights(model, weights_path=engine_folder)
        plans = state_of(model).plans
        replayed = report.replayed == report.tensors
        return (
            bool(plans.copy_plan and plans.copy_plan.of),
            replayed and report.bytes_read < report.nbytes,
            report.policy,
            repr(plans.copy_plan.key),
        )

    engine_folder = engine.folders["A"]
    first, second = engine.llm.collective_rpc(known)
    assert first[:3] == second[:3] == (True, True, "staged")
    assert first[3] != second[3], "a plan of one rank would do for the other"


def source_raises(engine: Engine) -> None:
    """On one rank; neither of them says that it serves anything new, until one reload is good on both."""
    engine.reload("A", "step 7")
    first = engine.told()
    own, others = "SourceError", "RanksDisagreeError: Not every rank is ready"
    engine.assert_refused(engine.on(1, raising), others, own)
    engine.assert_refused(engine.on(0, raising), own, others)
    assert "the line went dead" in engine.on(1, raising)[0], "the others are not told why"
    assert engine.told() == first
    engine.reload("B", "step 8")
    second = engine.told()
    engine.reload("A", "step 7")
    third = engine.told()
    for number, said in enumerate((first, second, third)):
        assert [one["version"] for one in said] == [first[0]["version"] + number] * 2
        assert [one["weight_version"] for one in said] == [("step 7", "step 8")[number % 2]] * 2
    digests = [[one["digest"] for one in said] for said in (first, second, third)]
    assert digests[0] == digests[2]
    assert len({*digests[0], *digests[1], None}) == 5, "ranks and generations cannot be told apart"


def any_rank_raises(engine: Engine) -> None:
    """One after the other: it has its own error, all others have one that names it, and none serves B."""
    for rank in range(engine.ranks):
        says = [f"rank {rank}: SourceError"] * engine.ranks
        says[rank] = "SourceError"
        engine.assert_refused(engine.on(rank, raising), *says)


def partial_update(engine: Engine) -> None:
    """One layer of B onto A, from a folder and from an iterator: what a reload of the mixture gives."""
    a, b = (read_tensors(Path(engine.folders[letter])) for letter in "AB")
    layer = {name: tensor for name, tensor in b.items() if ".layers.1." in name}
    with tempfile.TemporaryDirectory() as root:
        for name, tensors in (("mixture", a | layer), ("part", layer)):
            shutil.copytree(engine.folders["A"], Path(root, name))
            save_file(tensors, Path(root, name, "model.safetensors"))
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": f"{root}/mixture"})
        wanted = state_of(engine.llm, engine.answers)
        engine.reload("A")
        part = {"weights_path": f"{root}/part", "partial": True}
        engine.llm.collective_rpc("reload_weights", kwargs=part)
        engine.assert_shows(wanted, "the mixture, from a folder")
        engine.reload("A")
        engine.llm.collective_rpc(push_part, args=(f"{root}/part",))
        engine.assert_shows(wanted, "the mixture, from an iterator")
    engine.reload("A")


def push_part(worker: object, folder: str) -> None:
    """A partial update from an iterator, which is this rank's own."""
    weights = iter(read_tensors(Path(folder)).items())
    worker.model_runner.reload_weights(weights_iterator=weights, partial=True)


def names_are_missing(engine: Engine) -> None:
    found = engine.on(1, without_keys)
    engine.assert_refused(found, "rank 1: MissingWeightsError", "MissingWeightsError")
    assert "layers.1.self_attn.qkv_proj" in found[1]


def all_offenders_are_named_on_every_rank(engine: Engine) -> None:
    """Shards, replicas and padding do not blur what is missing, unexpected or of another shape."""

    def bad(weights: Weights) -> Weights:
        return with_more(cut(without_keys(weights)))

    for text in engine.on(0, bad, other=bad):
        assert text.startswith("WeightsError")
        assert "1 missing: model.layers.1.self_attn.qkv_proj.weight" in text
        assert "1 unexpected: model.nothing.weight" in text
        assert "1 misshapen: model.layers.0.self_attn.o_proj.weight" in text
    engine.assert_is("A")


def processing_raises(engine: Engine) -> None:
    fails = failing_in("reload_plugin.vllm_api", "process_layers", RuntimeError("no kernel"), after=2)
    engine.assert_refused(engine.on(1, fails), "rank 1: ProcessingError", "ProcessingError")


def the_tail_raises(engine: Engine) -> None:
    """The very last thing before the commit."""
    fails = failing_in("reload_plugin.transaction.group_processing", "process_tail", RuntimeError("no hook"))
    says = "ReloadError: The reload failed with RuntimeError: no hook"
    engine.assert_refused(engine.on(0, fails), says, f"rank 0: {says}")


def memory_runs_out(engine: Engine) -> None:
    fails = failing_in(
        "reload_plugin.record.staged_storage", "StagedStorage.materialise", MemoryError("full"), after=3
    )
    engine.assert_refused(engine.on(1, fails), "rank 1: ", "full")


def a_slow_rank_is_waited_for(engine: Engine) -> None:
    assert engine.on(1, slowly) == ["committed"] * 2
    engine.assert_is("B")
    engine.reload("A")


def a_rank_is_too_slow(engine: Engine) -> None:
    try:
        engine.on(0, with_timeout(0.5), "A")
        found = engine.on(1, slowly)
    finally:
        engine.on(0, with_timeout(600), "A")
    engine.assert_refused(found, "rank 1: did not answer rank 0 within 0.5 s", "rank 1: did not answer")


def engine_raises(call: Callable[[], object], says: str) -> None:
    with pytest.raises(Exception, match=says):
        call()


def answers_stay_in_step_after_a_failure(engine: Engine) -> None:
    """Through the public call: what failed is reported once, and not by the calls after it."""
    engine_raises(
        lambda: engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": "/nowhere"}), "no folder"
    )
    engine.reload("B")
    engine.assert_is("B")
    assert engine.llm.collective_rpc(lambda worker: worker.rank) == [0, 1]
    engine.reload("A")


def a_call_that_cannot_be_sent_is_not_answered(engine: Engine) -> None:
    engine_raises(lambda: engine.llm.collective_rpc(type, args=(lambda: None,)), "pickle")
    assert engine.llm.collective_rpc(lambda worker: worker.rank) == [0, 1]


def layer_by_layer_policies_are_refused(engine: Engine) -> None:
    def reload(worker: object) -> str:
        import reload_plugin

        return attempt(
            lambda: reload_plugin.reload_weights(worker.get_model(), weights_path=folder, policy="streaming")
        )

    folder = engine.folders["B"]
    engine.assert_refused(engine.llm.collective_rpc(reload), *["2 ranks can commit together"] * 2)


def layerwise(engine: Engine) -> None:
    """vLLM's start and finish, as transfer engines call them: first one rank lacks a weight, then none."""

    def start(worker: object) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(worker.get_model())

    def load(worker: object, incomplete: int) -> None:
        change = without_keys if worker.rank == incomplete else unchanged
        worker.get_model().load_weights(change(iter(read_tensors(Path(folder)).items())))

    def finish(worker: object) -> str:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        return attempt(lambda: finalize_layerwise_reload(worker.get_model(), worker.model_config))

    folder = engine.folders["B"]
    for incomplete in (1, None):
        engine.llm.collective_rpc(start)
        engine.llm.collective_rpc(load, args=(incomplete,))
        found = engine.llm.collective_rpc(finish)
        if incomplete == 1:
            engine.assert_refused(found, "rank 1: MissingWeightsError", "MissingWeightsError")
    assert found == ["committed"] * 2
    engine.assert_is("B")
    engine.reload("A")


def block(engine: Engine) -> None:
    """`restore_for_reloading`, left by an exception on one rank, then on none."""

    def reload(worker: object, failing: int) -> str:
        import reload_plugin

        def inside() -> None:
            with reload_plugin.restore_for_reloading(worker.get_model()):
                worker.get_model().load_weights(iter(read_tensors(Path(folder)).items()))
                if worker.rank == failing:
                    raise ValueError("changed my mind")

        return attempt(inside)

    folder = engine.folders["B"]
    found = engine.llm.collective_rpc(reload, args=(1,))
    engine.assert_refused(found, "rank 1: ValueError: changed my mind", "ValueError")
    assert engine.llm.collective_rpc(reload, args=(None,)) == ["committed"] * 2
    engine.assert_is("B")
    engine.reload("A")


# --- model.load_weights of the served model ---


def pieces(worker: object, folder: str, part: int, parts: int, change: Callable = unchanged) -> str:
    """One RPC of a push: a part of a checkpoint by `model.load_weights`."""
    weights = list(read_tensors(Path(folder)).items())[part::parts]
    return attempt(lambda: worker.get_model().load_weights(change(iter(weights))))


def live(engine: Engine, letter: str, parts: int = 3, serve: bool = False) -> None:
    for part in range(parts):
        found = engine.llm.collective_rpc(pieces, args=(engine.folders[letter], part, parts))
        assert found == ["committed"] * engine.ranks, found
        if serve and part + 1 < parts:
            engine.assert_is("AB"[letter == "A"])


def live_push(engine: Engine) -> None:
    """In one call and in several, forward passes in between; also as the first push that the engine gets."""
    for letter, parts, serve in (("B", 1, False), ("A", 3, False), ("B", 3, True), ("A", 5, True)):
        live(engine, letter, parts, serve)
        engine.assert_is(letter)


def live_push_fails_on_one_rank(engine: Engine) -> None:
    """In its first, middle and last call; what follows is refused on that rank, and no rank commits."""
    live(engine, "A")
    for rank, failing in ((0, 0), (1, 1), (1, 2)):
        for number in range(3):
            change = raising_at_once if number == failing else unchanged
            arguments = (engine.folders["B"], number, rank, change)
            if number == failing:
                engine_raises(
                    lambda a=arguments: engine.llm.collective_rpc(on_rank, args=a), "line went dead"
                )
            elif number > failing:
                engine_raises(lambda a=arguments: engine.llm.collective_rpc(on_rank, args=a), "failed")
            else:
                engine.llm.collective_rpc(on_rank, args=arguments)
        # No request in between: who goes on after an error did not hear of it, so the next one raises
        # on both ranks, and an engine of vLLM with several processes does not outlive that.
        assert engine.llm.collective_rpc(look) == engine.states["A"][1]
        live(engine, "B")
        engine.assert_is("B")
        live(engine, "A")


def raising_at_once(weights: Weights) -> Weights:
    yield next(weights)
    raise OSError("the line went dead")


def on_rank(worker: object, folder: str, part: int, rank: int, change: Callable) -> None:
    weights = iter(list(read_tensors(Path(folder)).items())[part::3])
    worker.get_model().load_weights(change(weights) if worker.rank == rank else weights)


def a_commit_that_fails_stops_that_rank(engine: Engine) -> None:
    """The others cannot know any more; this one must not serve until it is healed."""

    def broken(worker: object) -> bool:
        from reload_plugin.transaction.engine_state import state_of

        return state_of(worker.get_model()).broken is not None

    for after in (0, 2):
        fails = failing_in("reload_plugin.commit.group_commit", "Commit.apply", RuntimeError("lost"), after)
        found = engine.on(1, fails)
        assert found[0] == "committed"
        assert found[1].startswith("EngineBrokenError"), found[1]
        assert "the other ranks committed" in found[1]
        assert engine.llm.collective_rpc(broken) == [False, True]
        engine.reload("B")
        assert engine.llm.collective_rpc(broken) == [False, False]
        engine.assert_is("B")
        engine.reload("A")


def an_export_is_written_by_both(engine: Engine) -> None:
    """After an iterator, whose weights nobody can read again: each rank writes what it serves."""
    from tests import ranked_exports

    engine.on(0, unchanged)
    engine.assert_is("B")
    with tempfile.TemporaryDirectory() as root:
        report = reload_plugin.export_checkpoint(engine.llm, Path(root, "two"), max_shard_size="100KB")
        assert set(report.tiers.values()) <= {"plan", "inverse"}
        written, expected = read_tensors(Path(root, "two")), read_tensors(Path(engine.folders["B"]))
        assert exports.differing(written, expected) == {}
        assert reload_plugin.verify(engine.llm, Path(root, "two")).serves
        ranked_exports.check_refused(engine.llm, Path(root))
    engine.assert_is("B")


# --- engines ---


@contextlib.contextmanager
def started(case: Case, folder: Path, executor: str) -> Iterator[object]:
    """An engine on two ranks: shards, or stages where the case says so."""
    staged = "pipeline_parallel_size" in case.engine_kwargs
    sizes = {} if staged else {"tensor_parallel_size": 2}  # a grid says both
    with oracle.running(case, folder, distributed_executor_backend=executor, **sizes) as llm:
        if staged:
            # vLLM's runner for CPUs makes the buffers of later stages in a warm-up only.
            llm.collective_rpc(
                lambda worker: worker.model_runner._dummy_run(worker.model_runner.max_num_tokens) and None
            )
        yield llm


@contextlib.contextmanager
def engine_of(case: Case, root: Path, answers: bool = True, executor: str = "mp") -> Iterator[Engine]:
    """An engine on two ranks that serves A, and what it looks like on A and B, reloaded and started."""
    folders = oracle.write(case, root)
    with started(case, folders["B"], "mp") as llm:
        cold = state_of(llm, answers)
    with (
        ray_cluster.running() if executor == "ray" else contextlib.nullcontext(),
        started(case, folders["A"], executor) as llm,
    ):
        engine = Engine(llm, {letter: str(folder) for letter, folder in folders.items()}, {}, cold, answers)
        engine.states["A"] = state_of(llm, answers)
        engine.reload("B")
        engine.states["B"] = state_of(llm, answers)
        engine.reload("A")
        yield engine
