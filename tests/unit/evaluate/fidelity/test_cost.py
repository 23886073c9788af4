"""What a token of a prompt costs with a recipe: shares of the multiplications, and bits."""

from __future__ import annotations

import pytest
import tiny_models

import mixquant
from mixquant.core.summary import Layer
from mixquant.evaluate.fidelity.cost import cost


def _layer(name: str, shape: tuple[int, ...], fmt: str) -> Layer:
    return Layer(name, shape, fmt, "kernel", True, 0, None)


class TestCost:
    def test_by_hand(self) -> None:
        layers = [
            _layer("model.layers.0.self_attn.q_proj", (30, 10), "nvfp4"),
            _layer("model.layers.0.self_attn.k_proj", (10, 10), "fp8"),
            _layer("model.layers.0.mlp.down_proj", (10, 60), "bf16"),
            _layer("lm_head", (5000, 10), "bf16"),  # one row of a prompt goes through it
        ]
        result = cost("arm", layers, {}, "lm_head")
        assert result.share == {"bf16": 0.6, "fp8": 0.1, "nvfp4": 0.3}
        assert result.bits == pytest.approx(0.6 * 16 + 0.1 * 8 + 0.3 * 4.5)

    def test_a_token_meets_some_of_the_experts(self) -> None:
        def layers(*experts: Layer) -> list[Layer]:
            return [_layer("model.layers.0.mlp.shared_expert.up_proj", (10, 10), "bf16"), *experts]

        config = {"text_config": {"num_experts_per_tok": 2}}
        name = "model.layers.0.mlp.experts"
        stacked = layers(_layer(f"{name}.up_proj", (8, 10, 10), "int8"))
        apart = layers(*(_layer(f"{name}.{i}.up_proj", (10, 10), "int8") for i in range(8)))
        for these in (stacked, apart):
            assert cost("arm", these, config, None).share == pytest.approx(
                {"bf16": 1 / 3, "int8": 2 / 3}
            )

    def test_of_a_prepared_model(self) -> None:
        model = tiny_models.build("llama")
        formats = {"default": "int8", "k_proj": "fp8", "down_proj": "bf16"}
        mixquant.prepare(model, {"format": formats})
        made = mixquant.summary(model)
        result = cost("arm", made.layers, model.config.to_dict(), "lm_head")
        # Hidden 64, four heads and two for keys of 16, intermediate 96; both layers are alike.
        work = {"bf16": 64 * 96, "fp8": 32 * 64, "int8": 64 * 64 * 2 + 32 * 64 + 2 * 96 * 64}
        assert result.share == pytest.approx({k: v / sum(work.values()) for k, v in work.items()})

    def test_of_a_prepared_mixture(self) -> None:
        model = tiny_models.build("qwen3_moe")
        mixquant.prepare(model, {"format": "int8"})
        made = mixquant.summary(model)
        result = cost("arm", made.layers, model.config.to_dict(), "lm_head")
        # Two of four experts with an intermediate size of 32, and the router, stay BF16 here.
        precise = 2 * 3 * 32 * 64 + 4 * 64
        attention = 64 * 64 * 2 + 2 * 32 * 64
        assert result.share["int8"] == pytest.approx(attention / (attention + precise))
