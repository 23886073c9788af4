"""NVFP4 against vLLM's reference bit by bit, against torchao, and against FP64 arithmetic."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_inputs import (
    DTYPES,
    NAN,
    SCALES,
    assert_same_bits,
    bits,
    outlier,
    randn,
    rough,
    seeds,
    some,
)
from torch import Tensor

from mixquant.formats import e2m1, nvfp4_blocks
from mixquant.formats.swizzle import swizzle


def zero_block(x: Tensor) -> Tensor:
    x = x.clone()
    x[2, 16:32] = 0.0
    x[3] = 0.0
    return x


CASES: dict[str, Tensor] = {
    "normal": randn(37, 128),
    "weights": randn(37, 128, seed=1) * 0.02,
    "rough": rough(64, 256),
    "ties": torch.randint(-64, 65, (64, 256), generator=torch.Generator().manual_seed(2)) / 8,
    "powers of two": 2.0 ** torch.randint(-8, 8, (16, 64), generator=torch.Generator()),
    "outlier": outlier(randn(8, 64), 3e4),
    "huge outlier": outlier(randn(8, 64), -6e4) * 1e-3,
    "underflowing blocks": outlier(randn(8, 64) * 6e-8, 6e4),
    "zero blocks": zero_block(randn(8, 64)),
    "all zero": torch.zeros(4, 32),
    "negative zeros": torch.full((4, 32), -0.0),
    "tiny": randn(8, 64) * 1e-6,
    "largest": torch.full((4, 32), 65504.0),
    "one row": randn(1, 16),
}


def assert_as_vllm(vllm: ModuleType, x: Tensor, global_scale: Tensor) -> None:
    codes, scales = nvfp4_blocks.quantize(x, global_scale)
    values, reference_scales = vllm.ref_nvfp4_quant(x.clone(), global_scale, 16)
    assert not values.isnan().any()
    assert_same_bits(e2m1.decode(e2m1.unpack(codes)), values)
    assert_same_bits(scales.float(), reference_scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_quantize_is_bit_exact_to_vllm(vllm: ModuleType, case: str, dtype: torch.dtype) -> None:
    x = CASES[case].to(dtype)
    amax = x.abs().amax().float()
    assert_as_vllm(vllm, x, nvfp4_blocks.global_scale(amax))
    for factor in (1e-3, 0.5, 1.0, 1344.0, 1e6):  # too small for some cases, too large for others
        assert_as_vllm(vllm, x, torch.tensor(factor))


@pytest.mark.parametrize("value", [3.3e38, 1e30, 1e-30, 1e-38, 1e-42, 1.4e-45])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extreme_magnitudes_are_bit_exact_to_vllm(
    vllm: ModuleType, value: float, dtype: torch.dtype
) -> None:
    x = (randn(8, 64).clamp(-1, 1) * torch.tensor(value)).to(dtype)
    x[0, 0], x[1, :16] = value, 0.0
    scale = nvfp4_blocks.global_scale(x.abs().amax().float())
    assert_as_vllm(vllm, x, scale)
    assert (
        nvfp4_blocks.dequantize(*nvfp4_blocks.quantize(x, scale), scale.reciprocal())
        .isfinite()
        .all()
    )


@some
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
)
def test_any_finite_tensor_is_bit_exact_to_vllm(vllm: ModuleType, values: list[float]) -> None:
    x = torch.tensor(values).view(1, 32)
    assert_as_vllm(vllm, x, nvfp4_blocks.global_scale(x.abs().amax()))


@some
@given(seed=seeds, exponent=st.integers(-40, 40))
def test_random_tensors_are_bit_exact_to_vllm(vllm: ModuleType, seed: int, exponent: int) -> None:
    x = (rough(16, 128, seed=seed) * 2.0**exponent).to(torch.bfloat16)
    assert_as_vllm(vllm, x, nvfp4_blocks.global_scale(x.abs().amax().float()))


def test_the_oddity_of_blocks_without_a_scale(vllm: ModuleType) -> None:
    # A block scale that underflows becomes zero, its reciprocal 1e-8: the codes need not be zero,
    # the values are.
    x = torch.tensor([[3e38] * 16 + [1e30] * 16])
    scale = nvfp4_blocks.global_scale(x.amax())
    codes, scales = nvfp4_blocks.quantize(x, scale)
    assert scales.float().tolist() == [[448.0, 0.0]]
    assert e2m1.unpack(codes)[0, 16:].tolist() == [7] * 16
    assert nvfp4_blocks.dequantize(codes, scales, scale.reciprocal())[0, 16:].tolist() == [0.0] * 16
    assert_as_vllm(vllm, x, scale)


def test_global_scales_beyond_the_limit_give_no_nan(vllm: ModuleType) -> None:
    x = torch.tensor([[0.0] * 8 + [1e-40] * 8])
    scale = torch.tensor(2.0**127)
    assert vllm.ref_nvfp4_quant(x, scale, 16)[0].isnan().any()  # the reference's 0 * inf
    codes, scales = nvfp4_blocks.quantize(x, scale)
    assert e2m1.unpack(codes)[0, :8].tolist() == [0] * 8
    assert nvfp4_blocks.dequantize(codes, scales, scale.reciprocal()).isfinite().all()


def test_global_scale_is_vllms_and_finite(vllm: ModuleType) -> None:
    amax = randn(1000).abs()
    assert_same_bits(nvfp4_blocks.global_scale(amax), (448.0 * vllm.FLOAT4_E2M1_MAX) / amax)
    assert_same_bits(nvfp4_blocks.global_scale(amax, "4/6"), 1536.0 / amax)
    assert nvfp4_blocks.global_scale(torch.tensor([0.0, 1.4e-45, 1e-36])).tolist() == [2.0**117] * 3


def test_nan_spreads_over_its_block_only() -> None:
    x = randn(2, 32)
    x[0, 3] = NAN
    codes, scales = nvfp4_blocks.quantize(x, torch.tensor(100.0))
    values = nvfp4_blocks.dequantize(codes, scales, torch.tensor(0.01))
    assert values[0, :16].isnan().all() and values.isnan().sum() == 16


@pytest.mark.parametrize("block_scale", SCALES)
def test_dequantize_is_bit_exact_to_vllm(
    vllm: ModuleType, block_scale: nvfp4_blocks.BlockScale
) -> None:
    x = rough(150, 192)
    scale = nvfp4_blocks.global_scale(x.abs().amax(), block_scale)
    codes, scales = nvfp4_blocks.quantize(x, scale, block_scale)
    tensor_scale = scale.reciprocal()
    ours = nvfp4_blocks.dequantize(codes, scales, tensor_scale)
    for layout, swizzled in ((scales, False), (swizzle(scales), True)):
        theirs = vllm.dequantize_to_dtype(
            codes, layout, tensor_scale, torch.float32, 16, swizzle=swizzled
        )
        assert_same_bits(ours, theirs)


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    x = rough(6, 64)
    scale = torch.tensor(7.0)
    codes, scales = nvfp4_blocks.quantize(x, scale)
    for other in (x.view(2, 3, 64), x.view(6, 1, 64)):
        c, s = nvfp4_blocks.quantize(other, scale)
        assert torch.equal(c.view(6, 32), codes)
        assert torch.equal(bits(s).view(6, 4), bits(scales))
    c, s = nvfp4_blocks.quantize(x.t().contiguous().t(), scale)
    assert torch.equal(c, codes) and torch.equal(bits(s), bits(scales))


def effective_scales(scales: Tensor, global_scale: Tensor) -> Tensor:
    return (scales.double() / global_scale.double()).repeat_interleave(16, -1)


@some
@given(seed=seeds, block_scale=st.sampled_from(SCALES))
def test_error_is_within_half_a_step(seed: int, block_scale: nvfp4_blocks.BlockScale) -> None:
    x = rough(8, 128, seed=seed)
    scale = nvfp4_blocks.global_scale(x.abs().amax(), block_scale)
    codes, scales = nvfp4_blocks.quantize(x, scale, block_scale)
    error = (nvfp4_blocks.dequantize(codes, scales, scale.reciprocal()).double() - x.double()).abs()
    # Half the widest gap between codes (4 to 6) is one block scale, which at most is the block's
    # maximum over 4 or 6, rounded to E4M3: 2**-4 relative, or 2**-10 where E4M3 is subnormal.
    step = effective_scales(scales, scale)
    lost = 6 * 2.0**-10 / scale.double()
    assert (error <= torch.maximum(step, lost) * (1 + 1e-5)).all()
    block_max = x.abs().view(8, 8, 16).amax(-1).double().repeat_interleave(16, -1)
    widest = block_max / (6 if block_scale == "6" else 4) * (1 + 2**-4)
    assert (step <= torch.maximum(widest, widest + 2.0**-10 / scale.double()) * (1 + 1e-5)).all()


@some
@given(seed=seeds, block_scale=st.sampled_from(SCALES))
def test_quantizing_quantized_values_changes_nothing(
    seed: int, block_scale: nvfp4_blocks.BlockScale
) -> None:
    x = rough(8, 128, seed=seed)
    scale = nvfp4_blocks.global_scale(x.abs().amax(), block_scale)
    codes, scales = nvfp4_blocks.quantize(x, scale, block_scale)
    once = nvfp4_blocks.dequantize(codes, scales, scale.reciprocal())
    twice = nvfp4_blocks.dequantize(
        *nvfp4_blocks.quantize(once, scale, block_scale), scale.reciprocal()
    )
    # Subnormal E4M3 scales are so coarse that a block's maximum need not become 6 (4).
    normal = (scales.float() >= 2.0**-6).repeat_interleave(16, -1)
    assert normal.any()
    torch.testing.assert_close(twice[normal], once[normal], rtol=1e-6, atol=0)


def block_errors(x: Tensor, scale: Tensor, block_scale: nvfp4_blocks.BlockScale) -> Tensor:
    codes, scales = nvfp4_blocks.quantize(x, scale, block_scale)
    values = e2m1.decode(e2m1.unpack(codes)).double() * effective_scales(scales, scale)
    return (values - x.double()).square().view(*scales.shape, 16).sum(-1)


@some
@given(seed=seeds, largest=st.sampled_from([256.0, 448.0]))
def test_four_over_six_never_errs_more_than_six(seed: int, largest: float) -> None:
    x = rough(8, 128, seed=seed)
    scale = largest * 6 / x.abs().amax()  # 448: the scale of the largest block's 4 saturates
    six, better = block_errors(x, scale, "6"), block_errors(x, scale, "4/6")
    assert (better <= six * (1 + 1e-5)).all()


def test_four_over_six_errs_less_on_normal_values() -> None:
    x = randn(64, 512)
    scale = nvfp4_blocks.global_scale(x.abs().amax(), "4/6")
    ratio = block_errors(x, scale, "4/6").sum() / block_errors(x, scale, "6").sum()
    assert ratio < 0.87  # 0.84 measured


def test_four_over_six_takes_the_better_of_the_two_scales() -> None:
    # If 40 becomes 6 (scale 6.67, rounded to 6.5), then 30 falls between the codes 4 and 6; if it
    # becomes 4, all four are codes.
    block = torch.tensor([[10.0, 20.0, 30.0, 40.0] * 4])
    one = torch.tensor(1.0)
    codes, scales = nvfp4_blocks.quantize(block, one, "4/6")
    assert scales.item() == 10.0
    assert e2m1.decode(e2m1.unpack(codes))[0, :4].tolist() == [1, 2, 3, 4]
    assert nvfp4_blocks.quantize(block, one, "6")[1].item() == 6.5


def test_four_over_six_ties_go_to_six() -> None:
    exact_in_both = torch.tensor([[12.0, -12.0, 0.0, 12.0] * 4])
    codes, scales = nvfp4_blocks.quantize(exact_in_both, torch.tensor(1.0), "4/6")
    assert scales.item() == 2.0
    assert e2m1.unpack(codes)[0, :4].tolist() == [7, 15, 0, 7]


def test_four_over_six_agrees_with_fp64_arithmetic() -> None:
    x = randn(128, 256)
    scale = nvfp4_blocks.global_scale(x.abs().amax(), "4/6")
    _, scales = nvfp4_blocks.quantize(x, scale, "4/6")
    scaled = x.double().view(128, 16, 16) * scale.double()
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)

    def error(largest: float) -> tuple[Tensor, Tensor]:
        wanted = (scaled.abs().amax(-1) / largest).float().to(torch.float8_e4m3fn)
        s = wanted.double()[..., None]
        nearest = ((scaled.abs() / s)[..., None] - grid).abs().argmin(-1)
        return (grid[nearest] * s - scaled.abs()).square().sum(-1), wanted.float()

    (error6, scale6), (error4, scale4) = error(6.0), error(4.0)
    clear = (error6 - error4).abs() > 1e-4 * error6
    expected = torch.where(error4 < error6, scale4, scale6)
    assert clear.float().mean() > 0.99
    assert torch.equal(scales.float()[clear], expected[clear])
    assert 0.3 < (error4 < error6).double().mean() < 0.7  # both are really chosen


@pytest.mark.parametrize(
    ("x", "block_scale", "message"),
    [
        (torch.zeros(2, 100), "6", r"\[2, 100\] is not a multiple of 16"),
        (torch.zeros(2, 32, dtype=torch.float64), "6", "not torch.float64"),
        (torch.zeros(2, 32), "5", "'5' is neither '6' nor '4/6'"),
        (torch.tensor(1.0), "6", "not a multiple of 16"),
    ],
)
def test_quantize_errors(x: Tensor, block_scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nvfp4_blocks.quantize(x, torch.tensor(1.0), block_scale)


def both(torchao: ModuleType, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales (FP32): ours, then torchao's, with each its own tensor scale."""
    amax = x.abs().amax().float()
    codes, scales = nvfp4_blocks.quantize(x, nvfp4_blocks.global_scale(amax))
    per_tensor_scale = torchao.per_tensor_amax_to_scale(amax)
    ao_scales, ao_codes = torchao.nvfp4_quantize(x, 16, per_tensor_scale)
    return e2m1.unpack(codes), scales.float(), e2m1.unpack(ao_codes), ao_scales.float()


def test_torchao_agrees_off_the_ties(torchao: ModuleType) -> None:
    codes, scales, ao_codes, ao_scales = both(torchao, randn(256, 1024))
    assert torch.equal(codes, ao_codes) and torch.equal(scales, ao_scales)


def test_torchao_differs_on_ties(torchao: ModuleType) -> None:
    """It divides where vLLM multiplies with reciprocals. BF16 values often lie on a tie, where one
    bit of FP32 turns the rounding: of block scales, or of codes in blocks of equal scale."""
    x = (randn(256, 1024, seed=2) * 30).to(torch.bfloat16)
    codes, scales, ao_codes, ao_scales = both(torchao, x)
    scale = nvfp4_blocks.global_scale(x.abs().amax().float()).double()

    def assert_on_tie(exact: Tensor, a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(exact, (a.double() + b.double()) / 2, rtol=1e-6, atol=0)

    other = scales != ao_scales
    assert 0 < other.sum() < 0.01 * scales.numel()
    block_max = x.view(256, 64, 16).abs().amax(-1).double()
    assert_on_tie((block_max * scale / 6)[other], scales[other], ao_scales[other])

    differ = (codes != ao_codes) & ~other.repeat_interleave(16, -1)
    assert 0 < differ.sum() < 0.005 * codes.numel()
    quotients = x.double() * scale / scales.double().repeat_interleave(16, -1)
    values, ao_values = e2m1.decode(codes), e2m1.decode(ao_codes)
    assert_on_tie(quotients[differ], values[differ], ao_values[differ])


def test_torchao_differs_in_zero_blocks(torchao: ModuleType) -> None:
    """Its scales are at least 2**-6, the smallest normal E4M3 number; ours may be zero."""
    x = randn(4, 64)
    x[1, 16:32] = 0.0
    codes, scales, ao_codes, ao_scales = both(torchao, x)
    assert torch.equal(codes, ao_codes)
    assert (scales != ao_scales).nonzero().tolist() == [[1, 1]]
    assert scales[1, 1] == 0.0 and ao_scales[1, 1] == 2.0**-6


def test_torchao_differs_in_subnormal_scales(torchao: ModuleType) -> None:
    """Next to one outlier, it stretches small blocks to the scale 2**-6; ours, like vLLM's, uses
    the subnormal scales, and so keeps more of small values."""
    x = outlier(randn(8, 64), 1e5)
    codes, scales, ao_codes, ao_scales = both(torchao, x)
    small = scales < 2.0**-6
    assert small.sum() > 20 and (scales[small] > 0).all()
    assert (ao_scales[small] == 2.0**-6).all()
    assert torch.equal(scales[~small], ao_scales[~small])
    scale = 1 / nvfp4_blocks.global_scale(x.abs().amax())
    rows, columns = small.nonzero(as_tuple=True)

    def error(codes: Tensor, scales: Tensor) -> Tensor:
        values = e2m1.decode(codes).view(8, 4, 16) * scales[..., None] * scale
        return (values - x.view(8, 4, 16))[rows, columns].square().sum()

    assert error(codes, scales) < error(ao_codes, ao_scales)


def test_torchao_differs_in_a_zero_tensor(torchao: ModuleType) -> None:
    """Its per-tensor scale is zero then, and its block scales NaN; ours are zero."""
    codes, scales, _, ao_scales = both(torchao, torch.zeros(2, 32))
    assert ao_scales.isnan().all()
    assert (scales == 0).all() and (codes == 0).all()


def test_torchao_differs_in_the_sign_of_zero(torchao: ModuleType) -> None:
    """It keeps the sign of -0.0, as the hardware does; ours, like vLLM's, does not."""
    x = randn(1, 16)
    x[0, 3] = -0.0
    codes, _, ao_codes, _ = both(torchao, x)
    assert codes[0, 3] == 0 and ao_codes[0, 3] == 8
    assert (codes != ao_codes).sum() == 1


def test_torchao_takes_no_fp16(torchao: ModuleType) -> None:
    x = torch.ones(1, 16, dtype=torch.float16)
    with pytest.raises(AssertionError, match="not supported"):
        torchao.nvfp4_quantize(x, 16, torch.tensor(1.0))
    assert nvfp4_blocks.quantize(x, torch.tensor(6.0))[1].item() == 1.0


def test_the_emulations_matrix_is_exact_in_bf16() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(32, 8)
    every_scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)  # no NaN, sign 0
    codes = every_byte.view(1, 32, 8).expand(127, 32, 8).reshape(127, 256)
    scales = every_scale.view(127, 1).view(torch.uint8).expand(127, 32).contiguous()
    scales = scales.view(torch.float8_e4m3fn)
    unscaled = nvfp4_blocks.unscaled(codes, scales)
    assert unscaled.dtype == torch.bfloat16
    values = e2m1.decode(e2m1.unpack(codes)).double()
    assert torch.equal(unscaled.double(), values * scales.double().repeat_interleave(16, -1))
