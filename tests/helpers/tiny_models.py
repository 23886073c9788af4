"""Tiny random models of each architecture, and a recorder of what reaches quantized products."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixquant.formats import EMULATION
from mixquant.formats.int8 import INT8

VOCABULARY = 256
PAD = 0  # prompts hold no token below 3

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Much larger than usual, so that the layers, and errors in them, show in the logits.
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GEMMA: dict[str, Any] = {
    **_BASE,
    "global_head_dim": 32,
    "sliding_window": 16,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCABULARY,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_BASE),
    "qwen3": lambda: transformers.Qwen3Config(**_BASE),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **{**_BASE, "num_hidden_layers": 4},  # three of linear attention, one of full attention
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "gemma4": lambda: transformers.Gemma4TextConfig(**_GEMMA, hidden_size_per_layer_input=16),
    "gemma4_moe": lambda: transformers.Gemma4TextConfig(
        **_GEMMA,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "phi3": lambda: transformers.Phi3Config(**_BASE),
}
ARCHITECTURES = tuple(CONFIGS)
MIXTURES_OF_EXPERTS = ("gemma4_moe", "qwen3_moe")


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random BF16 model; the same one for the same arguments."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def tokens(count: int, seed: int = 0) -> Tensor:
    """A prompt ``[1, count]`` in which no token stands twice."""
    order = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(seed))
    assert count <= len(order)
    return order[:count][None] + 3


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of a batch of prompts ``[1, count]``."""
    columns = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), columns), PAD)
    mask = torch.zeros(len(prompts), columns, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, columns - prompt.shape[1] :] = prompt
        mask[row, columns - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def distance(a: Tensor, b: Tensor) -> float:
    """How far `b` is from `a`, as a share of a's length."""
    return ((a.float() - b.float()).norm() / a.float().norm()).item()


@dataclass
class Pass:
    """One forward pass of a watched model."""

    model: str
    rows: int  # that went in
    products: int = 0  # quantized ones
    counts: set[int] = field(default_factory=set)  # rows per quantized product
    identified: list[list[int]] = field(default_factory=list)

    @property
    def quantized(self) -> list[int]:
        """The tokens of the rows that were quantized, in order. Fails if products disagree."""
        if not self.products:
            return []
        assert self.identified, "the first layer's rows were not among those quantized"
        first = self.identified[0]
        assert all(other == first for other in self.identified), self.identified
        assert self.counts == {len(first)}, (self.counts, len(first))
        return first


class Recorder:
    """Records which token rows reach quantized products, at the products themselves.

    It asks nothing of the code that decides. A row that enters the first layer is a function of its
    token and of nothing else (embedding, then norm), so the direction of its INT8 codes says which
    token it is. Rows of deeper layers, which point elsewhere, are counted.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        self._passes: list[Pass] = []
        self._running = threading.local()
        # Whatever the code in between: this operation, or the emulation, is what multiplies.
        onednn, linear = torch.ops.onednn.qlinear_pointwise, type(INT8).linear

        class Recorded:
            def __call__(_, codes_plus_128: Tensor, *args: Any) -> Tensor:
                self._product(codes_plus_128)
                return onednn(codes_plus_128, *args)

            def __getattr__(_, name: str) -> Any:
                return getattr(onednn, name)  # TorchInductor looks at its overloads

        def record_emulation(fmt: Any, rows: Any, weight: Any, *args: Any) -> None:
            if weight.kernel == EMULATION:
                self._product(rows.codes_plus_128)
            linear(fmt, rows, weight, *args)

        monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", Recorded())
        monkeypatch.setattr(type(INT8), "linear", record_emulation)

    def _product(self, codes_plus_128: Tensor) -> None:
        running: list[Pass] = getattr(self._running, "stack", [])
        if not running:
            return  # the library trying its kernel out
        current = running[-1]
        current.products += 1
        current.counts.add(codes_plus_128.shape[0])
        tokens, directions = self._tables[current.model]
        if codes_plus_128.shape[1] != directions.shape[1]:
            return
        codes = normalize(codes_plus_128.float() - 128)
        alike, nearest = (codes @ directions.T).max(dim=1)
        if bool((alike > 0.998).all()):
            current.identified.append(tokens[nearest].tolist())

    def watch(
        self, model: PreTrainedModel, name: str = "main", known: Tensor | None = None
    ) -> None:
        """Records the passes of this model, whose tokens are those in `known` (None: any)."""
        size = model.config.get_text_config().vocab_size
        known = torch.arange(size) if known is None else known.unique()
        self._tables[name] = _first_rows(model, known)

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
            inputs = kwargs["inputs_embeds"] if inputs is None else inputs
            running = Pass(name, inputs.shape[0] * inputs.shape[1])
            self._running.stack = [*getattr(self._running, "stack", []), running]
            self._passes.append(running)

        def end(*_: Any) -> None:
            self._running.stack = self._running.stack[:-1]

        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(end, always_call=True)

    def forget(self) -> None:
        """The passes so far: the tiny one that `prepare` makes, say."""
        self._passes = []

    def take(self, name: str = "main") -> list[Pass]:
        """The passes of a model since the last call."""
        taken = [each for each in self._passes if each.model == name]
        self._passes = [each for each in self._passes if each.model != name]
        return taken


class _EnoughError(Exception):
    """The rows that were asked for are known."""


def _first_rows(model: PreTrainedModel, known: Tensor) -> tuple[Tensor, Tensor]:
    """The known tokens, and the directions in which they enter the first layer's projections."""
    layer = model.get_decoder().layers[0]
    first = next(
        module
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in ("q_proj", "qkv_proj", "in_proj_qkv")
    )
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: Any) -> None:
        entered.append(args[0].flatten(0, -2))
        raise _EnoughError  # the layers behind it take long, and say nothing more

    hook = first.register_forward_pre_hook(enter)
    with torch.no_grad(), suppress(_EnoughError):
        model(known[:, None], use_cache=False)
    hook.remove()
    directions = normalize(entered[0].float())
    alike = directions @ directions.T - 2 * torch.eye(len(known))
    assert alike.max() < 0.97, "two tokens enter the first layer alike"
    return known, directions
