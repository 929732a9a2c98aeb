"""vLLM's platform object made to answer as a CUDA machine while tensors are on the CPU or a simulated device.

The object keeps its identity, because vLLM's modules bind it by name when imported; its class is exchanged.
Modules are imported before the exchange, because some of them import CUDA extensions when it is CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum


class CudaLike(CpuPlatform):
    """CUDA to who asks for a capability or a kernel list, CPU to who asks for a device or a setting."""

    _enum = PlatformEnum.CUDA
    capability = DeviceCapability(9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # noqa: ARG003
        return cls.capability

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:  # noqa: ARG003
        return "stand-in"

    @classmethod
    def supports_fp8(cls) -> bool:
        return True

    @classmethod
    def support_deep_gemm(cls) -> bool:
        return cls.capability.major in (9, 10)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """The reference backend, not the one for AMX: a test must not depend on the CPU it runs on."""
        if attn_selector_config.use_mla:
            return AttentionBackendEnum.CPU_MLA.get_path()
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003
        return 132


@contextmanager
def cuda_like(major: int, minor: int, device: str = "cpu") -> Iterator[None]:
    """Make the platform CUDA of that capability, with tensors on `device`.

    On the CPU questions about device memory get answers, and `Tensor.cpu` copies, as it does from a device:
    `numpy()` often follows and would pin it.
    """
    plain = type(current_platform)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(CudaLike, "capability", DeviceCapability(major, minor)))
        if device == "cpu":
            _answer_for_the_cpu(stack)
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", _itself))
        stack.callback(setattr, current_platform, "__class__", plain)
        current_platform.__class__ = CudaLike
        yield


def _answer_for_the_cpu(stack: ExitStack) -> None:
    device = {"max_memory_allocated": 0, "empty_cache": None, "current_device_index": torch.device("cpu")}
    for name, answer in device.items():
        stack.enter_context(mock.patch.object(torch.accelerator, name, return_value=answer))
    stack.enter_context(mock.patch.object(torch.accelerator, "synchronize"))
    stack.enter_context(mock.patch.object(torch.Tensor, "cpu", torch.Tensor.clone))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
