"""Products of the vLLM plugin: against this project's formats, and what they hand to GPU kernels."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from this_machine import needs_int8_sums
from torch import Tensor

pytest.importorskip("vllm")

from example_counts import up_to
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.model_executor.kernels import linear as vllm_kernels
from vllm.model_executor.kernels.linear.nvfp4 import cutlass, flashinfer
from vllm.platforms import current_platform

from mixquant.core.recipe import Recipe
from mixquant.engines.vllm import hardware
from mixquant.engines.vllm.products import choose as products
from mixquant.engines.vllm.products import nvfp4 as nvfp4_products
from mixquant.engines.vllm.products.base import nbytes_of, unsupported_shape
from mixquant.engines.vllm.products.choose import product_of
from mixquant.engines.vllm.products.cpu import OneDnnProduct
from mixquant.engines.vllm.products.in_torch import EmulatedProduct
from mixquant.engines.vllm.products.nvfp4 import (
    Nvfp4Product,
    TritonNvfp4Product,
    nvfp4_codes,
    nvfp4_product,
)
from mixquant.engines.vllm.products.scaled import ScaledProduct
from mixquant.formats import BY_NAME, EMULATION, int8, nvfp4, nvfp4_blocks
from mixquant.formats import fp8 as fp8_format
from mixquant.formats.swizzle import swizzle
from mixquant.kernels import triton as kernels

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's CPU build")

K = 64
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def multiplied(product: Any, rows: Tensor, features: int, bias: Tensor | None = None) -> Tensor:
    out = rows.new_full((len(rows), features), torch.nan)
    product(rows, bias, out)
    return out


def reference(
    fmt: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """In FP32, from what the codes of both stand for."""
    codes = BY_NAME[fmt].quantize_rows(rows, EMULATION, **options)
    held = BY_NAME[fmt].quantize_weight(weight, EMULATION, **options)
    if fmt == "nvfp4":
        x = nvfp4.NVFP4.dequantize_rows(codes)
    elif fmt == "int8":
        x = int8.dequantize((codes.codes_plus_128.to(torch.int16) - 128), codes.scale)
    else:
        x = BY_NAME[fmt].dequantize_weight(BY_NAME[fmt].quantize_weight(rows, EMULATION))
    product = (x.double() @ BY_NAME[fmt].dequantize_weight(held).double().T).float()
    return product if bias is None else product + bias.float()


def assert_rounded(found: Tensor, wanted: Tensor, ulps: float = 1.5) -> None:
    """Equal but for rounding to the type of the result (half an ulp), and in sums."""
    torch.testing.assert_close(
        found.float(), wanted.float(), rtol=ulps * torch.finfo(found.dtype).eps, atol=1e-5
    )


# --- which product, which shapes ---------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize(
    ("native", "fmt", "kind", "kernel"),
    [
        (("int8",), "int8", OneDnnProduct, "vLLM oneDNN"),
        (("int8",), "fp8", EmulatedProduct, "emulation"),
        (("int8",), "nvfp4", EmulatedProduct, "emulation"),
        ((), "int8", EmulatedProduct, "emulation"),
    ],
)
def test_what_a_cpu_multiplies_with(
    native: tuple[str, ...],
    fmt: str,
    kind: type,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "native_in_vllm", lambda: (frozenset(native), "a CPU"))
    product = product_of(fmt, random(48, K), Recipe(block_scale="4/6"))
    assert type(product) is kind
    assert (product.format, product.kernel.name) == (fmt, kernel)
    assert product.kernel.native == (fmt in native)
    if isinstance(product, EmulatedProduct):
        assert product.options == ({"block_scale": "4/6"} if fmt == "nvfp4" else {})


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    assert "16" in (unsupported_shape("nvfp4", 32, 24) or "")
    assert unsupported_shape("nvfp4", 7, 32) is None
    monkeypatch.setattr(hardware, "native_in_vllm", lambda: (frozenset({"fp8"}), ""))
    for cuda in (True, False):
        platform = SimpleNamespace(is_cuda=lambda cuda=cuda: cuda)
        monkeypatch.setattr(vllm.platforms, "current_platform", platform)
        for shape in ((24, 32), (32, 24)):
            assert (unsupported_shape("fp8", *shape) is not None) == cuda  # only CUTLASS is choosy
            assert unsupported_shape("int8", *shape) is None  # emulated here
        assert unsupported_shape("fp8", 48, 32) is None


@on_cpu
@pytest.mark.parametrize("fmt", ["int8", "fp8", "nvfp4"])
def test_bytes_that_are_announced_are_those_of_the_native_copy(fmt: str) -> None:
    n, k = 48, 128
    weight = random(n, k)
    if fmt == "nvfp4":
        held = Nvfp4Product(*nvfp4_codes(weight, Recipe())).nbytes
        assert nbytes_of(fmt, n, k) <= held <= nbytes_of(fmt, n, k) + 32  # and a few scalars
    elif fmt == "fp8":
        assert ScaledProduct(fmt, weight).nbytes == nbytes_of(fmt, n, k)
    else:
        assert OneDnnProduct(weight).nbytes == nbytes_of(fmt, n, k)


# --- INT8 on a CPU -----------------------------------------------------------------------------------


@on_cpu
@needs_int8_sums
@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 5),
    biased=st.booleans(),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
)
@hypothesis_settings(deadline=None, max_examples=up_to(40))
def test_onednn_multiplies_the_codes_of_the_format(
    rows: int, features: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = random(16 * features, K, seed=seed, dtype=dtype)
    x = random(rows, K, seed=seed + 1, dtype=dtype)
    bias = random(16 * features, seed=seed + 2, dtype=dtype) if biased else None
    product = OneDnnProduct(weight)
    out = multiplied(product, x, 16 * features, bias)
    # vLLM's own quantizer may round a tie the other way: compare with the codes that it made.
    codes, scale, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
    ours = int8.quantize(x)
    assert ((codes.int() - ours[0].int()).abs() <= 1).all()
    assert (codes != ours[0]).float().mean() < 0.02
    torch.testing.assert_close(scale, ours[1], rtol=1e-6, atol=0)
    held = int8.dequantize(*int8.quantize(weight))
    wanted = (int8.dequantize(codes, scale).double() @ held.double().T).float()
    assert_rounded(out, wanted if bias is None else wanted + bias.float(), ulps=2)
    # A row's products are exactly those that it would have alone.
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(out[row], multiplied(product, x[row : row + 1], len(weight), bias)[0])


@on_cpu
@pytest.mark.parametrize("fmt", ["int8", "fp8", "nvfp4"])
def test_emulated_products(fmt: str) -> None:
    weight, x, bias = random(48, K), random(37, K, seed=1), random(48, seed=2)
    for block_scale in ("6", "4/6") if fmt == "nvfp4" else ("",):
        options = {"block_scale": block_scale} if block_scale else {}
        product = EmulatedProduct(fmt, weight, options)
        assert (product.kernel, product.nbytes > 0) == (EMULATION, True)
        for b in (None, bias):
            out = multiplied(product, x, 48, b)
            assert_rounded(out, reference(fmt, x, weight, b, **options))


@on_cpu
@pytest.mark.parametrize("make", ["onednn", "emulated", "nvfp4"])
def test_columns_of_a_wider_matrix_and_rows_that_are_not_contiguous(make: str) -> None:
    weight = random(32, K)
    product: Any = {
        "onednn": lambda: OneDnnProduct(weight),
        "emulated": lambda: EmulatedProduct("fp8", weight, {}),
        "nvfp4": lambda: Nvfp4Product(*nvfp4_codes(weight, Recipe())),
    }[make]()
    wide_x = random(21, 3 * K, seed=1)
    x = wide_x[:, K : 2 * K]
    bias = random(96, seed=2)
    out = torch.full((21, 96), 7.0).bfloat16()
    product(x, bias[32:64], out[:, 32:64])
    wanted = multiplied(product, x.contiguous(), 32, bias[32:64].clone())
    assert torch.equal(out[:, 32:64], wanted)
    assert (out[:, :32] == 7).all() and (out[:, 64:] == 7).all()


# --- NVFP4 -------------------------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("block_scale", ["6", "4/6"])
@pytest.mark.parametrize("rows", [1, 3, 33, 127])
@pytest.mark.parametrize("k", [16, 48, 128])
def test_nvfp4_in_vllms_emulation(rows: int, k: int, block_scale: Any) -> None:
    weight = random(40, k)
    x = random(rows, k, seed=1) * torch.logspace(-6, 6, rows).bfloat16()[:, None]
    product = Nvfp4Product(*nvfp4_codes(weight, Recipe(block_scale=block_scale)))
    assert product.kernel == EMULATION
    held: Any = product.holder
    ours = nvfp4.NVFP4.quantize_weight(weight, EMULATION, block_scale)
    assert torch.equal(held.weight, ours.codes)
    assert torch.equal(held.weight_scale.view(torch.uint8), ours.block_scales.view(torch.uint8))
    assert torch.equal(held.weight_global_scale, ours.tensor_scale)
    # Rows are scaled by 6 in either case.
    codes = nvfp4.NVFP4.quantize_rows(x, EMULATION)
    wanted = nvfp4.NVFP4.dequantize_rows(codes).double() @ (
        nvfp4.NVFP4.dequantize_weight(ours).double().T
    )
    for bias in (None, random(40, seed=2)):
        out = multiplied(product, x, 40, bias)
        expected = wanted if bias is None else wanted + bias.double()
        # The emulation rounds both operands to BF16, too.
        size = wanted.abs().amax(dim=1, keepdim=True) + (0 if bias is None else bias.abs().max())
        assert ((out.double() - expected).abs() <= 2**-6 * size).all()


@on_cpu
def test_nvfp4_rows_do_not_depend_on_each_other() -> None:
    """vLLM's kernels take one input scale for all rows; a row thousands of times larger is there."""
    product = Nvfp4Product(*nvfp4_codes(random(32, K), Recipe()))
    x = random(9, K, seed=1)
    crowd = torch.cat([x, 10_000 * random(4, K, seed=2), 1e-4 * random(4, K, seed=3)])
    assert_rounded(multiplied(product, crowd, 32)[:9], multiplied(product, x, 32))
    assert_rounded(
        multiplied(product, crowd, 32)[-4:] * 2**12,
        multiplied(product, crowd[-4:] * 2**12, 32),
    )


@on_cpu
def test_nvfp4_of_float16_and_of_zeros() -> None:
    weight = random(32, K, dtype=torch.float16)
    product = Nvfp4Product(*nvfp4_codes(weight, Recipe()))
    x = torch.cat([random(3, K, dtype=torch.float16), torch.zeros(2, K, dtype=torch.float16)])
    out = multiplied(product, x, 32)
    assert out.dtype == torch.float16
    assert (out[3:] == 0).all()
    wanted = F.linear(x.float(), weight.float())[:3]
    assert (out[:3].float() - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("vllms", ["MarlinNvFp4LinearKernel", "CutlassNvFp4LinearKernel"])
@pytest.mark.parametrize("triton", [True, False])
def test_our_own_nvfp4_product_where_vllm_has_none(
    vllms: str, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = type(vllms, (), {"process_weights_after_loading": lambda self, layer: None})
    monkeypatch.setattr(nvfp4_products, "nvfp4_kernel", kernel)
    monkeypatch.setattr(hardware, "triton_has_block_scales", lambda: triton)
    monkeypatch.setattr(hardware, "native_in_vllm", lambda: (frozenset({"nvfp4"}), "a Blackwell"))
    codes = nvfp4_codes(random(48, K), Recipe())
    product = nvfp4_product(*codes, torch.bfloat16)
    ours = triton and vllms.startswith("Marlin")
    assert isinstance(product, TritonNvfp4Product if ours else Nvfp4Product)
    assert product.kernel.native == (ours or vllms.startswith("Cutlass"))
    # Ours takes BF16 rows only, and pairs of blocks.
    assert isinstance(nvfp4_product(*codes, torch.float16), Nvfp4Product)
    odd = nvfp4_codes(random(48, 48), Recipe())
    assert isinstance(nvfp4_product(*odd, torch.bfloat16), Nvfp4Product)


def test_what_our_own_nvfp4_product_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight as emulation has it. The kernel itself: unit/kernels/triton/test_nvfp4.py."""

    def linear(
        x: Tensor, codes: Tensor, block_scales: Tensor, scale: Tensor, bias: Any, out: Tensor
    ) -> None:
        assert scale.shape == (1,)
        weight = nvfp4.emulated_weight(codes, block_scales, scale)
        nvfp4.NVFP4.linear(nvfp4.NVFP4.quantize_rows(x, EMULATION), weight, bias, out)

    module = SimpleNamespace(linear=linear)
    monkeypatch.setitem(sys.modules, "mixquant.kernels.triton.nvfp4", module)
    monkeypatch.setattr(kernels, "nvfp4", module, raising=False)
    weight, x, bias = random(48, K), random(5, K, seed=1), random(48, seed=2)
    out = multiplied(TritonNvfp4Product(*nvfp4_codes(weight, Recipe())), x, 48, bias)
    wanted = torch.empty(5, 48, dtype=torch.bfloat16)
    nvfp4.NVFP4.linear(
        nvfp4.NVFP4.quantize_rows(x, EMULATION),
        nvfp4.NVFP4.quantize_weight(weight, EMULATION),
        bias,
        wanted,
    )
    assert torch.equal(out, wanted)


class Fp4Kernels:
    """Stands in for vLLM's CUDA kernels of NVFP4: checks what it is given, and multiplies it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def quantize(
        self,
        x: Tensor,
        scale: Tensor,
        is_sf_swizzled_layout: bool = True,
        backend: str = "none",
        padded_n: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert (x.dtype, x.ndim, x.is_contiguous()) == (torch.bfloat16, 2, True)
        assert (scale.dtype, scale.numel(), float(scale)) == (torch.float32, 1, 1.0)
        # The global scale is one, so only rows in this range fit block scales.
        largest = x.abs().amax(dim=1)
        assert ((largest < 2**11) & ((largest >= 2**10) | (largest == 0))).all()
        assert is_sf_swizzled_layout
        self.calls.append(backend)
        if padded_n is not None:
            x = F.pad(x, (0, padded_n - x.shape[1]))
        codes, scales = nvfp4_blocks.quantize(x, scale)
        return codes, swizzle(scales)

    def multiply(
        self,
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        alpha: Tensor,
        dtype: torch.dtype,
        backend: str = "",
    ) -> Tensor:
        (m, k_half), n = a.shape, b.shape[0]
        assert (a.dtype, b.dtype, dtype) == (torch.uint8, torch.uint8, torch.bfloat16)
        assert b.shape == (n, k_half) and a.is_contiguous() and b.is_contiguous()
        assert n % 32 == 0 and k_half % 16 == 0
        assert (alpha.dtype, alpha.numel()) == (torch.float32, 1)
        self.calls.append("multiply")
        operands = []
        for codes, scales, rows in ((a, scale_a, m), (b, scale_b, n)):
            assert scales.dtype == torch.float8_e4m3fn
            linear = unswizzled(scales, rows, k_half // 8)
            operands.append(nvfp4_blocks.dequantize(codes, linear, torch.ones(1)))
        return (operands[0] @ operands[1].T * alpha).to(dtype)


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    tiles = -(-rows // 128), -(-columns // 4)
    assert scales.shape == (tiles[0] * 128, tiles[1] * 4)
    blocks = scales.view(torch.uint8).view(*tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
    linear = blocks.reshape(tiles[0] * 128, tiles[1] * 4)
    return linear[:rows, :columns].contiguous().view(torch.float8_e4m3fn)


FP4_KERNELS = (
    (cutlass.CutlassNvFp4LinearKernel, "cutlass"),
    (flashinfer.FlashInferCutlassNvFp4LinearKernel, "flashinfer-cutlass"),
    (flashinfer.FlashInferCuteDslNvFp4LinearKernel, "flashinfer-cutedsl"),
)


@on_cpu
@pytest.mark.parametrize(("kernel", "backend"), FP4_KERNELS)
@pytest.mark.parametrize(("n", "k"), [(64, 128), (40, 96), (128, 48)])
@pytest.mark.parametrize("rows", [1, 33, 129])
def test_what_vllms_nvfp4_kernels_are_given(
    kernel: Any, backend: str, n: int, k: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fp4Kernels()
    monkeypatch.setattr(cutlass, "scaled_fp4_quant", fake.quantize)
    monkeypatch.setattr(cutlass, "cutlass_scaled_fp4_mm", fake.multiply)
    monkeypatch.setattr(flashinfer, "scaled_fp4_quant", fake.quantize)
    monkeypatch.setattr(flashinfer, "flashinfer_scaled_fp4_mm", fake.multiply)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)  # vLLM puts swizzled scales there
    monkeypatch.setattr(hardware, "native_in_vllm", lambda: (frozenset({"nvfp4"}), "a GPU"))
    monkeypatch.setattr(kernel, "is_supported", lambda *args: (True, None))
    selected = kernel(vllm_kernels.NvFp4LinearLayerConfig())
    monkeypatch.setattr(vllm_kernels, "init_nvfp4_linear_kernel", lambda: selected)

    weight, x, bias = random(n, k), random(rows, k, seed=1), random(n, seed=2)
    product = Nvfp4Product(*nvfp4_codes(weight, Recipe()))
    assert product.kernel.native
    assert product.kernel.name.startswith("vLLM ") and "NvFp4" not in product.kernel.name
    out = multiplied(product, x, n, bias)
    assert fake.calls == [backend, "multiply"]
    torch.testing.assert_close(
        out.float(), reference("nvfp4", x, weight, bias), rtol=2**-6, atol=2**-5
    )


# --- CUTLASS's scaled products -----------------------------------------------------------------------


class Cutlass:
    """Stands in for vLLM's CUDA kernels of FP8 and INT8."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outs: list[Tensor] = []
        quantize = "dynamic_per_token_scaled_fp8_quant"
        monkeypatch.setattr(torch.ops._C, quantize, self.quantize_fp8, raising=False)
        monkeypatch.setattr(ops, "scaled_int8_quant", self.quantize_int8)
        monkeypatch.setattr(torch.ops._C, "cutlass_scaled_mm", self.multiply, raising=False)

    def quantize_fp8(self, codes: Tensor, rows: Tensor, scale: Tensor, most: Any) -> None:
        assert most is None and rows.ndim == 2 and rows.stride(1) == 1
        assert codes.dtype == torch.float8_e4m3fn and codes.is_contiguous()
        assert scale.dtype == torch.float32 and scale.shape == (len(rows), 1)
        its_codes, its_scale = fp8_format.quantize(rows)
        codes.copy_(its_codes)
        scale.copy_(its_scale)

    def quantize_int8(self, input: Tensor, scale: Any = None) -> tuple[Tensor, Tensor, None]:
        assert scale is None and input.ndim == 2
        return *int8.quantize(input), None

    def multiply(
        self, out: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Any
    ) -> None:
        (m, k), (k_too, n) = a.shape, b.shape
        assert a.dtype == b.dtype and a.dtype in (torch.int8, torch.float8_e4m3fn)
        assert k == k_too and k % 16 == 0 and n % 16 == 0
        # Packed, all of them: the kernels for Hopper and later ignore strides.
        assert out.shape == (m, n) and out.stride(1) == 1 and out.data_ptr() % 16 == 0
        assert m == 1 or out.stride(0) == n
        assert a.is_contiguous() and b.t().is_contiguous()
        assert out.dtype in (torch.bfloat16, torch.float16)
        for scale, count in ((scale_a, m), (scale_b, n)):
            assert scale.dtype == torch.float32 and scale.numel() == count
            assert scale.is_contiguous()
        if bias is not None:
            assert bias.dtype == out.dtype and bias.shape == (n,) and bias.is_contiguous()
        self.outs.append(out)
        product = (a.double() @ b.double()).float() * scale_a.view(-1, 1) * scale_b.view(1, -1)
        out.copy_(product if bias is None else product + bias.float())


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 37])
def test_what_cutlass_is_given(
    fmt: str, biased: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Cutlass(monkeypatch)
    weight, x = random(48, K), random(rows, K, seed=1)
    bias = random(96, seed=2)[16:64] if biased else None
    product = ScaledProduct(fmt, weight)
    assert (product.format, product.kernel.native) == (fmt, True)
    out = torch.full((rows, 48), torch.nan).bfloat16()
    product(x, bias, out)
    assert fake.outs[0] is out  # straight into place
    assert_rounded(out, reference(fmt, x, weight, bias))
    # Columns of a wider matrix are copied there: the kernel gets a packed one.
    wide = torch.full((rows, 96), 7.0).bfloat16()
    product(x, bias, wide[:, 16:64])
    assert torch.equal(wide[:, 16:64], out)
    assert (wide[:, :16] == 7).all() and (wide[:, 64:] == 7).all()


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
def test_weights_are_quantized_alike_in_pieces(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Cutlass(monkeypatch)
    weight, x = random(1024 * 2 + 32, 16), random(3, 16, seed=1)
    product = ScaledProduct(fmt, weight)
    assert_rounded(multiplied(product, x, len(weight)), reference(fmt, x, weight))
    assert len(fake.outs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_of_a_checkpoint_meet_a_kernel_that_takes_the_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours in Triton takes BF16 rows only. The GPU is a stand-in: its tensors stay on the CPU."""
    given: list[torch.dtype] = []

    def noted(codes: Tensor, block_scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
        given.append(dtype)
        return Nvfp4Product

    class OnGpu:
        type = "cuda"

    monkeypatch.setattr(products, "nvfp4_product", noted)
    codes, block_scales, scale = nvfp4_codes(random(48, K), Recipe())

    class Held:
        """A tensor that goes to the stand-in."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def to(self, device: Any) -> Tensor:
            return self.tensor

    tensors = SimpleNamespace(
        codes=Held(codes), block_scales=Held(block_scales), global_scale=Held(scale.reciprocal())
    )
    products.product_of_tensors(tensors, OnGpu(), dtype, "6")  # type: ignore[arg-type]
    assert given == [dtype]
