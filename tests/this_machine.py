"""Whether this machine multiplies INT8, the format of the default recipe where there is no GPU.

Without VNNI (AMD processors before Zen 4, say) oneDNN's INT8 sums saturate, so there mixquant has no
native format: vLLM refuses the default recipe unless it says ``emulate``. Tests that start vLLM say so
on such a machine, and on such a machine alone: elsewhere they run the native kernels, unasked.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mixquant.formats import native_formats

ON_GPU = torch.cuda.is_available()
EMULATES = not ON_GPU and "int8" not in native_formats(torch.device("cpu"))
# What a recipe that should run in vLLM here has to say besides.
RECIPE: dict[str, Any] = {"emulate": True} if EMULATES else {}
RECIPE_OPTION = ["--recipe", json.dumps(RECIPE)] if RECIPE else []  # of our commands
RECIPE_FOR_VLLM = ["--additional-config", json.dumps({"mixquant": RECIPE})] if RECIPE else []

needs_int8_sums = pytest.mark.skipif(
    "int8" not in native_formats(torch.device("cpu")),
    reason="no VNNI: oneDNN's INT8 sums saturate on this processor",
)
