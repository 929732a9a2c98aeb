"""What is changed in the process for a while is put back, in whatever order those who wanted it leave."""

import contextlib
import gc
import threading
from collections.abc import Callable

import pytest
import torch

from reload_plugin.device.gc_pause import full_gc_paused, gc_paused
from reload_plugin.device.output_reuse import reusing_served_outputs
from reload_plugin.process.native_handles import watching_native

Context = Callable[[], contextlib.AbstractContextManager[object]]


def state() -> tuple[object, ...]:
    constructor = getattr(torch.ops._C, "create_onednn_mm_handler", None)
    return gc.isenabled(), gc.get_threshold(), torch.empty_like, constructor


CONTEXTS: dict[str, Context] = {
    "no collections": gc_paused,
    "no full collections": full_gc_paused,
    "outputs reused": reusing_served_outputs,
    "native handles watched": lambda: watching_native(torch.device("cpu"), {}),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("order", ["last in, first out", "first in, first out"])
def test_two_that_overlap_leave_the_process_as_it_was(name: str, order: str) -> None:
    import vllm._custom_ops  # noqa: F401 - its operators have to be there before their names are compared

    before = state()
    first, second = CONTEXTS[name](), CONTEXTS[name]()
    first.__enter__()
    changed = state()
    second.__enter__()
    assert state() == changed
    one, other = (second, first) if order == "last in, first out" else (first, second)
    one.__exit__(None, None, None)
    assert state() == changed, "undone while somebody wants it"
    other.__exit__(None, None, None)
    assert state() == before


def test_memory_is_offered_to_the_thread_that_offers_it() -> None:
    served = torch.zeros(4, 4)
    found: list[bool] = []

    def other() -> None:
        found.append(torch.empty_like(torch.ones(4, 4)).data_ptr() == served.data_ptr())

    with reusing_served_outputs() as places, places.offered(lambda: [served]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.empty_like(torch.ones(4, 4)).data_ptr() == served.data_ptr()
    assert found == [False]
