"""Checkpoints made from a seed: names and shapes of tiny models, packed as a quantization stores them.

Two words run through the folder. A *packing* says which tensors stand on disk for one linear weight of N
outputs and K inputs. A *generation* is a letter, "A" or "B"; they share names and shapes but no weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

GROUP = 128


@dataclass(frozen=True)
class Spec:
    """One tensor on disk. `kind` picks how its values are drawn (see `_values`)."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    extra: tuple[int, ...] = ()


Packing = Callable[[int, int], dict[str, Spec]]

# ---- packings: linear weight (N, K) -> suffix -> Spec


def plain(n: int, k: int) -> dict[str, Spec]:
    return {"weight": Spec("weight", (n, k))}


def _fp8(n: int, k: int) -> Spec:
    return Spec("fp8", (n, k), torch.float8_e4m3fn)


def _scale(*shape: int, dtype: torch.dtype = torch.float32) -> Spec:
    return Spec("scale", shape, dtype)


def fp8_tensor(n: int, k: int) -> dict[str, Spec]:
    return {"weight": _fp8(n, k), "weight_scale": _scale()}


def fp8_tensor_static(n: int, k: int) -> dict[str, Spec]:
    return fp8_tensor(n, k) | {"input_scale": _scale()}


def fp8_channel(n: int, k: int) -> dict[str, Spec]:
    return {"weight": _fp8(n, k), "weight_scale": _scale(n, 1)}


def fp8_block(n: int, k: int) -> dict[str, Spec]:
    return {"weight": _fp8(n, k), "weight_scale_inv": _scale(-(-n // 128), -(-k // 128))}


def fp8_block_compressed(n: int, k: int) -> dict[str, Spec]:
    return {"weight": _fp8(n, k), "weight_scale": _scale(-(-n // 128), -(-k // 128))}


def mxfp8(n: int, k: int) -> dict[str, Spec]:
    return {"weight": _fp8(n, k), "weight_scale": Spec("exponent", (n, k // 32), torch.uint8)}


def int8_channel(n: int, k: int) -> dict[str, Spec]:
    return {"weight": Spec("bits", (n, k), torch.int8), "weight_scale": _scale(n, 1)}


def int8_channel_static(n: int, k: int) -> dict[str, Spec]:
    return int8_channel(n, k) | {"input_scale": _scale(1), "input_zero_point": Spec("bits", (1,), torch.int8)}


def int8_channel_static_symmetric(n: int, k: int) -> dict[str, Spec]:
    return int8_channel(n, k) | {"input_scale": _scale(1)}


def _words(*shape: int) -> Spec:
    return Spec("bits", shape, torch.int32)


def wna16(n: int, k: int) -> dict[str, Spec]:
    return {
        "weight_packed": _words(n, k // 8),
        "weight_scale": _scale(n, k // GROUP, dtype=torch.bfloat16),
        "weight_shape": Spec("shape", (2,), torch.int64, (n, k)),
    }


def wna16_zero_points(n: int, k: int) -> dict[str, Spec]:
    return wna16(n, k) | {"weight_zero_point": _words(n // 8, k // GROUP)}


def gptq(n: int, k: int) -> dict[str, Spec]:
    """With `g_idx`, which checkpoints still carry and vLLM's loaders pass over."""
    return {
        "qweight": _words(k // 8, n),
        "qzeros": _words(k // GROUP, n // 8),
        "scales": _scale(k // GROUP, n, dtype=torch.float16),
        "g_idx": Spec("groups", (k,), torch.int32),
    }


def awq(n: int, k: int) -> dict[str, Spec]:
    return {
        "qweight": _words(k, n // 8),
        "qzeros": _words(k // GROUP, n // 8),
        "scales": _scale(k // GROUP, n, dtype=torch.float16),
    }


def _nibbles(n: int, k: int) -> Spec:
    return Spec("bits", (n, k // 2), torch.uint8)


def nvfp4_modelopt(n: int, k: int) -> dict[str, Spec]:
    return {
        "weight": _nibbles(n, k),
        "weight_scale": Spec("fp8_scale", (n, k // 16), torch.float8_e4m3fn),
        "weight_scale_2": _scale(),
        "input_scale": _scale(),
    }


def nvfp4_compressed(n: int, k: int) -> dict[str, Spec]:
    return {
        "weight_packed": _nibbles(n, k),
        "weight_scale": Spec("fp8_scale", (n, k // 16), torch.float8_e4m3fn),
        "weight_global_scale": Spec("inverse_scale", (1,), torch.float32),
        "input_global_scale": Spec("inverse_scale", (1,), torch.float32),
    }


def mxfp4_compressed(n: int, k: int) -> dict[str, Spec]:
    return {
        "weight_packed": _nibbles(n, k),
        "weight_scale": Spec("exponent", (n, k // 32), torch.uint8),
    }


# ---- models: config.json without quantization_config, and what is on disk

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 4, 2, 64, 256
INTERMEDIATE = 256
EXPERTS = 2

_BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Linear:
    """A linear weight on disk; `packed` says whether the quantization applies to it."""

    prefix: str
    n: int
    k: int
    packed: bool = True


@dataclass(frozen=True)
class Tiny:
    """A model of a few layers. `describe` lists its linear weights and its other tensors."""

    config: dict[str, Any]
    describe: Callable[[dict[str, Any]], tuple[list[Linear], dict[str, Spec]]]


def _vector(*shape: int) -> Spec:
    return Spec("weight", shape)


def _attention(prefix: str) -> list[Linear]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = {"q_proj": (q, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, q)}
    return [Linear(f"{prefix}.{name}", *size) for name, size in sizes.items()]


def _gated(prefix: str, width: int, names: tuple[str, str, str]) -> list[Linear]:
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return [Linear(gate, width, HIDDEN), Linear(up, width, HIDDEN), Linear(down, HIDDEN, width)]


def _experts(prefix: str, names: tuple[str, str, str]) -> list[Linear]:
    return [linear for e in range(EXPERTS) for linear in _gated(f"{prefix}.{e}", INTERMEDIATE, names)]


def _shell(config: dict[str, Any]) -> dict[str, Spec]:
    tensors = {
        "model.embed_tokens.weight": _vector(VOCAB, HIDDEN),
        "model.norm.weight": _vector(HIDDEN),
        "lm_head.weight": _vector(VOCAB, HIDDEN),
    }
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = _vector(HIDDEN)
    return tensors


_MLP = ("gate_proj", "up_proj", "down_proj")


def _llama(config: dict[str, Any]) -> tuple[list[Linear], dict[str, Spec]]:
    linears: list[Linear] = []
    for i in range(config["num_hidden_layers"]):
        linears += _attention(f"model.layers.{i}.self_attn")
        linears += _gated(f"model.layers.{i}.mlp", INTERMEDIATE, _MLP)
    return linears, _shell(config)


def _mixtral(config: dict[str, Any]) -> tuple[list[Linear], dict[str, Spec]]:
    linears: list[Linear] = []
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}.block_sparse_moe"
        linears += _attention(f"model.layers.{i}.self_attn")
        linears += [Linear(f"{block}.gate", EXPERTS, HIDDEN, packed=False)]
        linears += _experts(f"{block}.experts", ("w1", "w3", "w2"))
    return linears, _shell(config)


def _qwen3_moe(config: dict[str, Any]) -> tuple[list[Linear], dict[str, Spec]]:
    linears: list[Linear] = []
    tensors = _shell(config)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        linears += _attention(f"{layer}.self_attn")
        linears += [Linear(f"{layer}.mlp.gate", EXPERTS, HIDDEN, packed=False)]
        linears += _experts(f"{layer}.mlp.experts", _MLP)
        tensors |= {f"{layer}.self_attn.{n}_norm.weight": _vector(HEAD_DIM) for n in "qk"}
    return linears, tensors


def _substituted(config: dict[str, Any]) -> tuple[list[Linear], dict[str, Spec]]:
    """Qwen3-MoE, with a constant in place of each expert that `approximate_experts` names."""
    linears, tensors = _qwen3_moe(config)
    gone = [
        f"model.layers.{layer}.mlp.experts.{expert}."
        for layer, experts in config["approximate_experts"].items()
        for expert in experts
    ]
    kept = [linear for linear in linears if not linear.prefix.startswith(tuple(gone))]
    return kept, tensors | {f"{prefix}approx_value": _vector(HIDDEN) for prefix in gone}


def _deepseek(config: dict[str, Any]) -> tuple[list[Linear], dict[str, Spec]]:
    rank, rope, nope, v = (
        config[k] for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    linears: list[Linear] = []
    tensors = _shell(config)
    for i in range(config["num_hidden_layers"]):
        attention = f"model.layers.{i}.self_attn"
        linears += [
            Linear(f"{attention}.q_proj", HEADS * (nope + rope), HIDDEN),
            Linear(f"{attention}.kv_a_proj_with_mqa", rank + rope, HIDDEN),
            Linear(f"{attention}.kv_b_proj", HEADS * (nope + v), rank),
            Linear(f"{attention}.o_proj", HIDDEN, HEADS * v),
        ]
        tensors[f"{attention}.kv_a_layernorm.weight"] = _vector(rank)
        linears += _gated(f"model.layers.{i}.mlp", INTERMEDIATE, _MLP)
    return linears, tensors


def _gpt_oss(config: dict[str, Any]) -> tuple[list[Linear], dict[str, Spec]]:
    linears: list[Linear] = []
    tensors = _shell(config)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for linear in _attention(f"{layer}.self_attn"):
            linears.append(Linear(linear.prefix, linear.n, linear.k, packed=False))
            tensors[f"{linear.prefix}.bias"] = _vector(linear.n)
        linears.append(Linear(f"{layer}.mlp.router", EXPERTS, HIDDEN, packed=False))
        tensors[f"{layer}.mlp.router.bias"] = _vector(EXPERTS)
        tensors[f"{layer}.self_attn.sinks"] = _vector(HEADS)
        tensors |= _gpt_oss_experts(f"{layer}.mlp.experts")
    return linears, tensors


def _gpt_oss_experts(prefix: str) -> dict[str, Spec]:
    """The two fused MXFP4 expert weights: 16 bytes hold a block of 32 values that shares one exponent."""
    tensors = {}
    for name, n, k in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
        tensors[f"{prefix}.{name}_blocks"] = Spec("bits", (EXPERTS, n, k // 32, 16), torch.uint8)
        tensors[f"{prefix}.{name}_scales"] = Spec("exponent", (EXPERTS, n, k // 32), torch.uint8)
        tensors[f"{prefix}.{name}_bias"] = _vector(EXPERTS, n)
    return tensors


_MLA: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": INTERMEDIATE,
    "num_key_value_heads": HEADS,
    "rope_scaling": None,
    "rope_theta": 10000,
}

_MOE: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": INTERMEDIATE,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}


def _config(kind: str, architecture: str, layers: int, **changes: Any) -> dict[str, Any]:
    return (
        _BASE | {"model_type": kind, "architectures": [architecture], "num_hidden_layers": layers} | changes
    )


MODELS = {
    "llama": Tiny(_config("llama", "LlamaForCausalLM", 2), _llama),
    "mixtral": Tiny(
        _config("mixtral", "MixtralForCausalLM", 1, num_local_experts=EXPERTS, num_experts_per_tok=1),
        _mixtral,
    ),
    "qwen3_moe": Tiny(_config("qwen3_moe", "Qwen3MoeForCausalLM", 1, **_MOE), _qwen3_moe),
    "qwen3_moe_substituted": Tiny(
        _config("qwen3_moe", "Qwen3MoeForCausalLM", 1, **_MOE, approximate_experts={"0": [0]}), _substituted
    ),
    "deepseek": Tiny(_config("deepseek_v2", "DeepseekV2ForCausalLM", 1, **_MLA), _deepseek),
    "gpt_oss": Tiny(
        _config(
            "gpt_oss",
            "GptOssForCausalLM",
            1,
            num_local_experts=EXPERTS,
            num_experts_per_tok=1,
            sliding_window=64,
            layer_types=["full_attention"],
            rope_theta=10000,
        ),
        _gpt_oss,
    ),
}


def on_disk(
    tiny: Tiny, packing: Packing, extra: Callable[[dict[str, Any]], dict[str, Spec]] | None
) -> dict[str, Spec]:
    """Every tensor of the checkpoint by its name on disk."""
    linears, tensors = tiny.describe(tiny.config)
    specs = dict(tensors)
    for linear in linears:
        for suffix, spec in (packing if linear.packed else plain)(linear.n, linear.k).items():
            specs[f"{linear.prefix}.{suffix}"] = spec
    return specs | (extra(tiny.config) if extra else {})


def kv_scales(config: dict[str, Any]) -> dict[str, Spec]:
    """Scales of the KV cache under the names of vLLM's own FP8 checkpoints."""
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.self_attn.attn.{name}_scale": _scale() for i in layers for name in "kv"}


def kv_scales_compressed(config: dict[str, Any]) -> dict[str, Spec]:
    """The same as compressed-tensors names and shapes them."""
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.self_attn.{name}_scale": _scale(1) for i in layers for name in "kv"}


# ---- values

SPREAD = {"A": 0.1, "B": 0.137}  # so that the largest magnitudes differ too, which online scales are made of


def _values(spec: Spec, rng: torch.Generator, spread: float) -> torch.Tensor:
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(spec.shape, generator=rng, dtype=torch.float32) * (high - low) + low

    match spec.kind:
        case "weight":
            return torch.randn(spec.shape, generator=rng, dtype=torch.float32) * spread
        case "fp8":
            return torch.randn(spec.shape, generator=rng, dtype=torch.float32) * spread * 200
        case "scale":
            return uniform(0.004, 0.016)
        case "inverse_scale":
            return uniform(100.0, 400.0)
        case "fp8_scale":
            return uniform(0.5, 8.0)
        case "exponent":
            return torch.randint(118, 130, spec.shape, generator=rng)
        case "bits":
            info = torch.iinfo(spec.dtype)
            return torch.randint(info.min, info.max + 1, spec.shape, generator=rng)
        case "groups":
            return torch.arange(spec.shape[0]) // GROUP
        case "shape":
            return torch.tensor(spec.extra)
    raise AssertionError(spec.kind)


def draw(name: str, spec: Spec, generation: str) -> torch.Tensor:
    """Draw one tensor, independent of torch's defaults: a cold load has another dtype than a reload."""
    rng = torch.Generator().manual_seed(zlib.crc32(f"{generation}:{name}".encode()))
    with torch.device("cpu"):
        return _values(spec, rng, SPREAD[generation]).to(spec.dtype)


def weights(specs: dict[str, Spec], generation: str) -> Iterator[tuple[str, torch.Tensor]]:
    """One fresh tensor at a time, in name order."""
    for name in sorted(specs):
        yield name, draw(name, specs[name], generation)
