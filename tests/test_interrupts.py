"""When Ctrl-C is raised, and when it waits."""

import signal
import threading
from collections.abc import Iterator

import pytest

from reload_plugin.interrupts import call_between, call_held, call_out, deliver, held, let_through


def ctrl_c(_: object = None) -> str:
    signal.raise_signal(signal.SIGINT)
    return "went on"


@pytest.fixture(autouse=True)
def handler() -> Iterator[object]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a handler was left behind"
    signal.signal(signal.SIGINT, before)


def test_our_own_code_is_not_interrupted_and_then_it_is() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), held():
        steps.append(ctrl_c())
    assert steps == ["went on"]


def test_held_inside_held_waits_for_the_outer_one() -> None:
    with held():
        with held():
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            deliver()


def test_the_callers_code_is_interrupted_at_once_and_ours_after_it_is_not() -> None:
    with held():
        with pytest.raises(KeyboardInterrupt):
            call_out(ctrl_c, None)
        with pytest.raises(KeyboardInterrupt), let_through():
            ctrl_c()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            deliver()


def test_what_was_noted_is_raised_before_the_callers_code_runs() -> None:
    ran: list[object] = []
    for call in (call_out, call_between):
        with held():
            ctrl_c()
            with pytest.raises(KeyboardInterrupt):
                call(ran.append, call)
    assert not ran


def test_the_callers_code_finds_its_own_handler(handler: object) -> None:
    with held():
        assert call_out(signal.getsignal, signal.SIGINT) is handler
        assert call_between(signal.getsignal, signal.SIGINT) is not handler


def test_our_own_code_during_a_rollback_is_never_interrupted() -> None:
    with held():
        ctrl_c()
        assert call_held(ctrl_c, None) == "went on"
        with pytest.raises(KeyboardInterrupt):
            deliver()
    with held():
        assert call_between(ctrl_c, None) == "went on"
        with pytest.raises(KeyboardInterrupt):
            deliver()


def test_without_held_and_in_other_threads_calls_are_just_calls() -> None:
    assert call_out(len, "abc") == call_between(len, "abc") == 3
    found: list[int] = []

    def elsewhere() -> None:
        with held():
            found.append(call_out(len, "abc"))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [3]


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held():
            ctrl_c()
            assert call_out(ctrl_c, None) == "went on"
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
