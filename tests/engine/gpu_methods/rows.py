"""The methods under test, one row each: how the checkpoint is packed and which kernel is asked for.

`expect` names classes that must be reachable in the built model. It is what makes a row the row it claims to
be: without it, a change in vLLM's choice of kernels would turn the test into a second test of another method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.engine.gpu_methods import checkpoints as disk
from tests.engine.gpu_methods.checkpoints import Packing, Spec


@dataclass(frozen=True)
class Row:
    """`engine` goes to `EngineArgs`; `packages` and `environment` hold while the row runs."""

    name: str
    model: str
    packing: Packing
    expect: tuple[str, ...]
    quantization_config: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    capability: tuple[int, int] = (9, 0)
    packages: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    extra: Callable[[dict[str, Any]], dict[str, Spec]] | None = None
    since: tuple[int, int] = (0, 0)
    """The first minor version of vLLM that has the method."""


# ---- quantization_config as checkpoints state it

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_STATIC = FP8 | {"activation_scheme": "static"}
FP8_BLOCK = FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.0.mlp.gate"]}


def compressed(
    weights: dict[str, Any], inputs: dict[str, Any] | None, layout: str, **more: Any
) -> dict[str, Any]:
    """A compressed-tensors configuration: one group for all linear layers but routers and lm_head."""
    static = {"dynamic": False, "symmetric": True, "observer": "minmax"}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": static | weights,
                "input_activations": inputs and static | {"dynamic": True} | inputs,
                "output_activations": None,
            }
        },
    } | more


def _bits(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy} | more


_FLOAT8, _INT8, _FLOAT4 = (8, "float"), (8, "int"), (4, "float")
_GROUP128 = _bits(4, "int", "group", group_size=128)
_GROUP16 = _bits(*_FLOAT4, "tensor_group", group_size=16)
_E8M0 = {"group_size": 32, "scale_dtype": "torch.uint8"}

CT_TENSOR = compressed(_bits(*_FLOAT8, "tensor"), _bits(*_FLOAT8, "tensor", dynamic=False), "float-quantized")
CT_CHANNEL = compressed(_bits(*_FLOAT8, "channel"), _bits(*_FLOAT8, "token"), "float-quantized")
CT_BLOCK = compressed(
    _bits(*_FLOAT8, "block", block_structure=[128, 128]),
    _bits(*_FLOAT8, "group", group_size=128),
    "float-quantized",
)
CT_KV = CT_CHANNEL | {"kv_cache_scheme": _bits(*_FLOAT8, "tensor", dynamic=False, symmetric=True)}
CT_INT8 = compressed(_bits(*_INT8, "channel"), _bits(*_INT8, "token"), "int-quantized")
CT_INT8_STATIC = compressed(_bits(*_INT8, "channel"), _bits(*_INT8, "tensor", dynamic=False), "int-quantized")
CT_INT8_ASYMMETRIC = compressed(
    _bits(*_INT8, "channel"), _bits(*_INT8, "tensor", dynamic=False, symmetric=False), "int-quantized"
)
CT_W4A16 = compressed(_GROUP128, None, "pack-quantized")
CT_W4A16_ZERO_POINTS = compressed(_GROUP128 | {"symmetric": False}, None, "pack-quantized")
CT_NVFP4 = compressed(_GROUP16, _GROUP16 | {"dynamic": "local"}, "nvfp4-pack-quantized")
CT_MXFP4 = compressed(_bits(*_FLOAT4, "group", **_E8M0), None, "mxfp4-pack-quantized")
CT_MXFP8 = compressed(
    _bits(*_FLOAT8, "group", **_E8M0), _bits(*_FLOAT8, "group", group_size=32), "mxfp8-quantized"
)
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "dynamic": {"-:.*gate$": {}},
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["block_sparse_moe.gate"],
}


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    settings = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "*gate"]}
    return {"quant_method": "modelopt", "quant_algo": algorithm, "quantization": settings | more}


MODELOPT_FP8 = modelopt("FP8")
NVFP4 = modelopt("NVFP4", group_size=16)
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": []}


# ---- engine settings


def backend(linear: str | None = None, moe: str | None = None, **more: Any) -> dict[str, Any]:
    chosen = {"linear_backend": linear, "moe_backend": moe}
    return {"engine": {key: value for key, value in chosen.items() if value} | more}


def online(name: str, linear: str | None = None, moe: str | None = None) -> dict[str, Any]:
    return backend(linear, moe, quantization=name)


def requantized(**layers: str) -> dict[str, Any]:
    """Online quantization of layers that the checkpoint has in another format."""
    return {"engine": {"quantization_config": layers}}


HOPPER_FLASHINFER = {"packages": ("flashinfer",), "environment": {"VLLM_HAS_FLASHINFER_CUBIN": "1"}}
BLACKWELL = {"capability": (10, 0)}
BLACKWELL_FLASHINFER = HOPPER_FLASHINFER | BLACKWELL
DEEP_GEMM = {"packages": ("deep_gemm",)}
FP8_KV = {"kv_cache_dtype": "fp8"}

# ---- the rows

LINEAR = (
    Row("fp8 cutlass", "llama", disk.fp8_tensor, ("Fp8LinearMethod", "CutlassFP8ScaledMMLinearKernel"), FP8),
    Row(
        "fp8 static cutlass", "llama", disk.fp8_tensor_static, ("CutlassFP8ScaledMMLinearKernel",), FP8_STATIC
    ),
    Row(
        "fp8 torch",
        "llama",
        disk.fp8_tensor,
        ("ChannelWiseTorchFP8ScaledMMLinearKernel",),
        FP8,
        **backend("torch"),
    ),
    Row("fp8 marlin", "llama", disk.fp8_tensor, ("MarlinFP8ScaledMMLinearKernel",), FP8, **backend("marlin")),
    Row(
        "fp8 flashinfer",
        "llama",
        disk.fp8_tensor_static,
        ("FlashInferFP8ScaledMMLinearKernel",),
        FP8_STATIC,
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "fp8 block cutlass",
        "llama",
        disk.fp8_block,
        ("CutlassFp8BlockScaledMMKernel",),
        FP8_BLOCK,
        **backend("cutlass"),
    ),
    Row(
        "fp8 block triton",
        "llama",
        disk.fp8_block,
        ("TritonFp8BlockScaledMMKernel",),
        FP8_BLOCK,
        **backend("triton"),
    ),
    Row(
        "fp8 block marlin",
        "llama",
        disk.fp8_block,
        ("MarlinFP8ScaledMMLinearKernel",),
        FP8_BLOCK,
        **backend("marlin"),
    ),
    Row(
        "fp8 block deep_gemm hopper",
        "llama",
        disk.fp8_block,
        ("DeepGemmFp8BlockScaledMMKernel",),
        FP8_BLOCK,
        **backend("deep_gemm"),
        **DEEP_GEMM,
    ),
    Row(
        "fp8 block deep_gemm blackwell",
        "llama",
        disk.fp8_block,
        ("DeepGemmFp8BlockScaledMMKernel",),
        FP8_BLOCK,
        **backend("deep_gemm"),
        **DEEP_GEMM,
        **BLACKWELL,
    ),
    Row("fp8 modelopt", "llama", disk.fp8_tensor_static, ("ModelOptLinearMethod",), MODELOPT_FP8),
    Row("fp8 compressed tensor", "llama", disk.fp8_tensor_static, ("CompressedTensorsW8A8Fp8",), CT_TENSOR),
    Row("fp8 compressed channel", "llama", disk.fp8_channel, ("CompressedTensorsW8A8Fp8",), CT_CHANNEL),
    Row(
        "fp8 compressed channel marlin",
        "llama",
        disk.fp8_channel,
        ("CompressedTensorsW8A16Fp8", "MarlinFP8ScaledMMLinearKernel"),
        CT_CHANNEL,
        capability=(8, 0),
    ),
    Row(
        "fp8 compressed block",
        "llama",
        disk.fp8_block_compressed,
        ("CompressedTensorsW8A8Fp8", "CutlassFp8BlockScaledMMKernel"),
        CT_BLOCK,
    ),
    Row("int8 compressed", "llama", disk.int8_channel, ("CutlassInt8ScaledMMLinearKernel",), CT_INT8),
    Row(
        "int8 compressed static",
        "llama",
        disk.int8_channel_static_symmetric,
        ("CutlassInt8ScaledMMLinearKernel",),
        CT_INT8_STATIC,
    ),
    Row(
        "int8 compressed asymmetric",
        "llama",
        disk.int8_channel_static,
        ("CutlassInt8ScaledMMLinearKernel",),
        CT_INT8_ASYMMETRIC,
    ),
    Row("w4a16 compressed machete", "llama", disk.wna16, ("MacheteLinearKernel",), CT_W4A16),
    Row(
        "w4a16 compressed marlin", "llama", disk.wna16, ("MarlinLinearKernel",), CT_W4A16, **backend("marlin")
    ),
    Row(
        "w4a16 compressed exllama",
        "llama",
        disk.wna16,
        ("ExllamaLinearKernel",),
        CT_W4A16,
        **backend("exllama", dtype="float16"),
    ),
    Row(
        "w4a16 compressed triton",
        "llama",
        disk.wna16,
        ("TritonW4A16LinearKernel",),
        CT_W4A16,
        **backend("triton"),
    ),
    Row(
        "nvfp4 torch",
        "llama",
        disk.nvfp4_modelopt,
        ("TorchNvFp4LinearKernel",),
        NVFP4,
        **backend("torch"),
        **BLACKWELL,
    ),
    Row(
        "w4a16 compressed zero points",
        "llama",
        disk.wna16_zero_points,
        ("MarlinLinearKernel",),
        CT_W4A16_ZERO_POINTS,
        **backend("marlin"),
    ),
    Row(
        "gptq marlin",
        "llama",
        disk.gptq,
        ("AutoGPTQLinearMethod", "MarlinLinearKernel"),
        GPTQ,
        **backend("marlin"),
    ),
    Row(
        "gptq machete",
        "llama",
        disk.gptq,
        ("AutoGPTQLinearMethod", "MacheteLinearKernel"),
        GPTQ,
        **backend("machete"),
    ),
    Row(
        "awq marlin",
        "llama",
        disk.awq,
        ("AutoAWQMarlinLinearMethod", "MarlinLinearKernel"),
        AWQ,
        **backend("marlin"),
    ),
    Row(
        "nvfp4 marlin", "llama", disk.nvfp4_modelopt, ("MarlinNvFp4LinearKernel",), NVFP4, **backend("marlin")
    ),
    Row(
        "nvfp4 emulation",
        "llama",
        disk.nvfp4_modelopt,
        ("EmulationNvFp4LinearKernel",),
        NVFP4,
        **backend("emulation"),
    ),
    Row(
        "nvfp4 cutlass",
        "llama",
        disk.nvfp4_modelopt,
        ("CutlassNvFp4LinearKernel",),
        NVFP4,
        **backend("cutlass"),
        **BLACKWELL,
    ),
    Row(
        "nvfp4 flashinfer trtllm",
        "llama",
        disk.nvfp4_modelopt,
        ("FlashInferTrtllmNvFp4LinearKernel",),
        NVFP4,
        **backend("flashinfer_trtllm"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "nvfp4 flashinfer cutlass",
        "llama",
        disk.nvfp4_modelopt,
        ("FlashInferCutlassNvFp4LinearKernel",),
        NVFP4,
        **backend("flashinfer_cutlass"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "nvfp4 compressed marlin",
        "llama",
        disk.nvfp4_compressed,
        ("CompressedTensorsW4A4Fp4", "MarlinNvFp4LinearKernel"),
        CT_NVFP4,
        **backend("marlin"),
    ),
    Row(
        "nvfp4 compressed cutlass",
        "llama",
        disk.nvfp4_compressed,
        ("CompressedTensorsW4A4Fp4", "CutlassNvFp4LinearKernel"),
        CT_NVFP4,
        **backend("cutlass"),
        **BLACKWELL,
    ),
    Row("mxfp4 compressed marlin", "llama", disk.mxfp4_compressed, ("MarlinMxFp4LinearKernel",), CT_MXFP4),
    Row(
        "mxfp8 compressed marlin",
        "llama",
        disk.mxfp8,
        ("MarlinMxfp8LinearKernel",),
        CT_MXFP8,
        **backend("marlin"),
    ),
)

EXPERTS = (
    Row("bf16 experts triton", "mixtral", disk.plain, ("UnquantizedFusedMoEMethod", "TritonExperts")),
    Row(
        "bf16 experts flashinfer trtllm",
        "mixtral",
        disk.plain,
        ("TrtLlmBf16ExpertsMonolithic",),
        **backend(moe="flashinfer_trtllm"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "bf16 experts flashinfer cutlass",
        "mixtral",
        disk.plain,
        ("FlashInferExperts",),
        **backend(moe="flashinfer_cutlass"),
        **HOPPER_FLASHINFER,
    ),
    Row("fp8 experts triton", "mixtral", disk.fp8_tensor, ("Fp8MoEMethod", "TritonExperts"), FP8),
    Row(
        "fp8 experts static", "mixtral", disk.fp8_tensor_static, ("Fp8MoEMethod", "TritonExperts"), FP8_STATIC
    ),
    Row(
        "fp8 experts marlin",
        "mixtral",
        disk.fp8_tensor,
        ("Fp8MoEMethod", "MarlinExperts"),
        FP8,
        **backend(moe="marlin"),
    ),
    Row(
        "fp8 experts flashinfer trtllm",
        "mixtral",
        disk.fp8_tensor_static,
        ("Fp8MoEMethod", "TrtLlmFp8ExpertsMonolithic"),
        FP8_STATIC,
        **backend(moe="flashinfer_trtllm"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "fp8 experts flashinfer cutlass",
        "mixtral",
        disk.fp8_tensor_static,
        ("Fp8MoEMethod", "FlashInferExperts"),
        FP8_STATIC,
        **backend(moe="flashinfer_cutlass"),
        **HOPPER_FLASHINFER,
    ),
    Row(
        "fp8 block experts triton", "qwen3_moe", disk.fp8_block, ("Fp8MoEMethod", "TritonExperts"), FP8_BLOCK
    ),
    Row(
        "fp8 block experts marlin",
        "qwen3_moe",
        disk.fp8_block,
        ("Fp8MoEMethod", "MarlinExperts"),
        FP8_BLOCK,
        **backend(moe="marlin"),
    ),
    Row(
        "fp8 block experts deep_gemm hopper",
        "qwen3_moe",
        disk.fp8_block,
        ("Fp8MoEMethod", "DeepGemmExperts"),
        FP8_BLOCK,
        **backend(moe="deep_gemm"),
        **DEEP_GEMM,
    ),
    Row(
        "fp8 block experts deep_gemm blackwell",
        "qwen3_moe",
        disk.fp8_block,
        ("Fp8MoEMethod", "DeepGemmExperts"),
        FP8_BLOCK,
        **backend(moe="deep_gemm"),
        **DEEP_GEMM,
        **BLACKWELL,
    ),
    Row(
        "fp8 block experts flashinfer trtllm",
        "qwen3_moe",
        disk.fp8_block,
        ("Fp8MoEMethod", "TrtLlmFp8ExpertsMonolithic"),
        FP8_BLOCK,
        **backend(moe="flashinfer_trtllm"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "fp8 experts compressed channel cutlass",
        "mixtral",
        disk.fp8_channel,
        ("CompressedTensorsW8A8Fp8MoEMethod", "CutlassExpertsFp8"),
        CT_CHANNEL,
    ),
    Row(
        "int8 experts compressed",
        "mixtral",
        disk.int8_channel,
        ("CompressedTensorsW8A8Int8MoEMethod", "TritonExperts"),
        CT_INT8,
    ),
    Row(
        "w4a16 experts compressed marlin",
        "mixtral",
        disk.wna16,
        ("CompressedTensorsWNA16MoEMethod", "MarlinExperts"),
        CT_W4A16,
        **backend(moe="marlin"),
    ),
    Row(
        "gptq experts marlin",
        "mixtral",
        disk.gptq,
        ("AutoGPTQMoEMethod", "MarlinExperts"),
        GPTQ,
        **backend(moe="marlin"),
    ),
    Row(
        "awq experts marlin",
        "mixtral",
        disk.awq,
        ("AutoAWQMoEMethod", "MarlinExperts"),
        AWQ,
        **backend(moe="marlin"),
    ),
    Row(
        "nvfp4 experts marlin",
        "mixtral",
        disk.nvfp4_modelopt,
        ("MarlinExperts",),
        NVFP4,
        **backend(moe="marlin"),
    ),
    Row(
        "nvfp4 experts cutlass",
        "mixtral",
        disk.nvfp4_modelopt,
        ("CutlassExpertsFp4",),
        NVFP4,
        **backend(moe="cutlass"),
        **BLACKWELL,
    ),
    Row(
        "nvfp4 experts flashinfer trtllm",
        "mixtral",
        disk.nvfp4_modelopt,
        ("TrtLlmNvFp4ExpertsMonolithic",),
        NVFP4,
        **backend(moe="flashinfer_trtllm"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "nvfp4 experts flashinfer cutlass",
        "mixtral",
        disk.nvfp4_modelopt,
        ("FlashInferExperts",),
        NVFP4,
        **backend(moe="flashinfer_cutlass"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "nvfp4 experts compressed marlin",
        "mixtral",
        disk.nvfp4_compressed,
        ("CompressedTensorsW4A4Nvfp4MoEMethod", "MarlinExperts"),
        CT_NVFP4,
        **backend(moe="marlin"),
    ),
    Row(
        "mxfp4 experts compressed marlin",
        "mixtral",
        disk.mxfp4_compressed,
        ("CompressedTensorsW4A4Mxfp4MoEMethod", "MarlinExperts"),
        CT_MXFP4,
        **backend(moe="marlin"),
    ),
    Row(
        "mxfp4 experts marlin",
        "gpt_oss",
        disk.plain,
        ("GptOssMxfp4MoEMethod", "MarlinExperts"),
        MXFP4,
        **backend(moe="marlin"),
    ),
    Row(
        "mxfp4 experts flashinfer trtllm",
        "gpt_oss",
        disk.plain,
        ("GptOssMxfp4MoEMethod", "TrtLlmMxfp4ExpertsMonolithic"),
        MXFP4,
        **backend(moe="flashinfer_trtllm"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "mxfp4 experts flashinfer cutlass",
        "gpt_oss",
        disk.plain,
        ("GptOssMxfp4MoEMethod", "FlashInferExperts"),
        MXFP4,
        **backend(moe="flashinfer_cutlass"),
        **HOPPER_FLASHINFER,
    ),
)

ONLINE = (
    Row(
        "online fp8 tensor",
        "mixtral",
        disk.plain,
        ("Fp8PerTensorOnlineLinearMethod", "Fp8PerTensorOnlineMoEMethod", "TritonExperts"),
        **online("fp8_per_tensor"),
    ),
    Row(
        "online fp8 tensor marlin",
        "mixtral",
        disk.plain,
        ("Fp8PerTensorOnlineMoEMethod", "MarlinFP8ScaledMMLinearKernel", "MarlinExperts"),
        **online("fp8_per_tensor", "marlin", "marlin"),
    ),
    Row(
        "online fp8 block",
        "mixtral",
        disk.plain,
        ("Fp8PerBlockOnlineLinearMethod", "Fp8PerBlockOnlineMoEMethod", "TritonExperts"),
        **online("fp8_per_block"),
    ),
    Row(
        "online fp8 block marlin",
        "mixtral",
        disk.plain,
        ("Fp8PerBlockOnlineMoEMethod", "MarlinFP8ScaledMMLinearKernel", "MarlinExperts"),
        **online("fp8_per_block", "marlin", "marlin"),
    ),
    Row(
        "online fp8 block deep_gemm",
        "mixtral",
        disk.plain,
        ("Fp8PerBlockOnlineMoEMethod", "DeepGemmFp8BlockScaledMMKernel", "DeepGemmExperts"),
        **online("fp8_per_block", "deep_gemm", "deep_gemm"),
        **DEEP_GEMM,
        **BLACKWELL,
    ),
    Row(
        "online fp8 channel",
        "mixtral",
        disk.plain,
        ("Fp8PtpcOnlineLinearMethod", "Fp8PtpcOnlineMoEMethod", "TritonExperts"),
        **online("fp8_per_channel"),
    ),
    Row(
        "online mxfp8 marlin",
        "mixtral",
        disk.plain,
        ("Mxfp8OnlineLinearMethod", "Mxfp8OnlineMoEMethod", "MarlinExperts"),
        **online("mxfp8", "marlin", "marlin"),
    ),
    Row(
        "online mxfp4 marlin",
        "mixtral",
        disk.plain,
        ("Mxfp4OnlineLinearMethod", "Mxfp4OnlineMoEMethod", "MarlinExperts"),
        **online("mxfp4", "marlin", "marlin"),
    ),
    Row(
        "online int8 experts",
        "mixtral",
        disk.plain,
        ("Int8OnlineMoEMethod", "TritonExperts"),
        **online("int8_per_channel_weight_only"),
    ),
    Row(
        "online nvfp4 experts",
        "mixtral",
        disk.plain,
        ("Nvfp4OnlineMoEMethod",),
        **online("nvfp4_per_token", moe="flashinfer_trtllm"),
        **BLACKWELL_FLASHINFER,
    ),
    Row(
        "online fp8 two layers",
        "llama",
        disk.plain,
        ("Fp8PerTensorOnlineLinearMethod",),
        **online("fp8_per_tensor"),
    ),
)

ATTENTION = (
    Row(
        "fp8 kv cache scales",
        "llama",
        disk.fp8_tensor,
        ("Fp8KVCacheMethod",),
        FP8,
        engine=FP8_KV,
        extra=disk.kv_scales,
    ),
    Row("fp8 kv cache scales absent", "llama", disk.fp8_tensor, ("Fp8KVCacheMethod",), FP8, engine=FP8_KV),
    Row(
        "fp8 kv cache scales compressed",
        "llama",
        disk.fp8_channel,
        ("CompressedTensorsKVCacheMethod",),
        CT_KV,
        engine=FP8_KV,
        extra=disk.kv_scales_compressed,
    ),
    Row("fp8 kv cache bf16 weights", "llama", disk.plain, ("CPUAttentionBackendImpl",), engine=FP8_KV),
    Row("mla bf16", "deepseek", disk.plain, ("MLAAttention",)),
    Row("mla fp8", "deepseek", disk.fp8_tensor, ("MLAAttention", "CutlassFP8ScaledMMLinearKernel"), FP8),
    Row(
        "mla fp8 block",
        "deepseek",
        disk.fp8_block,
        ("MLAAttention", "TritonFp8BlockScaledMMKernel"),
        FP8_BLOCK,
        **backend("triton"),
    ),
    Row(
        "mla fp8 block marlin",
        "deepseek",
        disk.fp8_block,
        ("MLAAttention", "MarlinFP8ScaledMMLinearKernel"),
        FP8_BLOCK,
        **backend("marlin"),
    ),
    Row(
        "mla online fp8",
        "deepseek",
        disk.plain,
        ("MLAAttention", "Fp8PerTensorOnlineLinearMethod"),
        **online("fp8_per_tensor"),
    ),
    Row(
        "mla online fp8 block marlin",
        "deepseek",
        disk.plain,
        ("MLAAttention", "Fp8PerBlockOnlineLinearMethod"),
        **online("fp8_per_block", "marlin"),
    ),
)

NEWER = (
    Row(
        "online fp8 from mxfp8",
        "llama",
        disk.mxfp8,
        ("Fp8PerTensorOnlineLinearMethod",),
        modelopt("MXFP8"),
        **requantized(linear="fp8_per_tensor"),
        since=(0, 32),
    ),
    Row(
        "online fp8 experts from nvfp4",
        "mixtral",
        disk.nvfp4_modelopt,
        ("Fp8PerTensorOnlineMoEMethod", "TritonExperts"),
        NVFP4,
        **requantized(moe="fp8_per_tensor"),
        since=(0, 33),
    ),
    Row(
        "online fp8 channel experts from nvfp4 compressed",
        "mixtral",
        disk.nvfp4_compressed,
        ("Fp8PtpcOnlineMoEMethod", "TritonExperts"),
        CT_NVFP4,
        **requantized(moe="fp8_per_channel"),
        since=(0, 33),
    ),
    Row(
        "online int8 experts from nvfp4",
        "mixtral",
        disk.nvfp4_modelopt,
        ("Int8OnlineMoEMethod", "TritonExperts"),
        NVFP4,
        **requantized(moe="int8_per_channel_weight_only"),
        since=(0, 33),
    ),
    Row(
        "bf16 experts substituted by constants",
        "qwen3_moe_substituted",
        disk.plain,
        ("SubstitutedRoutedExperts", "ConstantExpertSubstitution", "TritonExperts"),
        since=(0, 33),
    ),
)
"""What not every vLLM has that is supported: checkpoints quantized anew, constants in place of experts."""

ROWS = LINEAR + EXPERTS + ONLINE + ATTENTION

NOT_RUN = (
    (
        "mxfp4 experts, OAI triton kernels",
        "processing wraps the weights in objects of the triton_kernels package, which the CPU wheel lacks",
    ),
    ("w4a8 compressed cutlass", "processing asserts that its scales are on a GPU"),
    ("mxfp8 experts, triton", "the kernel asks for a gfx950 device, and the stand-in platform is CUDA"),
    ("gptq and compressed-tensors with group activation order", "vLLM 0.32 refuses such a configuration"),
    (
        "online fp8 block under MLA, kernels other than marlin",
        "MLA reads kv_b_proj back with a forward pass, which needs per-token quantization kernels",
    ),
    (
        "Humming, b12x, CuTe DSL, conch and fbgemm kernels; flashinfer's expert-parallel and MXINT4 experts",
        "no stand-in of the package was written",
    ),
    (
        "mxfp8 through flashinfer or deep_gemm, linear and experts",
        "no row was written; marlin stands for mxfp8",
    ),
    ("bitsandbytes, GGUF, torchao, quark, inc, humming configurations", "no row was written"),
    ("methods of ROCm, XPU and Zen CPUs", "the stand-in platform is CUDA"),
    ("GPU attention backends' own processing", "the attention layers keep vLLM's CPU backends"),
    ("more than one rank", "the process group has one member: no weight is sharded, no scale is reduced"),
    ("forward passes", "the operations are stand-ins: the tests compare what a forward pass would read"),
)
