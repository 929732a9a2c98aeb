"""The digest is made when somebody asks: who pays for it, and that it is always that of what is served."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from reload_plugin import (
    ReloadReport,
    ReloadSession,
    abort_weight_update,
    reload_weights,
    restore_for_reloading,
    status,
)
from reload_plugin.digest import digest
from reload_plugin.errors import EngineBrokenError, ReloadError
from reload_plugin.record.model_record import record_of
from reload_plugin.transaction.chunked_update import finish_layerwise, open_layerwise
from reload_plugin.transaction.engine_state import state_of
from reload_plugin.vllm_hooks import runners
from tests.transaction.test_session import A, B, Model, cold, registered, reload, start  # noqa: F401 - a fixture among them


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Every digest that is made."""
    found: list[str | None] = []
    plainly = digest.digest_of

    def counting(*arguments: Any, **options: Any) -> str | None:
        found.append(plainly(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(digest, "digest_of", counting)
    return found


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """Of a model that started on these weights."""
    found = status(cold(Model, weights))[0].digest
    assert found
    return found


def streaming(model: nn.Module, **how: Any) -> ReloadReport:
    return reload_weights(model, iter(B.items()), policy="streaming", **how)


def partially(model: nn.Module, **how: Any) -> ReloadReport:
    reload_weights(model, iter(A.items()), keep_load_format="host", digest="later")
    return reload_weights(model, iter(B.items()), partial=True, **how)


WAYS: dict[str, Callable[..., ReloadReport]] = {
    "all or nothing": lambda model, **how: reload_weights(model, iter(B.items()), **how),
    "streaming": streaming,
    "partial": partially,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
def test_later_computes_the_digest_on_the_first_status_call(way: Callable, made: list[str | None]) -> None:
    model = start()
    way(model)
    made.clear()
    report = way(model, digest="later")
    assert not made
    assert (report.digest, "digest" in report.seconds) == (None, False)
    assert status(model, digest=False)[0].digest is None
    asked = status(model)[0]
    assert made == [asked.digest]
    assert asked.digest == asked.report.digest == digest_of(B) != digest_of(A)
    made.clear()
    assert status(model)[0].digest == status(model, digest=False)[0].report.digest == digest_of(B)
    assert len(made) == 1, "that of the cold start, and no other"


@every_way
def test_a_report_keeps_its_digest(way: Callable, made: list[str | None]) -> None:
    model = start()
    reports = [reload(model, A), way(model), reload(model, A)]
    found = [report.digest for report in reports]
    assert found == made
    assert found == [digest_of(A), digest_of(B), digest_of(A)]
    assert all(0 < report.seconds["digest"] < report.seconds["total"] for report in reports)


def test_a_block_reports_the_digest() -> None:
    model = start()
    with restore_for_reloading(model) as session:
        model.load_weights(iter(B.items()))
    assert session.report.digest == digest_of(B)


def test_the_runner_and_vllms_own_finish_leave_it_for_later(made: list[str | None]) -> None:
    """They give nobody the report."""
    from vllm.model_executor.model_loader.reload import inplace

    model = start()
    inplace.reload_weights(None, model, iter(B.items()), None, True)
    assert (made, status(model, digest=False)[0].version) == ([], 1)
    open_layerwise(model)
    model.load_weights(iter(B.items()))
    finish_layerwise(model)
    assert (made, status(model, digest=False)[0].version) == ([], 2)
    assert status(model)[0].digest == digest_of(B)


def test_the_runner_computes_the_digest_when_asked_to(made: list[str | None]) -> None:
    from vllm.model_executor.model_loader.reload import inplace

    model = start()
    token = runners._asked.set({"digest": True})
    try:
        inplace.reload_weights(None, model, iter(B.items()), None, True)
    finally:
        runners._asked.reset(token)
    assert made == [status(model, digest=False)[0].digest] == [digest_of(B)]


def test_weights_in_kernel_format_change_it_too() -> None:
    class Plain(Model):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.layer = nn.Linear(3, 4)

    model = cold(Plain, {"layer.weight": torch.ones(4, 3), "layer.bias": torch.ones(4)})
    found = []
    for value, how in ((2.0, True), (3.0, True), (2.0, "later"), (3.0, False)):
        bias = ("layer.bias", torch.full((4,), value))
        report = reload_weights(model, iter([bias]), is_checkpoint_format=False, digest=how)
        assert (report.digest is None) == (how is not True)
        found.append(status(model)[0].digest)
    assert found[0] == found[2] != found[1] == found[3]
    assert None not in found, "nothing here has native handles"


def test_a_reload_that_fails_keeps_the_digest() -> None:
    model = start()
    reload_weights(model, iter(B.items()), digest="later")
    with pytest.raises(ReloadError):
        reload(model, {"first.weight": A["first.weight"]})
    assert status(model)[0].digest == digest_of(B)


def test_a_model_that_is_broken_has_none_and_one_that_is_healed_has() -> None:
    model = start()
    reload_weights(model, iter(B.items()), digest="later")
    with pytest.raises(EngineBrokenError):
        reload_weights(model, iter([("first.weight", A["first.weight"])]), policy="streaming")
    broken = status(model)[0]
    assert (broken.state, broken.digest, broken.report.digest) == ("broken", None, None)
    assert reload(model, A).digest == digest_of(A) == status(model)[0].digest


# --- while a reload is at work ---


def test_an_open_update_shows_the_served_weights_for_a_digest() -> None:
    model = start()
    with ReloadSession(model) as session:
        session.load([("first.weight", B["first.weight"])])
        assert status(model)[0].digest == digest_of(A)
        session.load([("lm_head.weight", B["lm_head.weight"])])
        report = session.finish()
    assert report.digest == digest_of(B)


def test_an_update_that_vllm_opened_shows_the_served_weights_for_a_digest() -> None:
    model = start()
    for ends in (abort_weight_update, finish_layerwise):
        state_of(model).generation = type(state_of(model).generation)()  # as if nobody had asked
        open_layerwise(model)
        model.load_weights(iter(B.items()))
        assert status(model)[0].digest == digest_of(A)
        ends(model)
    assert status(model)[0].digest == digest_of(B)


def test_an_aborted_update_does_not_prevent_a_digest() -> None:
    model = start()
    session = ReloadSession(model)
    session.open()
    session.load([("first.weight", B["first.weight"])])
    session.abort()
    assert status(model)[0].digest == digest_of(A)


def test_an_open_update_that_changed_served_weights_has_no_digest() -> None:
    model = start()
    with ReloadSession(model, policy="streaming") as session:
        session.load([("first.weight", B["first.weight"])])
        session.load([("lm_head.weight", B["lm_head.weight"])])
        assert session.touched_groups
        assert status(model)[0].digest is None
        session.finish()
    assert status(model)[0].digest == digest_of(B)


def test_inside_a_block_the_digest_is_of_the_served_weights(made: list[str | None]) -> None:
    model = start()
    for served in (digest_of(A), digest_of(B)):
        with restore_for_reloading(model):
            assert status(model)[0].digest == served
            model.load_weights(iter(dict(list(B.items())[:1]).items()))
            assert status(model)[0].digest == served
            model.load_weights(iter(dict(list(B.items())[1:]).items()))
        assert status(model)[0].digest == digest_of(B)


def test_a_reload_waits_until_a_digest_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, began, go_on = start(), threading.Event(), threading.Event()
    plainly = digest.digest_of
    reload_weights(model, iter(B.items()), digest="later")

    def slowly(*arguments: Any, **options: Any) -> str | None:
        began.set()
        assert go_on.wait(10)
        return plainly(*arguments, **options)

    monkeypatch.setattr(digest, "digest_of", slowly)
    found: list[str | None] = []
    asking = threading.Thread(target=lambda: found.append(status(model)[0].digest))
    asking.start()
    assert began.wait(10)
    reloading = threading.Thread(target=reload, args=(model, A))
    reloading.start()
    reloading.join(0.2)
    assert reloading.is_alive()
    assert not record_of(model).changes
    go_on.set()
    asking.join(10)
    reloading.join(10)
    assert (found, state_of(model).generation.version) == ([digest_of(B)], 2)
