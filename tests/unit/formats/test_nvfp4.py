"""NVFP4 against vLLM's reference bit by bit, against torchao, and against FP64 arithmetic."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from example_counts import up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixquant.formats import nvfp4
from mixquant.formats.base import EMULATION, Kernel
from mixquant.formats.nvfp4 import NVFP4, NVFP4Rows, NVFP4Weight

NATIVE = Kernel("torch.scaled_mm", native=True)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALES: list[nvfp4.BlockScale] = ["6", "4/6"]
INF = float("inf")
NAN = float("nan")

some = settings(deadline=None, max_examples=up_to(60))
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module")
def vllm() -> ModuleType:
    # Inside a fixture, since importing vLLM takes seconds.
    pytest.importorskip("vllm", reason="vLLM is not installed")
    return import_module("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")


@pytest.fixture(scope="module")
def torchao() -> ModuleType:
    return import_module("torchao.prototype.mx_formats.nvfp4_tensor")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rough(*shape: int, seed: int = 0) -> Tensor:
    """Blocks of very different magnitudes (2**-12 to 2**12)."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 13, (*shape[:-1], shape[-1] // 16), generator=generator)
    return torch.randn(*shape, generator=generator) * (2.0**exponents).repeat_interleave(16, -1)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(bits(a), bits(b))


# --- E2M1 ---------------------------------------------------------------------------------------


def test_e2m1_rounds_half_to_even_and_saturates() -> None:
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for low, high in zip(range(7), range(1, 8), strict=True):
        middle = torch.tensor((grid[low] + grid[high]) / 2)
        below, above = torch.nextafter(middle, -middle), torch.nextafter(middle, middle * 2)
        even = low if low % 2 == 0 else high
        x = torch.stack([below, middle, above])
        assert nvfp4.encode_e2m1(x).tolist() == [low, even, high]
        assert nvfp4.encode_e2m1(-x).tolist() == [8 + low, 8 + even, 8 + high]
    assert nvfp4.encode_e2m1(torch.tensor(grid)).tolist() == list(range(8))
    assert nvfp4.encode_e2m1(torch.tensor([6.1, 7.1, 1e30, INF, -INF, NAN])).tolist() == [
        *[7, 7, 7, 7, 15, 7]
    ]


def test_e2m1_zeros_have_the_reference_signs(vllm: ModuleType) -> None:
    x = torch.tensor([0.0, -0.0, 0.1, -0.1, -1e-45])
    assert nvfp4.encode_e2m1(x).tolist() == [0, 0, 0, 8, 8]
    assert_same_bits(nvfp4.decode_e2m1(nvfp4.encode_e2m1(x)), vllm.cast_to_fp4(x.clone()))


def test_e2m1_codes_survive_decoding() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    negative_zero = 8  # decodes to -0.0, which encodes as 0
    again = nvfp4.encode_e2m1(nvfp4.decode_e2m1(codes))
    assert again.tolist() == [0 if code == negative_zero else code for code in range(16)]


# --- layouts ------------------------------------------------------------------------------------


@some
@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_pack_round_trip(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = nvfp4.pack(codes)
    assert packed.tolist() == [
        a + 16 * b for a, b in zip(values[::2], values[1::2], strict=True)
    ]  # the even element low
    assert torch.equal(nvfp4.unpack(packed), codes)
    assert torch.equal(nvfp4.pack(nvfp4.unpack(packed)), packed)


def test_unpack_agrees_with_vllm(vllm: ModuleType) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(2, 128)
    ours = nvfp4.decode_e2m1(nvfp4.unpack(every_byte))
    assert_same_bits(ours, vllm.break_fp4_bytes(every_byte, torch.float32))


@some
@given(m=st.integers(1, 400), c=st.integers(1, 40), seed=seeds)
def test_swizzle_round_trip(m: int, c: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randint(1, 255, (m, c), dtype=torch.uint8, generator=generator)
    scales = scales.view(torch.float8_e4m3fn)
    swizzled = nvfp4.swizzle_block_scales(scales)
    assert swizzled.shape == (-(-m // 128) * 128, -(-c // 4) * 4) and swizzled.is_contiguous()
    assert (bits(swizzled) != 0).sum() == m * c  # the padding is zero, nothing is lost
    assert_same_bits(nvfp4.unswizzle_block_scales(swizzled, m, c), scales)
    assert_same_bits(nvfp4.unswizzle_block_scales(swizzled.flatten(), m, c), scales)


@pytest.mark.parametrize(("m", "c"), [(1, 1), (128, 4), (129, 5), (513, 96), (32, 2), (300, 12)])
def test_swizzle_agrees_with_torchao_and_vllm(
    m: int, c: int, torchao: ModuleType, vllm: ModuleType
) -> None:
    scales = randn(m, c, seed=m).abs().to(torch.float8_e4m3fn)
    ours = nvfp4.swizzle_block_scales(scales)
    assert_same_bits(ours.flatten(), torchao.to_blocked(scales))
    back = vllm.convert_swizzled_to_linear(ours.float(), m, c * 16, 16)
    assert torch.equal(back[:, :c], scales.float())


def test_swizzle_places_each_scale_as_cublas_documents() -> None:
    m, c = 200, 7
    scales = torch.arange(m * c).remainder(251).to(torch.uint8).view(m, c)
    flat = nvfp4.swizzle_block_scales(scales).flatten()
    for row in (0, 1, 31, 32, 127, 128, 199):
        for column in (0, 3, 4, 6):
            tile = (row // 128) * 2 + column // 4
            r = row % 128
            place = tile * 512 + (r % 32) * 16 + (r // 32) * 4 + column % 4
            assert flat[place] == scales[row, column]


def test_layout_errors() -> None:
    with pytest.raises(ValueError, match="odd number of codes"):
        nvfp4.pack(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[129, 5\], which pads to \[256, 8\]"):
        nvfp4.unswizzle_block_scales(torch.zeros(512, dtype=torch.uint8), 129, 5)


# --- quantize: bit by bit as vLLM ---------------------------------------------------------------


def outlier(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 5] = value
    return x


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
    codes, scales = nvfp4.quantize(x, global_scale)
    values, reference_scales = vllm.ref_nvfp4_quant(x.clone(), global_scale, 16)
    assert not values.isnan().any()
    assert_same_bits(nvfp4.decode_e2m1(nvfp4.unpack(codes)), values)
    assert_same_bits(scales.float(), reference_scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_quantize_is_bit_exact_to_vllm(vllm: ModuleType, case: str, dtype: torch.dtype) -> None:
    x = CASES[case].to(dtype)
    amax = x.abs().amax().float()
    assert_as_vllm(vllm, x, nvfp4.global_scale(amax))
    for factor in (1e-3, 0.5, 1.0, 1344.0, 1e6):  # too small for some cases, too large for others
        assert_as_vllm(vllm, x, torch.tensor(factor))


@pytest.mark.parametrize("value", [3.3e38, 1e30, 1e-30, 1e-38, 1e-42, 1.4e-45])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extreme_magnitudes_are_bit_exact_to_vllm(
    vllm: ModuleType, value: float, dtype: torch.dtype
) -> None:
    x = (randn(8, 64).clamp(-1, 1) * torch.tensor(value)).to(dtype)
    x[0, 0], x[1, :16] = value, 0.0
    scale = nvfp4.global_scale(x.abs().amax().float())
    assert_as_vllm(vllm, x, scale)
    assert nvfp4.dequantize(*nvfp4.quantize(x, scale), scale.reciprocal()).isfinite().all()


@some
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
)
def test_any_finite_tensor_is_bit_exact_to_vllm(vllm: ModuleType, values: list[float]) -> None:
    x = torch.tensor(values).view(1, 32)
    assert_as_vllm(vllm, x, nvfp4.global_scale(x.abs().amax()))


@some
@given(seed=seeds, exponent=st.integers(-40, 40))
def test_random_tensors_are_bit_exact_to_vllm(vllm: ModuleType, seed: int, exponent: int) -> None:
    x = (rough(16, 128, seed=seed) * 2.0**exponent).to(torch.bfloat16)
    assert_as_vllm(vllm, x, nvfp4.global_scale(x.abs().amax().float()))


def test_the_oddity_of_blocks_without_a_scale(vllm: ModuleType) -> None:
    # A block scale that underflows becomes zero, its reciprocal 1e-8: the codes need not be zero,
    # the values are.
    x = torch.tensor([[3e38] * 16 + [1e30] * 16])
    scale = nvfp4.global_scale(x.amax())
    codes, scales = nvfp4.quantize(x, scale)
    assert scales.float().tolist() == [[448.0, 0.0]]
    assert nvfp4.unpack(codes)[0, 16:].tolist() == [7] * 16
    assert nvfp4.dequantize(codes, scales, scale.reciprocal())[0, 16:].tolist() == [0.0] * 16
    assert_as_vllm(vllm, x, scale)


def test_global_scales_beyond_the_limit_give_no_nan(vllm: ModuleType) -> None:
    x = torch.tensor([[0.0] * 8 + [1e-40] * 8])
    scale = torch.tensor(2.0**127)
    assert vllm.ref_nvfp4_quant(x, scale, 16)[0].isnan().any()  # the reference's 0 * inf
    codes, scales = nvfp4.quantize(x, scale)
    assert nvfp4.unpack(codes)[0, :8].tolist() == [0] * 8
    assert nvfp4.dequantize(codes, scales, scale.reciprocal()).isfinite().all()


def test_global_scale_is_vllms_and_finite(vllm: ModuleType) -> None:
    amax = randn(1000).abs()
    assert_same_bits(nvfp4.global_scale(amax), (448.0 * vllm.FLOAT4_E2M1_MAX) / amax)
    assert_same_bits(nvfp4.global_scale(amax, "4/6"), 1536.0 / amax)
    assert nvfp4.global_scale(torch.tensor([0.0, 1.4e-45, 1e-36])).tolist() == [2.0**117] * 3


def test_nan_spreads_over_its_block_only() -> None:
    x = randn(2, 32)
    x[0, 3] = NAN
    codes, scales = nvfp4.quantize(x, torch.tensor(100.0))
    values = nvfp4.dequantize(codes, scales, torch.tensor(0.01))
    assert values[0, :16].isnan().all() and values.isnan().sum() == 16


@pytest.mark.parametrize("block_scale", SCALES)
def test_dequantize_is_bit_exact_to_vllm(vllm: ModuleType, block_scale: nvfp4.BlockScale) -> None:
    x = rough(150, 192)
    scale = nvfp4.global_scale(x.abs().amax(), block_scale)
    codes, scales = nvfp4.quantize(x, scale, block_scale)
    tensor_scale = scale.reciprocal()
    ours = nvfp4.dequantize(codes, scales, tensor_scale)
    for layout, swizzled in ((scales, False), (nvfp4.swizzle_block_scales(scales), True)):
        theirs = vllm.dequantize_to_dtype(
            codes, layout, tensor_scale, torch.float32, 16, swizzle=swizzled
        )
        assert_same_bits(ours, theirs)


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    x = rough(6, 64)
    scale = torch.tensor(7.0)
    codes, scales = nvfp4.quantize(x, scale)
    for other in (x.view(2, 3, 64), x.view(6, 1, 64)):
        c, s = nvfp4.quantize(other, scale)
        assert torch.equal(c.view(6, 32), codes)
        assert torch.equal(bits(s).view(6, 4), bits(scales))
    c, s = nvfp4.quantize(x.t().contiguous().t(), scale)
    assert torch.equal(c, codes) and torch.equal(bits(s), bits(scales))


# --- quantize: properties -----------------------------------------------------------------------


def effective_scales(scales: Tensor, global_scale: Tensor) -> Tensor:
    return (scales.double() / global_scale.double()).repeat_interleave(16, -1)


@some
@given(seed=seeds, block_scale=st.sampled_from(SCALES))
def test_error_is_within_half_a_step(seed: int, block_scale: nvfp4.BlockScale) -> None:
    x = rough(8, 128, seed=seed)
    scale = nvfp4.global_scale(x.abs().amax(), block_scale)
    codes, scales = nvfp4.quantize(x, scale, block_scale)
    error = (nvfp4.dequantize(codes, scales, scale.reciprocal()).double() - x.double()).abs()
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
    seed: int, block_scale: nvfp4.BlockScale
) -> None:
    x = rough(8, 128, seed=seed)
    scale = nvfp4.global_scale(x.abs().amax(), block_scale)
    codes, scales = nvfp4.quantize(x, scale, block_scale)
    once = nvfp4.dequantize(codes, scales, scale.reciprocal())
    twice = nvfp4.dequantize(*nvfp4.quantize(once, scale, block_scale), scale.reciprocal())
    # Subnormal E4M3 scales are so coarse that a block's maximum need not become 6 (4).
    normal = (scales.float() >= 2.0**-6).repeat_interleave(16, -1)
    assert normal.any()
    torch.testing.assert_close(twice[normal], once[normal], rtol=1e-6, atol=0)


def block_errors(x: Tensor, scale: Tensor, block_scale: nvfp4.BlockScale) -> Tensor:
    codes, scales = nvfp4.quantize(x, scale, block_scale)
    values = nvfp4.decode_e2m1(nvfp4.unpack(codes)).double() * effective_scales(scales, scale)
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
    scale = nvfp4.global_scale(x.abs().amax(), "4/6")
    ratio = block_errors(x, scale, "4/6").sum() / block_errors(x, scale, "6").sum()
    assert ratio < 0.87  # 0.84 measured


def test_four_over_six_takes_the_better_of_the_two_scales() -> None:
    # If 40 becomes 6 (scale 6.67, rounded to 6.5), then 30 falls between the codes 4 and 6; if it
    # becomes 4, all four are codes.
    block = torch.tensor([[10.0, 20.0, 30.0, 40.0] * 4])
    one = torch.tensor(1.0)
    codes, scales = nvfp4.quantize(block, one, "4/6")
    assert scales.item() == 10.0
    assert nvfp4.decode_e2m1(nvfp4.unpack(codes))[0, :4].tolist() == [1, 2, 3, 4]
    assert nvfp4.quantize(block, one, "6")[1].item() == 6.5


def test_four_over_six_ties_go_to_six() -> None:
    exact_in_both = torch.tensor([[12.0, -12.0, 0.0, 12.0] * 4])
    codes, scales = nvfp4.quantize(exact_in_both, torch.tensor(1.0), "4/6")
    assert scales.item() == 2.0
    assert nvfp4.unpack(codes)[0, :4].tolist() == [7, 15, 0, 7]


def test_four_over_six_agrees_with_fp64_arithmetic() -> None:
    x = randn(128, 256)
    scale = nvfp4.global_scale(x.abs().amax(), "4/6")
    _, scales = nvfp4.quantize(x, scale, "4/6")
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
        nvfp4.quantize(x, torch.tensor(1.0), block_scale)


# --- torchao: where it differs ------------------------------------------------------------------


def both(torchao: ModuleType, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales (FP32): ours, then torchao's, with each its own tensor scale."""
    amax = x.abs().amax().float()
    codes, scales = nvfp4.quantize(x, nvfp4.global_scale(amax))
    per_tensor_scale = torchao.per_tensor_amax_to_scale(amax)
    ao_scales, ao_codes = torchao.nvfp4_quantize(x, 16, per_tensor_scale)
    return nvfp4.unpack(codes), scales.float(), nvfp4.unpack(ao_codes), ao_scales.float()


def test_torchao_agrees_off_the_ties(torchao: ModuleType) -> None:
    codes, scales, ao_codes, ao_scales = both(torchao, randn(256, 1024))
    assert torch.equal(codes, ao_codes) and torch.equal(scales, ao_scales)


def test_torchao_differs_on_ties(torchao: ModuleType) -> None:
    """It divides where vLLM multiplies with reciprocals. BF16 values often lie on a tie, where one
    bit of FP32 turns the rounding: of block scales, or of codes in blocks of equal scale."""
    x = (randn(256, 1024, seed=2) * 30).to(torch.bfloat16)
    codes, scales, ao_codes, ao_scales = both(torchao, x)
    scale = nvfp4.global_scale(x.abs().amax().float()).double()

    def assert_on_tie(exact: Tensor, a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(exact, (a.double() + b.double()) / 2, rtol=1e-6, atol=0)

    other = scales != ao_scales
    assert 0 < other.sum() < 0.01 * scales.numel()
    block_max = x.view(256, 64, 16).abs().amax(-1).double()
    assert_on_tie((block_max * scale / 6)[other], scales[other], ao_scales[other])

    differ = (codes != ao_codes) & ~other.repeat_interleave(16, -1)
    assert 0 < differ.sum() < 0.005 * codes.numel()
    quotients = x.double() * scale / scales.double().repeat_interleave(16, -1)
    values, ao_values = nvfp4.decode_e2m1(codes), nvfp4.decode_e2m1(ao_codes)
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
    scale = 1 / nvfp4.global_scale(x.abs().amax())
    rows, columns = small.nonzero(as_tuple=True)

    def error(codes: Tensor, scales: Tensor) -> Tensor:
        values = nvfp4.decode_e2m1(codes).view(8, 4, 16) * scales[..., None] * scale
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
    assert nvfp4.quantize(x, torch.tensor(6.0))[1].item() == 1.0


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 160), (2, 160), (513, 160), (300, 2048)])
def test_rows_do_not_depend_on_each_other(
    m: int, k: int, dtype: torch.dtype, block_scale: nvfp4.BlockScale
) -> None:
    x = rough(m, k, seed=m).to(dtype)
    x[0] = 0.0
    x[m // 2, 7] = NAN
    together = NVFP4.quantize_rows(x, EMULATION, block_scale)
    for i in {0, m // 2, m // 3, m - 1}:
        alone = NVFP4.quantize_rows(x[i : i + 1], EMULATION, block_scale)
        assert_same_bits(together.codes[i : i + 1], alone.codes)
        assert_same_bits(together.block_scales[i : i + 1], alone.block_scales)
        assert_same_bits(together.row_scale[i : i + 1], alone.row_scale)


def test_rows_are_bit_exact_to_vllm_once_scaled(vllm: ModuleType) -> None:
    x = rough(64, 256).to(torch.bfloat16)
    rows = NVFP4.quantize_rows(x, EMULATION)
    scaled = (x / rows.row_scale.to(torch.bfloat16)).to(torch.bfloat16)  # exact, even in BF16
    values, scales = vllm.ref_nvfp4_quant(scaled, torch.tensor(1.0), 16)
    assert_same_bits(nvfp4.decode_e2m1(nvfp4.unpack(rows.codes)), values)
    assert_same_bits(rows.block_scales.float(), scales)


@pytest.mark.parametrize(
    ("block_scale", "low", "high"), [("6", 2**10, 2**11), ("4/6", 2**9, 2**10)]
)
def test_row_scales_are_powers_of_two_that_fill_the_range(
    block_scale: nvfp4.BlockScale, low: int, high: int
) -> None:
    x = torch.cat(
        [rough(256, 64), torch.eye(16).repeat(1, 4) * 2.0 ** torch.arange(-8, 8)[:, None]]
    )
    rows = NVFP4.quantize_rows(x, EMULATION, block_scale)
    assert (rows.row_scale.frexp().mantissa == 0.5).all()
    assert torch.equal(rows.row_scale, rows.row_scale.to(torch.bfloat16).float())
    scaled = x.abs().amax(1, keepdim=True) / rows.row_scale
    assert (scaled >= low).all() and (scaled < high).all()
    largest = rows.block_scales.float().amax(1)
    # The largest possible, 2**11 / 6 and 2**10 / 4, round to 352 and 256; the least, 2**10 / 6 and
    # 2**9 / 6, to 176 and 88.
    bounds = (176, 352) if block_scale == "6" else (88, 256)
    assert (largest >= bounds[0]).all() and (largest <= bounds[1]).all()


@pytest.mark.parametrize("block_scale", SCALES)
@some
@given(seed=seeds, exponent=st.integers(-60, 60))
def test_rows_scale_with_powers_of_two(
    block_scale: nvfp4.BlockScale, seed: int, exponent: int
) -> None:
    x = randn(3, 64, seed=seed).to(torch.bfloat16)
    rows = NVFP4.quantize_rows(x, EMULATION, block_scale)
    other = NVFP4.quantize_rows(x * 2.0**exponent, EMULATION, block_scale)
    assert_same_bits(rows.codes, other.codes)
    assert_same_bits(rows.block_scales, other.block_scales)
    assert torch.equal(rows.row_scale * 2.0**exponent, other.row_scale)


@pytest.mark.parametrize("block_scale", SCALES)
def test_rows_that_are_zero_or_not_finite(block_scale: nvfp4.BlockScale) -> None:
    x = randn(6, 64)
    clean = NVFP4.quantize_rows(x, EMULATION, block_scale)
    dirty = x.clone()
    dirty[1], dirty[2, 5], dirty[3, 6], dirty[4, 7] = 0.0, NAN, INF, -INF
    rows = NVFP4.quantize_rows(dirty, EMULATION, block_scale)
    assert rows.row_scale[1] == 1.0 and (rows.codes[1] == 0).all()
    assert rows.row_scale[2:5].isnan().all()
    for i in (0, 5):
        assert torch.equal(rows.codes[i], clean.codes[i])
        assert torch.equal(rows.row_scale[i], clean.row_scale[i])
    weight = NVFP4.quantize_weight(randn(32, 64), EMULATION, block_scale)
    out = torch.empty(6, 32)
    NVFP4.linear(rows, weight, None, out)
    assert out[2:5].isnan().all() and out[[0, 1, 5]].isfinite().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("block_scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_extreme_magnitude_stay_finite(
    dtype: torch.dtype, block_scale: nvfp4.BlockScale
) -> None:
    largest, normal = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    amax = torch.tensor([largest, largest / 2, 1e30, 1e-30, normal * 1024, normal, normal / 4])
    x = randn(len(amax), 64).clamp(-1, 1) * amax[:, None]
    x[:, 0] = amax
    x = x.to(dtype)
    rows = NVFP4.quantize_rows(x, EMULATION, block_scale)
    values = NVFP4.dequantize_rows(rows)
    # What the first row's largest is rounded to is more than FP32 holds; its products are not.
    assert values[1:].isfinite().all() and not values[0].isnan().any()
    error = (values.double() - x.double()).norm(dim=1) / x.double().norm(dim=1)
    assert (error[1:5] < 0.15).all()
    # The row scales and their reciprocals are normal numbers.
    assert (rows.row_scale >= 2.0**-126).all() and (rows.row_scale <= 2.0**118).all()
    weight = NVFP4.quantize_weight(randn(16, 64) * 0.01, EMULATION, block_scale)
    out = torch.empty(len(amax), 16, dtype=dtype)
    NVFP4.linear(rows, weight, None, out)
    assert out.isfinite().all()


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_bit_exact_to_vllm(vllm: ModuleType, dtype: torch.dtype) -> None:
    weight = (randn(48, 96) * 0.02).to(dtype)
    held = NVFP4.quantize_weight(weight, EMULATION)
    global_scale = 448.0 * 6.0 / weight.abs().max().float()
    values, scales = vllm.ref_nvfp4_quant(weight, global_scale, 16)
    assert_same_bits(nvfp4.decode_e2m1(nvfp4.unpack(held.codes)), values)
    assert_same_bits(held.block_scales.float(), scales)
    assert held.shape == (48, 96)
    theirs = vllm.dequantize_to_dtype(
        held.codes, held.block_scales, held.tensor_scale, torch.float32, 16, swizzle=False
    )
    assert_same_bits(NVFP4.dequantize_weight(held), theirs)


@pytest.mark.parametrize("block_scale", SCALES)
def test_weights_hold_the_same_numbers_for_either_kernel(block_scale: nvfp4.BlockScale) -> None:
    weight = rough(144, 96)
    emulated = NVFP4.quantize_weight(weight, EMULATION, block_scale)
    native = NVFP4.quantize_weight(weight, NATIVE, block_scale)
    assert_same_bits(NVFP4.dequantize_weight(emulated), NVFP4.dequantize_weight(native))
    # The largest value gets the block scale 448, or under 4/6 256 or 384.
    largest = {"6": [448.0], "4/6": [256.0, 384.0]}[block_scale]
    assert emulated.block_scales.float().max().item() in largest


def test_nbytes_counts_what_is_held() -> None:
    weight = randn(144, 96)
    native = NVFP4.quantize_weight(weight, NATIVE)
    assert native.nbytes == 144 * 48 + 256 * 8 + 4  # scales [144, 6] padded
    emulated = NVFP4.quantize_weight(weight, EMULATION)
    assert emulated.nbytes == 144 * 48 + 144 * 6 + 4 + 144 * 96 * 2  # with the BF16 matrix


@pytest.mark.parametrize("block_scale", SCALES)
def test_a_zero_weight_gives_zeros(block_scale: nvfp4.BlockScale) -> None:
    weight = NVFP4.quantize_weight(torch.zeros(16, 64), EMULATION, block_scale)
    assert (NVFP4.dequantize_weight(weight) == 0).all()
    out = torch.empty(3, 16)
    NVFP4.linear(NVFP4.quantize_rows(randn(3, 64), EMULATION), weight, None, out)
    assert (out == 0).all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_weight_that_is_not_finite_is_nan(value: float) -> None:
    x = randn(16, 32)
    x[3, 4] = value
    assert NVFP4.dequantize_weight(NVFP4.quantize_weight(x, EMULATION)).isnan().all()


def test_a_parameter_can_be_quantized() -> None:
    weight = NVFP4.quantize_weight(torch.nn.Parameter(randn(16, 32)), EMULATION)
    assert not NVFP4.dequantize_weight(weight).requires_grad


# --- the product --------------------------------------------------------------------------------


def reference_product(rows: NVFP4Rows, weight: NVFP4Weight) -> tuple[Tensor, Tensor]:
    """The product of the dequantized operands in FP64, and a bound for FP32's summation error."""
    a = NVFP4.dequantize_rows(rows).double()
    b = NVFP4.dequantize_weight(weight).double()
    return a @ b.T, (a.shape[1] + 4) * 2.0**-24 * (a.abs() @ b.abs().T)


@pytest.mark.parametrize("block_scale", SCALES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 17, 513])
def test_linear_is_the_product_of_the_dequantized_operands(
    m: int, dtype: torch.dtype, biased: bool, block_scale: nvfp4.BlockScale
) -> None:
    x, w = randn(m, 320, seed=m).to(dtype), (randn(72, 320, seed=9) * 0.05).to(dtype)
    bias = randn(72).to(dtype) if biased else None
    rows = NVFP4.quantize_rows(x, EMULATION, block_scale)
    weight = NVFP4.quantize_weight(w, EMULATION, block_scale)
    # A slice of a wider tensor, as one of several fused projections has it.
    wide = torch.full((m, 100), 7.0, dtype=dtype)
    NVFP4.linear(rows, weight, bias, wide[:, 10:82])
    expected, bound = reference_product(rows, weight)
    if bias is not None:
        expected += bias.double()
    # FP32 summation, then one rounding to the type of the result (plus one in FP32).
    bound = bound + expected.abs() * (torch.finfo(dtype).eps / 2 + 2.0**-23)
    assert ((wide[:, 10:82].double() - expected).abs() <= bound).all()
    assert (wide[:, :10] == 7).all() and (wide[:, 82:] == 7).all()
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    error = (wide[:, 10:82].double() - exact).norm() / exact.norm()
    assert 0.02 < error < 0.2


def test_linear_of_no_rows() -> None:
    rows = NVFP4.quantize_rows(torch.empty(0, 64), EMULATION)
    weight = NVFP4.quantize_weight(randn(16, 64), EMULATION)
    out = torch.empty(0, 16)
    NVFP4.linear(rows, weight, None, out)
    assert rows.codes.shape == (0, 32) and out.shape == (0, 16)


def test_products_of_a_row_agree_alone_and_in_a_batch() -> None:
    x, weight = randn(513, 512), NVFP4.quantize_weight(randn(64, 512), EMULATION)
    together, alone = torch.empty(513, 64), torch.empty(1, 64)
    rows = NVFP4.quantize_rows(x, EMULATION)
    NVFP4.linear(rows, weight, None, together)
    _, bound = reference_product(rows, weight)
    for i in (0, 256, 512):
        NVFP4.linear(NVFP4.quantize_rows(x[i : i + 1], EMULATION), weight, None, alone)
        assert ((alone[0] - together[i]).abs() <= 2 * bound[i]).all()


def test_the_emulations_matrix_is_exact_in_bf16() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(32, 8)
    every_scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)  # no NaN, sign 0
    codes = every_byte.view(1, 32, 8).expand(127, 32, 8).reshape(127, 256)
    scales = every_scale.view(127, 1).view(torch.uint8).expand(127, 32).contiguous()
    scales = scales.view(torch.float8_e4m3fn)
    unscaled = nvfp4._unscaled(codes, scales)
    assert unscaled.dtype == torch.bfloat16
    values = nvfp4.decode_e2m1(nvfp4.unpack(codes)).double()
    assert torch.equal(unscaled.double(), values * scales.double().repeat_interleave(16, -1))


def test_rows_and_weight_for_different_kernels() -> None:
    rows = NVFP4.quantize_rows(randn(3, 64), EMULATION)
    weight = NVFP4.quantize_weight(randn(16, 64), NATIVE)
    with pytest.raises(ValueError, match=r"rows for emulation .* weight for torch.scaled_mm"):
        NVFP4.linear(rows, weight, None, torch.empty(3, 16))


# --- the native kernel --------------------------------------------------------------------------


def check_arguments(arguments: dict[str, Any]) -> tuple[int, int, int]:
    """What torch demands of NVFP4 operands (ScaledBlas.cpp). Returns M, N and K."""
    scaling, swizzle = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
    a, b = arguments["mat_a"], arguments["mat_b"]
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
    m, n, k = a.shape[0], b.shape[1], 2 * a.shape[1]
    assert b.shape[0] == a.shape[1] and a.shape[1] % 16 == 0 and n % 16 == 0
    assert a.stride() == (k // 2, 1) and b.stride() == (1, k // 2)
    for side, rows in (("a", m), ("b", n)):
        blocks, tensor = arguments[f"scale_{side}"]
        assert arguments[f"scale_recipe_{side}"] == [scaling.BlockWise1x16, scaling.TensorWise]
        assert arguments[f"swizzle_{side}"] == [swizzle.SWIZZLE_32_4_4, swizzle.NO_SWIZZLE]
        assert blocks.dtype == torch.float8_e4m3fn and blocks.is_contiguous()
        assert blocks.numel() == -(-rows // 128) * 128 * -(-k // 64) * 4
        assert tensor.dtype == torch.float32 and tensor.numel() == 1
    return m, n, k


def fake_scaled_mm(**arguments: Any) -> Tensor:
    """Decodes the operands from the layouts it is handed, and multiplies them in FP64."""
    m, n, k = check_arguments(arguments)

    def decode(packed: Tensor, scales: list[Tensor], rows: int) -> Tensor:
        values = nvfp4.decode_e2m1(nvfp4.unpack(packed.view(torch.uint8))).double()
        blocks, tensor = scales
        linear = nvfp4.unswizzle_block_scales(blocks, rows, k // 16).double()
        return values * linear.repeat_interleave(16, -1) * tensor.double()

    a = decode(arguments["mat_a"], arguments["scale_a"], m)
    b = decode(arguments["mat_b"].t(), arguments["scale_b"], n)
    return (a @ b.T).to(arguments["output_dtype"])


@pytest.mark.parametrize("block_scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (129, 144, 96), (513, 32, 320)])
def test_the_native_kernel_gets_the_numbers_of_the_emulation(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    block_scale: nvfp4.BlockScale,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", fake_scaled_mm)
    x, w, bias = randn(m, k).to(dtype), randn(n, k, seed=1).to(dtype), randn(n).to(dtype)
    out = {}
    for kernel in (NATIVE, EMULATION):
        rows = NVFP4.quantize_rows(x, kernel, block_scale)
        weight = NVFP4.quantize_weight(w, kernel, block_scale)
        out[kernel] = torch.empty(m, n, dtype=dtype)
        NVFP4.linear(rows, weight, bias, out[kernel])
    _, bound = reference_product(rows, weight)
    native, emulated = out[NATIVE].double(), out[EMULATION].double()
    # The native product is rounded to BF16 before the row scale and the bias, and once more after.
    bound = bound + torch.finfo(dtype).eps * (emulated.abs() + bias.double().abs()) + 1e-6
    assert ((native - emulated).abs() <= bound).all()


def test_the_fake_kernel_would_notice_a_wrong_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", fake_scaled_mm)
    rows = NVFP4.quantize_rows(rough(128, 64), NATIVE)
    weight = NVFP4.quantize_weight(rough(128, 64), NATIVE)
    right, wrong = torch.empty(128, 128), torch.empty(128, 128)
    NVFP4.linear(rows, weight, None, right)
    linear = nvfp4.unswizzle_block_scales(rows.block_scales, 128, 4)
    NVFP4.linear(NVFP4Rows(rows.codes, linear, rows.row_scale, NATIVE), weight, None, wrong)
    assert not torch.allclose(right, wrong, rtol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_itself_accepts_the_arguments(dtype: torch.dtype) -> None:
    """Shapes, strides, scales and recipes pass the checks of torch's own meta function."""
    rows = NVFP4.quantize_rows(randn(129, 96).to(dtype), NATIVE)
    weight = NVFP4.quantize_weight(randn(144, 96).to(dtype), NATIVE)
    arguments = nvfp4._scaled_mm_arguments(rows, weight, dtype)
    check_arguments(arguments)
    from torch._meta_registrations import meta_scaled_mm_v2

    product = meta_scaled_mm_v2(
        arguments["mat_a"],
        arguments["mat_b"],
        arguments["scale_a"],
        arguments["scale_recipe_a"],
        arguments["swizzle_a"],
        arguments["scale_b"],
        arguments["scale_recipe_b"],
        arguments["swizzle_b"],
        output_dtype=arguments["output_dtype"],
    )
    assert product.shape == (129, 144)
    assert product.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


@pytest.mark.parametrize(
    ("n", "k", "kernel", "reason"),
    [
        (64, 100, EMULATION, "in_features 100 is not a multiple of 16"),
        (64, 100, NATIVE, "in_features 100 is not a multiple of 16"),
        (1, 48, EMULATION, None),
        (16, 48, NATIVE, "torch.scaled_mm needs in_features a multiple of 32, not 48"),
        (1, 64, NATIVE, "torch.scaled_mm needs out_features a multiple of 16, not 1"),
        (16, 64, NATIVE, None),
    ],
)
def test_why_not(n: int, k: int, kernel: Kernel, reason: str | None) -> None:
    assert NVFP4.why_not(n, k, kernel) == reason
    if reason is not None:
        with pytest.raises(ValueError, match="multiple of"):
            NVFP4.quantize_weight(torch.zeros(n, k), kernel)
    else:
        assert NVFP4.quantize_weight(torch.zeros(n, k), kernel).kernel == kernel


def test_matrices_only() -> None:
    with pytest.raises(ValueError, match=r"expected a matrix, got the shape \[2, 3, 32\]"):
        NVFP4.quantize_rows(torch.zeros(2, 3, 32), EMULATION)
    with pytest.raises(ValueError, match=r"expected a matrix, got the shape \[32\]"):
        NVFP4.quantize_weight(torch.zeros(32), EMULATION)


@pytest.mark.parametrize(
    ("capability", "native"),
    [((8, 9), False), ((9, 0), False), ((10, 0), True), ((10, 3), True), ((12, 0), True)],
)
def test_kernel_by_compute_capability(
    capability: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    nvfp4._kernel.cache_clear()
    try:
        assert NVFP4.kernel(torch.device("cuda", 0)) == (NATIVE if native else EMULATION)
    finally:
        nvfp4._kernel.cache_clear()


def test_kernel_elsewhere() -> None:
    assert NVFP4.kernel(torch.device("cpu")) == EMULATION
    assert NVFP4.kernel(torch.device("meta")) == EMULATION
