"""CUDA graphs of quantized passes.

vLLM captures graphs for passes of up to some 500 rows. Those stay precise: so few rows gain nothing.
Longer passes are launched kernel by kernel, which can take the CPU longer than a turn of an agent takes
the GPU. So more sizes are captured, and those are quantized.

A graph is the same for every pass of its size, so which of its rows are precise is data there: the
numbers of up to `FEW_ROWS` of them, in a tensor that is filled before each replay. A pass that needs
more, or is precise as a whole, runs without a graph. Attention stands between the graphs of a pass and
follows its plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixquant.core.phase import PhasePlan
from mixquant.core.recipe import Recipe
from mixquant.engines.vllm.context import state_of
from mixquant.engines.vllm.linear.route import StaticRoute
from mixquant.engines.vllm.patches.outcome import Outcome
from mixquant.kernels.triton import FEW_ROWS

MAX_GRAPH_ROWS = 4096
"""Rows of the largest graph: longer passes take the GPU longer than the CPU."""

MARGIN = 64
"""A graph is quantized if it has more rows than the threshold and this margin together.

The margin leaves room for precise rows and padding."""


def sizes(own: list[int], least: int, most: int) -> tuple[list[int], list[int]]:
    """The sizes, in rows, of graphs that are captured besides vLLM's own.

    Args:
        own: vLLM's.
        least: quantizable rows of a quantized pass.
        most: rows of a pass.

    Returns:
        Those of precise graphs, and those of quantized ones, which are larger.
    """
    last = max(own)
    until = max(last, -(-(least + MARGIN) // 64) * 64)
    precise = range(last // 64 * 64 + 64, min(until, most) + 1, 64)
    steps = [*range(128, 2049, 128), *range(2304, MAX_GRAPH_ROWS + 1, 256)]
    return list(precise), [size for size in steps if until < size <= most]


class QuantizedGraphs:
    """The graphs of one model runner that are captured quantized, and what their kernels read."""

    def __init__(
        self, sizes: list[int], precise_until: int, largest: int, device: torch.device
    ) -> None:
        self.sizes = sizes  # of all graphs, precise ones and vLLM's own, too
        self._precise_until = precise_until
        self._largest = largest
        # First the numbers of `FEW_ROWS` precise rows, as int64. Then each row's index among those, or
        # -1, as int32.
        self._static = torch.full((2 * FEW_ROWS + largest,), -1, dtype=torch.int32, device=device)

    def holds(self, rows: int) -> bool:
        """Whether a graph of this many rows, padding included, is quantized."""
        return self._precise_until < rows <= self._largest

    def plan_to_capture(self, rows: int) -> PhasePlan:
        """The plan under which a pass is captured; `serve` fills in precise rows before each replay."""
        plan = PhasePlan(rows, ((0, rows),), ())
        index, numbers = self._views(self._static, rows)
        state_of(plan).route = StaticRoute(rows, index, numbers)
        return plan

    def serve(self, plan: PhasePlan | None) -> bool:
        """Fills in the precise rows of a pass that replays a graph; False if no graph serves it."""
        if plan is None or not plan.quantized or plan.precise_rows > FEW_ROWS:
            return False
        filled = torch.full((2 * FEW_ROWS + plan.rows,), -1, dtype=torch.int32)
        index, numbers = self._views(filled, plan.rows)
        if plan.precise:
            rows = torch.from_numpy(np.concatenate([np.arange(*one) for one in plan.precise]))
            index[: len(rows)] = rows
            numbers[rows] = torch.arange(len(rows), dtype=torch.int32)
        if self._static.is_cuda:
            filled = filled.pin_memory()  # a new one for each pass, so that none waits for the copy
        self._static[: len(filled)].copy_(filled, non_blocking=True)
        return True

    @staticmethod
    def _views(of: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        return of[: 2 * FEW_ROWS].view(torch.int64), of[2 * FEW_ROWS : 2 * FEW_ROWS + rows]


def leave() -> None:
    """Has the pass that begins run without a graph."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    get_forward_context().cudagraph_runtime_mode = CUDAGraphMode.NONE


def prepare(
    runner: Any, model: torch.nn.Module, recipe: Recipe, least: int
) -> tuple[QuantizedGraphs | None, Outcome]:
    """The quantized graphs that a model runner should capture, if its model can have them.

    Args:
        runner: of vLLM's, which has loaded its model.
        least: quantizable rows of a quantized pass.

    Returns:
        The graphs, or None; and what the table says of them.
    """
    what = "quantized CUDA graphs:"
    compilation = runner.vllm_config.compilation_config
    if not compilation.cudagraph_capture_sizes:
        return None, Outcome(what, ())  # vLLM captures none either
    if (why := why_no_graphs(runner.vllm_config, model, recipe)) is not None:
        return None, Outcome.no_place(what, why)
    own = list(compilation.cudagraph_capture_sizes)
    most = min(MAX_GRAPH_ROWS, runner.vllm_config.scheduler_config.max_num_batched_tokens)
    precise, quantized = sizes(own, least, most)
    if not quantized:
        return None, Outcome.no_place(what, f"no pass has more than {most} rows")
    every = sorted({*own, *precise, *quantized})
    graphs = QuantizedGraphs(every, max([*own, *precise]), quantized[-1], runner.device)
    return graphs, Outcome(what, (None,) * len(quantized))


@contextmanager
def configured(graphs: QuantizedGraphs | None, compilation: Any) -> Iterator[None]:
    """Inside, vLLM plans to capture these graphs.

    Its configuration is as it was afterwards, for vLLM checks it again. And the largest size stays as it
    is all the time: attention's workspace, and graphs of decode alone, go by it.
    """
    if graphs is None:
        yield
        return
    own, compilation.cudagraph_capture_sizes = compilation.cudagraph_capture_sizes, graphs.sizes
    try:
        yield
    finally:
        compilation.cudagraph_capture_sizes = own


def why_no_graphs(vllm_config: Any, model: torch.nn.Module, recipe: Recipe) -> str | None:
    """Why a model has no quantized graphs, or None if it can have them."""
    from vllm import envs
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if recipe.everywhere or recipe.role == "prefill":
        return "every row is quantized, so vLLM's own graphs are"
    if not vllm_config.quant_config.default_graph_sizes:
        return "cudagraph_capture_sizes or max_cudagraph_capture_size is set"
    if compilation.cudagraph_mode.mixed_mode() != CUDAGraphMode.PIECEWISE:
        return "vLLM captures attention in its graphs"
    if getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False):
        return "VLLM_USE_BREAKABLE_CUDAGRAPH is set"
    if not getattr(vllm_config, "use_v2_model_runner", False):
        return "needs vLLM's model runner V2"
    if vllm_config.lora_config is not None:
        return "LoRA is on"
    methods = [getattr(module, "mixquant_method", None) for module in model.modules()]
    if any(method is not None and method.fp8 is None for method in methods):
        return "needs layers in FP8 on Hopper, without a bias"
    if any(_are_experts(module) for module in model.modules()):
        return "the model has quantized experts"
    return None if any(method is not None for method in methods) else "nothing is quantized"


def _are_experts(module: Any) -> bool:
    return getattr(getattr(module, "quant_method", None), "quantized", None) is not None
