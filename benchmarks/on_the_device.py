"""What only an accelerator has: weights that are there already, streams, memory that is full."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.full_card import filled

CHUNK = 256 << 20
"""Bytes of one chunk, as of vLLM's packed transfer."""


@contextlib.contextmanager
def card_with(llm: Any, spare: float | None) -> Iterator[None]:
    """Within, so much memory is free on the device, as a share of the weights' bytes; as it is for None."""
    if spare is None:
        yield
        return
    (weights,) = llm.collective_rpc(lambda worker: sum(p.nbytes for p in worker.get_model().parameters()))
    with filled(int(spare * weights)):
        yield


def through_one_buffer(pairs: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The weights one by one in a buffer on the device, which another stream overwrites for the next."""
    import torch

    device = torch.accelerator.current_accelerator()
    buffer = torch.empty(max(tensor.nbytes for _, tensor in pairs), dtype=torch.uint8, device=device)
    receiver = torch.Stream(device=device)
    torch.accelerator.synchronize()
    for name, tensor in pairs:
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with receiver:
            view.copy_(tensor)
        receiver.synchronize()
        yield name, view


def push_on_two_streams(worker: Any, pairs: list[tuple[str, Any]]) -> None:
    """One update in chunks, each on one of two streams in turn with that stream as the current one."""
    import torch

    from reload_plugin import restore_for_reloading

    device = torch.accelerator.current_accelerator()
    streams = (torch.Stream(device=device), torch.Stream(device=device))
    model = worker.get_model()
    with restore_for_reloading(model):
        for number, chunk in enumerate(chunks_of(pairs)):
            with streams[number % 2]:
                model.load_weights([(name, tensor.to(device)) for name, tensor in chunk])


def chunks_of(pairs: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """The weights in lists of about ``CHUNK`` bytes."""
    chunk: list[tuple[str, Any]] = []
    for pair in pairs:
        chunk.append(pair)
        if sum(tensor.nbytes for _, tensor in chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
