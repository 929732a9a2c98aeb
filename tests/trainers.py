"""One model saved in every format that is read, each by the library that writes it in practice.

    python -m tests.trainers MODEL FOLDER       # every format of a model folder, into sub-folders

Formats that need ranks are written by processes of their own over gloo, on the CPU.
"""

import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

THREE, FOUR = 3, 4
"""Ranks: three, so that shards are uneven; four for two-dimensional meshes."""


def bare_model(folder: Path) -> torch.nn.Module:
    """The model of a folder, as transformers loads it, in the dtype it has on disk."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    cls = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
    more = {"add_pooling_layer": True} if config.model_type == "bert" else {}
    return cls.from_pretrained(folder, dtype="auto", **more).eval()


def with_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state for a few parameters, as a checkpoint of a run has it."""
    few = list(model.parameters())[:3]
    optimizer = torch.optim.AdamW(few, lr=0.0)
    for parameter in few:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


# --- one process ---


def write_safetensors(model: Path, folder: Path) -> None:
    bare_model(model).save_pretrained(folder)


def write_safetensors_sharded(model: Path, folder: Path) -> None:
    bare_model(model).save_pretrained(folder, max_shard_size="20MB")
    assert (folder / "model.safetensors.index.json").exists()


def write_bin(model: Path, folder: Path) -> None:
    torch.save(bare_model(model).state_dict(), folder / "pytorch_model.bin")
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")


def write_bin_sharded(model: Path, folder: Path) -> None:
    """As transformers did before 5: files with an index."""
    import json

    from huggingface_hub import split_torch_state_dict_into_shards

    state = bare_model(model).state_dict()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size="20MB"
    )
    for file, names in split.filename_to_tensors.items():
        torch.save({name: state[name] for name in names}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_nested(model: Path, folder: Path) -> None:
    """A trainer's own file: compiled, wrapped, with its optimizer and its step."""
    bare = bare_model(model)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in bare.state_dict().items()}
    whole = {
        "model": state,
        "optimizer": with_optimizer(bare).state_dict(),
        "step": 7,
        "rng": torch.get_rng_state(),
    }
    torch.save(whole, folder / "checkpoint.pt")


def write_legacy(model: Path, folder: Path) -> None:
    """torch before 1.6."""
    state = {"state_dict": bare_model(model).state_dict(), "epoch": 3}
    torch.save(state, folder / "last.pth", _use_new_zipfile_serialization=False)


def write_compiled(model: Path, folder: Path) -> None:
    """torch.compile and DistributedDataParallel name their wrappers by themselves."""
    compiled = torch.compile(bare_model(model))
    torch.save(torch.nn.DataParallel(compiled).state_dict(), folder / "model.pt")


def write_olmo(model: Path, folder: Path) -> None:
    """OLMo's unsharded checkpoint: ``model.pt`` beside the optimizer and the trainer."""
    bare = bare_model(model)
    torch.save(bare.state_dict(), folder / "model.pt")
    torch.save(with_optimizer(bare).state_dict(), folder / "optim.pt")
    torch.save({"global_step": 5}, folder / "train.pt")


def write_olmo_safetensors(model: Path, folder: Path) -> None:
    """Names as OLMo encodes them: base64 of the pickle of (path, is pickled)."""
    import base64
    import pickle

    from safetensors.torch import save_file

    state = bare_model(model).state_dict()
    named = {
        base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode(): tensor.contiguous()
        for name, tensor in state.items()
    }
    save_file(named, folder / "model.safetensors")


def write_dcp(model: Path, folder: Path) -> None:
    """torch.distributed.checkpoint without ranks."""
    import torch.distributed.checkpoint as dcp

    bare = bare_model(model)
    state = {"model": bare.state_dict(), "optim": with_optimizer(bare).state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


# --- many processes ---


def write_by_three(model: Path, folders: dict[str, Path]) -> None:
    ranks(THREE, _three, str(model), {name: str(folder) for name, folder in folders.items()})


def write_by_four(model: Path, folders: dict[str, Path]) -> None:
    ranks(FOUR, _four, str(model), {name: str(folder) for name, folder in folders.items()})


def ranks(world: int, work: Callable, *args: object) -> None:
    """Run ``work(rank, world, *args)`` in processes that form a group over gloo."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.start_processes(
        _entered, (world, port, work, args), nprocs=world, start_method="forkserver"
    )


def _entered(rank: int, world: int, port: int, work: Callable, args: tuple) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        work(rank, world, *args)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def save_rank(state: dict, folder: str, rank: int, world: int, step: int = 1) -> None:
    """The files of verl's checkpoint manager."""
    torch.save(state, f"{folder}/model_world_size_{world}_rank_{rank}.pt")
    extra = {
        "lr_scheduler": {"last_epoch": step, "_step_count": step + 1},
        "rng": {"cpu": torch.get_rng_state()},
    }
    torch.save(extra, f"{folder}/extra_state_world_size_{world}_rank_{rank}.pt")


def _mesh(*shape: int, names: tuple[str, ...]) -> object:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (module for module in model.modules() if type(module).__name__.endswith("Layer"))


def sharded(model: torch.nn.Module, mesh: object) -> torch.nn.Module:
    """FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def fsdp1_state(model: torch.nn.Module, **more: object) -> Iterator[dict]:
    """The sharded state dict of FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType

    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, **more)
    config = ShardedStateDictConfig(offload_to_cpu=False)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT, config):
        yield wrapped.state_dict()


def _three(rank: int, world: int, model: str, folders: dict[str, str]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    path = Path(model)
    state = sharded(bare_model(path), _mesh(world, names=("fsdp",))).state_dict()
    save_rank(state, folders["fsdp2"], rank, world)
    dcp.save({"app": {"model": state, "step": 3}}, checkpoint_id=folders["dcp_app"])
    dcp.save(dict(state), checkpoint_id=folders["dcp_flat"])
    writer = HuggingFaceStorageWriter(folders["dcp_safetensors"], save_distributed=True)
    dcp.save(dict(state), storage_writer=writer)
    index = {name: 1 + number % 2 for number, name in enumerate(state)}
    writer = HuggingFaceStorageWriter(
        folders["dcp_consolidated"], index, save_distributed=True, enable_consolidation=True
    )
    dcp.save(dict(state), storage_writer=writer)
    with fsdp1_state(bare_model(path)) as state:
        save_rank(state, folders["fsdp1"], rank, world)
        dcp.save({"model": state}, checkpoint_id=folders["dcp_fsdp1"])
    with fsdp1_state(bare_model(path), device_mesh=_mesh(world, names=("fsdp",))) as state:
        save_rank(state, folders["fsdp1_mesh"], rank, world)
    _accelerate(path, folders)


def _accelerate(model: Path, folders: dict[str, str]) -> None:
    """``save_state`` of Accelerate (and of transformers' Trainer), whole and sharded."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import save_fsdp_model

    for kind, name in (("SHARDED_STATE_DICT", "accelerate"), ("FULL_STATE_DICT", "accelerate_full")):
        AcceleratorState._reset_state(True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=kind, cpu_ram_efficient_loading=False
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        wrapped = sharded(bare_model(model), _mesh(torch.distributed.get_world_size(), names=("fsdp",)))
        save_fsdp_model(plugin, accelerator, wrapped, folders[name])


def _four(rank: int, world: int, model: str, folders: dict[str, str]) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    path = Path(model)
    state = sharded(bare_model(path), _mesh(2, world // 2, names=("ddp", "fsdp"))).state_dict()
    save_rank(state, folders["hsdp"], rank, world)
    mesh = _mesh(2, world // 2, names=("fsdp", "tp"))
    cut = bare_model(path)
    plan = {
        name: RowwiseParallel()
        if name.endswith(("output.dense", "o_proj", "down_proj"))
        else ColwiseParallel()
        for name, module in cut.named_modules()
        if isinstance(module, torch.nn.Linear) and "layer" in name
    }
    parallelize_module(cut, mesh["tp"], plan)
    save_rank(sharded(cut, mesh["fsdp"]).state_dict(), folders["fsdp_tp"], rank, world)


ALONE: dict[str, Callable[[Path, Path], None]] = {
    "safetensors": write_safetensors,
    "safetensors_sharded": write_safetensors_sharded,
    "bin": write_bin,
    "bin_sharded": write_bin_sharded,
    "nested": write_nested,
    "legacy": write_legacy,
    "compiled": write_compiled,
    "olmo": write_olmo,
    "olmo_safetensors": write_olmo_safetensors,
    "dcp": write_dcp,
}
BY_THREE = (
    *("fsdp2", "fsdp1", "fsdp1_mesh", "dcp_app", "dcp_flat", "dcp_fsdp1"),
    *("dcp_safetensors", "dcp_consolidated", "accelerate", "accelerate_full"),
)
BY_FOUR = ("hsdp", "fsdp_tp")
FORMATS = (*ALONE, *BY_THREE, *BY_FOUR)


def write_all(model: Path, root: Path) -> dict[str, Path]:
    """Format -> the folder it was written to, below ``root``."""
    folders = {name: root / name for name in FORMATS}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, write in ALONE.items():
        write(model, folders[name])
    write_by_three(model, {name: folders[name] for name in BY_THREE})
    write_by_four(model, {name: folders[name] for name in BY_FOUR})
    return folders


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write_all(Path(sys.argv[1]), Path(sys.argv[2]))
