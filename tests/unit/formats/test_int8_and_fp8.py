"""INT8 and FP8 against other libraries and exact arithmetic, and what every format promises.

NVFP4's own tests are in tests/unit/formats/test_nvfp4.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_counts import up_to
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from mixquant.formats import (
    BY_NAME,
    EMULATION,
    Format,
    Kernel,
    fp8,
    int8,
    native_formats,
    why_not_on,
)
from mixquant.kernels.cpu import compiled
from mixquant.kernels.cpu import int8 as int8_cpu

CPU = torch.device("cpu")
FORMATS = tuple(BY_NAME)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INT8_KERNELS = tuple(dict.fromkeys((int8.INT8.kernel(CPU), EMULATION)))
# Around the row counts where a library, or PLAIN_ROWS, switches to another kernel.
ROW_COUNTS = (1, 2, 15, 16, 17, 33, 513)

# The first calls compile.
relaxed = settings(deadline=None, max_examples=up_to(30))


def random(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def awkward_rows(columns: int, dtype: torch.dtype) -> Tensor:
    """Rows at the limits of the type and of the formats, among ordinary ones."""
    finfo = torch.finfo(dtype)
    x = random(24, columns).double()
    outlier = x[0].clone()
    outlier[columns // 2] = finfo.max
    cells = [
        torch.zeros(columns).double(),
        -torch.zeros(columns).double(),
        outlier,
        x[1] * finfo.max,  # with infinities
        torch.full((columns,), finfo.max).double(),
        torch.full((columns,), finfo.tiny).double(),
        x[2] * finfo.tiny,  # denormals
        torch.full((columns,), finfo.smallest_normal / 8).double(),
        x[3] * 1e-35,  # where INT8 gives up a scale
        x[4] * 1e-3,  # where FP8's scale reaches its floor
        torch.linspace(-127, 127, columns).round().double() + 0.5,  # ties
        torch.full((columns,), float("nan")).double(),
    ]
    one_nan, one_inf = x[5].clone(), x[6].clone()
    one_nan[-1], one_inf[0] = float("nan"), -float("inf")
    return torch.cat([x[:7], torch.stack([*cells, one_nan, one_inf]), x[7:]]).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; any NaN counts as any other, but no number does."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(bits)[~nan], b.view(bits)[~nan])


def tensors(quantized: Any) -> dict[str, Tensor]:
    """The parts of quantized rows, each ``[M, ...]``."""
    return {
        f.name: value
        for f in dataclasses.fields(quantized)
        if isinstance(value := getattr(quantized, f.name), Tensor)
    }


def product(
    fmt: Format, rows: Any, weight: Any, bias: Tensor | None, count: int, dtype: torch.dtype
) -> Tensor:
    out = torch.full((count, weight.shape[0]), float("nan"), dtype=dtype)
    fmt.linear(rows, weight, bias, out)
    return out


# --- INT8: codes and scales ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_nearest_code(dtype: torch.dtype) -> None:
    x = random(70, 129, dtype) * torch.logspace(-3, 3, 70)[:, None].to(dtype)
    codes, scale = int8.quantize(x)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    largest = x.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / 127, rtol=2**-23, atol=0)
    assert codes.abs().amax(1).eq(127).all()  # the largest uses the whole range, -128 is unused
    wanted = x.double() / (largest / 127)
    assert ((codes.double() - wanted).abs() <= 0.5 + 1e-4).all()
    error = (int8.dequantize(codes, scale).double() - x.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-4)).all()


def test_int8_rounds_half_to_even() -> None:
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    codes, scale = int8.quantize(x)
    assert scale.item() == 1
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


def test_int8_agrees_with_torchao() -> None:
    """Where the definitions coincide: FP32, codes of -127 to 127, no row of zeros."""
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    x = random(200, 96) * torch.logspace(-8, 8, 200)[:, None]
    theirs_scale, zero = ao.choose_qparams_affine(
        x, ao.MappingType.SYMMETRIC, (1, 96), torch.int8, -127, 127, scale_dtype=torch.float32
    )
    theirs = ao.quantize_affine(x, (1, 96), theirs_scale, zero, torch.int8, -127, 127)
    codes, scale = int8.quantize(x)
    assert torch.equal(scale.squeeze(1), theirs_scale)
    assert torch.equal(codes, theirs)
    # Unlike theirs, a row of zeros has the scale 1 and not an epsilon; both give zeros.
    codes, scale = int8.quantize(torch.zeros(1, 8))
    assert (codes == 0).all()
    assert scale.item() == 1


def test_int8_differs_from_compressed_tensors_by_the_code_of_minus_128() -> None:
    """There the largest becomes 127.5, which saturates on one side; its codes are finer by 0.4 %."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = random(200, 96)
    args = ct.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    theirs_scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
    theirs = quantize(x, theirs_scale, zero, args, dtype=torch.int8)
    codes, scale = int8.quantize(x)
    torch.testing.assert_close(scale / theirs_scale, torch.full((200, 1), 127.5 / 127))
    assert (codes.int() - theirs.int()).abs().max() == 1
    assert theirs.min() == -128
    assert codes.min() == -127
    # With their scale, our rounding is theirs.
    assert torch.equal((x / theirs_scale).round().clamp(-128, 127).to(torch.int8), theirs)


def test_int8_of_a_row_with_an_outlier() -> None:
    x = torch.ones(2, 64)
    x[0, 5] = 1e4
    codes, scale = int8.quantize(x)
    assert codes[0].tolist() == [127 if i == 5 else 0 for i in range(64)]
    assert codes[1].eq(127).all()  # no other row suffers
    assert scale[1].item() == pytest.approx(1 / 127, rel=1e-6)


def test_int8_rows_that_hold_no_number_say_so() -> None:
    weight = int8.INT8.quantize_weight(random(8, 16), int8.INT8.kernel(CPU))
    x = random(40, 16)
    x[3, 2], x[7, 1] = float("nan"), float("inf")
    out = product(
        int8.INT8, int8.INT8.quantize_rows(x, weight.kernel), weight, None, 40, torch.float32
    )
    assert not out[[3, 7]].isfinite().any()
    rest = [i for i in range(40) if i not in (3, 7)]
    assert out[rest].isfinite().all()


# --- FP8: codes and scales -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_the_nearest_code(dtype: torch.dtype) -> None:
    x = random(70, 129, dtype) * torch.logspace(-1, 3, 70)[:, None].to(dtype)
    codes, scale = fp8.quantize(x)
    assert (codes.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    largest = x.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=2**-23, atol=0)
    assert codes.float().abs().amax(1).eq(448).all()

    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    scaled = x.double() / scale.double()
    nearest = (scaled[..., None] - numbers).abs().amin(-1)
    error = (scaled - codes.double()).abs()
    assert (error <= nearest + scaled.abs() * 1e-6).all()
    # 3 bits of mantissa: half of 2**-3 of a number, or half of the smallest denormal, 2**-9.
    assert (error <= (scaled.abs() * 2**-4).clamp(min=2**-10) * (1 + 1e-6)).all()


def test_fp8_rounds_half_to_even() -> None:
    x = torch.tensor([[448, 17, 19, 21, -17, -19, 2**-10, 3 * 2**-10]])
    codes, scale = fp8.quantize(x)
    assert scale.item() == 1
    assert codes.float().tolist() == [[448, 16, 20, 20, -16, -20, 0, 2**-8]]


def test_fp8_agrees_with_torchao_and_compressed_tensors() -> None:
    """On FP32 rows above the floor of the scales. Below it, and on zeros, they go other ways."""
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = random(200, 96) * torch.logspace(-2, 8, 200)[:, None]
    codes, scale = fp8.quantize(x)
    ao_scale = ao._choose_scale_float8(x, [1, 96])
    assert torch.equal(scale, ao_scale)
    assert same(codes, ao._quantize_affine_float8(x, ao_scale))

    args = ct.QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    ct_scale, zero = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), args)
    assert torch.equal(scale, ct_scale)
    assert same(codes, quantize(x, ct_scale, zero, args, dtype=torch.float8_e4m3fn))

    zeros = torch.zeros(1, 96)
    assert ao._quantize_affine_float8(zeros, ao._choose_scale_float8(zeros, [1, 96])).isnan().all()
    codes, scale = fp8.quantize(zeros)
    assert (codes.float() == 0).all()
    assert scale.item() == pytest.approx(1 / (448 * 512))


def test_fp8_of_rows_that_are_small_or_hold_no_number() -> None:
    x = torch.stack([torch.full((16,), 1e-4), torch.full((16,), 1e-30), torch.zeros(16)])
    codes, scale = fp8.quantize(x)
    assert (scale == fp8.MIN_SCALE).all()
    torch.testing.assert_close(fp8.dequantize(codes, scale)[0], x[0], rtol=2**-4, atol=0)
    assert (codes[1:].float() == 0).all()
    x[0, 3] = float("nan")
    assert fp8.dequantize(*fp8.quantize(x))[0].isnan().all()


# --- what every format promises ------------------------------------------------------------------


def quantizers() -> list[Any]:
    options: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in FORMATS]
    options.append(("nvfp4", {"block_scale": "4/6"}))
    return [pytest.param(n, o, id=n + "".join(o.values())) for n, o in options]


@pytest.mark.parametrize(("name", "options"), quantizers())
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 12),
)
@relaxed
def test_a_row_is_quantized_as_if_it_were_alone(
    name: str,
    options: dict[str, Any],
    rows: int,
    blocks: int,
    dtype: torch.dtype,
    seed: int,
    spread: float,
) -> None:
    """Bit for bit, in any batch: also across the row count at which compiled code takes over."""
    fmt = BY_NAME[name]
    kernel = fmt.kernel(CPU)
    columns = 16 * blocks
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    magnitudes = 10 ** (spread * (torch.rand(rows, 1, generator=generator) - 0.5))
    x = (x * magnitudes).to(dtype)
    together = tensors(fmt.quantize_rows(x, kernel, **options))
    picked = {0, rows - 1, *torch.randint(rows, (6,), generator=generator).tolist()}
    for row in picked:
        alone = tensors(fmt.quantize_rows(x[row : row + 1], kernel, **options))
        for part, value in together.items():
            assert same(value[row : row + 1], alone[part]), (part, row)
    # Nor does it matter which rows come along, or how many.
    some = torch.randperm(rows, generator=generator)[: rows // 2 + 1]
    others = tensors(fmt.quantize_rows(x[some], kernel, **options))
    for part, value in together.items():
        assert same(value[some], others[part]), part


@pytest.mark.parametrize(("name", "options"), quantizers())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 48, 1024])
def test_awkward_rows_are_quantized_as_if_they_were_alone(
    name: str, options: dict[str, Any], dtype: torch.dtype, columns: int
) -> None:
    fmt = BY_NAME[name]
    kernel = fmt.kernel(CPU)
    x = awkward_rows(columns, dtype)
    assert x.shape[0] > compiled.PLAIN_ROWS
    together = tensors(fmt.quantize_rows(x, kernel, **options))
    for row in range(x.shape[0]):
        alone = tensors(fmt.quantize_rows(x[row : row + 1], kernel, **options))
        for part, value in together.items():
            assert same(value[row : row + 1], alone[part]), (part, row, x[row])


@pytest.mark.parametrize("name", FORMATS)
def test_rows_need_not_be_contiguous(name: str) -> None:
    fmt = BY_NAME[name]
    kernel = fmt.kernel(CPU)
    wide = random(40, 96, torch.bfloat16)
    for x in (wide[:, 32:64], wide[::2, :32], wide.T[:32].T):
        strided = tensors(fmt.quantize_rows(x, kernel))
        plain = tensors(fmt.quantize_rows(x.clone(memory_format=torch.contiguous_format), kernel))
        assert all(same(strided[part], plain[part]) for part in plain)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_dequantized_operands(
    name: str, dtype: torch.dtype, biased: bool
) -> None:
    fmt = BY_NAME[name]
    kernel = fmt.kernel(CPU)
    n, k = 40, 96
    weight = fmt.quantize_weight(random(n, k, seed=1), kernel)
    bias = random(1, n, dtype, seed=2)[0] if biased else None
    exact_weight = fmt.dequantize_weight(weight).double()
    for rows in ROW_COUNTS:
        x = random(rows, k, dtype)
        quantized = fmt.quantize_rows(x, kernel)
        out = product(fmt, quantized, weight, bias, rows, dtype)
        exact = dequantized_rows(name, quantized)
        wanted = exact @ exact_weight.T + (0 if bias is None else bias.double())
        # Sums in FP32; INT8 rounds twice to BF16 where that is the output.
        size = exact.abs() @ exact_weight.abs().T
        bound = size * 1e-6 + wanted.abs() * 2 * torch.finfo(dtype).eps
        if bias is not None:
            bound += bias.double().abs() * 2 * torch.finfo(dtype).eps
        if dtype == torch.bfloat16:
            bound += (wanted if bias is None else wanted - bias.double()).abs() * 2**-8
        assert ((out.double() - wanted).abs() <= bound).all(), rows


def dequantized_rows(name: str, rows: Any) -> Tensor:
    if name == "int8":
        return (rows.codes_plus_128.double() - 128) * rows.scale.double()
    if name == "fp8":
        return rows.codes.double() * rows.scale.double()
    return BY_NAME["nvfp4"].dequantize_rows(rows).double()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_go_into_a_slice_and_nowhere_else(name: str, dtype: torch.dtype) -> None:
    """As the parts of a fused layer do: `out` is not contiguous."""
    fmt = BY_NAME[name]
    kernel = fmt.kernel(CPU)
    weight = fmt.quantize_weight(random(32, 64, seed=1), kernel)
    bias = random(1, 32, dtype, seed=2)[0]
    for rows in ROW_COUNTS:
        quantized = fmt.quantize_rows(random(rows, 64, dtype), kernel)
        for b in (None, bias):
            wanted = product(fmt, quantized, weight, b, rows, dtype)
            canvas = torch.full((rows + 2, 100), 7.0, dtype=dtype)
            fmt.linear(quantized, weight, b, canvas[1:-1, 33:65])
            assert torch.equal(canvas[1:-1, 33:65], wanted)
            canvas[1:-1, 33:65] = 7.0
            assert (canvas == 7.0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_a_row_hardly_depend_on_the_others(name: str) -> None:
    """Exactly not at all for INT8 (see below); elsewhere up to the order of sums in FP32."""
    fmt = BY_NAME[name]
    kernel = fmt.kernel(CPU)
    weight = fmt.quantize_weight(random(40, 192, seed=1), kernel)
    x = random(513, 192, torch.bfloat16)
    together = product(fmt, fmt.quantize_rows(x, kernel), weight, None, 513, torch.float32)
    for rows in ROW_COUNTS:
        part = product(fmt, fmt.quantize_rows(x[:rows], kernel), weight, None, rows, torch.float32)
        torch.testing.assert_close(part, together[:rows], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_zeros_give_zeros_and_the_bias(name: str) -> None:
    fmt = BY_NAME[name]
    kernel = fmt.kernel(CPU)
    weight = fmt.quantize_weight(torch.zeros(32, 64), kernel)
    bias = torch.arange(32.0)
    for rows in (3, 40):
        quantized = fmt.quantize_rows(random(rows, 64), kernel)
        assert (product(fmt, quantized, weight, None, rows, torch.float32) == 0).all()
        out = product(fmt, quantized, weight, bias, rows, torch.float32)
        assert torch.equal(out, bias.expand(rows, 32))


# Half the distance of neighbouring codes, as a share of the largest value that shares a scale.
ERRORS = {"int8": 0.5 / 127, "fp8": 2**-4, "nvfp4": 0.25}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_dequantized_within_the_format_s_error(name: str, dtype: torch.dtype) -> None:
    fmt = BY_NAME[name]
    weight = random(48, 96, dtype)
    quantized = fmt.quantize_weight(weight, fmt.kernel(CPU))
    assert quantized.shape == (48, 96)
    assert quantized.kernel == fmt.kernel(CPU)
    back = fmt.dequantize_weight(quantized)
    assert (back.shape, back.dtype) == ((48, 96), torch.float32)
    error = (back.double() - weight.double()).abs()
    assert (error <= weight.double().abs().amax(1, keepdim=True) * ERRORS[name] * 1.001).all()
    assert error.max() > 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (32, 48)])
def test_the_bytes_told_are_the_bytes_held(name: str, shape: tuple[int, int]) -> None:
    fmt = BY_NAME[name]
    quantized = fmt.quantize_weight(random(*shape), fmt.kernel(CPU))
    held = sum(
        torch.ops.mkldnn._nbytes(value) if value.is_mkldnn else value.nbytes
        for value in vars(quantized).values()
        if isinstance(value, Tensor)
    )
    assert quantized.nbytes == held
    codes = shape[0] * shape[1] // (2 if name == "nvfp4" else 1)
    assert held >= codes


def test_what_is_native_is_chosen_once() -> None:
    for fmt in BY_NAME.values():
        assert fmt.kernel(CPU) == fmt.kernel(torch.device("cpu"))
    assert native_formats(CPU) == {n for n, f in BY_NAME.items() if f.kernel(CPU).native}
    # No CPU multiplies these.
    assert native_formats(CPU) <= {"int8"}
    for name in ("fp8", "nvfp4"):
        assert BY_NAME[name].kernel(CPU) == EMULATION
        assert not EMULATION.native


@pytest.mark.parametrize(
    ("fmt", "kernel", "multiple"),
    [(int8.INT8, int8.INT_MM, 8), (fp8.FP8, fp8.SCALED_MM, 16)],
)
def test_shapes_that_a_kernel_does_not_take(fmt: Format, kernel: Kernel, multiple: int) -> None:
    assert fmt.why_not(multiple, 3 * multiple, kernel) is None
    for shape in ((multiple + 1, multiple), (multiple, multiple // 2)):
        reason = fmt.why_not(*shape, kernel)
        assert reason is not None
        assert str(multiple) in reason
        assert kernel.name in reason
        assert fmt.why_not(*shape, EMULATION) is None


# --- INT8: exact products ------------------------------------------------------------------------

SHAPES = [(64, 64), (1, 7), (33, 65), (100, 33), (7, 1), (192, 576), (24, 2048)]


@pytest.mark.parametrize("kernel", INT8_KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_products_are_exact(kernel: Kernel, shape: tuple[int, int]) -> None:
    """Integers, then one rounding for each scale: nothing is left to the kernel."""
    n, k = shape
    source = random(n, k, torch.bfloat16, seed=1)
    weight = int8.INT8.quantize_weight(source, kernel)
    codes, scale = int8.quantize(source)
    for rows in ROW_COUNTS:
        x = random(rows, k, torch.bfloat16, seed=rows) * 10
        quantized = int8.INT8.quantize_rows(x, kernel)
        sums = (quantized.codes_plus_128.long() - 128) @ codes.long().T
        wanted = (sums.float() * scale.squeeze(1)) * quantized.scale
        bias = random(1, n, seed=3)[0]
        for b in (None, bias):
            exact = wanted if b is None else wanted + b
            out = product(int8.INT8, quantized, weight, b, rows, torch.float32)
            assert torch.equal(out, exact), rows
            half = product(int8.INT8, quantized, weight, b, rows, torch.float16)
            assert torch.equal(half, exact.half()), rows
            brain = product(int8.INT8, quantized, weight, b, rows, torch.bfloat16)
            # Twice rounded, before and after the row's scale.
            bound = wanted.abs() * 2**-8 + exact.abs() * 2**-8
            assert ((brain.float() - exact).abs() <= bound).all(), rows


@pytest.mark.parametrize("kernel", INT8_KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("k", [1040, 1041, 5000])
def test_int8_products_of_the_largest_codes_are_exact(kernel: Kernel, k: int) -> None:
    """Their sums are the first that FP32 would round: odd ones beyond 2^24."""
    sign = torch.tensor([[1.0], [-1.0]])
    weight = int8.INT8.quantize_weight(sign.expand(2, k).clone(), kernel)
    x = torch.ones(3, k)
    x[1, 0] = 126 / 127  # so that sums are no multiples of 127^2
    rows = int8.INT8.quantize_rows(x, kernel)
    out = product(int8.INT8, rows, weight, None, 3, torch.float32)
    sums = torch.tensor([k * 127**2, k * 127**2 - 127, k * 127**2])[:, None] * torch.tensor([1, -1])
    scale = int8.quantize(x)[1]
    assert torch.equal(out, (sums.float() * scale[0]) * scale)


@pytest.mark.parametrize("kernel", INT8_KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_products_of_a_row_are_those_it_has_alone(
    kernel: Kernel, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, k = shape
    weight = int8.INT8.quantize_weight(random(n, k, dtype, seed=1), kernel)
    bias = random(1, n, dtype, seed=2)[0]
    x = random(513, k, dtype)
    x[4], x[9, 0] = 0, float("nan")
    quantized = int8.INT8.quantize_rows(x, kernel)
    together = product(int8.INT8, quantized, weight, bias, 513, dtype)
    assert together[9].isnan().all()
    for first in (0, 5):
        for rows in ROW_COUNTS:
            piece = x[first : first + rows]
            alone = product(
                int8.INT8, int8.INT8.quantize_rows(piece, kernel), weight, bias, len(piece), dtype
            )
            assert same(alone, together[first : first + len(piece)]), (first, rows)


@pytest.mark.parametrize("kernel", INT8_KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_weights_are_read_back_from_any_layout(kernel: Kernel, shape: tuple[int, int]) -> None:
    source = random(*shape, torch.bfloat16)
    source[0] = 0
    weight = int8.INT8.quantize_weight(source, kernel)
    wanted = int8.dequantize(*int8.quantize(source))
    assert torch.equal(int8.INT8.dequantize_weight(weight), wanted)


# --- compiled chains -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_plain_chains_agree_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()  # earlier compilations count toward its limit, beyond which nothing is
    graphs = counters["stats"]["unique_graphs"]
    outputs: list[list[Tensor]] = []
    assert awkward_rows(7, dtype).shape[0] > compiled.PLAIN_ROWS
    for why_not in ("plain for the test", None):  # then compiled
        monkeypatch.setattr(compiled, "_failure", why_not)
        found: list[Tensor] = []
        for columns in (1000, 7, 64):
            x = awkward_rows(columns, dtype)
            codes, scale = int8_cpu.quantize(x)
            found += [codes, scale]
            wide = random(x.shape[0], 40, seed=4) * 1e3
            # oneDNN's product comes in BF16 where that is the output, else in FP32.
            for product_ in (wide, wide.bfloat16()) if dtype == torch.bfloat16 else (wide,):
                for bias in (None, random(1, 40, dtype, seed=5)[0]):
                    out = torch.empty(x.shape[0], 40, dtype=dtype)
                    int8_cpu.rescale(product_, scale, bias, out)
                    found.append(out)
        outputs.append(found)
    if compiled.why_not_fused() is not None:
        pytest.skip(f"nothing is compiled here: {compiled.why_not_fused()}")
    assert counters["stats"]["unique_graphs"] >= graphs + 1 + 2
    assert all(map(same, *outputs))


def test_compiled_code_leaves_denormals_alone() -> None:
    """Code compiled with fast math may set the processor to flush them, for the whole process."""
    int8.quantize(random(64, 64))
    tiny = torch.full((4,), 1e-40)
    assert (tiny * 0.5).tolist() == pytest.approx([5e-41] * 4, rel=1e-3)


def test_without_a_compiler_the_plain_chain_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    tried: list[str] = []

    def no_compiler(chain: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            tried.append(chain.__name__)
            raise InvalidCxxCompiler

        return run

    monkeypatch.setattr(compiled, "_failure", None)
    monkeypatch.setattr(torch, "compile", no_compiler)

    @compiled.fused()
    def double(x: Tensor) -> Tensor:
        return x * 2

    @compiled.fused()
    def triple(x: Tensor) -> Tensor:
        return x * 3

    x = random(40, 4)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(double(x[:2]), x[:2] * 2)
        assert tried == []  # too few rows to compile for
        assert compiled.why_not_fused() is None
        for _ in range(2):
            assert torch.equal(double(x), x * 2)
            assert torch.equal(triple(x), x * 3)
    assert tried == ["double"]
    assert compiled.why_not_fused()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "compiler" in warnings[0]


def test_a_chain_s_own_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_failure", None)

    @compiled.fused()
    def wrong(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    for rows in (3, 40):
        with pytest.raises(RuntimeError, match="size of tensor"):
            wrong(random(rows, 4), random(rows, 5))
    assert compiled.why_not_fused() is None


# --- devices other than CPUs and NVIDIA GPUs ----------------------------------------------------


def test_rocm_is_not_taken_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's devices are called cuda, and MI300, whose FP8 is E4M3FNUZ, has "capability 9.4"."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert {fmt.kernel(device) for fmt in (fp8.FP8, int8.INT8)} == {EMULATION}
    assert native_formats(device) == frozenset()
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert fp8.FP8.kernel(device).native
    assert int8.INT8.kernel(device).native


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4"])
def test_a_device_is_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for one that lacks an operator: it has no numbers to give back."""
    assert why_not_on(name, torch.device("cpu")) is None
    reason = why_not_on(name, torch.device("meta"))
    assert reason is not None
    assert "\n" not in reason
    linear, calls = type(BY_NAME[name]).linear, []

    def wrong_the_second_time(fmt: Any, rows: Any, weight: Any, bias: Any, out: Tensor) -> None:
        linear(fmt, rows, weight, bias, out)
        calls.append(1)
        out.mul_(len(calls))

    monkeypatch.setattr(type(BY_NAME[name]), "linear", wrong_the_second_time)
    assert why_not_on(name, torch.device("cpu")) == "its products are wrong"


@pytest.mark.parametrize("columns", [1040, 1041, 5000])
def test_exact_products_need_no_fp64(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has none. The largest codes, all of one sign: no sum of INT8 products is larger."""
    codes = torch.full((3, columns), 127, dtype=torch.int8)
    codes[1, 0] = 126
    wanted = codes.long() @ codes.long().T

    def refuse(*_: Any) -> Any:
        raise TypeError("no FP64 on this device")

    monkeypatch.setattr(Tensor, "double", refuse)
    assert torch.equal(int8._exact_product(codes, codes).long(), wanted)
