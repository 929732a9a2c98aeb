"""Checkpoints to reload: random weights of a given size, dense or with many experts, bf16 or quantized.

Checkpoints of two seeds have no weight in common, except for layers that are asked to stay unchanged.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests import checkpoints  # the tests write the same formats
from tests.checkpoints import WEIGHTS, generator_for
from tests.processor import has_operator

Size = Mapping[str, int]
SIZES = ("layers", "hidden", "vocabulary", "experts", "inner")
HEAD = 128  # width of an attention head
SEEDS = {"A": 1, "B": 2}


@dataclass(frozen=True)
class Model:
    """Size and form of a checkpoint, and the options of an engine that is started on it."""

    name: str
    size: Size
    form: str = "bf16"
    """On disk: ``bf16``, ``w8a8`` (INT8, scales per channel and token) or ``w4a16`` (INT4 in groups)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine."""

    @property
    def missing(self) -> str | None:
        """The operator of this model that vLLM's kernels for this processor lack, or None."""
        needs = "cpu_gemm_wna16" if self.form == "w4a16" and not torch.accelerator.is_available() else ""
        return None if has_operator(needs) else needs

    def small(self) -> "Model":
        """The same model with a few megabytes, for smoke tests; models of different sizes stay different."""
        size = {"layers": 2, "hidden": 128, "vocabulary": 256, "experts": 0, "inner": 256}
        if self.size["experts"]:
            size |= {"experts": 8, "inner": 64, "layers": 1 + self.size["layers"] // 16}
        return replace(self, size=size)


DENSE = {"layers": 28, "hidden": 1024, "vocabulary": 32768, "experts": 0, "inner": 3072}
"""28 layers of 11 tensors and 3 more: 311 tensors, 1.0 GB."""
EXPERTS = {"layers": 8, "hidden": 256, "vocabulary": 8192, "experts": 128, "inner": 256}
"""8 layers of 3 · 128 + 9 tensors and 3 more: 3,147 tensors, 0.4 GB."""
MANY = {"layers": 50, "hidden": 128, "vocabulary": 8192, "experts": 128, "inner": 64}
"""50 layers of 3 · 128 + 9 tensors and 3 more: 19,653 tensors, 0.3 GB."""
LARGE = DENSE | {"layers": 30, "hidden": 2048, "inner": 6144}
"""333 tensors, 4.0 GB."""


# -- writing --------------------------------------------------------------------------------------


def write(folder: Path, model: Model, seed: int, changed: float = 1) -> Path:
    """Write config.json and model.safetensors; the seed decides every weight.

    With ``changed`` below 1, that share of the layers is of this seed, and all else is of seed A.
    """
    folder.mkdir(parents=True)
    tensors = {
        name: _fill(name, shape, seed if is_changed(name, model.size, changed) else SEEDS["A"])
        for name, shape in shapes(model.size).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    del tensors
    (folder / "config.json").write_text(json.dumps(_config(model.size), indent=2))
    if model.form == "w8a8":
        checkpoints.to_w8a8_dynamic(folder)
    elif model.form == "w4a16":
        checkpoints.to_w4a16(folder, group=128)
    return folder


def write_changed(folder: Path, whole: Path, model: Model, changed: float) -> Path:
    """Write only the changed weights of the checkpoint ``whole``, for a partial update."""
    folder.mkdir(parents=True)
    with safe_open(whole / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if is_changed(name, model.size, changed)]  # noqa: SIM118  no dict
        chosen = {name: file.get_tensor(name) for name in names}
    save_file(chosen, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copy(whole / "config.json", folder)
    return folder


def is_changed(name: str, size: Size, changed: float) -> bool:
    """Whether a tensor belongs to the changed share of the model: whole layers, from the first on."""
    if changed == 1:
        return True
    number = name.removeprefix("model.layers.").split(".")[0]
    return number.isdigit() and int(number) < changed * size["layers"]


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape of every tensor of the bf16 checkpoint."""
    hidden, heads, inner = size["hidden"], _heads(size), size["inner"]
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocabulary"], hidden)}
    for layer in range(size["layers"]):
        prefix = f"model.layers.{layer}"
        result[f"{prefix}.input_layernorm.weight"] = (hidden,)
        result[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, count in (("q", 2 * heads), ("k", heads), ("v", heads)):
            result[f"{prefix}.self_attn.{name}_proj.weight"] = (count * HEAD, hidden)
        result[f"{prefix}.self_attn.o_proj.weight"] = (hidden, 2 * heads * HEAD)
        result |= {f"{prefix}.self_attn.{name}_norm.weight": (HEAD,) for name in "qk"}
        mlps = [f"{prefix}.mlp.experts.{n}" for n in range(size["experts"])] or [f"{prefix}.mlp"]
        if size["experts"]:
            result[f"{prefix}.mlp.gate.weight"] = (size["experts"], hidden)
        for mlp in mlps:
            result |= {f"{mlp}.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            result[f"{mlp}.down_proj.weight"] = (hidden, inner)
    return result | {"model.norm.weight": (hidden,), "lm_head.weight": (size["vocabulary"], hidden)}


def largest_layer(size: Size) -> int:
    """Bytes of the largest layer in bf16: the embedding, or what one block's projections are merged into."""
    return 2 * size["hidden"] * max(size["vocabulary"], 3 * size["inner"] * max(1, size["experts"]))


def bytes_of(folder: str | Path) -> int:
    """Size of a checkpoint on disk."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def tensors_of(folder: str | Path) -> int:
    """Number of tensors of a checkpoint on disk."""
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        return len(file.keys())


def _fill(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator_for(name, seed), dtype=torch.float32)
    if "embed" in name:
        return noise.to(torch.bfloat16)
    scaled = noise.mul_(0.1).add_(1) if len(shape) == 1 else noise.mul_(1.5 / shape[-1] ** 0.5)
    return scaled.to(torch.bfloat16)


def _heads(size: Size) -> int:
    """Key-value heads; there are twice as many query heads."""
    return max(1, size["hidden"] // HEAD)


def _config(size: Size) -> dict[str, Any]:
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if size["experts"] else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if size["experts"] else "qwen3",
        "torch_dtype": "bfloat16",
        "vocab_size": size["vocabulary"],
        "hidden_size": size["hidden"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": 2 * _heads(size),
        "num_key_value_heads": _heads(size),
        "head_dim": HEAD,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    experts = {
        "num_experts": size["experts"],
        "num_experts_per_tok": min(8, size["experts"]),
        "moe_intermediate_size": size["inner"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return config | experts if size["experts"] else config
