"""vLLM's weight transfer over a gloo group: what vLLM's `nccl` does, on CPUs, and what a trainer sends with.

A server loads the worker's side by its name, with this folder in its PYTHONPATH:

    --worker-extension-cls gloo_transfer.Worker --weight-transfer-config '{"backend": "gloo"}'

A chunk is received as a whole before a tensor of it is loaded: an engine that cannot load one has still taken
all, so the group is fit for the next push.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

SECONDS = 60.0
"""How long a side of the group waits for the others."""


def group_of(store: dist.Store, rank: int, ranks: int) -> dist.ProcessGroup:
    """The group of a trainer, rank 0, and the ranks of an engine; apart from torch's default group."""
    return dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=SECONDS))


class Sender:
    """The trainer's side of the group of one engine.

    Args:
        ranks: of the engine.

    """

    def __init__(self, ranks: int) -> None:
        limit = timedelta(seconds=SECONDS)
        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=limit)
        self.ranks = 1 + ranks
        self._group: dist.ProcessGroup | None = None

    def init_info(self, address: str) -> dict:
        """What the engine needs to join, as JSON. `address`: of this machine, as the engine sees it."""
        port = self._store.port
        return {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": self.ranks,
        }

    def open(self) -> None:
        """Join the group; returns when the engine has."""
        self._group = group_of(self._store, 0, self.ranks)

    def send(self, tensors: list[torch.Tensor], failed: Callable[[], bool]) -> None:
        """Broadcast tensors to the engine, which has been asked to receive them.

        Args:
            tensors: on the CPU.
            failed: whether the engine has given up. It is asked while a tensor is on its way, for which
                nobody may be waiting any more.

        Raises:
            RuntimeError: a rank of the engine is gone.
            ConnectionAbortedError: `failed` says so; this group cannot be used again.

        """
        for tensor in tensors:
            sent = self._group.broadcast(tensor.contiguous(), 0)
            while not sent.is_completed():
                if failed():
                    raise ConnectionAbortedError("the engine gave up before it had received all")
                time.sleep(0.0005)
            sent.wait()


# -- in the workers of an engine -------------------------------------------------------------------

with contextlib.suppress(ImportError):  # a trainer needs no vLLM
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    class GlooWeightTransferEngine(NCCLWeightTransferEngine):
        """vLLM's `nccl` engine with another group in place of NCCL's. Its start and finish are vLLM's."""

        def init_transfer_engine(self, init_info) -> None:
            """Join the trainer's group; as rank `rank_offset` and the ranks after it."""
            limit = timedelta(seconds=SECONDS)
            address, port = init_info.master_address, init_info.master_port
            store = dist.TCPStore(address, port, is_master=False, timeout=limit)
            rank = init_info.rank_offset + self.parallel_config.rank
            self.model_update_group = group_of(store, rank, init_info.world_size)

        def receive_weights(self, update_info) -> None:
            """Receive a chunk, then load it."""
            kinds = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
            self.model.load_weights(list(self._received(kinds)))

        def _received(self, kinds) -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape in kinds:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self.model_update_group.broadcast(tensor, 0).wait()
                yield name, tensor

        def shutdown(self) -> None:
            """Leave the group."""
            self.model_update_group = None

    # vLLM's attention for AMX is an illegal instruction in a process that has not asked the system for AMX.
    # Torch asks with its first large product; layers as small as those of the example may not have one.
    torch.cpu._init_amx()
    with contextlib.suppress(ValueError):  # registered already: this module is imported twice
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)


class Worker:
    """Calls that are added to vLLM's worker; importing this module is what offers the backend `gloo`."""

    def process_id(self) -> int:
        """Of this rank."""
        return os.getpid()
