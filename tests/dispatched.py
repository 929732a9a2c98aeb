"""Models that Accelerate has dispatched or offloaded, one situation each, for tests and for the table."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    logging,
)

from reload_plugin.checkpoint.formats.offloading import hooks_of, is_offloading

logging.disable_progress_bar()
logging.set_verbosity_error()

HERE = torch.device("cpu")
"""A device that Accelerate takes for an accelerator: it is not the text ``cpu``, so modules mapped to the
text are offloaded to a dictionary."""
IDS = torch.arange(12).reshape(1, 12)


class Counted(nn.Module):
    """Buffers of both kinds, a module called without its own forward, and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.inner = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Sequential(nn.Linear(16, 8)))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("table", torch.randn(8))
        self.register_buffer("fixed", torch.randn(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)).relu()
        return (
            self.inner(hidden) * self.scale.to(x.device) + self.table.to(x.device) + self.fixed.to(x.device)
        )


def counted(seed: int = 0) -> Counted:
    """The same weights for the same seed; batch statistics that are not those of a new module."""
    torch.manual_seed(seed)
    model = Counted().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2.0)
        model.norm.num_batches_tracked.fill_(7 + seed)
    return model


def config(tied: bool) -> LlamaConfig:
    """A small Llama."""
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )


def llama(tied: bool, seed: int = 0) -> LlamaForCausalLM:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(tied)).eval()


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="dispatched-")


@functools.cache
def checkpoint(tied: bool, seed: int = 0) -> str:
    """A folder of these weights, which a process writes once."""
    folder = Path(_kept().name) / f"{tied}-{seed}"
    llama(tied, seed).save_pretrained(folder)
    return str(folder)


MIXTURES = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            vocab_size=64,
            initializer_range=0.5,
        ),
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            vocab_size=64,
            initializer_range=0.5,
        ),
    ),
}
"""Models whose experts are fused and stacked while they are loaded."""


@functools.cache
def mixture_checkpoint(kind: str, seed: int) -> str:
    """A folder of a model with experts, one tensor each."""
    folder = Path(_kept().name) / f"{kind}-{seed}"
    torch.manual_seed(seed)
    model_class, model_config = MIXTURES[kind]
    model_class(model_config).eval().save_pretrained(folder)
    return str(folder)


def mixture(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """The model of that folder."""
    return MIXTURES[kind][0].from_pretrained(mixture_checkpoint(kind, seed), **options).eval()


def split_map(first: Any, second: Any, rest: Any = HERE) -> dict[str, Any]:
    """A device map: the two layers, and all else."""
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {"model.layers.0": first, "model.layers.1": second, **dict.fromkeys(names, rest)}


Situation = Callable[[Path], nn.Module]
"""Given an empty folder for what is offloaded: a model."""


def _dispatched(tied: bool, folder: Path, device_map: Mapping[str, Any], **options: Any) -> nn.Module:
    main = options.pop("main_device", HERE)
    return dispatch_model(llama(tied), dict(device_map), main_device=main, offload_dir=str(folder), **options)


def _pretrained(tied: bool, folder: Path, device_map: Mapping[str, Any]) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(
        checkpoint(tied), device_map=dict(device_map), offload_folder=str(folder)
    )
    for module in model.modules():  # safetensors takes the text, or the number of a GPU, and no torch.device
        for hook in hooks_of(module):
            if is_offloading(hook):
                hook.weights_map.dataset.device = "cpu"
    return model.eval()


def _loaded(tied: bool, folder: Path, device_map: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights():
        model = LlamaForCausalLM(config(tied)).eval()
    model.tie_weights()
    return load_checkpoint_and_dispatch(
        model, checkpoint(tied), device_map=dict(device_map), offload_folder=str(folder)
    )


def situations(tied: bool) -> dict[str, Situation]:
    """Name -> how to get the model of ``llama(tied)`` dispatched in that way."""
    blocks = ["LlamaDecoderLayer"]
    every = split_map("disk", "disk", "disk")
    return {
        "dispatch_model, dict": lambda f: _dispatched(tied, f, split_map("cpu", HERE)),
        "dispatch_model, .dat": lambda f: _dispatched(tied, f, every),
        "dispatch_model, mixed": lambda f: _dispatched(tied, f, split_map("cpu", "disk")),
        "dispatch_model, mixed, buffers": lambda f: _dispatched(
            tied, f, split_map("cpu", "disk", "disk"), offload_buffers=True
        ),
        "dispatch_model, nested hooks": lambda f: _dispatched(
            tied, f, split_map("cpu", "disk"), preload_module_classes=blocks
        ),
        "load_checkpoint_and_dispatch, .dat": lambda f: _loaded(tied, f, split_map("cpu", "disk", "cpu")),
        "load_checkpoint_and_dispatch, all .dat": lambda f: _loaded(tied, f, {**every, "model.norm": "cpu"}),
        "from_pretrained, index": lambda f: _pretrained(tied, f, split_map("cpu", "disk", "cpu")),
        "from_pretrained, all index": lambda f: _pretrained(tied, f, every),
        "from_pretrained, dict and index": lambda f: _pretrained(tied, f, split_map("cpu", "disk")),
        "cpu_offload": lambda _: cpu_offload(llama(tied), HERE),
        "cpu_offload, nested hooks": lambda _: cpu_offload(
            llama(tied), HERE, offload_buffers=True, preload_module_classes=blocks
        ),
        "disk_offload": lambda f: disk_offload(llama(tied), str(f), HERE),
        "disk_offload, nested hooks": lambda f: disk_offload(
            llama(tied), str(f), HERE, preload_module_classes=blocks
        ),
    }


def counted_situations() -> dict[str, Situation]:
    """Name -> how to get the model of ``counted()`` dispatched in that way."""
    return {
        "buffers, dict": lambda _: cpu_offload(counted(), HERE, offload_buffers=True),
        "buffers, .dat": lambda f: disk_offload(counted(), str(f), HERE, offload_buffers=True),
        "buffers stay, .dat": lambda f: disk_offload(counted(), str(f), HERE),
    }


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of an ordinary model, by each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def logits(model: nn.Module) -> torch.Tensor:
    """What a model answers."""
    with torch.no_grad():
        if isinstance(model, Counted):
            return model(torch.linspace(-1, 1, 24).reshape(3, 8))
        return model(IDS, use_cache=False).logits


if __name__ == "__main__":  # python -m tests.dispatched --table, or --memory
    import sys

    from tests import dispatched_table

    dispatched_table.main(sys.argv[1:])
