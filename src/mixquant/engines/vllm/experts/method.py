"""The method of a layer of experts (MoE) in vLLM: BF16 as vLLM has it, and a choice per row.

vLLM routes, and then calls `apply` inside an opaque operator of its own, so the plan can be looked
at there: torch.compile does not see it, and what a CUDA graph captures is precise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from mixquant.checkpoints.prefill import check_is_of
from mixquant.checkpoints.second_checkpoint import opened
from mixquant.core.fingerprint import sample
from mixquant.core.phase import PhasePlan, everything_quantized, plan_in_force
from mixquant.core.summary import Layer
from mixquant.engines.vllm.experts import fp8 as fp8_experts
from mixquant.engines.vllm.experts.base import QuantizedExperts, by_rows
from mixquant.engines.vllm.loading.memory import Ledger
from mixquant.engines.vllm.loading.online import (
    CannotReload,
    load_in_turn,
    should_process,
    weights_are_made_up,
)
from mixquant.engines.vllm.loading.second_checkpoint import expert as expert_of
from mixquant.engines.vllm.products.base import nbytes_of
from mixquant.formats.nvfp4_blocks import BlockScale

# Row counts whose Triton kernels are compiled in the profiling pass, besides the largest: vLLM picks
# tile sizes by row count, and a compilation in the first request costs seconds.
_WARM_ROWS = (256, 512, 1024, 1536, 2048, 3072, 4096)

_ADVICE = "name experts in the recipe's 'ignore', or spread the model with --tensor-parallel-size"
_ADVICE_FOR_PREFILL = "spread the model with --tensor-parallel-size"


class PhaseExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """BF16 experts as vLLM has them, and a copy of them for quantized rows.

    vLLM's class is an nn.Module and a child of the layer: the copy is kept in plain attributes, so
    that it is no parameter that a checkpoint has to fill. With ``only_quantized``, in a prefill engine,
    the BF16 weights are given back as soon as it is made, and every row takes it.
    """

    def __init__(
        self,
        moe: Any,
        fmt: str,
        prefix: str,
        ledger: Ledger,
        block_scale: BlockScale = "6",
        *,
        only_quantized: bool = False,
        prefill_model: str | None = None,
    ) -> None:
        super().__init__(moe)
        self.format = fmt
        self.block_scale = block_scale
        self.prefix = prefix
        self.ledger = ledger
        self.quantized: QuantizedExperts | None = None
        self.shape: tuple[int, ...] = ()
        self.only_quantized = only_quantized
        self.prefill_model = prefill_model
        self.freed = 0  # bytes
        self.samples: list[Tensor] = []  # of the weights that the copy was made of, as they lie now
        self.made_up = False  # weights that --load-format dummy makes: no checkpoint is of them
        self._warm = False

    @property
    def supports_eplb(self) -> bool:
        return False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        device = torch.get_default_device()
        with torch.device("meta") if self.only_quantized else nullcontext():
            super().create_weights(layer, *args, **kwargs)
        copy = weights = 0
        for weight in (layer.w13_weight, layer.w2_weight):
            experts, rows, columns = weight.shape
            copy += experts * nbytes_of(self.format, rows, columns)
            weights += weight.nbytes
        self.shape = tuple(layer.w13_weight.shape)
        self.made_up = weights_are_made_up()
        if self.only_quantized:
            load_in_turn(self, layer)
            self.freed = weights
            self.ledger.reserve(device, self.prefix, copy, 0, _ADVICE_FOR_PREFILL)
        else:
            self.ledger.reserve(layer.w13_weight.device, self.prefix, copy, weights, _ADVICE)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.only_quantized and not should_process(
            layer, loaded_before=self.quantized is not None
        ):
            return
        # Before super's, which swaps halves or shuffles blocks for some kernels.
        _zero_padding(layer)
        if self.quantized is None:
            self.quantized = _quantized_experts(layer, self.format, self.block_scale)
        if self.prefill_model is None:
            self.quantized.load(layer)
        else:
            self._take(layer, self.quantized)
        # Also where no row will take what it sets up: vLLM asks it how a layer of experts is run.
        super().process_weights_after_loading(layer)
        if not self.only_quantized:
            self.samples = _samples(layer)
        else:
            for name in ("w13_weight", "w2_weight"):
                weight = getattr(layer, name)
                nothing = torch.empty(len(weight), 0, 0, dtype=weight.dtype, device=weight.device)
                setattr(layer, name, torch.nn.Parameter(nothing, requires_grad=False))

    def renew(self, layer: Any) -> None:
        """Refuses weights that were written to where they are: they may lie as a kernel wants them."""
        if self.only_quantized or not self.samples:
            return
        if not all(map(torch.equal, self.samples, _samples(layer))):
            raise CannotReload(
                f"the weights of the experts {self.prefix} were changed without vLLM's processing, so "
                "their quantized copy is out of date; load weights with vLLM's reload_weights"
            )

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        stock = super().apply
        if self.only_quantized and not len(x):
            return torch.empty_like(x)
        plan = self._plan(x, lambda: (topk_weights, topk_ids), layer)
        if plan is None:
            return stock(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        # Shared experts: without data parallelism vLLM runs them around this call, once, whatever
        # the kernel is handed.
        return by_rows(
            plan,
            (x, topk_weights, topk_ids),
            precise=lambda x, weights, ids: stock(layer, x, weights, ids, None, None),
            quantized=lambda x, weights, ids: self._experts(layer, x, weights, ids),
        )

    def apply_monolithic(
        self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        """BF16 kernels that route by themselves (TensorRT-LLM's, vLLM's choice on Blackwell).

        Precise rows take them, so that without quantized rows nothing differs from vLLM alone; for
        the quantized ones vLLM's router, which is idle otherwise, is asked.
        """
        stock = super().apply_monolithic

        def route() -> tuple[Tensor, Tensor]:
            router = get_forward_context().no_compile_layers[layer.layer_name].router
            routed: tuple[Tensor, Tensor] = router.select_experts(
                hidden_states=x, router_logits=router_logits, input_ids=input_ids
            )
            return routed

        if self.only_quantized and not len(x):
            return torch.empty_like(x)
        plan = self._plan(x, route, layer)
        if plan is None:
            return stock(layer, x, router_logits, input_ids)
        of_rows = (x, *route(), router_logits) + (() if input_ids is None else (input_ids,))
        return by_rows(
            plan,
            of_rows,
            precise=lambda x, weights, ids, *rest: stock(layer, x, *rest),
            quantized=lambda x, weights, ids, *rest: self._experts(layer, x, weights, ids),
        )

    def described(self, name: str) -> list[Layer]:
        """The layer's line in the table."""
        assert self.quantized is not None
        kernel, nbytes = self.quantized.kernel, self.quantized.nbytes
        return [Layer(name, self.shape, self.format, kernel, True, nbytes, None, self.freed)]

    def _take(self, layer: Any, quantized: QuantizedExperts) -> None:
        """Out of the prefill model, whose experts have the names of the layer and their numbers."""
        assert self.prefill_model is not None
        source, moe = opened(self.prefill_model), layer.moe_config
        features = _features(moe)
        half = layer.w13_weight.shape[1] // 2
        for expert in range(moe.num_experts):
            parts = expert_of(source, self.prefix, expert, moe.moe_parallel_config, features)
            if expert in (0, moe.num_experts - 1) and not self.made_up:
                gate_up = layer.w13_weight[expert].data
                for tensors, weight in zip(
                    parts,
                    (
                        gate_up[:features],
                        gate_up[half : half + features],
                        layer.w2_weight[expert].data[:, :features],
                    ),
                    strict=True,
                ):
                    check_is_of(tensors, weight, f"{self.prefix}.{expert}")
            quantized.take(expert, *parts)

    def _experts(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        assert self.quantized is not None
        if self.only_quantized:
            ids = ids.clamp(min=0)  # padding rows have no expert, and are not told apart here
        return self.quantized(layer, x, weights, ids)

    def _plan(
        self, x: Tensor, route: Callable[[], tuple[Tensor, Tensor]], layer: Any
    ) -> PhasePlan | None:
        """The plan, if these rows are its rows and some of them are quantized."""
        plan = everything_quantized(len(x)) if self.only_quantized else plan_in_force()
        if plan is None or not plan.quantized or plan.rows != x.shape[0]:
            return None
        if not self._warm:
            self._warm = True
            self._warm_up(layer, x, *route())
        return plan

    def _warm_up(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> None:
        """In the profiling pass: compiles for the common row counts.

        That pass has the most rows there can be, so its own call gives vLLM's workspace, which is
        locked afterwards, its size.
        """
        shape = (self.format, *self.shape)
        if shape in _warmed:
            return
        _warmed.add(shape)
        ids = ids.clamp(min=0)  # padding rows have no expert
        for rows in _WARM_ROWS:
            if rows < x.shape[0]:
                self._experts(layer, x[:rows], weights[:rows], ids[:rows])


def _samples(layer: Any) -> list[Tensor]:
    return [sample(weight.flatten(0, -2)).clone() for weight in (layer.w13_weight, layer.w2_weight)]


_warmed: set[tuple[Any, ...]] = set()


def _features(moe: Any) -> int:
    """Of an expert's middle on this rank, without what some kernels have it rounded up by."""
    used = getattr(moe, "intermediate_size_per_partition_unpadded", None)
    size: int = moe.intermediate_size_per_partition if used is None else used
    return size


def _quantized_experts(layer: Any, fmt: str, block_scale: BlockScale) -> QuantizedExperts:
    if fmt == "fp8":
        return fp8_experts.Fp8Experts(layer)
    from mixquant.engines.vllm.experts.nvfp4 import Nvfp4Experts

    return Nvfp4Experts(layer, block_scale)


def _zero_padding(layer: Any) -> None:
    """Some kernels have the intermediate size rounded up; vLLM clears the rest in super's, too late."""
    moe = layer.moe_config
    size = moe.intermediate_size_per_partition
    used = getattr(moe, "intermediate_size_per_partition_unpadded", None)
    if used is None or size <= used:
        return
    layer.w13_weight.data[:, used:size].zero_()
    if moe.is_act_and_mul:
        layer.w13_weight.data[:, size + used :].zero_()
    layer.w2_weight.data[:, :, used:].zero_()
