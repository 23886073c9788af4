"""NVFP4's product in Triton: its instructions, and its numbers against the emulation's.

Triton is imported in child processes only: its interpreter is chosen on import, and its folder
(MIXQUANT_TRITON, or .venv/triton, or else the environment's own) need not be in this process's path.
Without a GPU the kernels are compiled for one, and run in Triton's interpreter. With one they run
twice: compiled by Triton there, and as the cubins that scripts/nvfp4_cubin.py made elsewhere, whose
folder is MIXQUANT_CUBINS or build/nvfp4_sm90.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import REPOSITORY
from triton_child import (
    child,
    complete_the_interpreter,
    needs_gpu,
    needs_triton,
    rows_of_every_kind,
)

from mixquant.formats.base import EMULATION
from mixquant.formats.e2m1 import pack
from mixquant.formats.nvfp4 import NVFP4

CUBINS = Path(os.environ.get("MIXQUANT_CUBINS") or REPOSITORY / "build" / "nvfp4_sm90")


@pytest.mark.slow  # of each kind test_few_rows.py has one that takes less
@needs_triton
@pytest.mark.parametrize(
    ("capability", "instruction"),
    [
        (100, r"tcgen05\.mma\S*\.kind::mxf4nvf4\.block_scale\.block16"),
        (120, r"mma\.sync\S*\.kind::mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1\S*ue4m3"),
        (90, r"wgmma\.mma_async\S*\.f32\.bf16\.bf16"),
    ],
)
def test_the_tensor_cores_instruction(capability, instruction, tmp_path):
    child(REPOSITORY / "scripts" / "nvfp4_cubin.py", tmp_path, "--capability", str(capability))
    described = json.loads((tmp_path / "kernels.json").read_text())
    assert described["kernels"].keys() == {"row_scales", "linear", "linear_bias"}
    for name, kernel in described["kernels"].items():
        assert (tmp_path / kernel["file"]).read_bytes()[:4] == b"\x7fELF"
        assert 0 < kernel["shared"] <= 227 * 1024
        ptx = (tmp_path / f"{name}.ptx").read_text()
        (parameters,) = re.findall(
            rf"\.visible \.entry {kernel['symbol']}\((.*?)\)", ptx, re.DOTALL
        )
        kinds = [{"i32": "u32"}.get(kind, "u64") for _, kind in kernel["arguments"]]
        assert re.findall(r"\.param \.(u\d+)", parameters) == kinds
        if name != "row_scales":
            assert re.search(instruction, ptx)
            # What keeps the codes exact: divisions rounded, nothing fused with the rounding of codes.
            assert "div.full" not in ptx and "fma.rn.f32" not in ptx


# What the kernels share, whoever launches them. A `linear` takes what kernels/nvfp4_triton.py's does.


def check_quantization(linear: Any, device: str, m: int, k: int) -> None:
    """Times the identity, the product is the quantized rows themselves: exact in BF16."""
    x = rows_of_every_kind(m, k)
    out = torch.full((m, k), 123.0, dtype=torch.bfloat16, device=device)
    codes = pack(torch.eye(k, dtype=torch.uint8) * 2).to(device)  # the code of 1
    scales = torch.ones(k, k // 16, device=device).to(torch.float8_e4m3fn)
    linear(x.to(device), codes, scales, torch.ones(1, device=device), None, out)
    expected = NVFP4.dequantize_rows(NVFP4.quantize_rows(x, EMULATION)).bfloat16()
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def check_product(linear: Any, device: str, m: int, n: int, k: int, with_bias: bool) -> None:
    """Against the emulation, in views of wider matrices, whose other columns must stay."""
    x = rows_of_every_kind(m, k) * 2**-20  # sums stay within FP32
    weight = NVFP4.quantize_weight(torch.randn(n, k) * 0.05, EMULATION)
    bias = torch.randn(n).bfloat16() if with_bias else None
    wide_x = torch.full((m, k + 16), torch.nan, dtype=torch.bfloat16, device=device)
    wide_out = torch.full((m, -(-n // 16) * 16 + 16), 123.0, dtype=torch.bfloat16, device=device)
    wide_x[:, :k] = x
    linear(
        wide_x[:, :k],
        weight.codes.to(device),
        weight.block_scales.to(device),
        weight.tensor_scale.to(device),
        None if bias is None else bias.to(device),
        wide_out[:, :n],
    )
    out = wide_out.float().cpu()
    assert (out[:, n:] == 123).all()
    rows, expected = NVFP4.quantize_rows(x, EMULATION), torch.empty(m, n)
    NVFP4.linear(rows, weight, None if bias is None else bias.float(), expected)
    finite = rows.row_scale.isfinite().flatten()
    assert out[~finite, :n].isnan().all()
    # Half a unit in BF16's last place (or its last subnormal one), and sums in another order.
    size = x.float().abs() @ NVFP4.dequantize_weight(weight).abs().T
    limit = expected.abs() * (1.01 * 2**-8) + size * 2**-16 + 2.0**-133
    assert ((out[:, :n] - expected).abs() <= limit)[finite].all(), (m, n, k)


def check(linear: Any, device: str) -> None:
    torch.manual_seed(0)
    for m, k in [(1, 64), (17, 96), (100, 576), (257, 160)]:
        check_quantization(linear, device, m, k)
    for case in [(1, 48, 64), (17, 100, 576), (100, 48, 576), (100, 100, 64), (300, 272, 96)]:
        for with_bias in (False, True):
            check_product(linear, device, *case, with_bias)


def check_refusals(linear: Any) -> None:
    def call(**changed: torch.Tensor) -> None:
        arguments = {
            "x": torch.zeros(2, 64, dtype=torch.bfloat16),
            "codes": torch.zeros(48, 32, dtype=torch.uint8),
            "block_scales": torch.zeros(48, 4).to(torch.float8_e4m3fn),
            "tensor_scale": torch.ones(1),
            "bias": None,
            "out": torch.zeros(2, 48, dtype=torch.bfloat16),
        }
        linear(**{**arguments, **changed})

    call()
    with pytest.raises(ValueError, match=r"\[2, 48\], not .* K a multiple of 32"):
        call(x=torch.zeros(2, 48, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="x is"):
        call(x=torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"out is .* not torch.bfloat16 \[2, 48\]"):
        call(out=torch.zeros(3, 48, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="codes is not contiguous"):
        call(codes=torch.zeros(32, 48, dtype=torch.uint8).T)


@pytest.mark.slow
@needs_triton
def test_the_interpreted_kernels_numbers():
    child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_the_kernels_numbers_on_a_gpu():
    child(__file__, "gpu")


@pytest.mark.gpu
@needs_gpu
def test_the_cubins_numbers_on_a_gpu():
    pytest.importorskip("cupy")
    if not (CUBINS / "kernels.json").exists():
        pytest.skip(f"no cubins in {CUBINS}: scripts/nvfp4_cubin.py compiles them")
    cubins = Cubins(CUBINS)
    if torch.cuda.get_device_capability() != divmod(cubins.capability, 10):
        pytest.skip(f"the cubins in {CUBINS} are for {cubins.capability}")
    check(cubins.linear, "cuda")


class Cubins:
    """`mixquant.kernels.triton.nvfp4.linear` from compiled kernels, without Triton."""

    def __init__(self, folder: Path) -> None:
        import cupy

        described = json.loads((folder / "kernels.json").read_text())
        self.capability = described["capability"]
        self.kernels = described["kernels"]
        self.functions = {}
        for name, kernel in self.kernels.items():
            module = cupy.RawModule(path=str(folder / kernel["file"]))
            self.functions[name] = module.get_function(kernel["symbol"])
            if kernel["shared"] > 48 * 1024:
                self.functions[name].max_dynamic_shared_size_bytes = kernel["shared"]

    def launch(self, name: str, grid: tuple[int, ...], **values: torch.Tensor | int) -> None:
        import cupy
        import numpy as np

        kernel, arguments = self.kernels[name], []
        for argument, kind in kernel["arguments"]:
            value = values.get(argument, 0)  # the hidden ones, of Triton's launcher, are null
            if isinstance(value, torch.Tensor):
                value = value.data_ptr()
            assert argument not in kernel["multiples_of_16"] or value % 16 == 0, argument
            arguments.append(np.int32(value) if kind == "i32" else np.uint64(value))
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            self.functions[name](
                grid, (32 * kernel["num_warps"],), tuple(arguments), shared_mem=kernel["shared"]
            )

    def linear(self, x, codes, block_scales, tensor_scale, bias, out) -> None:
        (m, k), n = x.shape, codes.shape[0]
        row_scale = torch.empty(m, device=x.device)
        shape = {"M": m, "N": n, "K": k, "stride_x": x.stride(0), "stride_out": out.stride(0)}
        tensors = {"codes": codes, "block_scales": block_scales, "tensor_scale": tensor_scale}
        tensors |= {"x": x, "scales": row_scale, "out": out}
        self.launch("row_scales", (m,), **tensors, **shape)
        name = "linear" if bias is None else "linear_bias"
        if bias is not None:
            tensors["bias"] = bias
        tiles = self.kernels[name]["constants"]
        self.launch(name, (-(-n // tiles["TILE_N"]), -(-m // tiles["TILE_M"])), **tensors, **shape)


def main() -> None:
    from mixquant.kernels.triton import nvfp4 as nvfp4_triton

    if sys.argv[1] == "interpret":
        complete_the_interpreter()
        check(nvfp4_triton.linear, "cpu")
        check_refusals(nvfp4_triton.linear)
    else:
        check(nvfp4_triton.linear, "cuda")


if __name__ == "__main__":
    main()
