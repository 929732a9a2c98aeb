"""vLLM's own transfer engines in a running engine: their real code, with what needs a GPU played by this
file (the communicator, the memory handles). Ours end in a cold start's engine; of those that write by
themselves the status says that nobody knows what is served.
"""

import contextlib
import types
from collections.abc import Iterator

import pytest
import torch

import reload_plugin
from reload_plugin import vllm_api
from reload_plugin.errors import PartialUpdateError, SourceError
from tests import oracle, roads
from tests.roads import Lab, Weights

CASE = "llama_tied"
NCCL = {"backend": "nccl"}
NORM = "model.norm.weight"
NO_IMPORTER = types.SimpleNamespace(close=lambda: None)


class Replay:
    """In place of a communicator: each broadcast brings the next tensor of the trainer."""

    device = torch.device("cpu")

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = iter(tensors)

    def broadcast(self, into: torch.Tensor, src: int, stream: object) -> None:
        assert (src, stream) == (0, None)
        into.copy_(next(self.tensors))

    def destroy(self) -> None:
        """Nothing is connected."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """An engine that was started on A with vLLM's NCCL engine."""
    with roads.lab(CASE, tmp_path_factory.mktemp("backends"), weight_transfer_config=NCCL) as found:
        yield found


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_, **__: None)


def worker_of(lab: Lab) -> object:
    return lab.llm.llm_engine.model_executor.driver_worker.worker


@contextlib.contextmanager
def engine_in(lab: Lab, backend: type, **attributes: object) -> Iterator[object]:
    """The running engine with a transfer engine of this class, made without its connection to a trainer."""
    worker = worker_of(lab)
    own = worker.weight_transfer_engine
    engine = backend.__new__(backend)
    for base in (own, types.SimpleNamespace(**attributes)):
        vars(engine).update(vars(base))
    worker.weight_transfer_engine = engine
    try:
        yield engine
    finally:
        worker.weight_transfer_engine = own


def described(weights: Weights) -> dict[str, list]:
    return {
        "names": [name for name, _ in weights],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in weights],
        "shapes": [list(tensor.shape) for _, tensor in weights],
    }


def recovers(lab: Lab) -> None:
    """A whole reload ends not knowing."""
    lab.llm.collective_rpc("reload_weights")
    assert reload_plugin.status(lab.llm)[0].known
    assert lab.difference("A") == ""


@pytest.mark.parametrize("letter", ["B", "A"])
def test_nccl_broadcasts_in_two_calls(lab: Lab, letter: str) -> None:
    weights = lab.weights[letter]
    worker_of(lab).weight_transfer_engine.packed = False
    lab.llm.start_weight_update()
    for part in (weights[: len(weights) // 2], weights[len(weights) // 2 :]):
        worker_of(lab).weight_transfer_engine.model_update_group = Replay([tensor for _, tensor in part])
        lab.llm.update_weights({"update_info": described(part)})
    lab.llm.finish_weight_update()
    assert lab.difference(letter) == ""
    assert reload_plugin.status(lab.llm)[0].known


REMEMBERING = pytest.mark.skipif(
    vllm_api.minor_of(vllm_api.version()) < (0, 33), reason="this vLLM wants names with each update"
)


def nccl_update(lab: Lab, weights: Weights, info: dict[str, list]) -> None:
    """One update in one call, which stays open."""
    engine = worker_of(lab).weight_transfer_engine
    engine.packed, engine.model_update_group = False, Replay([tensor for _, tensor in weights])
    lab.llm.start_weight_update()
    lab.llm.update_weights({"update_info": info})


@REMEMBERING
def test_an_nccl_update_that_names_nothing_brings_the_weights_of_the_last_one(lab: Lab) -> None:
    """Trainers of vLLM 0.33 send names, dtypes and shapes once."""
    for letter, info in (("B", described(lab.weights["B"])), ("A", {}), ("B", {}), ("A", {})):
        nccl_update(lab, lab.weights[letter], info)
        lab.llm.finish_weight_update()
        assert lab.difference(letter) == ""
        assert reload_plugin.status(lab.llm)[0].known


@REMEMBERING
def test_an_nccl_update_that_names_nothing_and_follows_none_is_not_committed(lab: Lab) -> None:
    """A worker that was started anew remembers nothing, and its trainer does not know."""
    worker_of(lab).weight_transfer_engine._last_update_info.clear()
    nccl_update(lab, lab.weights["B"], {})
    with pytest.raises(SourceError, match="gave no weights"):
        lab.llm.finish_weight_update()
    assert lab.llm.collective_rpc("abort_weight_update") == [True]
    assert lab.difference("A") == ""
    test_an_nccl_update_that_names_nothing_brings_the_weights_of_the_last_one(lab)


def test_a_trainer_of_nccl_that_goes_away_leaves_the_old_weights(lab: Lab) -> None:
    weights = lab.weights["B"]
    engine = worker_of(lab).weight_transfer_engine
    engine.packed, engine.model_update_group = False, Replay([tensor for _, tensor in weights[:4]])
    lab.llm.start_weight_update()
    with pytest.raises((StopIteration, RuntimeError)):
        lab.llm.update_weights({"update_info": described(weights)})
    assert lab.difference("A") == ""
    test_nccl_broadcasts_in_two_calls(lab, "A")


def test_ipc_handles(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.weight_transfer import ipc_engine

    weights = lab.weights["B"]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="this device")
    )
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", lambda tensor, *_: tensor)
    with engine_in(lab, ipc_engine.IPCWeightTransferEngine, packed=False, _packed_importer=NO_IMPORTER):
        lab.llm.start_weight_update()
        handles = [{"this device": (tensor, *range(6))} for _, tensor in weights]
        lab.llm.update_weights({"update_info": described(weights) | {"ipc_handles": handles}})
        lab.llm.finish_weight_update()
    assert lab.difference("B") == ""
    recovers(lab)


def test_sparse_nccl_writes_in_place_and_the_status_says_that_nobody_knows(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.weight_transfer import sparse_nccl_engine

    monkeypatch.setattr(torch.accelerator, "device_index", lambda _: contextlib.nullcontext())
    norm = dict(lab.weights["B"])[NORM]
    indices = torch.tensor([0, 3, 5], dtype=torch.int32)
    before = reload_plugin.status(lab.llm)[0]
    served = lab.model.model.norm.weight.detach().clone()
    with engine_in(
        lab,
        sparse_nccl_engine.SparseNCCLWeightTransferEngine,
        model_update_group=Replay([indices, norm[indices.long()]]),
    ):
        lab.llm.start_weight_update()
        update = described([(NORM, norm)]) | {"num_updates_list": [len(indices)]}
        lab.llm.update_weights({"update_info": update})
        lab.llm.finish_weight_update()
    wanted = served.clone()
    wanted[indices.long()] = norm[indices.long()].to(served.dtype)
    torch.testing.assert_close(lab.model.model.norm.weight.detach(), wanted, rtol=0, atol=0)
    after = reload_plugin.status(lab.llm)[0]
    assert before.known
    assert not after.known
    assert after.digest != before.digest
    with pytest.raises(PartialUpdateError):
        worker_of(lab).model_runner.reload_weights(weights_iterator=iter([(NORM, norm)]), partial=True)
    recovers(lab)


def test_nccl_m2n_receives_into_served_memory(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.weight_transfer import m2n_engine

    norm = dict(lab.weights["B"])[NORM]
    served = lab.model.model.norm.weight
    monkeypatch.setattr(m2n_engine, "comm_ptr", lambda _: 0, raising=False)  # up to vLLM 0.32
    with engine_in(
        lab,
        m2n_engine.M2NWeightTransferEngine,
        model_update_group=object(),
        _handle=object(),
        _uses_load_weights=False,
        _index={NORM: 0},
        _metas=[types.SimpleNamespace(shape=norm.shape, dtype=norm.dtype)],
        _parameter_destinations=[types.SimpleNamespace(tensor=served.data, placements=None)],
        _reshard=lambda _comm, _stream, _meta, _placements, buffer: buffer.copy_(norm),
    ):
        lab.llm.start_weight_update()
        lab.llm.update_weights({"update_info": {"names": [NORM]}})
        lab.llm.finish_weight_update()
    torch.testing.assert_close(served.detach(), norm.to(served.dtype), rtol=0, atol=0)
    assert not reload_plugin.status(lab.llm)[0].known
    recovers(lab)


def test_a_push_while_an_update_of_a_backend_is_open_goes_into_it(lab: Lab) -> None:
    """SkyRL's engines derive from vLLM's and call `model.load_weights` by themselves."""
    weights = lab.weights["B"]
    lab.llm.start_weight_update()
    lab.model.load_weights(weights[:5])
    lab.model.load_weights(weights[5:])
    assert lab.difference("A") == ""
    lab.llm.finish_weight_update()
    assert lab.difference("B") == ""
    recovers(lab)


def test_sharded_rdt_gets_vllms_own_layerwise_functions(lab: Lab) -> None:
    from vllm.distributed.weight_transfer import sharded_rdt_engine
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    with engine_in(
        lab, sharded_rdt_engine.ShardedRDTWeightTransferEngine, drain_pending=lambda: None
    ) as engine:
        lab.llm.start_weight_update()
        assert LAYERWISE_INFO[engine.model.model.norm].kernel_tensors is not None, "vLLM's own did not run"
        lab.llm.finish_weight_update()
    assert not reload_plugin.status(lab.llm)[0].known
    lab.llm.collective_rpc("reload_weights")
    assert reload_plugin.status(lab.llm)[0].known
    # vLLM's own functions leave other objects in places: values are compared, and this test is the last.
    assert oracle.compare_values("A", oracle.snapshot(lab.llm, lab.case), lab.cold["A"]) == []
