"""What each of two processes does in the tests of FSDP: builds a model, restores it, tells what it saw."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from reload_plugin import restore_fsdp
from reload_plugin.checkpoint import open_source
from reload_plugin.errors import ReloadError

WIDTH, INNER = 8, 5
"""A block has an odd number of parameters, so FSDP1 has to pad; and rows that do not divide evenly."""


class Block(nn.Module):
    """Linear layers, a norm, and buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(self.up(x)))


class Model(nn.Module):
    """Two blocks between an embedding and a head, which may be the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fsdp1(tied: bool = False, **how: object) -> nn.Module:
    """Blocks and the rest each in a flat parameter of their own."""
    model = Model(tied)
    device = torch.device("cpu")
    model.blocks = nn.ModuleList(FullyShardedDataParallel(b, device_id=device, **how) for b in model.blocks)
    return FullyShardedDataParallel(model, device_id=device, **how)


def fsdp2(tied: bool = False, **how: object) -> nn.Module:
    model = Model(tied)
    mesh = how.pop("mesh", None) or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def by_columns(parameter: nn.Parameter) -> Shard | None:
    """Shard matrices along their second dimension, where FSDP2 can: it has to divide evenly there."""
    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % 2 == 0 else None


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "fsdp1": lambda **k: fsdp1(use_orig_params=False, **k),
    "fsdp1_orig": lambda **k: fsdp1(use_orig_params=True, **k),
    "fsdp1_grad": lambda **k: fsdp1(
        use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, **k
    ),
    "fsdp1_none": lambda **k: fsdp1(use_orig_params=False, sharding_strategy=ShardingStrategy.NO_SHARD, **k),
    "fsdp2": fsdp2,
    "fsdp2_kept": lambda **k: fsdp2(reshard_after_forward=False, **k),
    "fsdp2_columns": lambda **k: fsdp2(shard_placement_fn=by_columns, **k),
    "fsdp2_hybrid": lambda **k: fsdp2(
        mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")), **k
    ),
    "fsdp2_hybrid_other": lambda **k: fsdp2(
        mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards")), **k
    ),
}


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything the model holds, gathered by torch's own code."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = model.state_dict()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(
        state[name].dtype == tensor.dtype
        and torch.equal(state[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in expected.items()
    )


def local_elements(model: nn.Module) -> int:
    """Elements of parameters and buffers on this rank, without the padding of FSDP1, tied weights once."""
    count = sum(b.numel() for n, b in model.named_buffers() if not n.endswith("scratch"))
    if not isinstance(model, FullyShardedDataParallel):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        return count + sum(tensor.numel() for tensor in local)
    for module in FullyShardedDataParallel.fsdp_modules(model):
        count += sum(i.numel_in_shard or 0 for i in module._handle.flat_param._shard_param_infos)
    return count


def olmo_refuses(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """The rule that OLMo's trainer applies: NaN into every flat parameter, the weights to where
    the shard infos say, refuse if a NaN is left.
    """
    modules = FullyShardedDataParallel.fsdp_modules(model)
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad():
        for module in modules:
            flat = module._handle.flat_param
            flat.fill_(float("nan"))
            for fqn, info in zip(flat._fqns, flat._shard_param_infos, strict=True):
                if info.in_shard:
                    name = (
                        f"{names[id(module)]}.{fqn}".replace("_fsdp_wrapped_module", "")
                        .replace("..", ".")
                        .strip(".")
                    )
                    part = state[name].flatten()[info.intra_param_start_idx : info.intra_param_end_idx + 1]
                    flat[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard] = part
        return any(bool(torch.isnan(module._handle.flat_param).any()) for module in modules)


# -- cases ----------------------------------------------------------------------------------------

Found = dict[str, object]


def restored(kind: str, checkpoint: Path, tied: bool = False, forward: bool = False) -> Found:
    """A restore that works: what it read, and whether torch and a forward pass see the checkpoint."""
    torch.manual_seed(3)
    model = BUILDERS[kind](tied=tied)
    ids, elements = torch.arange(4), local_elements(model)
    if forward:
        with torch.no_grad() if forward == "eval" else torch.enable_grad():
            model(ids)
    report = restore_fsdp(model, checkpoint, timeout=60)
    expected = load_file(checkpoint)
    reference = Model(tied)
    reference.load_state_dict(expected, strict=False)
    return {
        "same": same(full_state(model), expected),
        "forward": bool(torch.allclose(model(ids), reference(ids), equal_nan=True, atol=1e-5)),
        "report": report.model_dump(mode="json"),
        "elements": elements,
    }


def refused(kind: str, checkpoint: Path, tied: bool = False, **how: object) -> Found:
    """A restore that is refused: with what, and that the model is as it was."""
    torch.manual_seed(3)
    model = BUILDERS[kind](tied=tied)
    before = full_state(model)
    try:
        restore_fsdp(model, checkpoint, timeout=20, **how)
        error = None
    except ReloadError as caught:
        error = caught
    named = {k: v for k, v in vars(error).items() if v} if error else {}
    return {
        "error": type(error).__name__,
        "text": str(error),
        "named": named,
        "same": same(full_state(model), before),
    }


def one_rank_fails(checkpoint: Path, when: str) -> Found:
    """Rank 1 cannot read the checkpoint; what each rank says, and what the model holds."""
    torch.manual_seed(3)
    model = BUILDERS["fsdp1"]()
    before = full_state(model)
    source = open_source(checkpoint)
    if dist.get_rank() == 1 and when == "opening":
        source = checkpoint.with_name("nowhere.safetensors")
    try:
        restore_fsdp(model, source, timeout=20)
        error = None
    except ReloadError as caught:
        error = caught
    return {"error": type(error).__name__, "text": str(error), "same": same(full_state(model), before)}


def failing_after(reads: int, source: object, fault: Callable[[], BaseException]) -> list[str]:
    """Let a source fail at a later read; returns what is read."""
    seen: list[str] = []
    original = source.read_spans

    def read_spans(name: str, spans: object, out: torch.Tensor) -> None:
        seen.append(name)
        if len(seen) > reads:
            raise fault()
        original(name, spans, out)

    source.read_spans = read_spans
    return seen


def local_bits(model: nn.Module) -> list[bytes]:
    """Everything that lies on this rank, padding too."""
    tensors = [*model.parameters(), *model.buffers()]
    if isinstance(model, FullyShardedDataParallel):
        tensors += [m._handle.flat_param for m in FullyShardedDataParallel.fsdp_modules(model)]
    return [
        bytes(t.detach().contiguous().view(-1).view(torch.uint8).tolist()) for t in map(local_part, tensors)
    ]


def one_rank_fails_half_way(kind: str, checkpoint: Path) -> Found:
    """Rank 1 cannot read on after some tensors; then a restore that works."""
    torch.manual_seed(3)
    model = BUILDERS[kind]()
    before, memory = full_state(model), local_bits(model)
    source, seen = open_source(checkpoint), []
    if dist.get_rank() == 1:
        seen = failing_after(5, source, lambda: OSError(5, "the disk is gone"))
    try:
        restore_fsdp(model, source, timeout=20)
        error = None
    except ReloadError as caught:
        error = caught
    result = {
        "error": type(error).__name__,
        "text": str(error),
        "untouched": local_bits(model) == memory,
        "same": same(full_state(model), before),
        "reads": len(seen),
    }
    restore_fsdp(model, checkpoint, timeout=20)
    return result | {"restored": same(full_state(model), load_file(checkpoint))}


def one_rank_is_interrupted(checkpoint: Path) -> Found:
    """Ctrl-C on rank 1 while it reads."""
    model = BUILDERS["fsdp1"]()
    before, source = full_state(model), open_source(checkpoint)
    if dist.get_rank() == 1:
        failing_after(4, source, KeyboardInterrupt)
    try:
        restore_fsdp(model, source, timeout=20)
        error = None
    except (ReloadError, KeyboardInterrupt) as caught:
        error = caught
    return {"error": type(error).__name__, "same": same(full_state(model), before)}


def one_rank_never_comes(checkpoint: Path) -> Found:
    """Rank 1 does something else; rank 0 does not wait for ever."""
    model = BUILDERS["fsdp2"]()
    if dist.get_rank() == 1:
        dist.barrier()
        return {"error": None}
    try:
        restore_fsdp(model, checkpoint, timeout=1)
        error = None
    except ReloadError as caught:
        error = caught
    dist.barrier()
    return {"error": type(error).__name__, "text": str(error)}


def two_dimensional(state: dict[str, torch.Tensor] | None = None, columns: bool = False) -> nn.Module:
    """Tensor parallelism inside of FSDP2 on a mesh of two by two; the weights are cut by torch's own code."""
    torch.manual_seed(3)
    model = Model()
    if state is not None:
        model.load_state_dict(state, strict=False)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {
        "head": ColwiseParallel(output_layouts=Replicate()),
        "embed": RowwiseParallel(input_layouts=Replicate()),
    }
    for number in range(len(model.blocks)):
        plan |= {f"blocks.{number}.up": ColwiseParallel(), f"blocks.{number}.down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    how = {"shard_placement_fn": by_columns} if columns else {}
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"], **how)
    return fully_shard(model, mesh=mesh["data"], **how)


def restored_on_a_grid(checkpoint: Path, work: Path, columns: bool, by_ranks: bool) -> Found:
    """A model on a mesh of two dimensions, from safetensors or from the files of its ranks."""
    expected = load_file(checkpoint)
    reference = two_dimensional(expected, columns)
    source = checkpoint
    if by_ranks:
        source = work / f"ranks-{columns}"
        source.mkdir(exist_ok=True)
        file = source / f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
        torch.save(reference.state_dict(), file)
        dist.barrier()
    model = two_dimensional(columns=columns)
    other = local_bits(model) != local_bits(reference)
    report = restore_fsdp(model, source, timeout=20)
    strided = {type(placement).__name__ for p in model.parameters() for placement in p.placements}
    return {
        "before": other,
        "local": local_bits(model) == local_bits(reference),
        "same": same(full_state(model), expected),
        "placements": sorted(strided),
        "report": report.model_dump(mode="json"),
        "bytes": [t.nbytes for t in map(local_part, model.state_dict().values())],
    }


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checks_of_olmo_and_ours(checkpoint: Path) -> Found:
    """The same model and checkpoint before OLMo's rule and before ours."""
    refuses = olmo_refuses(BUILDERS["fsdp1"](), load_file(checkpoint))
    model = BUILDERS["fsdp1"]()
    flats = [m._handle.flat_param for m in FullyShardedDataParallel.fsdp_modules(model)]
    padding = sum(flat._shard_numel_padded for flat in flats)
    report = restore_fsdp(model, checkpoint, timeout=20)
    right = same(full_state(model), load_file(checkpoint))
    return {"olmo refuses": refuses, "padding": padding, "elements": report.elements, "same": right}


class Whole:
    """A source that cannot be read in parts."""

    def __init__(self, checkpoint: Path) -> None:
        self._source = open_source(checkpoint)
        self.description = "a format without parts"

    def infos(self) -> object:
        return self._source.infos()

    def read(self, order: object = None, pool: object = None, destinations: object = None) -> object:
        return self._source.read(order, pool, destinations)

    def unchanged(self) -> bool:
        return True


def from_whole_tensors(kind: str, checkpoint: Path) -> Found:
    """As ``restored``, from a source without ranges."""
    model = BUILDERS[kind]()
    report = restore_fsdp(model, Whole(checkpoint), timeout=20)
    expected = load_file(checkpoint)
    return {"same": same(full_state(model), expected), "report": report.model_dump(mode="json")}


def main() -> None:
    rank, size, work, cases = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    store = dist.FileStore(str(work / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=dt.timedelta(seconds=60))
    found: dict[str, Found] = {}
    for name, (function, arguments) in cases.items():
        try:
            found[name] = globals()[function](**{k: convert_path(k, v) for k, v in arguments.items()})
        except Exception:  # noqa: BLE001 - told to the test that asked
            found[name] = {"failed": traceback.format_exc()}
    (work / f"rank{rank}.json").write_text(json.dumps(found, default=str))
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes outlive the store


def convert_path(key: str, value: object) -> object:
    return Path(str(value)) if key in ("checkpoint", "work") else value


if __name__ == "__main__":
    main()
