"""Random histories of reloads on a real engine, against a model that only remembers the last good weights.

Good, bad, partial, chunked, aborted and repeated reloads of three generations follow one another in any
order, under every policy. After each step the engine holds what it should, at the same addresses.
"""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
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
from reload_plugin import _vllm
from reload_plugin.errors import EngineBrokenError, PartialUpdateError, ReloadError
from reload_plugin.generation import before_serving
from reload_plugin.record import record_of
from tests import oracle
from tests.checkpoints import read_tensors
from tests.zoo import case_named

HISTORIES = {"llama_tied": 430, "w8a8_dynamic": 350}
ANSWERED = 50
"""Histories at whose end the engine is asked, beside its tensors being looked at."""
GENERATIONS = "ABC"
PARTS = ("layers.0.self_attn.k_proj", "norm.weight")
"""What partial updates send: a shard of a fused layer, and norms, which processing leaves as they are."""

Mix = tuple[str, str, str]
"""Generation of everything else, and of each of PARTS."""


class World:
    """The engine, what it looks like on every mix of generations, and what it should look like now."""

    def __init__(self, llm: object, case: object, folders: dict[str, Path], root: Path) -> None:
        self.llm, self.case = llm, case
        self.model = oracle.model_of(llm)
        self.weights = {letter: read_tensors(folders[letter]) for letter in "AB"}
        self.weights["C"] = {name: self.third(tensor) for name, tensor in self.weights["A"].items()}
        self.folders = {letter: str(folders[letter]) for letter in "AB"} | {"C": str(root / "C.safetensors")}
        save_file(self.weights["C"], self.folders["C"])
        self.pictures: dict[Mix, oracle.Snapshot] = {}
        for mix in ((a, b, c) for a in GENERATIONS for b in GENERATIONS for c in GENERATIONS):
            self.push(iter(self.mixed(mix).items()))
            self.pictures[mix] = oracle.snapshot(llm, case)
        self.start = self.pictures["A", "A", "A"]
        self.counts: Counter[str] = Counter()

    @staticmethod
    def third(tensor: torch.Tensor) -> torch.Tensor:
        """Other values of the same kind: matrices with their rows in another order."""
        return tensor.flip(0).contiguous() if tensor.dim() == 2 else tensor * 1

    def part_of(self, name: str) -> int:
        return next((index for index, part in enumerate(PARTS, 1) if part in name), 0)

    def mixed(self, mix: Mix) -> dict[str, torch.Tensor]:
        return {name: self.weights[mix[self.part_of(name)]][name] for name in self.weights["A"]}

    def push(self, weights: object, **options: object) -> object:
        return reload_plugin.reload_weights(self.model, weights, **options)

    def differences(self, mix: Mix) -> list[object]:
        """Tensors and packed weights that are not those of ``mix``, and what has moved since the start."""
        wanted, now = self.pictures[mix], oracle.live_tensors(self.model)
        assert now.keys() == wanted.tensors.keys()
        wrong: list[object] = [path for path in now if now[path].digest != wanted.tensors[path].digest]
        return wrong + oracle.compare_places("", self.start, oracle.Snapshot([], now))


WORLD: list[World] = []


def machine_for(world: World) -> type[RuleBasedStateMachine]:  # noqa: C901 - one class, with the world at hand
    """A state machine over the one engine; each history begins with generation A."""
    names = list(world.weights["A"])
    positions = st.integers(0, len(names) - 1)
    generations = st.sampled_from(GENERATIONS)
    streams = st.sampled_from(["auto", "host", "spill"])
    parts = st.sampled_from(range(1, len(PARTS) + 1))

    class Histories(RuleBasedStateMachine):
        """What the last good weights are, whether they can be read again, and what is open or broken."""

        @initialize()
        def begin(self) -> None:
            world.push(iter(world.weights["A"].items()), policy="host")
            self.mix: Mix = ("A", "A", "A")
            self.readable = False
            self.sent: dict[str, str] = {}
            self.open = self.broken = False
            world.counts["histories"] += 1

        def good(self, letter: str, readable: bool) -> None:
            self.mix, self.readable, self.broken = (letter, letter, letter), readable, False
            world.counts["good"] += 1

        def refused(self, call: object, *errors: type[Exception]) -> None:
            with pytest.raises(errors or (ReloadError,)):
                call()
            world.counts["refused"] += 1

        @precondition(lambda self: not self.open)
        @rule(
            letter=generations,
            policy=streams,
            keep=st.sampled_from([None, "host", "spill"]),
            seed=st.integers(0, 9),
        )
        def from_an_iterator(self, letter: str, policy: str, keep: str | None, seed: int) -> None:
            items = list(world.weights[letter].items())
            random.Random(seed).shuffle(items)
            if policy == "spill" and not self.readable:
                self.refused(lambda: world.push(iter(items), policy=policy))
                return
            world.push(iter(items), policy=policy, keep_load_format=keep)
            self.good(letter, policy == "spill" or keep is not None)

        @precondition(lambda self: not self.open)
        @rule(letter=generations, policy=st.sampled_from(["auto", "host", "streaming"]))
        def from_a_file(self, letter: str, policy: str) -> None:
            reload_plugin.reload_weights(world.model, weights_path=world.folders[letter], policy=policy)
            self.good(letter, True)

        @precondition(lambda self: not self.open)
        @rule(letter=generations, policy=streams, at=positions, fault=st.sampled_from(FAULTS))
        def that_fails(self, letter: str, policy: str, at: int, fault: str) -> None:
            self.refused(
                lambda: world.push(faulty(world.weights[letter], at, fault), policy=policy),
                ReloadError,
                FaultError,
            )

        @precondition(lambda self: not self.open and not self.broken)
        @rule(letter=generations, count=st.integers(1, 12), path=st.booleans())
        def whose_processing_fails(self, letter: str, count: int, path: bool) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_vllm, "process_layers", failing_at(count))
                try:
                    if path:
                        reload_plugin.reload_weights(world.model, weights_path=world.folders[letter])
                    else:
                        world.push(iter(world.weights[letter].items()), policy="host")
                except ReloadError:
                    world.counts["refused"] += 1
                else:
                    self.good(letter, path)  # this model has fewer layers than that

        @precondition(lambda self: not self.open and not self.broken)
        @rule(letter=generations, part=parts)
        def partly(self, letter: str, part: int) -> None:
            some = [
                (name, tensor)
                for name, tensor in world.weights[letter].items()
                if world.part_of(name) == part
            ]
            if not self.readable and PARTS[part - 1] != "norm.weight":
                self.refused(lambda: world.push(iter(some), partial=True), PartialUpdateError)
                return
            world.push(iter(some), partial=True)
            mix = list(self.mix)
            mix[part] = letter
            self.mix = (mix[0], mix[1], mix[2])
            world.counts["partial"] += 1

        @precondition(lambda self: not self.open and not self.broken)
        @rule(letter=generations, at=positions)
        def that_breaks_the_engine(self, letter: str, at: int) -> None:
            """Streaming, which the caller chose by name, gives the way back away."""
            try:
                world.push(faulty(world.weights[letter], at, "raises"), policy="streaming")
            except EngineBrokenError:
                self.broken = True  # and the source of the last good weights is where it was
                world.counts["broken"] += 1
            except ReloadError:
                world.counts["refused"] += 1

        @precondition(lambda self: not self.open and not self.broken)
        @rule()
        def start_an_update(self) -> None:
            layerwise("initialize_layerwise_reload")(world.model)
            self.open, self.sent = True, {}

        @precondition(lambda self: self.open)
        @rule(letter=generations, first=positions, count=st.integers(1, 40))
        def send_a_chunk(self, letter: str, first: int, count: int) -> None:
            chunk = [name for name in names[first : first + count] if name not in self.sent]
            world.model.load_weights((name, world.weights[letter][name]) for name in chunk)
            self.sent |= dict.fromkeys(chunk, letter)

        @precondition(lambda self: self.open)
        @rule(letter=generations)
        def send_the_rest_and_finish(self, letter: str) -> None:
            """Finishes only an update of one generation, so that the result is one that was seen."""
            if set(self.sent.values()) - {letter}:
                return
            chunk = [name for name in names if name not in self.sent]
            world.model.load_weights((name, world.weights[letter][name]) for name in chunk)
            layerwise("finalize_layerwise_reload")(world.model, record_of(world.model).model_config)
            self.open = False
            self.good(letter, False)

        @precondition(lambda self: self.open and len(self.sent) < len(names))
        @rule()
        def finish_too_early(self) -> None:
            finish = layerwise("finalize_layerwise_reload")
            self.refused(lambda: finish(world.model, record_of(world.model).model_config))

        @precondition(lambda self: self.open)
        @rule()
        def abort(self) -> None:
            assert reload_plugin.abort_weight_update(world.model)
            self.open = False
            world.counts["aborted"] += 1

        @invariant()
        def it_holds_the_last_good_weights(self) -> None:
            if not hasattr(self, "mix"):
                return
            if self.broken:
                self.refused(before_serving, EngineBrokenError)
                return
            before_serving()
            assert world.differences(self.mix) == []

        def teardown(self) -> None:
            if not hasattr(self, "mix"):
                return
            if self.open:
                reload_plugin.abort_weight_update(world.model)
            if self.broken:
                world.push(iter(world.weights["A"].items()), policy="host")
            elif world.counts["histories"] % (sum(HISTORIES.values()) // ANSWERED) == 0:
                answers = oracle.answer(world.llm)
                assert oracle.differing_answers(answers, world.pictures[self.mix].answers) == []
                world.counts["answered"] += 1

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
    process, calls = _vllm.process_layers, []

    def failing(*args: object) -> None:
        calls.append(args)
        if len(calls) == count:
            raise MemoryError("no room")
        process(*args)

    return failing


@pytest.mark.parametrize("kind", HISTORIES)
def test_no_history_leads_anywhere_but_to_the_last_good_weights(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_named(kind)
    folders = oracle.write(case, tmp_path)
    wanted = int(os.environ.get("HISTORIES", HISTORIES[kind]))
    with oracle.running(case, folders["A"]) as llm, one_thread():
        world = World(llm, case, folders, tmp_path)
        assert len({str(p.answers) for p in world.pictures.values()}) > len(GENERATIONS)
        run_state_machine_as_test(
            machine_for(world),
            settings=settings(
                max_examples=wanted,
                stateful_step_count=5,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    with capsys.disabled():
        print(f"\n{kind}: {dict(world.counts)}")
    assert world.counts["histories"] >= wanted
    for what in ("good", "refused", "partial", "aborted", "broken", "answered"):
        assert world.counts[what] > 0, what
