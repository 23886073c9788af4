"""NVFP4 rows, weights and their product, emulated and as the native kernel gets them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_inputs import DTYPES, INF, NAN, SCALES, assert_same_bits, randn, rough, seeds, some
from torch import Tensor

from mixquant.formats import e2m1, nvfp4, nvfp4_blocks
from mixquant.formats.base import EMULATION, Kernel
from mixquant.formats.nvfp4 import NVFP4, NVFP4Rows, NVFP4Weight
from mixquant.formats.swizzle import unswizzle

NATIVE = Kernel("torch.scaled_mm", native=True)


@pytest.mark.parametrize("block_scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 160), (2, 160), (513, 160), (300, 2048)])
def test_rows_do_not_depend_on_each_other(
    m: int, k: int, dtype: torch.dtype, block_scale: nvfp4_blocks.BlockScale
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
    assert_same_bits(e2m1.decode(e2m1.unpack(rows.codes)), values)
    assert_same_bits(rows.block_scales.float(), scales)


@pytest.mark.parametrize(
    ("block_scale", "low", "high"), [("6", 2**10, 2**11), ("4/6", 2**9, 2**10)]
)
def test_row_scales_are_powers_of_two_that_fill_the_range(
    block_scale: nvfp4_blocks.BlockScale, low: int, high: int
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
    block_scale: nvfp4_blocks.BlockScale, seed: int, exponent: int
) -> None:
    x = randn(3, 64, seed=seed).to(torch.bfloat16)
    rows = NVFP4.quantize_rows(x, EMULATION, block_scale)
    other = NVFP4.quantize_rows(x * 2.0**exponent, EMULATION, block_scale)
    assert_same_bits(rows.codes, other.codes)
    assert_same_bits(rows.block_scales, other.block_scales)
    assert torch.equal(rows.row_scale * 2.0**exponent, other.row_scale)


@pytest.mark.parametrize("block_scale", SCALES)
def test_rows_that_are_zero_or_not_finite(block_scale: nvfp4_blocks.BlockScale) -> None:
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
    dtype: torch.dtype, block_scale: nvfp4_blocks.BlockScale
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_bit_exact_to_vllm(vllm: ModuleType, dtype: torch.dtype) -> None:
    weight = (randn(48, 96) * 0.02).to(dtype)
    held = NVFP4.quantize_weight(weight, EMULATION)
    global_scale = 448.0 * 6.0 / weight.abs().max().float()
    values, scales = vllm.ref_nvfp4_quant(weight, global_scale, 16)
    assert_same_bits(e2m1.decode(e2m1.unpack(held.codes)), values)
    assert_same_bits(held.block_scales.float(), scales)
    assert held.shape == (48, 96)
    theirs = vllm.dequantize_to_dtype(
        held.codes, held.block_scales, held.tensor_scale, torch.float32, 16, swizzle=False
    )
    assert_same_bits(NVFP4.dequantize_weight(held), theirs)


@pytest.mark.parametrize("block_scale", SCALES)
def test_weights_hold_the_same_numbers_for_either_kernel(
    block_scale: nvfp4_blocks.BlockScale,
) -> None:
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
def test_a_zero_weight_gives_zeros(block_scale: nvfp4_blocks.BlockScale) -> None:
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
    m: int, dtype: torch.dtype, biased: bool, block_scale: nvfp4_blocks.BlockScale
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


def test_rows_and_weight_for_different_kernels() -> None:
    rows = NVFP4.quantize_rows(randn(3, 64), EMULATION)
    weight = NVFP4.quantize_weight(randn(16, 64), NATIVE)
    with pytest.raises(ValueError, match=r"rows for emulation .* weight for torch.scaled_mm"):
        NVFP4.linear(rows, weight, None, torch.empty(3, 16))


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
        values = e2m1.decode(e2m1.unpack(packed.view(torch.uint8))).double()
        blocks, tensor = scales
        linear = unswizzle(blocks, rows, k // 16).double()
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
    block_scale: nvfp4_blocks.BlockScale,
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
    linear = unswizzle(rows.block_scales, 128, 4)
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
