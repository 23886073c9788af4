"""The product of a few rows, against PyTorch.

Compiled for a GPU that need not be there, and run in Triton's interpreter; with a GPU, on it. Triton is
imported in child processes, as in tests/unit/kernels/triton/test_nvfp4.py.
"""

import re
import sys

import pytest
import torch
from torch import Tensor
from triton_child import child, complete_the_interpreter, needs_gpu, needs_triton

CASES = [  # rows, features, depth
    (1, 130, 512),
    (1, 64, 4096),
    (3, 257, 520),
    (16, 600, 96),
    (9, 128, 256),
]


@needs_triton
def test_compiles_for_hopper() -> None:
    child(__file__, "compile")


@needs_triton
def test_the_interpreted_kernels_numbers() -> None:
    child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_numbers_on_a_gpu() -> None:
    child(__file__, "gpu")


def check(device: str, cases: list[tuple[int, int, int]]) -> None:
    from mixquant.kernels.triton.few_rows import few_rows

    torch.manual_seed(0)
    for rows, features, depth in cases:
        wide = torch.full((rows, depth + 8), torch.nan, device=device).bfloat16()
        x = wide[:, :depth]
        x.copy_(torch.randn(rows, depth))
        weight = torch.randn(features, depth, device=device).bfloat16()
        whole = torch.full((rows + 2, features), torch.nan, device=device).bfloat16()
        out = whole[1:-1]
        few_rows(x, weight, out)
        wanted = x.double() @ weight.double().T
        # Half a unit in the last place, and what FP32 sums in another order make of it.
        torch.testing.assert_close(
            out.double(), wanted, rtol=2**-8, atol=1e-5 * depth, msg=str((rows, features, depth))
        )
        assert whole[[0, -1]].isnan().all(), "wrote beyond its rows"
        check_some_rows(x, weight)
    with pytest.raises(ValueError, match="17 rows"):
        few_rows(torch.zeros(17, 8), torch.zeros(8, 8), torch.zeros(17, 8))


def check_some_rows(x: Tensor, weight: Tensor) -> None:
    """Rows of a larger matrix, to rows of another, in any order."""
    from mixquant.kernels.triton.few_rows import few_rows

    rows = len(x)
    large = torch.full((3 * rows, x.shape[1]), torch.nan, device=x.device).bfloat16()
    of_x, of_out = (torch.randperm(3 * rows)[:rows].to(x.device) for _ in range(2))
    large[of_x] = x
    wanted = x.double() @ weight.double().T
    for source, its_rows in ((large, of_x), (x, None)):
        for its_targets in (of_out, None):
            out = torch.full((3 * rows, len(weight)), torch.nan, device=x.device).bfloat16()
            few_rows(source, weight, out, its_rows, its_targets)
            to = torch.arange(rows, device=x.device) if its_targets is None else its_targets
            torch.testing.assert_close(out[to].double(), wanted, rtol=2**-8, atol=1e-5 * x.shape[1])
            others = torch.ones(3 * rows, dtype=torch.bool, device=x.device)
            others[to] = False
            assert out[others].isnan().all(), "wrote to other rows"
    check_unused_places(x, weight)


def check_unused_places(x: Tensor, weight: Tensor) -> None:
    """As in CUDA graphs, where -1 stands in the places that a pass does not need."""
    from mixquant.kernels.triton import FEW_ROWS
    from mixquant.kernels.triton.few_rows import few_rows

    rows = len(x)
    places = torch.full((FEW_ROWS,), torch.nan, dtype=x.dtype, device=x.device)
    places = places[:, None].repeat(1, x.shape[1])
    places[:rows] = x
    for used in (rows, 0):
        index = torch.full((FEW_ROWS,), -1, device=x.device)
        index[:used] = torch.arange(used) + 2
        large = torch.full((FEW_ROWS + 2, x.shape[1]), torch.nan, device=x.device).bfloat16()
        large[2 : 2 + rows] = x
        for source, its_rows in ((places, None), (large, index)):
            out = torch.full((FEW_ROWS + 2, len(weight)), torch.nan, device=x.device).bfloat16()
            few_rows(source, weight, out, its_rows, index)
            wanted = x[:used].double() @ weight.double().T
            got = out[2 : 2 + used].double()
            torch.testing.assert_close(got, wanted, rtol=2**-8, atol=1e-5 * x.shape[1])
            assert out[:2].isnan().all() and out[2 + used :].isnan().all()


def main() -> None:
    what = sys.argv[1]
    if what == "interpret":
        complete_the_interpreter()
        check("cpu", CASES)
    elif what == "gpu":
        check("cuda", [*CASES, (1, 24576, 4096), (5, 4096, 12288), (13, 6144, 4096)])
    else:
        from mixquant.kernels.triton.few_rows import compile_for

        kernel = compile_for(90)
        assert kernel.metadata.shared <= 227 * 1024
        ptx = kernel.asm["ptx"]
        assert re.search(r"mma\S*\.f32\.bf16\.bf16", ptx)
        # Tiles are in flight while others are multiplied; or memory would be waited for.
        assert "cp.async.cg.shared.global" in ptx


if __name__ == "__main__":
    main()
