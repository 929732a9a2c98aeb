"""Weights in int8 whose scales a hook keeps beside them, as those of bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from reload_plugin import keep_weights_in_module, materialize, materialized
from tests.dispatched import HERE


class Int8Params(nn.Parameter):
    """Stands in for the class of that name: Accelerate asks for it by its name."""

    SCB: torch.Tensor | None

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, SCB: Any = None) -> Int8Params:  # noqa: N803
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.SCB = SCB
        return made

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """Keeps the class, and the scales where they have values."""
        scales = self.SCB
        return Int8Params(super().to(*args, **kwargs), self.requires_grad, scales)


class Quantized(nn.Module):
    """A linear layer in int8; its scales are an entry of the state dict, and an attribute of the weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = Int8Params(torch.randint(-127, 127, (6, 4), dtype=torch.int8))
        self.weight.SCB = torch.rand(6)
        self.bias = nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.weight.SCB[:, None] / 127).T + self.bias

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}SCB"] = self.weight.SCB


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.ones(1, 4))


def offloaded(where: str, folder: Path) -> nn.Module:
    model = nn.Sequential(Quantized())
    return cpu_offload(model, HERE) if where == "dict" else disk_offload(model, str(folder), HERE)


@pytest.mark.parametrize("where", ["dict", ".dat"])
def test_scales_come_with_their_weights(where: str, tmp_path: Path) -> None:
    model, plain = offloaded(where, tmp_path), nn.Sequential(Quantized())
    assert torch.equal(answers(model), answers(plain))
    materialize(model)
    assert type(model[0].weight) is Int8Params
    assert torch.equal(model[0].weight.SCB, plain[0].weight.SCB)
    assert torch.equal(answers(model), answers(plain))


@pytest.mark.parametrize("where", ["dict", ".dat"])
def test_scales_that_change_go_back(where: str, tmp_path: Path) -> None:
    model, plain = offloaded(where, tmp_path), nn.Sequential(Quantized())
    with materialized(model), torch.no_grad():
        model[0].weight.SCB.mul_(3)
    plain[0].weight.SCB.mul_(3)
    assert torch.equal(answers(model), answers(plain))
    materialize(model)
    assert torch.equal(answers(model), answers(plain))


@pytest.mark.parametrize("where", ["dict", ".dat"])
def test_int8_weights_are_kept(where: str, tmp_path: Path) -> None:
    model, plain = offloaded(where, tmp_path), nn.Sequential(Quantized())
    keep_weights_in_module(model, disk=True)
    assert not model[0].weight.is_meta
    assert torch.equal(answers(model), answers(plain))
