"""Modules that other code may stand in for: told by all that their forward does."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn

from mixquant.engines.source import statements_of_forward
from mixquant.engines.transformers.fusion import _fused_activation, is_written_as_gated_mlp
from mixquant.kernels.cpu import int8 as int8_cpu


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn, self.scale = nn.SiLU(), 2.0


class AsLlama(Gated):
    def forward(self, x: Tensor) -> Tensor:
        down_proj: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class Returned(Gated):
    def forward(self, x: Tensor) -> Any:
        """With a docstring, and a comment."""
        # the same
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Before(Gated):
    def forward(self, x: Tensor) -> Any:
        x = x * self.scale
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Behind(Gated):
    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.scale


class Later(Gated):
    def forward(self, x: Tensor) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        down_proj = nn.functional.dropout(down_proj, 0.5)
        return down_proj  # noqa: RET504


class Sometimes(Gated):
    def forward(self, x: Tensor) -> Any:
        if x.shape[0] > 1:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return x


def doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def twice(self: Any, x: Tensor) -> Any:
        return 2 * forward(self, x)

    return twice


class Decorated(Gated):
    @doubled
    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Replaced(Returned):
    pass


Replaced.forward = doubled(Returned.forward)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "gated"),
    [
        (Returned, True),
        (Before, False),
        (Behind, False),
        (Later, False),
        (Sometimes, False),
        (Decorated, False),
        (Replaced, False),
        (nn.Linear, False),
        (nn.Module, False),
    ],
)
def test_an_mlp_that_does_something_besides_is_not_fused(kind: Any, gated: bool) -> None:
    assert is_written_as_gated_mlp(kind) is gated


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma4"])
def test_the_mlps_of_models_are_known(name: str) -> None:
    mlp = build(name).model.layers[0].mlp
    assert is_written_as_gated_mlp(type(mlp))
    assert _fused_activation(mlp.act_fn) is not None


def test_a_statement_with_an_annotation_is_another_one() -> None:
    assert statements_of_forward(AsLlama)[1] == "return down_proj"
    assert not is_written_as_gated_mlp(AsLlama)


class SiLU(nn.Module):  # by its name, torch's
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x).clamp(max=3)


def test_an_activation_is_told_by_what_it_computes() -> None:
    assert _fused_activation(nn.SiLU()) is int8_cpu.silu_mul_quantize
    assert _fused_activation(nn.GELU(approximate="tanh")) is int8_cpu.gelu_mul_quantize
    assert _fused_activation(nn.GELU()) is None
    assert _fused_activation(SiLU()) is None
    watched = nn.SiLU()
    watched.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert _fused_activation(watched) is None
