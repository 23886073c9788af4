"""Triton in child processes: its interpreter is chosen on import, and its folder is not in our path."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import HELPERS, REPOSITORY

TRITON = Path(os.environ.get("MIXQUANT_TRITON") or Path(sys.prefix) / "triton")


def why_no_triton() -> str | None:
    """Why a child process cannot import a Triton that is new enough, found without importing it."""
    found = importlib.metadata.distributions(name="triton", path=[str(TRITON), *sys.path])
    version = next((distribution.version for distribution in found), None)
    if version is None:
        return f"no Triton, neither in {TRITON} nor in the environment"
    if tuple(map(int, version.split(".")[:2])) < (3, 9):
        return f"Triton {version} is older than 3.9"
    return None


needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def child(*arguments: str | Path, **environment: str) -> None:
    """Runs Python with Triton in its path; its output is shown where it fails."""
    ours = (REPOSITORY / "src", REPOSITORY / "benchmarks", HELPERS)
    path = [str(TRITON), *map(str, ours), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}", pytrace=False)


def complete_the_interpreter() -> None:
    """Gives Triton's interpreter (3.9) what it lacks for these kernels, by way of torch.

    Its conversions to narrower types round halves up and lose a carry into the exponent, its
    dot_scaled takes any scales for powers of two (E8M0), and its dot the bits of BF16 for numbers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float32: (torch.float32, np.float32),
        tl.bfloat16: (torch.bfloat16, np.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    }

    def convert(data, source, target, rounding_mode=None):
        bits = torch.from_numpy(np.array(data).view(types[source][1]))
        converted = bits.view(types[source][0]).to(types[target][0])
        plain = {2: torch.uint16, 1: torch.uint8}.get(converted.itemsize, torch.float32)
        return converted.view(plain).numpy()

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *arguments):
        if a.dtype == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle(convert(x.data, tl.bfloat16, tl.float32), tl.float32)
                for x in (a, b)
            )
        return dot(self, a, b, *arguments)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert
    interpreter._dot_scaled_scale_to_f32 = lambda scale, _: convert(
        scale.data, scale.dtype.scalar, tl.float32
    )


def rows_of_every_kind(m: int, k: int) -> torch.Tensor:
    """BF16 ``[m, k]``: rows of every magnitude, and, from 17 on, zeros, inf, NaN and the extremes."""
    x = torch.randn(m, k) * torch.logspace(-36, 36, m)[torch.randperm(m)][:, None]
    x = (x * torch.logspace(-7, 0, k)).bfloat16()  # block scales down to zero
    x[m // 2, ::3] = 0
    if m >= 17:
        x[1], x[2, 5], x[3, 7], x[4] = 0, torch.inf, torch.nan, -0.0
        x[5] = torch.randn(k) * 2.0**-130  # subnormal
        x[6] = torch.where(torch.rand(k) < 0.5, 3.3e38, -1e-40)
        x[7] = (torch.randint(-12, 13, (k,)) / 2) * 2.0  # ties
    return x
