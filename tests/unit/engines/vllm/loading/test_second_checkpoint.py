"""Which part of a quantized checkpoint's tensors a layer of vLLM gets, and whether it is all there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant.checkpoints.errors import CheckpointError
from mixquant.checkpoints.quantized_tensors import Fp8Tensors, Nvfp4Tensors
from mixquant.checkpoints.second_checkpoint import SecondCheckpoint
from mixquant.formats import fp8, nvfp4_blocks

pytest.importorskip("vllm", reason="vLLM is not installed")

from mixquant.engines.vllm.loading.second_checkpoint import joined, shard


def random(fmt: str, rows: int, columns: int, seed: int = 0) -> Any:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if fmt == "fp8":
        return Fp8Tensors(*fp8.quantize(weight))
    scale = nvfp4_blocks.global_scale(weight.abs().amax()).view(1)
    return Nvfp4Tensors(*nvfp4_blocks.quantize(weight, scale), scale)


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_together_have_the_whole_weight(fmt: str, ranks: int) -> None:
    whole = random(fmt, 64, 128)
    for rows, columns, axis in ((64 // ranks, 128, 0), (64, 128 // ranks, 1)):
        pieces = [
            shard(whole, SimpleNamespace(tp_rank=rank), "", rows, columns).dequantize()
            for rank in range(ranks)
        ]
        assert torch.equal(torch.cat(pieces, dim=axis), whole.dequantize())


def test_ranks_share_a_head_where_there_are_fewer_heads_than_ranks() -> None:
    whole = random("fp8", 32, 64)  # two heads of 16 on four ranks
    pieces = [
        shard(whole, SimpleNamespace(tp_rank=rank, num_kv_head_replicas=2), "k_proj", 16, 64)
        for rank in range(4)
    ]
    expected = whole.dequantize()
    for rank, piece in enumerate(pieces):
        head = rank // 2
        assert torch.equal(piece.dequantize(), expected[16 * head : 16 * head + 16])


def test_a_shape_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="40 output features"):
        shard(random("fp8", 40, 64), SimpleNamespace(tp_rank=0), "q_proj", 16, 64)


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_joined(fmt: str) -> None:
    parts = [random(fmt, rows, 64, seed=0) for rows in (16, 16)]
    whole = joined(parts)
    assert whole.shape == (32, 64)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


def holding(tensors: dict[str, Any], layers: int | None = 2) -> Any:
    """A checkpoint with these layers, all in NVFP4."""
    return SimpleNamespace(
        source="it",
        formats=dict.fromkeys(tensors, "nvfp4"),
        layer=tensors.__getitem__,
        layers=layers,
    )


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "other",
    [
        "mtp.layers.0.mlp.down_proj",
        "model.mtp_layers.0.mlp.down_proj",
        "model.visual.layers.0.mlp.down_proj",
        "vision_tower.vision_model.encoder.layers.0.mlp.down_proj",
        "model.audio_tower.layers.0.mlp.down_proj",
    ],
)
def test_towers_and_drafters_do_not_take_a_decoder_layers_place(other: str, order: int) -> None:
    decoder = "model.language_model.layers.0.mlp.down_proj"
    tensors = {name: random("nvfp4", 16, 64, seed=len(name)) for name in (decoder, other)}
    source = SecondCheckpoint(holding(dict(list(tensors.items())[::order])))
    found = source.layer("language_model.model.layers.0.mlp.down_proj")
    assert found is tensors[decoder]


def test_a_drafter_behind_the_last_layer_is_left_out() -> None:
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
    tensors = {name: random("nvfp4", 16, 64) for name in names}
    source = SecondCheckpoint(holding(tensors, layers=2))
    assert [source.format_of(name) for name in names] == ["nvfp4", "nvfp4", None]


def test_two_layers_of_one_name_are_refused() -> None:
    names = ("thinker.model.layers.0.mlp.down_proj", "language_model.layers.0.mlp.down_proj")
    tensors = {name: random("nvfp4", 16, 64) for name in names}
    with pytest.raises(CheckpointError) as caught:
        SecondCheckpoint(holding(tensors))
    assert all(name in str(caught.value) for name in ("it holds", *names))


@pytest.mark.parametrize("other", ["vpm.encoder", "talker.model", "encoder"])
def test_layers_of_what_is_no_decoder_are_no_decoder_layers(other: str) -> None:
    """Whatever it is called: an encoder's layers are numbered as a decoder's are."""
    decoder, tower = "llm.model.layers.0.self_attn.q_proj", f"{other}.layers.0.self_attn.q_proj"
    tensors = {name: random("nvfp4", 16, 64, seed=len(name)) for name in (decoder, tower)}
    source = SecondCheckpoint(holding(tensors))
    assert source.layer("model.layers.0.self_attn.q_proj") is tensors[decoder]
    only = SecondCheckpoint(holding({decoder: tensors[decoder]}))
    assert only.format_of(tower) is None


def test_names_before_the_layers_may_differ() -> None:
    first, second = random("nvfp4", 16, 64), random("nvfp4", 16, 64, seed=1)
    tensors = {
        "model.language_model.layers.0.self_attn.q_proj": first,
        "model.language_model.layers.0.self_attn.k_proj": first,
        "model.language_model.layers.0.self_attn.v_proj": second,
    }
    source = SecondCheckpoint(holding(tensors))
    layer = "language_model.model.layers.0.self_attn"
    assert source.format_of(f"{layer}.q_proj") == "nvfp4"
    assert source.format_of(f"{layer}.o_proj") is None
    assert source.have_one_scale(f"{layer}.q_proj", f"{layer}.k_proj")
    assert not source.have_one_scale(f"{layer}.q_proj", f"{layer}.v_proj")
