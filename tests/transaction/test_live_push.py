"""Pushes through ``model.load_weights`` of a served model, which most frameworks use."""

import itertools
import types
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader import utils as loader_utils

from reload_plugin import (
    MissingWeightsError,
    PartialUpdateError,
    ReloadError,
    SessionError,
    SourceError,
    UnsupportedError,
    WeightsError,
    reload_weights,
    restore_for_reloading,
    status,
    vllm_api,
)
from reload_plugin.transaction.chunked_update import GatheredUpdate, finish_layerwise, open_layerwise
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.transaction.live_push import LoadWeights, live_push_of
from reload_plugin.transaction.push_kinds import PushKind
from reload_plugin.vllm_hooks import layerwise, live, transfer_backends, workers
from tests.transaction.test_session import (
    A,
    B,
    Make,
    Method,
    Model,
    Tied,
    Twice,
    cold,
    identities,
    registered,  # noqa: F401 - the fixture is used by itself
    values,
)
from tests.transaction.test_whole_at_rest import MAKES, assert_whole
from tests.vllm_hooks.test_worker_hooks import Worker

FIRST, HEAD = "first.weight", "lm_head.weight"


def nothing(*_: object) -> None:
    """A method of the worker's that a hook wraps."""


def forward_pass(model: nn.Module) -> None:
    workers.guarding(nothing)(Worker(model))


def process(model: nn.Module) -> None:
    """What verl, checkpoint-engine and ms-swift call after a push."""
    loader_utils.process_weights_after_loading(model, None, torch.device("cpu"))


def push(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        model.load_weights([(name, tensor)])


def pushed_before(make: Make = Model) -> nn.Module:
    """A model on A that got a whole push, so that the next one is known."""
    model = cold(make, B)
    model.load_weights(A.items())
    forward_pass(model)
    assert values(model) == values(cold(make, A))
    return model


# --- the four ends ---


@pytest.mark.parametrize("make", MAKES)
def test_a_push_is_served_from_the_next_forward_pass_on(make: Make) -> None:
    model = cold(make, A)
    before, ids = values(model), identities(model)
    for weights in (B, A, B):
        push(model, weights)
        assert_whole(model)
        forward_pass(model)
        assert values(model) == values(cold(make, weights))
        assert identities(model) == ids
    assert values(model) != before


@pytest.mark.parametrize("make", MAKES)
def test_the_last_weight_of_a_known_push_commits_it(make: Make) -> None:
    model = pushed_before(make)
    before = values(model)
    *some, last = B.items()
    for name, tensor in some:
        model.load_weights([(name, tensor)])
        assert_whole(model)
        assert values(model) == before
    model.load_weights([last])
    assert values(model) == values(cold(make, B))
    assert status(model)[0].state == "serving"


@pytest.mark.parametrize("make", MAKES)
def test_processing_ends_a_push_and_does_nothing_the_second_time(make: Make) -> None:
    model = cold(make, A)
    ids = identities(model)
    for weights in (B, A):
        push(model, weights)
        process(model)
        assert values(model) == values(cold(make, weights))
        process(model)
        assert values(model) == values(cold(make, weights))
        assert identities(model) == ids


@pytest.mark.parametrize("make", MAKES)
def test_processing_a_served_model_changes_nothing(make: Make) -> None:
    model = cold(make, A)
    before, ids = values(model), identities(model)
    process(model)
    assert values(model) == before
    assert identities(model) == ids


def test_half_of_a_known_push_waits_while_the_old_weights_answer() -> None:
    model = pushed_before()
    before = values(model)
    model.load_weights([(FIRST, B[FIRST])])
    for _ in range(3):
        forward_pass(model)
        assert values(model) == before
    assert "1 weights so far" in (status(model)[0].update or "")
    model.load_weights([(HEAD, B[HEAD])])
    assert values(model) == values(cold(Model, B))


def test_a_part_that_was_never_pushed_is_a_partial_update() -> None:
    model = cold(lambda: Model(Method), A)
    model.load_weights([(FIRST, B[FIRST])])
    forward_pass(model)
    assert values(model) == values(cold(lambda: Model(Method), {FIRST: B[FIRST], HEAD: A[HEAD]}))
    model.load_weights([(FIRST, A[FIRST])])
    assert values(model) == values(cold(lambda: Model(Method), A)), "the same part is known by now"


class Fused(Model):
    """The first layer is packed from two weights."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            halves = {"first.q": self.first.weight.data[:2], "first.k": self.first.weight.data[2:]}
            halves.get(name, self.lm_head.weight.data).copy_(tensor)
        return {FIRST, HEAD}


def test_a_part_that_cannot_be_kept_is_refused_at_the_forward_pass_and_dropped() -> None:
    old = {"first.q": A[FIRST][:2], "first.k": A[FIRST][2:], HEAD: A[HEAD]}
    new = {"first.q": B[FIRST][:2], "first.k": B[FIRST][2:], HEAD: B[HEAD]}
    model = cold(Fused, old)
    before = values(model)
    model.load_weights([("first.q", new["first.q"])])
    with pytest.raises(PartialUpdateError, match="packed or quantized"):
        forward_pass(model)
    forward_pass(model)
    assert values(model) == before
    push(model, new)
    forward_pass(model)
    assert values(model) == values(cold(Fused, new))


def test_going_to_sleep_drops_a_push_and_a_sleeping_model_takes_none() -> None:
    model = pushed_before()
    before = values(model)
    model.load_weights([(FIRST, B[FIRST])])
    worker = Worker(model)
    workers.sleeping(nothing)(worker, 1)
    with pytest.raises(SessionError, match="Wake it up first"):
        model.load_weights([(FIRST, B[FIRST])])
    workers.waking(nothing)(worker)
    forward_pass(model)
    assert values(model) == before
    push(model, B)
    assert values(model) == values(cold(Model, B))


def test_a_model_whose_weights_were_discarded_is_healed_by_a_push() -> None:
    model = pushed_before()
    worker = Worker(model)
    workers.sleeping(nothing)(worker, 2)
    workers.waking(nothing)(worker)
    with pytest.raises(ReloadError, match="does not serve"):
        forward_pass(model)
    push(model, B)
    forward_pass(model)
    assert values(model) == values(cold(Model, B))


def test_another_reload_drops_a_push() -> None:
    model = pushed_before()
    model.load_weights([(FIRST, B[FIRST])])
    reload_weights(model, iter(B.items()))
    assert values(model) == values(cold(Model, B))
    model.load_weights([(FIRST, A[FIRST])])
    with restore_for_reloading(model):
        push(model, A)
    assert values(model) == values(cold(Model, A))
    forward_pass(model)
    assert values(model) == values(cold(Model, A))


# --- what is pushed ---


def test_the_caller_may_reuse_its_memory_after_each_call() -> None:
    for make in (Model, lambda: Model(Method)):
        model = cold(make, A)
        for weights in (B, A):
            for name, tensor in weights.items():
                bucket = tensor.clone()
                model.load_weights([(name, bucket)])
                bucket.fill_(float("nan"))
            forward_pass(model)
            assert values(model) == values(cold(make, weights))


def test_names_of_a_wrapped_model_are_those_without_the_wrapper() -> None:
    model = cold(Model, A)
    for _ in range(2):
        model.load_weights((name.replace(".weight", ".base_layer.weight"), t) for name, t in B.items())
        forward_pass(model)
        assert values(model) == values(cold(Model, B))


def test_a_weight_that_comes_again_before_the_end_counts_as_it_came_last() -> None:
    model = cold(Model, A)
    for weights in (B, A):  # the second time it is known that weights come twice
        push(model, {FIRST: torch.zeros(4, 3)})
        push(model, weights)
        forward_pass(model)
        assert values(model) == values(cold(Model, weights))


def test_a_push_that_begins_again_forgets_what_came_before() -> None:
    model = pushed_before()
    model.load_weights([(FIRST, torch.zeros(4, 3))])
    push(model, B)
    assert values(model) == values(cold(Model, B))


def test_weights_that_the_model_does_not_use_change_nothing() -> None:
    model = cold(Tied, {FIRST: A[FIRST]})
    before = values(model)
    model.load_weights([(HEAD, A[FIRST])])
    forward_pass(model)
    assert values(model) == before


def test_two_names_for_one_matrix_push_like_any_others() -> None:
    model = cold(Twice, A)
    both = {FIRST: B[FIRST], "old_head.weight": B[HEAD]}
    for _ in range(2):
        push(model, both)
        forward_pass(model)
        assert values(model) == values(cold(Model, B))


def test_a_weight_that_comes_alone_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a push of many thousand calls only the first and the last are more than a copy."""
    model = pushed_before()
    long_way: list[object] = []
    take = LoadWeights._take
    monkeypatch.setattr(LoadWeights, "_take", lambda self, *rest: long_way.append(rest) or take(self, *rest))
    three = {FIRST: B[FIRST], "ignored": B[FIRST], HEAD: B[HEAD]}
    guard = live_push_of(model)
    guard.kinds.learn(PushKind(frozenset(three), whole=True))
    for name in (FIRST, HEAD):
        model.load_weights([(name, B[name])])
    assert len(long_way) == 1
    assert guard._fast.names == {FIRST, HEAD}
    assert_whole(model)
    assert values(model) == values(cold(Model, A))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta"), torch.enable_grad])
def test_the_callers_modes_do_not_reach_the_weights(mode: Callable) -> None:
    for make in (Model, Tied):
        model = cold(make, A)
        for weights in (B, A, B):
            with mode():
                for name, tensor in weights.items():
                    model.load_weights([(name, torch.nn.Parameter(tensor, requires_grad=True))])
            forward_pass(model)
            assert values(model) == values(cold(make, weights))
            assert not any(p.is_inference() or p.requires_grad for p in model.parameters())


# --- errors ---


def raising(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from itertools.islice(weights.items(), 1)
    raise OSError("the trainer is gone")


WRONG: dict[str, tuple[type, Callable[[], object]]] = {
    "shape": (WeightsError, lambda: [(FIRST, B[FIRST]), (HEAD, torch.ones(5, 5))]),
    "unknown name": (WeightsError, lambda: [("nowhere.weight", B[FIRST])]),
    "twice in one call": (WeightsError, lambda: [(FIRST, B[FIRST]), (FIRST, B[FIRST])]),
    "no values": (WeightsError, lambda: [(FIRST, torch.empty(4, 3, device="meta"))]),
    "no tensor": (WeightsError, lambda: [(FIRST, "text")]),
    "no pairs": (SourceError, lambda: [B[FIRST]]),
    "no iterable": (SourceError, lambda: 7),
    "source raises": (SourceError, lambda: raising(B)),
}


@pytest.mark.parametrize("known", [False, True], ids=["first push", "known push"])
@pytest.mark.parametrize(("expected", "wrong"), WRONG.values(), ids=WRONG)
def test_a_call_that_fails_says_why_at_once_and_drops_the_push(
    expected: type, wrong: Callable[[], object], known: bool
) -> None:
    model = pushed_before() if known else cold(Model, A)
    before, ids = values(model), identities(model)
    with pytest.raises(expected):
        model.load_weights(wrong())
    assert_whole(model)
    for _ in range(2):
        forward_pass(model)
        assert values(model) == before
    assert status(model)[0].last_error
    push(model, A)  # the refusal of what is left, if any, is over with the first name
    forward_pass(model)
    push(model, B)
    forward_pass(model)
    assert values(model) == values(cold(Model, B))
    assert identities(model) == ids


@pytest.mark.parametrize("known", [False, True], ids=["first push", "known push"])
def test_what_comes_after_a_swallowed_error_makes_no_mixture(known: bool) -> None:
    model = pushed_before() if known else cold(Model, A)
    before = values(model)
    with pytest.raises(WeightsError):
        model.load_weights([(FIRST, torch.ones(5, 5))])
    with pytest.raises(SessionError, match=r"Send all of its weights again"):
        model.load_weights([(HEAD, B[HEAD])])
    with pytest.raises(ReloadError, match="its caller did not say so"):
        forward_pass(model)
    forward_pass(model)
    assert values(model) == before
    push(model, B)
    forward_pass(model)
    assert values(model) == values(cold(Model, B))


def test_processing_half_of_a_known_push_is_refused_there_and_at_the_next_forward_pass() -> None:
    model = pushed_before()
    before = values(model)
    model.load_weights([(FIRST, B[FIRST])])
    with pytest.raises(MissingWeightsError, match=r"lm_head\.weight"):
        process(model)
    with pytest.raises(ReloadError, match=r"lm_head\.weight"):
        forward_pass(model)
    forward_pass(model)
    assert values(model) == before


def test_a_failure_is_forgotten_when_new_weights_came_by_another_road() -> None:
    model = pushed_before()
    with pytest.raises(WeightsError):
        model.load_weights([(FIRST, torch.ones(5, 5))])
    with pytest.raises(SessionError):
        model.load_weights([(HEAD, B[HEAD])])
    reload_weights(model, iter(B.items()))
    forward_pass(model)
    push(model, dict(reversed(A.items())))
    assert values(model) == values(cold(Model, A))


def call_worker(call: Callable[[], object]) -> None:
    live.hearing(call)()


@pytest.mark.parametrize(
    "form", [str, lambda said: (False, f"failed to upload weights! {said}"), lambda said: {"error": said}]
)
def test_an_error_that_a_call_of_the_worker_answers_with_is_not_told_again(
    form: Callable[[str], object],
) -> None:
    model = pushed_before()

    def answering() -> object:
        try:
            model.load_weights([(FIRST, torch.ones(5, 5))])
        except ReloadError as error:
            return form(str(error))
        return True

    before = values(model)
    call_worker(answering)
    forward_pass(model)
    assert values(model) == before


def test_an_error_that_a_call_of_the_worker_swallows_comes_back_at_the_next_forward_pass() -> None:
    model = pushed_before()

    def swallowing() -> bool:
        try:
            model.load_weights([(FIRST, torch.ones(5, 5))])
        except Exception:  # noqa: BLE001 - as NeMo-RL does
            return False
        return True

    before = values(model)
    call_worker(swallowing)
    with pytest.raises(ReloadError, match=r"first\.weight"):
        forward_pass(model)
    forward_pass(model)
    assert values(model) == before


def test_an_error_that_reaches_the_caller_of_the_worker_is_not_told_twice() -> None:
    model = pushed_before()
    with pytest.raises(WeightsError):
        call_worker(lambda: model.load_weights([(FIRST, torch.ones(5, 5))]))
    forward_pass(model)


def test_weights_that_the_engine_itself_makes_are_refused() -> None:
    model = pushed_before()

    def generated() -> Iterator[tuple[str, torch.Tensor]]:
        yield FIRST, B[FIRST]
        forward_pass(model)

    with pytest.raises(ReloadError, match="cannot serve inside a call that reloads"):
        model.load_weights(generated())


def test_further_arguments_are_refused() -> None:
    model = cold(Model, A)
    with pytest.raises(ReloadError, match="takes the weights and nothing else"):
        model.load_weights(B.items(), strict=False)


# --- hands off ---


def test_switched_off_the_models_own_loader_runs_and_what_is_served_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(live.LIVE_SWITCH, "0")
    model = cold(lambda: Model(Method), A)
    model.load_weights(B.items())
    assert values(model) == values(cold(lambda: Model(Method), B))
    said = status(model)[0]
    assert not said.known
    assert said.digest is None
    assert said.version == 1
    assert live.LIVE_SWITCH in said.source


def in_module(name: str, function: str = "write") -> Callable[[nn.Module], None]:
    """A function of a module of that name that loads by the model's own loader."""
    module = types.ModuleType(name)
    source = f"def {function}(model, weights):\n    return model.load_weights(weights)\n"
    exec(compile(source, name, "exec"), module.__dict__)
    return getattr(module, function)


@pytest.mark.parametrize("backend", [one for one in transfer_backends.BACKENDS if one.treatment != "ours"])
def test_an_engine_that_writes_by_itself_is_let_through(backend: transfer_backends.Backend) -> None:
    model = cold(lambda: Model(Method), A)
    reload_weights(model, iter(A.items()), keep_load_format="host")
    in_module(backend.module, backend.function or "write")(model, list(B.items()))
    assert values(model) == values(cold(lambda: Model(Method), B))
    said = status(model)[0]
    assert (said.known, said.digest, said.version) == (False, None, 2)
    assert backend.name in said.source
    with pytest.raises(PartialUpdateError, match="Nobody knows which weights are served"):
        reload_weights(model, iter([(FIRST, A[FIRST])]), partial=True)
    reload_weights(model, iter(A.items()))
    assert status(model)[0].known
    assert status(model)[0].digest


@pytest.mark.parametrize("backend", [one for one in transfer_backends.BACKENDS if one.treatment == "ours"])
def test_an_engine_that_only_loads_gets_our_reload(backend: transfer_backends.Backend) -> None:
    model = cold(Model, A)
    in_module(backend.module)(model, list(B.items()))
    forward_pass(model)
    assert values(model) == values(cold(Model, B))
    assert status(model)[0].known


def test_dense_patches_are_loads_like_any_other() -> None:
    model = cold(Model, A)
    in_module(transfer_backends.PATCHES, "_load_weight_chunk")(model, list(B.items()))
    forward_pass(model)
    assert values(model) == values(cold(Model, B))


def test_the_models_own_loader_is_back_when_the_plugin_is_gone() -> None:
    from reload_plugin.vllm_hooks import plugin

    model = cold(lambda: Model(Method), A)
    plugin.unregister()
    try:
        model.load_weights(B.items())
        assert values(model) == values(
            cold(lambda: Model(Method), B),
        )
    finally:
        plugin.register()


def test_a_guard_does_not_keep_its_model_alive() -> None:
    model = cold(Model, A)
    guard = live_push_of(model)
    assert guard is not None
    assert state_of(model).update is None


def test_a_layerwise_reload_of_a_part_leaves_the_whole_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-RL reloads some submodules by vLLM's own functions, with ModelOpt."""
    model = cold(lambda: Model(Method), A)
    calls: list[nn.Module] = []
    layerwise.finishing(calls.append)(model.first)
    assert calls == [model.first]
    said = status(model)[0]
    assert (said.state, said.known, said.digest, said.version) == ("serving", False, None, 1)
    assert "layerwise reload of a part" in said.source


def test_weights_that_other_engines_serve_too_are_not_reloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cold(Model, A)
    before = values(model)
    monkeypatch.setattr(vllm_api, "load_format", lambda _: "ipc_cache")
    for reload in (
        lambda: reload_weights(model, iter(B.items())),
        lambda: model.load_weights(B.items()),
        lambda: open_layerwise(model),
    ):
        with pytest.raises(UnsupportedError, match="weight cache"):
            reload()
    assert values(model) == before


def test_zeros_by_reset_weights_are_nobodys_generation() -> None:
    model = cold(Model, A)
    workers.resetting(nothing)(Worker(model))
    said = status(model)[0]
    assert (said.state, said.known, said.digest, said.version) == ("lost", False, None, 1)
    assert "reset_weights" in said.source


@pytest.mark.parametrize("kind", ["block", "layerwise"])
def test_an_update_in_several_calls_goes_through_a_file_when_asked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cold(Model, B)
    reload_weights(model, iter(A.items()), keep_load_format="host")
    before = values(model)
    monkeypatch.setenv("RELOAD_PLUGIN_OPTIONS", '{"policy": "spill"}')
    if kind == "block":
        with restore_for_reloading(model, policy="spill"):
            push(model, B)
            assert values(model) == before
    else:
        open_layerwise(model)
        assert isinstance(state_of(model).update, GatheredUpdate)
        push(model, B)
        forward_pass(model)
        assert values(model) == before
        finish_layerwise(model)
    assert values(model) == values(cold(Model, B))


def test_a_gathered_update_that_lacks_weights_changes_nothing() -> None:
    model = cold(Model, B)
    reload_weights(model, iter(A.items()), keep_load_format="host")
    before = values(model)
    with pytest.raises(MissingWeightsError), restore_for_reloading(model, policy="spill"):
        model.load_weights([(FIRST, B[FIRST])])
    assert values(model) == before
    forward_pass(model)
    assert values(model) == before
