"""Online quantization that runs on any machine: bf16 in the checkpoint, INT8 per channel in the kernels.

`test_int8_after` creates ordinary weights and quantizes them in `process_weights_after_loading`.
`test_int8_meta` creates them on meta, and vLLM quantizes each layer while the checkpoint is still being read.
Importing this module registers both with vLLM.
"""

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

ALREADY = "_already_called_process_weights_after_loading"


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values, float32 scale with a last dimension of 1), one scale for each row."""
    scale = weight.float().abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
    return (weight.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the kernels of this module multiply with."""
    return (values.float() * scale).to(dtype)


class Int8Linear(LinearMethodBase):
    """Ordinary weights, quantized after loading."""

    device: str | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = ModelWeightParameter(
            data=torch.empty(shape, dtype=params_dtype, device=self.device),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        values, scale = quantize(layer.weight)
        replace_parameter(layer, "weight", values)
        replace_parameter(layer, "weight_scale", scale)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, dequantize(layer.weight, layer.weight_scale, x.dtype), bias)


class Int8MetaLinear(Int8Linear):
    """Weights on meta, quantized while loading; the flag is how vLLM's methods keep from doing it twice."""

    uses_meta_device = True
    device = "meta"

    def create_weights(self, layer: torch.nn.Module, *args: object, **kwargs: object) -> None:
        super().create_weights(layer, *args, **kwargs)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, ALREADY, False):
            return
        super().process_weights_after_loading(layer)
        setattr(layer, ALREADY, True)


class Int8Kernel:
    """Holds the scales it was built with, as vLLM's expert kernels do; the values it reads from the layer."""

    def __init__(self, w13_scale: torch.Tensor, w2_scale: torch.Tensor) -> None:
        self.w13_scale = w13_scale
        self.w2_scale = w2_scale

    def expert(self, layer: RoutedExperts, index: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's SwiGLU block on the rows that were routed to it."""
        w13 = dequantize(layer.w13_weight[index], self.w13_scale[index], x.dtype)
        w2 = dequantize(layer.w2_weight[index], self.w2_scale[index], x.dtype)
        gate, up = torch.nn.functional.linear(x, w13).chunk(2, -1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2)

    def __call__(
        self, layer: RoutedExperts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(x)
        for index in range(layer.w13_weight.shape[0]):
            rows, slots = (ids == index).nonzero(as_tuple=True)
            if rows.numel():
                by_copy_plan = self.expert(layer, index, x[rows]) * weights[rows, slots, None].to(x.dtype)
                output.index_add_(0, rows, by_copy_plan)
        return output


class Int8ExpertsBase(FusedMoEMethodBase):
    """What both kinds of expert quantization share: the kernel and the work after loading."""

    kernel: Int8Kernel

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        for name in ("w13", "w2"):
            values, scale = quantize(getattr(layer, name + "_weight"))
            replace_parameter(layer, name + "_weight", values)
            replace_parameter(layer, name + "_scale", scale)
        self.kernel = Int8Kernel(layer.w13_scale, layer.w2_scale)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.kernel(layer, x, topk_weights, topk_ids)


class Int8Experts(Int8ExpertsBase):
    """Ordinary expert weights, quantized after loading."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        shapes = {
            "w13_weight": (num_experts, 2 * intermediate_size_per_partition, hidden_size),
            "w2_weight": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, extra_weight_attrs)


class Int8MetaExperts(Int8ExpertsBase, OnlineMoEMethodBase):
    """Expert weights on meta, created by vLLM's own base class, quantized while loading."""

    create_weights = OnlineMoEMethodBase.create_weights

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if getattr(layer, ALREADY, False):
            return
        super().process_weights_after_loading(layer)
        setattr(layer, ALREADY, True)


class Int8Config(QuantizationConfig):
    """All linear layers and all experts, nothing to read from the checkpoint."""

    linear_method: type[LinearMethodBase]
    experts_method: type[FusedMoEMethodBase]

    def get_name(self) -> str:
        return "test_int8"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, object]) -> "Int8Config":  # noqa: ARG003  vLLM passes it
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> object | None:
        if isinstance(layer, LinearBase):
            return self.linear_method()
        if isinstance(layer, RoutedExperts):
            return self.experts_method(layer.moe_config)
        return None


@register_quantization_config("test_int8_after")
class AfterConfig(Int8Config):
    """Quantized in `process_weights_after_loading`."""

    linear_method = Int8Linear
    experts_method = Int8Experts


@register_quantization_config("test_int8_meta")
class MetaConfig(Int8Config):
    """Quantized while loading."""

    linear_method = Int8MetaLinear
    experts_method = Int8MetaExperts
