"""What this machine's processor lacks, and how vLLM is started in tests because of it.

INT8 is the format of the default recipe where there is no GPU. Without VNNI (AMD processors before
Zen 4, say) oneDNN's INT8 sums saturate, so there mixquant has no native format: vLLM refuses the default
recipe unless it says ``emulate``. Tests that start vLLM say so on such a machine, and on such a machine
alone: elsewhere they run the native kernels, unasked.

Without AVX-512 BF16 products take nine times as long as FP32 ones. There servers run in FP32, as a user
would have them, and engines in BF16 with FP64 products, rounded. FP32 would not do for what is compared
of engines: the order of sums, which BF16 mostly hides, changes INT8 codes and so all that follows.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from mixquant.formats import native_formats

ON_GPU = torch.cuda.is_available()
EMULATES = not ON_GPU and "int8" not in native_formats(torch.device("cpu"))
# What a recipe that should run in vLLM here has to say besides.
RECIPE: dict[str, Any] = {"emulate": True} if EMULATES else {}
RECIPE_OPTION = ["--recipe", json.dumps(RECIPE)] if RECIPE else []  # of our commands
RECIPE_FOR_VLLM = ["--additional-config", json.dumps({"mixquant": RECIPE})] if RECIPE else []

MULTIPLIES_BF16 = ON_GPU or (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
SERVED_IN = "auto" if MULTIPLIES_BF16 else "float32"  # vLLM's dtype; auto is the checkpoint's, BF16
KV_CACHE_GIB = 1 if MULTIPLIES_BF16 else 2  # for as many tokens

# With AVX-512 BF16 and no AMX (an EPYC of Zen 4), vLLM 0.32 itself, without mixquant, answers nonsense
# once it compiles the model: "What is the capital of France?" gives "L'Étoile, la Marseillaise".
COMPILED_IS_WRONG = not ON_GPU and (
    torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
)
COMPILED_OR_NOT = ["--enforce-eager"] if COMPILED_IS_WRONG else []  # of a server's options

HAS_FP8_CACHE = ON_GPU or torch.cpu._is_avx512_supported()

# So that the suite ends within what CI allows it: half an hour more on two cores of a Zen 3.
needs_patience = pytest.mark.skipif(
    not MULTIPLIES_BF16 and not os.environ.get("MIXQUANT_TEST_SLOW"),
    reason="slow where the processor has no BF16: MIXQUANT_TEST_SLOW=1 runs it",
)
needs_fp8_cache = pytest.mark.skipif(
    not HAS_FP8_CACHE, reason="vLLM's FP8 KV cache on a CPU needs AVX-512 or AMX"
)
needs_int8_sums = pytest.mark.skipif(
    "int8" not in native_formats(torch.device("cpu")),
    reason="no VNNI: oneDNN's INT8 sums saturate on this processor",
)


def multiply_bf16_in_fp64() -> None:
    """Makes torch's linear layer multiply BF16 in FP64, where BF16 is not multiplied natively.

    vLLM falls back on it there. FP64 is four times as fast, and the order of sums is rounded away.
    """
    if MULTIPLIES_BF16:
        return
    linear = torch.nn.functional.linear

    def through_fp64(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not x.dtype == weight.dtype == torch.bfloat16:
            return linear(x, weight, bias)
        product = linear(x.double(), weight.double(), None if bias is None else bias.double())
        return product.bfloat16()

    torch.nn.functional.linear = through_fp64
