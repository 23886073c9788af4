"""Causal attention of prompt rows on a CPU, in INT8 or BF16: `attention.cpp`, compiled on first use.

What it computes, and how, stands there. The library is kept where PyTorch keeps compiled extensions
(``TORCH_EXTENSIONS_DIR``). Not by `torch.utils.cpp_extension.load`: that needs Ninja, and a build that
is killed leaves a lock behind for which every later one waits.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import Tensor

logger = logging.getLogger(__name__)

Precision = Literal["int8", "bf16"]

MAX_HEAD_SIZE = 256  # and a multiple of 32

_SOURCE = Path(__file__).with_name("attention.cpp")
_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")


def why_unavailable(precision: Precision) -> str | None:
    """Why attention in this precision is not available here, or not faster than PyTorch's; else None.

    The first question that depends on the library compiles it, which takes some 15 seconds.
    """
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX-512 BF16"
    if precision == "bf16" and torch.cpu._is_amx_tile_supported():
        return "PyTorch's is faster with AMX"
    return _why_unavailable_at_all()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Sequence[tuple[int, int]],
    padding: Sequence[int],
    scale: float,
    precision: Precision,
    out: Tensor,
) -> None:
    """Writes the causal attention of some rows of each sequence into ``out``.

    The queries are the last ``R`` of the ``N`` tokens: row r sees the keys up to ``N - R + r``, but for
    the padding.

    Args:
        q: ``[B, H, R, D]`` BF16, in any layout whose last dimension is dense, as all four are.
        k, v: ``[B, G, N, D]`` BF16; query head h reads head ``h // (H // G)``.
        rows: for each sequence, which rows are computed: the first, and the one behind the last. The
            padding must end before the first.
        padding: for each sequence, how many keys at its start nobody sees.
        scale: of the scores, above 0.
        precision: of the products. Softmax and sums are FP32; ``int8`` sums up within 128 keys exactly.
            A NaN comes through: rows that see one have NaN, and so may rows shortly before it.
        out: ``[B, H, R, D]`` BF16; its other rows stay as they are.

    Raises:
        RuntimeError: the machine cannot, or the shapes do not go together.
    """
    if (reason := _why_unavailable_at_all()) is not None:
        raise RuntimeError(f"no attention in {precision} here: {reason}")
    torch.ops.mixquant_cpu.attend(
        q,
        k,
        v,
        out,
        [start for start, _ in rows],
        [stop for _, stop in rows],
        list(padding),
        scale,
        precision == "int8",
    )


def _why_unavailable_at_all() -> str | None:
    if not torch.cpu._is_avx512_supported() or not torch.cpu._is_vnni_supported():
        return "the processor has no AVX-512 VNNI"
    return _why_not_loaded()


@functools.cache
def _why_not_loaded() -> str | None:
    try:
        torch.ops.load_library(_library())
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        return _failed(f"the C++ compiler failed: {lines[0].strip()}")
    except FileNotFoundError as error:
        return _failed(f"there is no C++ compiler {error.filename} (Debian: g++)")
    except OSError as error:
        return _failed(f"the compiled library cannot be kept or loaded: {error}")
    return None


def _failed(reason: str) -> str:
    logger.warning("mixquant: attention stays PyTorch's, which is slower: %s", reason)
    return reason


def _library() -> Path:
    """The compiled library, made if it is not there.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be made.
    """
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    instructions = [*_INSTRUCTIONS]
    if torch.cpu._is_avx512_bf16_supported():
        instructions.append("avx512bf16")
    options = ["-shared", "-fPIC", "-std=c++20", "-O3", "-fopenmp"]
    options += [f"-m{name}" for name in instructions]
    options += [f"-I{path}" for path in cpp_extension.include_paths()]
    options += [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries = ["-ltorch_cpu", "-lc10"]
    made_of = (_SOURCE.read_text(), compiler, *options, *libraries, torch.__version__)
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / "mixquant_attention"
    if (kept := _kept(folder, key)) is not None:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        kept = _kept(folder, key)  # another process may have made it meanwhile
        if kept is None:
            logger.info("mixquant: compiling attention for this processor, once (%s)", folder)
            unfinished = folder / f"{key}.unfinished"
            command = [compiler, *options, str(_SOURCE), "-o", str(unfinished), *libraries]
            subprocess.run(command, check=True, capture_output=True, text=True)
            kept = unfinished.rename(folder / f"{key}-{unfinished.stat().st_size}.so")
    return kept


def _kept(folder: Path, key: str) -> Path | None:
    """The library that was made before. Its size is in its name: to load half a file is a crash."""
    whole = (
        file for file in folder.glob(f"{key}-*.so") if file.stem == f"{key}-{file.stat().st_size}"
    )
    return next(whole, None)
