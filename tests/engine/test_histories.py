"""Random histories of reloads, against a model that only remembers the last good weights.

Good, bad, partial, chunked, aborted and repeated reloads of three generations follow one another in any
order, under every policy. After each step everything is what it should be, at the same addresses: tensors,
what packed layers compute, and what the status says (version, name, digest, state, last error). A thousand
histories run on vLLM's own models, built and loaded by vLLM without an engine around them, and fewer on
engines, which are also asked between any two steps.
"""

import contextlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors.torch import save_file

import reload_plugin
from reload_plugin import vllm_api
from reload_plugin.errors import EngineBrokenError, PartialUpdateError, ReloadError
from reload_plugin.record.model_record import record_of
from reload_plugin.report import ReloadReport
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.status import ReloadStatus
from tests import oracle
from tests.checkpoints import read_tensors
from tests.zoo import Case, case_named

ON_MODELS = {"llama_tied": 400, "w8a8_dynamic": 340, "mixtral": 260}
ON_ENGINES = {"llama_tied": 30, "w8a8_dynamic": 30}
"""Histories of each case."""
SMALL = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
"""How models without an engine differ from the cases they are named after."""
GENERATIONS = "ABC"
NORMS = "norm.weight"
SHARDS = {"mixtral": "layers.0.block_sparse_moe.experts.1.w1."}
A_SHARD = "layers.0.self_attn.k_proj."
"""What partial updates send: norms, which processing leaves as they are, and a part of a packed layer, one
expert's matrix or a shard of a fused projection."""

Mix = tuple[str, str, str]
"""Generation of everything else, of the shard, and of the norms."""


class World:
    """A model, what it looks like on every mix of generations, and what it looked like at the start.

    Args:
        model: what is reloaded.
        case: what it was made from; its name tells which part of a packed layer partial updates send.
        folders: checkpoints A and B.
        root: where checkpoint C goes.
        llm: the engine around the model; None when there is none.

    """

    def __init__(
        self, model: torch.nn.Module, case: Case, folders: dict[str, Path], root: Path, llm: object = None
    ) -> None:
        self.model, self.case, self.llm = model, case, llm
        self.parts = (SHARDS.get(case.name, A_SHARD), NORMS)
        self.weights = {letter: read_tensors(folders[letter]) for letter in "AB"}
        self.weights["C"] = {name: self.third(tensor) for name, tensor in self.weights["A"].items()}
        self.folders = {letter: str(folders[letter]) for letter in "AB"} | {"C": str(root / "C.safetensors")}
        save_file(self.weights["C"], self.folders["C"])
        self.counts: Counter[str] = Counter()
        self.pictures: dict[Mix, oracle.Snapshot] = {}
        for mix in itertools.product(GENERATIONS, repeat=3):
            self.push(iter(self.mixed(mix).items()))
            self.pictures[mix] = self.picture()
        assert len({picture.digest for picture in self.pictures.values()}) == len(self.pictures)
        self.start = self.pictures["A", "A", "A"]

    @staticmethod
    def third(tensor: torch.Tensor) -> torch.Tensor:
        """Other values of the same kind: rows in another order."""
        return tensor.flip(0).contiguous()

    def part_of(self, name: str) -> int:
        return next((index for index, part in enumerate(self.parts, 1) if part in name), 0)

    def mixed(self, mix: Mix) -> dict[str, torch.Tensor]:
        return {name: self.weights[mix[self.part_of(name)]][name] for name in self.weights["A"]}

    def push(self, weights: object, **options: object) -> ReloadReport:
        return reload_plugin.reload_weights(self.model, weights, **options)

    def pull(self, letter: str, **options: object) -> ReloadReport:
        return reload_plugin.reload_weights(self.model, weights_path=self.folders[letter], **options)

    def status(self) -> ReloadStatus:
        return reload_plugin.status(self.model)[0]

    def name(self) -> str:
        """A name for the next weights, good or bad: no two reloads have the same."""
        self.counts["named"] += 1
        return f"number {self.counts['named']}"

    def answers(self) -> list:
        return [] if self.llm is None else oracle.answer(self.llm)

    def picture(self) -> oracle.Snapshot:
        return oracle.Snapshot(self.answers(), oracle.live_tensors(self.model), self.status().digest or "")

    def differences(self, mix: Mix) -> list[object]:
        """Tensors and packed weights that are not those of ``mix``, and what has moved since the start."""
        wanted, now = self.pictures[mix], oracle.live_tensors(self.model)
        assert now.keys() == wanted.tensors.keys()
        wrong: list[object] = [path for path in now if now[path].digest != wanted.tensors[path].digest]
        return wrong + oracle.compare_places("", self.start, oracle.Snapshot([], now))


@dataclass
class Remembered:
    """All that the state machine knows: the last good weights, and what the status has to say of them."""

    version: int
    """Reloads so far that were good."""
    mix: Mix = ("A", "A", "A")
    name: str | None = None
    readable: bool = False
    """Whether the weights served can be read again."""
    failed: bool = False
    """Whether the last reload was bad."""
    sent: dict[str, str] = field(default_factory=dict)
    """Weight -> generation, of the open update."""
    open: bool = False
    broken: bool = False

    def status(self, world: World) -> dict[str, object]:
        state = "broken" if self.broken else "updating" if self.open else "serving"
        digest = None if self.broken else world.pictures[self.mix].digest
        return {
            "state": state,
            "version": self.version,
            "weight_version": self.name,
            "digest": digest,
            "failed": self.failed,
        }


def machine_for(world: World) -> type[RuleBasedStateMachine]:  # noqa: C901 - one class, with the world at hand
    """A state machine over the one engine; each history begins with generation A."""
    names = list(world.weights["A"])
    positions = st.integers(0, len(names) - 1)
    parts = st.sampled_from(range(1, len(world.parts) + 1))
    generations = st.sampled_from(GENERATIONS)
    streams = st.sampled_from(["auto", "host", "spill"])
    closed = precondition(lambda self: not self.now.open)
    whole = precondition(lambda self: not self.now.open and not self.now.broken)
    opened = precondition(lambda self: self.now.open)

    class Histories(RuleBasedStateMachine):
        """Every way to reload, and what is remembered of it."""

        @initialize()
        def begin(self) -> None:
            report = world.push(iter(world.weights["A"].items()), policy="host")
            self.now, self.steps = Remembered(report.version), 0

        def good(self, letter: str, readable: bool, name: str | None = None) -> None:
            self.now = Remembered(self.now.version + 1, (letter, letter, letter), name, readable)
            world.counts["good"] += 1

        def refused(self, call: object, *errors: type[Exception]) -> None:
            with pytest.raises(errors or (ReloadError,)):
                call()
            self.now.failed = True
            world.counts["refused"] += 1

        @closed
        @rule(
            letter=generations,
            policy=streams,
            keep=st.sampled_from([None, "host", "spill"]),
            shuffle=st.integers(0, 9),
        )
        def from_an_iterator(self, letter: str, policy: str, keep: str | None, shuffle: int) -> None:
            items, name = list(world.weights[letter].items()), world.name()
            random.Random(shuffle).shuffle(items)
            if policy == "spill" and not self.now.readable:
                self.refused(lambda: world.push(iter(items), policy=policy, weight_version=name))
                return
            world.push(iter(items), policy=policy, keep_load_format=keep, weight_version=name)
            self.good(letter, policy == "spill" or keep is not None, name)

        @closed
        @rule(letter=generations, policy=st.sampled_from(["auto", "host", "streaming"]))
        def from_a_file(self, letter: str, policy: str) -> None:
            name = world.name()
            world.pull(letter, policy=policy, weight_version=name)
            self.good(letter, True, name)

        @closed
        @rule(letter=generations, policy=streams, at=positions, fault=st.sampled_from(FAULTS))
        def that_fails(self, letter: str, policy: str, at: int, fault: str) -> None:
            weights = faulty(world.weights[letter], at, fault)
            name = world.name()
            self.refused(
                lambda: world.push(weights, policy=policy, weight_version=name), ReloadError, FaultError
            )

        @whole
        @rule(letter=generations, count=st.integers(1, 12), path=st.booleans())
        def whose_processing_fails(self, letter: str, count: int, path: bool) -> None:
            name = world.name()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(vllm_api, "process_layers", failing_at(count))
                try:
                    if path:
                        world.pull(letter, weight_version=name)
                    else:
                        items = iter(world.weights[letter].items())
                        world.push(items, policy="host", weight_version=name)
                except ReloadError:
                    self.now.failed = True
                    world.counts["refused"] += 1
                else:
                    self.good(letter, path, name)  # this model has fewer layers than that

        @whole
        @rule(updates=st.lists(st.tuples(generations, parts), min_size=1, max_size=3))
        def partly(self, updates: list[tuple[str, int]]) -> None:
            """Some one after the other: each finds what those before have changed."""
            for letter, part in updates:
                self.change(letter, part)

        def change(self, letter: str, part: int) -> None:
            weights, name = world.weights[letter].items(), world.name()
            some = [(name, tensor) for name, tensor in weights if world.part_of(name) == part]
            if not self.now.readable and world.parts[part - 1] != NORMS:
                self.refused(
                    lambda: world.push(iter(some), partial=True, weight_version=name), PartialUpdateError
                )
                return
            world.push(iter(some), partial=True, weight_version=name)
            mix = list(self.now.mix)
            mix[part] = letter
            self.now = Remembered(self.now.version + 1, (mix[0], mix[1], mix[2]), name, self.now.readable)
            world.counts["partial"] += 1

        @whole
        @rule(letter=generations, at=positions)
        def that_breaks_the_engine(self, letter: str, at: int) -> None:
            """Streaming, which the caller chose by name, has no rollback source."""
            weights = faulty(world.weights[letter], at, "raises")
            try:
                world.push(weights, policy="streaming", weight_version=world.name())
            except EngineBrokenError:
                self.now.broken = True  # and the source of the last good weights is where it was
                world.counts["broken"] += 1
            except ReloadError:
                world.counts["refused"] += 1
            self.now.failed = True

        @whole
        @rule()
        def start_an_update(self) -> None:
            layerwise("initialize_layerwise_reload")(world.model)
            self.now.open, self.now.sent = True, {}

        @opened
        @rule(letter=generations, first=positions, count=st.integers(1, 40))
        def send_a_chunk(self, letter: str, first: int, count: int) -> None:
            chunk = [name for name in names[first : first + count] if name not in self.now.sent]
            world.model.load_weights((name, world.weights[letter][name]) for name in chunk)
            self.now.sent |= dict.fromkeys(chunk, letter)

        @opened
        @rule(letter=generations)
        def send_the_rest_and_finish(self, letter: str) -> None:
            """Finishes only an update of one generation, so that the result is one that was seen."""
            if set(self.now.sent.values()) - {letter}:
                return
            chunk = [name for name in names if name not in self.now.sent]
            world.model.load_weights((name, world.weights[letter][name]) for name in chunk)
            layerwise("finalize_layerwise_reload")(world.model, record_of(world.model).model_config)
            self.good(letter, False)
            world.counts["chunked"] += 1

        @precondition(lambda self: self.now.open and len(self.now.sent) < len(names))
        @rule()
        def finish_too_early(self) -> None:
            finish = layerwise("finalize_layerwise_reload")
            self.refused(lambda: finish(world.model, record_of(world.model).model_config))

        @opened
        @rule()
        def abort(self) -> None:
            assert reload_plugin.abort_weight_update(world.model)
            self.now.open = False
            world.counts["aborted"] += 1

        @precondition(lambda self: world.llm is not None and not self.now.broken)
        @rule()
        def ask(self) -> None:
            """Also in the middle of an update."""
            wanted = world.pictures[self.now.mix].answers
            assert oracle.differing_answers(world.answers(), wanted) == []
            world.counts["answered"] += 1

        @invariant()
        def it_holds_the_last_good_weights(self) -> None:
            if not hasattr(self, "now"):
                return
            if self.now.broken:
                with pytest.raises(EngineBrokenError):
                    state_of(world.model).before_forward_pass()
                return
            state_of(world.model).before_forward_pass()
            assert world.differences(self.now.mix) == []

        @invariant()
        def its_status_says_so(self) -> None:
            if not hasattr(self, "now"):
                return
            said, wanted = world.status(), self.now.status(world)
            told = said.model_dump(include=wanted.keys()) | {"failed": said.last_error is not None}
            assert told == wanted
            self.steps += 1

        def teardown(self) -> None:
            if not hasattr(self, "now"):
                return
            world.counts["steps"] += self.steps - 1
            world.counts["histories"] += self.steps > 1
            if self.now.open:
                reload_plugin.abort_weight_update(world.model)
            if self.now.broken:
                world.push(iter(world.weights["A"].items()), policy="host")
            elif world.llm is not None:
                self.ask()

    return Histories


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """These layers are far too small for two threads to do anything but wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layerwise(name: str) -> object:
    from vllm.model_executor.model_loader import reload

    return getattr(reload, name)


class FaultError(Exception):
    """What a source of ours raises."""


FAULTS = ("raises", "interrupted", "missing", "twice", "unknown", "misshapen", "meta")


def faulty(weights: dict[str, torch.Tensor], at: int, fault: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, with something wrong at one of them."""
    for index, (name, tensor) in enumerate(weights.items()):
        if index != at:
            yield name, tensor
        elif fault == "raises":
            raise FaultError(name)
        elif fault == "interrupted":
            raise ReloadError("interrupted by the caller")
        elif fault == "twice":
            yield from ((name, tensor), (name, tensor))
        elif fault == "unknown":
            yield from ((name, tensor), (name + ".unknown", tensor))
        elif fault == "misshapen":
            yield name, torch.cat([tensor, tensor])
        elif fault == "meta":
            yield name, tensor.to("meta")


def failing_at(count: int) -> object:
    process, calls = vllm_api.process_layers, []

    def failing(*args: object) -> None:
        calls.append(args)
        if len(calls) == count:
            raise MemoryError("no room")
        process(*args)

    return failing


def play(world: World, wanted: int, *kinds: str) -> None:
    """Run at least that many histories of a step or more; steps of these kinds have to be among them."""
    of_its_own = seed(f"{world.case.name}, {world.llm is None}")
    run_state_machine_as_test(
        of_its_own(machine_for(world)),
        settings=settings(
            max_examples=wanted + 2,  # some end before their first step
            stateful_step_count=5,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert world.counts["histories"] >= wanted
    for what in kinds:
        assert world.counts[what] > 0, what


@pytest.mark.parametrize("kind", ON_MODELS)
def test_every_history_ends_with_the_last_good_weights(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum(ON_MODELS.values()) >= 1000, "tests/README.md says a thousand"
    case = case_named(kind)
    case = replace(case, config={**case.config, **SMALL})
    folders = oracle.write(case, tmp_path)
    with one_thread(), oracle.built(case, folders["A"]) as model:
        world = World(model, case, folders, tmp_path)
        kinds = ("good", "refused", "partial", "aborted", "broken", "chunked")
        play(world, int(os.environ.get("HISTORIES", ON_MODELS[kind])), *kinds)
    with capsys.disabled():
        print(f"\n{kind}: {dict(world.counts)}")


@pytest.mark.parametrize("kind", ON_ENGINES)
def test_every_history_of_an_engine_ends_with_the_last_good_weights(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum(ON_ENGINES.values()) >= 50, "tests/README.md says fifty"
    case = case_named(kind)
    folders = oracle.write(case, tmp_path)
    with oracle.running(case, folders["A"]) as llm, one_thread():
        world = World(oracle.model_of(llm), case, folders, tmp_path, llm)
        assert len({str(p.answers) for p in world.pictures.values()}) > len(GENERATIONS)
        play(world, int(os.environ.get("HISTORIES", ON_ENGINES[kind])), "good", "refused", "partial")
    with capsys.disabled():
        print(f"\n{kind}: {dict(world.counts)}")
    assert world.counts["answered"] > 0
