"""Random checkpoints of a chosen size: one dense, two mixtures of many small experts."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = ("layers", "hidden", "vocabulary", "experts", "inner")
HEAD = 128  # width of an attention head
DEFAULTS = {
    # 28 layers of 11 tensors and 3 more: 311 tensors, 1.0 GB
    "dense": {"layers": 28, "hidden": 1024, "vocabulary": 32768, "experts": 0, "inner": 3072},
    # 8 layers of 3 · 128 + 9 tensors and 3 more: 3,147 tensors, 0.4 GB
    "moe": {"layers": 8, "hidden": 256, "vocabulary": 8192, "experts": 128, "inner": 256},
    # 50 layers of 3 · 128 + 9 tensors and 3 more: 19,653 tensors, 0.3 GB
    "many": {"layers": 50, "hidden": 128, "vocabulary": 8192, "experts": 128, "inner": 64},
}


def sizes(kind: str, **chosen: int | None) -> dict[str, int]:
    """The defaults of `kind`, with what was chosen in their place."""
    wanted = {name: value for name, value in chosen.items() if value is not None}
    if not DEFAULTS[kind]["experts"]:
        wanted.pop("experts", None)
    return DEFAULTS[kind] | wanted


def write(folder: Path, size: dict[str, int], seed: int) -> Path:
    """Write config.json and model.safetensors, bf16; the seed decides every weight."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _fill(name, shape, generator) for name, shape in shapes(size).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(size), indent=2))
    return folder


def shapes(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its name on disk."""
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


def _fill(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    scaled = 1 + 0.1 * noise if len(shape) == 1 else noise * 1.5 / shape[-1] ** 0.5
    return (scaled if "embed" not in name else noise).to(torch.bfloat16)


def _heads(size: dict[str, int]) -> int:
    """Heads of keys and values; there are twice as many of queries."""
    return max(1, size["hidden"] // HEAD)


def _config(size: dict[str, int]) -> dict:
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
